"""The paper's trade-off on Fashion-MNIST: guidance without and with a classifier, and label dropout. See docs/tradeoff.md.

    python benchmarks/tradeoff_study.py /usr/share/datasets/fashion-mnist --out runs/tradeoff
    python benchmarks/tradeoff_study.py /usr/share/datasets/fashion-mnist --out runs/small --samples 500 --reduced
    python benchmarks/tradeoff_study.py --show                                                # from the table, without sampling

Samples and judges each arm (benchmarks/tradeoff/arms.py) as `fastcfg sweep` does, in a folder of --out; the same command
resumes after an interruption. Writes the rows of all arms to benchmarks/results/tradeoff.csv, prints what docs/tradeoff.md
quotes, and draws its plots. With --reduced: two scales, and the table and the plots go to --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tradeoff import arms, report

from fastcfg import metrics, plots
from fastcfg.engines import ENGINES
from fastcfg.engines.choice import machine
from fastcfg.errors import Error
from fastcfg.sweep import Row, figure_cells, read_rows, run_sweep, write_rows

ROOT = Path(__file__).parents[1]
TABLE, PLOTS = ROOT / "benchmarks" / "results" / "tradeoff.csv", ROOT / "docs"
ALL = (*arms.KINDS, *arms.SMALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="folder with the IDX files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, help="folder of the sweeps; existing ones are resumed")
    parser.add_argument("--samples", type=int, default=2500, help="a point")
    parser.add_argument("--engine", default="auto", choices=["auto", *ENGINES], help="of the samplers; openvino is the fastest")
    parser.add_argument("--workers", type=int, help="processes, which share the cores; one a core is the fastest")
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ALL], help="these alone; the table keeps the others")
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    if options.show == bool(options.data and options.out) or (options.reduced and not options.out):
        parser.error("want DATA and --out, or --show; --reduced has its table in --out")
    into = options.out if options.reduced else PLOTS
    table = options.out / "tradeoff.csv" if options.reduced else TABLE
    try:
        plots.pyplot()  # before the work, which takes hours
        if not options.show:
            run(options, table)
        rows = read_rows(table)
        print(report.text(rows))
        report.draw(rows, into)
    except Error as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace, table: Path) -> None:
    scales = arms.REDUCED if options.reduced else arms.SCALES
    options.out.mkdir(parents=True, exist_ok=True)
    if not any(row["setting"] == report.REAL for row in read_rows(table)):
        _put(table, report.REAL, [real_images(options.data, options.samples)])
    for arm in ALL:
        if options.arms and arm.name not in options.arms:
            continue
        print(arm.name, file=sys.stderr)
        name = arm.name.replace(",", "").replace(" ", "-")
        spec = options.out / f"{name}.toml"
        spec.write_text(arm.toml(options.samples, scales, options.data, options.engine))
        rows = run_sweep(spec, options.out / name, workers=options.workers)
        _put(table, arm.name, [{"setting": arm.name, **row, "cpu": machine()} for row in rows])


def _put(table: Path, name: str, rows: list[Row]) -> None:
    """An arm's rows into the table, in place of older ones: other arms may have come from other processes meanwhile."""
    order = [report.REAL, *(arm.name for arm in ALL)]
    others = [row for row in read_rows(table) if row["setting"] in order and row["setting"] != name]
    write_rows(table, sorted([*others, *rows], key=lambda row: order.index(row["setting"])))


def real_images(data: str, count: int) -> dict[str, str]:
    """What as many real training images come to: the row of samples as good as data."""
    network = metrics.load_network("fashion-cnn")
    train = metrics.open_images(f"{data}:train")
    assert train.labels is not None
    samples = metrics.extract(metrics.from_arrays(next(train.read(count)), train.labels[:count]), network)
    figures = metrics.evaluate(samples, metrics.open_reference(f"{data}:test", network))
    return {"setting": report.REAL, "samples": str(count), **figure_cells(figures)}


if __name__ == "__main__":
    main()
