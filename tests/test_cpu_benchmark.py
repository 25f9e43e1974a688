"""The CPU benchmark: its dry run, and whether its contenders do the same work and its figures are what they are called."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastcfg import Error
from fastcfg.engines.cpu_dit import in_one_call
from fastcfg.engines.cpu_ops import has_bf16, has_int8
from fastcfg.engines.openvino_module import openvino_version, quantises_activations

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from cpu import contenders as peers  # noqa: E402 - after the path
from cpu import rates, sections, timing  # noqa: E402
from cpu.cases import SCALE, make_cases, overhead_case, random_model  # noqa: E402
from cpu.overhead import call_and_products  # noqa: E402
from cpu.report import MACHINE, Report  # noqa: E402
from table import MEASURED, percentiles  # noqa: E402

DTYPES = ["fp32", *["bf16"] * has_bf16()]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, list[dict[str, str]], Path]:
    out = tmp_path_factory.mktemp("session")
    command = [sys.executable, str(BENCHMARKS / "cpu_session.py"), "--dry-run", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(out)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done, list(csv.DictReader((out / "cpu-dry-run.csv").open())), out


def of(rows: list[dict[str, str]], section: str) -> list[dict[str, str]]:
    return [row for row in rows if row["section"] == section]


def test_everyone_who_is_installed_is_checked_and_timed(dry_run) -> None:
    _, rows, _ = dry_run
    want = {("fastcfg", dtype) for dtype in (*DTYPES, *["int8"] * has_int8())} | {("fastcfg's reference engine", "fp32")}
    want |= {("fastcfg, engine openvino", "int8")} if openvino_version() and quantises_activations() else set()
    for dtype in DTYPES:
        want |= {("fastcfg, engine openvino", dtype)} if openvino_version() else set()
        want |= {(f"diffusers, {how}", dtype) for how in ("eager", "compiled") if peers.installed("diffusers")}
        want |= {("our module, compiled", dtype)} if peers.installed("diffusers") else set()
        want |= {("OpenVINO", dtype)} if openvino_version() and peers.installed("diffusers") else set()
    for section in ("check", "loop"):
        assert {(row["name"], row["dtype"]) for row in of(rows, section)} == want
    assert {row["dtype"] for row in of(rows, "rate")} == {dtype for _, dtype in want}


def test_figures_follow_from_each_other(dry_run) -> None:
    """GFLOP/s from the time, its fraction from the rate, ratios from medians."""
    _, rows, _ = dry_run
    (case,) = make_cases(dry=True)
    rate = {row["dtype"]: float(row["value"]) for row in of(rows, "rate")}
    for row in of(rows, "loop"):
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["value"]) == pytest.approx(case.flops / float(row["p50_ms"]) / 1e6, rel=1e-3)
        assert float(row["fraction"]) == pytest.approx(float(row["value"]) / rate[row["dtype"]], rel=1e-3)
    medians = {(row["name"], row["dtype"]): float(row["p50_ms"]) for row in of(rows, "loop")}
    for row in of(rows, "ratio"):
        peer, theirs = row["name"].replace(",", "").split()[:2]
        best = min(ms for (name, dtype), ms in medians.items() if name.startswith(peer) and dtype == theirs)
        ours = "fastcfg, engine openvino" if "engine openvino" in row["name"] else "fastcfg"
        assert float(row["value"]) == pytest.approx(best / medians[ours, row["dtype"]], rel=1e-3)


def test_rows_say_where_they_were_measured(dry_run) -> None:
    _, rows, _ = dry_run
    assert list(rows[0]) == [*MEASURED, *MACHINE]
    assert all(row["cpu"] and row["torch"] and row["commit"] and row["date"] and int(row["cores"]) for row in rows)


def test_nothing_is_reported_to_openvinos_maker(dry_run) -> None:
    _, _, out = dry_run
    assert not (out / "intel").exists()  # where the user's identity would be


def test_tables_and_plot(dry_run) -> None:
    done, rows, out = dry_run
    tables = done.stdout[done.stdout.index("Milliseconds of a guided step") :]
    assert all(f"| {row['name']}, {row['dtype']} |" in tables for row in (*of(rows, "loop"), *of(rows, "rate")))
    assert all(f"| {row['dtype']} against {row['name']} |" in tables for row in of(rows, "ratio"))
    assert "of a call is outside its products" in tables
    assert (out / "cpu-dry-run.png").stat().st_size > 10_000


def test_peers_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = make_cases(dry=True)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert peers.absent()[-1:] == ["openvino"]
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert {contender.name.split("'")[0] for contender in peers.contenders(case, 1, dry=True)} == {"fastcfg"}
    assert [name.split()[0] for name in peers.absent()] == ["diffusers", "openvino"]


def test_the_loop_is_the_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' DiTPipeline itself, around a decoder that hands latents back, from the same x_T."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.dit import pipeline_dit
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline

    latents = []

    class Decoder(torch.nn.Module):
        config = types.SimpleNamespace(scaling_factor=1.0)
        dtype = torch.float32
        device = torch.device("cpu")

        def decode(self, x):
            latents.append(x)
            return types.SimpleNamespace(sample=x)

    (tiny,) = make_cases(dry=True)
    model = random_model(input_size=8, hidden_size=64, depth=2, num_heads=1, num_classes=1000)
    case = replace(tiny, model=model, labels=[3, 999], x_T=torch.randn(2, *model.shape))
    twin = peers.diffusers_twin(model)
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *_, **__: case.x_T)
    pipeline = DiTPipeline(twin, Decoder(), diffusers.DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    pipeline(case.labels, guidance_scale=SCALE, num_inference_steps=4, output_type="np")
    ours = peers.pipeline_loop(case, lambda x, t, y: twin(x, t, y).sample, torch.float32, 4)
    assert torch.equal(ours, latents[0])


@pytest.mark.skipif(openvino_version() is None, reason="OpenVINO is not installed")
def test_openvino_in_parts_is_openvino() -> None:
    pytest.importorskip("diffusers")
    (case,) = make_cases(dry=True)
    contender, *_ = peers._openvino(case, peers.diffusers_twin(case.model), cores=2)
    latency, throughput = (contender.options[f"{hint} hint"](case.steps) for hint in ("latency", "throughput"))
    torch.testing.assert_close(throughput, latency, rtol=1e-5, atol=1e-5)


def test_other_samples_are_refused(tmp_path: Path) -> None:
    (case,) = make_cases(dry=True)
    report = Report(tmp_path / "rows.csv", dict.fromkeys(MACHINE, ""))
    others = replace(case, labels=[label + 1 for label in case.labels])
    ready = [
        sections._prepare(contender, case.steps)
        for one in (case, others)
        for contender in peers._fastcfg(one)
        if contender.dtype == "fp32"
    ]
    sections._compare(report, case, ready[: len(ready) // 2])
    with pytest.raises(Error, match="another function"):
        sections._compare(report, case, ready)


def test_the_file_is_whole_after_every_row(tmp_path: Path) -> None:
    report = Report(tmp_path / "rows.csv", dict.fromkeys(MACHINE, "here"))
    for count in (1, 2, 3):
        report.row("loop", "name, with a comma", float(count), "GFLOP/s", times=(1.0, 2.0, 3.0))
        rows = list(csv.DictReader(report.path.open()))
        assert [float(row["value"]) for row in rows] == [1.0, 2.0, 3.0][:count]
        assert rows[-1]["name"] == "name, with a comma"
        assert list(tmp_path.iterdir()) == [report.path]


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PAUSE", 0)
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    taken = timing.round_robin(calls, timing.Rounds(0, least=3))
    assert "".join(order) == "abccbaabc"
    assert {len(seconds) for seconds in taken.values()} == {3}
    assert len(timing.round_robin(calls, timing.Rounds(60, most=4))["a"]) == 4


def test_percentiles() -> None:
    assert percentiles([i / 1e3 for i in range(11)]) == pytest.approx((2, 5, 8))
    assert percentiles([0.25]) == (250, 250, 250)


def test_the_best_of_a_peers_counts(tmp_path: Path) -> None:
    (case,) = make_cases(dry=True)
    report = Report(tmp_path / "rows.csv", dict.fromkeys(MACHINE, ""))
    medians = {("fastcfg", "int8"): 2.0, ("diffusers, eager", "bf16"): 9.0, ("diffusers, compiled", "bf16"): 6.6}
    sections._ratios(report, case, medians)
    assert [(row["dtype"], row["value"], row["fraction"]) for row in report.rows] == [
        ("int8", pytest.approx(3.3), pytest.approx(1.5))
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_products_of_the_rate_are_products(dtype: str) -> None:
    M, K, N = 8, 64, 32
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).double() for shape in ((M, K), (N, K), (N,)))
    want = x @ weight.T + bias
    error = (rates._product(dtype, M, K, N)().double() - want).norm() / want.norm()
    assert error < {"fp32": 1e-6, "bf16": 1e-2}[dtype]


@pytest.mark.skipif(not has_int8(), reason="this torch has no quantised products")
def test_the_int8_product_of_the_rate_is_a_product() -> None:
    M, K, N = 8, 64, 32
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).clamp(-1, 1) for shape in ((M, K), (N, K)))
    want = x @ weight.T
    assert (rates._product("int8", M, K, N)() - want).norm() / want.norm() < 0.05


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("one_call", [False, True])
def test_the_products_of_a_call(one_call: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four a block and one at the end for each half of each step, on all of its tokens, and one attention a block."""
    if one_call and not in_one_call(torch.float32):
        pytest.skip("no network in one call here")
    case, products = overhead_case(dry=True), []
    monkeypatch.setattr("fastcfg.engines.cpu.in_one_call", lambda _: one_call)
    calls = call_and_products(case, "fp32")
    engine, recorder, *_ = calls["products"].args
    assert engine._program.operations is not recorder
    tokens, depth, rows = engine._program.config.tokens, engine._program.config.depth, 2 * case.steps
    done = {"linear": 0, "attention": 0}
    for kind, call in (entry for work in recorder.work.values() for entry in work):
        inputs = call.args[0]
        done[kind] += len(inputs) if inputs.shape[1] == tokens else 0  # else it is the table's product
    if one_call:
        monkeypatch.setattr(engine._program, "products", lambda *given: products.append(given))
        assert done == {"linear": 0, "attention": 0}
    else:
        assert len(recorder.work) == torch.get_num_threads()
        assert done == {"linear": rows * (4 * depth + 1), "attention": rows * depth}
    for call in calls.values():
        call()
    assert sum(some for some, attention in products if attention) == rows * one_call
    assert sum(some for some, attention in products if not attention) == rows * one_call
