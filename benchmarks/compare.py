"""The benchmarks of two commits beside each other: does a change make anything faster or slower?

    python benchmarks/compare.py main                             # main against the working tree
    python benchmarks/compare.py HEAD~5 --only linear --rounds 9

Both are installed apart, each runs its own pytest-benchmark files (benchmarks/test_bench_*.py), and they take turns, process by
process: base, tree, tree, base, .. What both have is compared by the ratio of medians, round by round. Prints a table, the
largest change first, and writes runs/compare.csv. A change counts where every round agrees on its direction; the last row says
for how many that would be so by chance, so look at those again with --only and more rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cpu.report import Report, this_machine
from table import percentiles

from fastcfg.errors import Error

ROOT = Path(__file__).resolve().parents[1]
BASE, TREE = "base", "tree"


@dataclass(frozen=True)
class Side:
    """A tree whose package is installed in a folder of its own."""

    tree: Path
    packages: Path

    def run(self, only: str | None) -> dict[str, float]:
        """{benchmark: median seconds}, of one run of its files."""
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "found.json"
            command = ["-m", "pytest", ".", "-q", "--benchmark-only", f"--benchmark-json={found}", "-p", "no:cacheprovider"]
            self.python(*command, *(["-k", only] if only else []))
            benchmarks = json.loads(found.read_text())["benchmarks"]
        return {entry["fullname"].rpartition("/")[2]: entry["stats"]["median"] for entry in benchmarks}

    def python(self, *arguments: str) -> str:
        # From the folder of its benchmarks, where no folder is called fastcfg: what is imported is what was installed.
        environment = os.environ | {"PYTHONPATH": str(self.packages)}
        return _called([sys.executable, *arguments], self.tree / "benchmarks", environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a revision that git knows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="benchmarks that this matches, as pytest's -k")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "compare.csv")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("want at least two rounds")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            sides = {BASE: _at_commit(options.base, Path(folder) / BASE), TREE: _as_it_is(Path(folder) / TREE)}
            rounds = [_round(sides, options.only, backwards=bool(r % 2)) for r in range(options.rounds)]
    except Error as error:
        sys.exit(f"error: {error}")
    _tell(rounds, Report(options.out, this_machine(len(os.sched_getaffinity(0)))), options.base)


def _round(sides: dict[str, Side], only: str | None, backwards: bool) -> dict[str, dict[str, float]]:
    order = [TREE, BASE] if backwards else [BASE, TREE]
    found = {name: sides[name].run(only) for name in order}
    print(f"round of {' and '.join(order)}: {len(found[TREE])} benchmarks", file=sys.stderr)
    return found


def _tell(rounds: list[dict[str, dict[str, float]]], report: Report, base: str) -> None:
    """The table, and the names that only one side has."""
    both = sorted(set.intersection(*(set(found[side]) for found in rounds for side in (BASE, TREE))))
    ratios = {name: [found[TREE][name] / found[BASE][name] for found in rounds] for name in both}
    for name in sorted(both, key=lambda name: -abs(statistics.median(ratios[name]) - 1)):
        changed = "slower" if min(ratios[name]) > 1 else "faster" if max(ratios[name]) < 1 else "no change beyond noise"
        times = percentiles([found[TREE][name] for found in rounds])
        report.row("compare", name, statistics.median(ratios[name]), f"times {base}'s: {changed}", times=times)
    for side, words in ((BASE, f"only in {base}"), (TREE, "new")):
        for name in sorted(set().union(*(found[side] for found in rounds)) - set(both)):
            report.row("compare", name, words, "note")
    # Rounds that only differ by noise all agree in one of 2^(rounds - 1) cases: of many benchmarks, a few
    by_chance = len(both) * 2.0 ** (1 - len(rounds))
    report.row("compare", "by chance", by_chance, f"of {len(both)} are called faster or slower if nothing changed")


def _at_commit(revision: str, folder: Path) -> Side:
    tree = folder / "source"
    tree.mkdir(parents=True)
    archive = folder / "source.tar"
    _called(["git", "archive", "--output", str(archive), f"{revision}^{{commit}}"], ROOT)
    shutil.unpack_archive(archive, tree)
    return _installed(tree, folder / "packages")


def _as_it_is(folder: Path) -> Side:
    """The working tree, changes included."""
    listed = _called(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], ROOT)
    for name in filter(None, listed.split("\0")):
        if (source := ROOT / name).is_file():  # not where it was removed
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return _installed(folder / "source", folder / "packages")


def _installed(tree: Path, packages: Path) -> Side:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    _called([*pip, "--target", str(packages), str(tree)], tree)
    side = Side(tree, packages)
    found = side.python("-c", "import fastcfg, fastcfg.kernels; print(fastcfg.__file__, fastcfg.kernels.__file__)").split()
    if any(packages.resolve() not in Path(file).resolve().parents for file in found):
        raise Error(f"{found} would be measured, not what was installed in {packages}")
    return side


def _called(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    """What a command printed. Raises Error with its last words where it failed."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())[-400:]
        raise Error(f"{' '.join(command[:4])} .. failed: {words}")
    return done.stdout


if __name__ == "__main__":
    main()
