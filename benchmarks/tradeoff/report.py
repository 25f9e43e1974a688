"""What the study's table says: tables as docs/tradeoff.md has them, findings with their numbers, plots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastcfg.errors import Error
from fastcfg.metrics import CONFIDENCE
from fastcfg.plots import plot_tradeoff
from fastcfg.sweep import Row
from tradeoff import arms

REAL = "real images"
SHOWN = ("frechet_distance", "inception_score", "class_accuracy", "precision", "recall", "density", "coverage")
FD = "frechet_distance"


def text(rows: Sequence[Row]) -> str:
    """Tables and findings, in markdown."""
    names = [name for name in (arm.name for arm in (*arms.KINDS, *arms.SMALL)) if _of(rows, name)]
    if not names:
        raise Error("the table has no arm yet: run the study first")
    return "\n\n".join([_table(rows, names), "\n".join(f"- {line}" for line in findings(rows))])


def draw(rows: Sequence[Row], into: Path) -> None:
    """tradeoff-guidance.png and tradeoff-dropout.png."""
    groups = {"guidance": (arms.KINDS, "the shipped model"), "dropout": (arms.SMALL, "small models, by label dropout")}
    for name, (members, title) in groups.items():
        lines = [{**row, "setting": arm.name, "scale": strength(row, arm)} for arm in members for row in line(rows, arm)]
        if lines:
            title = f"Fashion-MNIST, {title}: {lines[0]['steps']} steps, {lines[0]['samples']} samples a point"
            plot_tradeoff(lines, into / f"tradeoff-{name}.png", title)


def line(rows: Sequence[Row], arm: arms.Arm) -> list[Row]:
    """An arm's points by scale, with CFG's unguided one in its place where that is the arm's own."""
    own = _of(rows, arm.name)
    start = [row | {"scale": f"{1 - arm.less:g}"} for row in _of(rows, "CFG") if float(row["scale"]) == 1]
    return [*(start if arm.from_cfg and own else []), *own]


def strength(row: Row, arm: arms.Arm) -> str:
    """The classifier-free scale that a point's guidance is as strong as: the plots' axis."""
    return f"{float(row['scale']) + arm.less:g}"


def findings(rows: Sequence[Row]) -> Iterator[str]:
    """What the paper and the issue of an interval claim, and what the figures say."""
    cfg = _of(rows, "CFG")
    if cfg:
        yield from _of_one_network(cfg)
        for arm in arms.KINDS[1:]:
            own = line(rows, arm)
            if own:
                best = _best(own)
                flat = arm.from_cfg and best is own[0]
                yield f"{arm.name}: {_flat(own) if flat else _beside(best, _best(cfg))}; {_as_strong(own, cfg, arm)}"
    small = {arm.name: own for arm in arms.SMALL if (own := _of(rows, arm.name))}
    largest = small.get(arms.SMALL[-1].name)
    for name, own in small.items():
        best, beside = _best(own), ""
        if largest is not None and own is not largest:
            other = _best(largest)
            beside = f", {_sure(best, other, FD)} {_side(best, other)} that of {arms.SMALL[-1].name}"
        yield f"{name}: best Frechet distance {_shown(best, FD)} at s = {best['scale']}{beside}; {_shown(own[0], FD)} at s = 1"


def _of_one_network(cfg: Sequence[Row]) -> Iterator[str]:
    first, best = cfg[0], _best(cfg)
    if best is first:
        yield f"CFG: {_flat(cfg)}"
    else:
        yield (
            f"CFG: best Frechet distance {_shown(best, FD)} at s = {best['scale']}, against {_shown(first, FD)} at s = 1: "
            f"smaller by {_sure(best, first, FD)}"
        )
    for name, up in (("inception_score", True), ("class_accuracy", True), ("precision", True), ("recall", False)):
        yield f"CFG: {name.replace('_', ' ')} {_way(cfg, name, up)}"


def _way(rows: Sequence[Row], name: str, up: bool) -> str:
    """How a figure goes with the scale, for a claim that it goes up (or down)."""
    first, last = rows[0], rows[-1]
    values = [float(row[name]) if up else -float(row[name]) for row in rows]
    peak = values.index(max(values))
    way, ends = ("rise", "highest") if up else ("fall", "lowest")
    figures = f"{_shown(first, name)} at s = 1, {_shown(last, name)} at s = {last['scale']}"
    if peak == 0:
        return f"does not {way}: {figures}"
    if values == sorted(values):
        return f"{way}s with every scale: {figures}"
    if peak == len(rows) - 1:
        return f"is {ends} at the last scale, and does not {way} with every one: {figures}"
    return f"is {ends} at s = {rows[peak]['scale']} ({_shown(rows[peak], name)}): {figures}"


def _flat(own: Sequence[Row]) -> str:
    """Of an arm that begins without guidance, and is best there."""
    return f"no scale has a smaller Frechet distance than no guidance ({_shown(own[0], FD)})"


def _beside(own: Row, cfg: Row) -> str:
    ratio = float(own["gflop_a_sample"]) / float(cfg["gflop_a_sample"])
    return (
        f"best Frechet distance {_shown(own, FD)} at scale {own['scale']}, {_sure(own, cfg, FD)} "
        f"{_side(own, cfg)} CFG's best, for {ratio:.0%} of its FLOPs; "
        f"class accuracy {_shown(own, 'class_accuracy')}, recall {_shown(own, 'recall')} "
        f"(CFG there: {_shown(cfg, 'class_accuracy')}, {_shown(cfg, 'recall')})"
    )


def _as_strong(own: Sequence[Row], cfg: Sequence[Row], arm: arms.Arm) -> str:
    """How often an arm is nearer to the data than CFG where its guidance is as strong."""
    beside = {row["scale"]: row for row in cfg if float(row["scale"]) > 1}
    pairs = [(row, beside[strength(row, arm)]) for row in own if strength(row, arm) in beside]
    below = sum(_side(row, other) == "below" for row, other in pairs)
    return f"at equal strength its distance is below CFG's at {below} of {len(pairs)} scales"


def _side(a: Row, b: Row) -> str:
    return "below" if float(a[FD]) < float(b[FD]) else "above"


def _sure(a: Row, b: Row, name: str) -> str:
    """How far two figures are apart, in their joint standard errors: an upper bound of the error, as they share their noise."""
    apart, error = abs(float(a[name]) - float(b[name])), math.hypot(_error(a, name), _error(b, name))
    return f"{apart:.3g} ({apart / error:.1f} standard errors)" if error else f"{apart:.3g}"


def _error(row: Row, name: str) -> float:
    return (float(row[f"{name}_high"]) - float(row[f"{name}_low"])) / 2 / CONFIDENCE


def _table(rows: Sequence[Row], names: Sequence[str]) -> str:
    lines = [
        f"| guidance | scale | GFLOP a sample | {' | '.join(name.replace('_', ' ') for name in SHOWN)} |",
        f"|{'---|' * (3 + len(SHOWN))}",
    ]
    for row in [row for name in (REAL, *names) for row in _of(rows, name)]:
        cells = [row["setting"], row["scale"], row["gflop_a_sample"], *(_shown(row, name) for name in SHOWN)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(row: Row, name: str) -> str:
    return f"{float(row[name]):.4g} ± {CONFIDENCE * _error(row, name):.2g}"


def _of(rows: Sequence[Row], setting: str) -> list[Row]:
    return sorted((row for row in rows if row["setting"] == setting), key=lambda row: float(row["scale"] or 0))


def _best(rows: Sequence[Row]) -> Row:
    return min(rows, key=lambda row: float(row[FD]))
