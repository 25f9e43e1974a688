"""Training: label dropout as asked, targets by definition, and a killed run that goes on as if it had not been."""

from __future__ import annotations

import errno
import gzip
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

import fastcfg
from fastcfg.cli import main
from fastcfg.files import read_safetensors, write_safetensors
from fastcfg.training.config import TrainConfig
from fastcfg.training.data import load_data
from fastcfg.training.loop import Trainer, prediction_target
from fastcfg.training.run import read_log

TINY = {
    "patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "batch": 8, "images": 96, "warmup": 2,
    "save_every": 4, "sample_every": 600, "dtype": "fp32", "compile": False,
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes of 8 x 8 images that differ in brightness."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    images = (rng.integers(0, 60, (64, 8, 8)) + labels[:, None, None] * 190).astype(np.uint8)
    path = tmp_path / "data.npz"
    np.savez(path, images=images, labels=labels, label_names=np.array(["dark", "bright"]))
    return path


def trainer(data: Path, out: Path, **changes: object) -> Trainer:
    out.mkdir(exist_ok=True)
    return Trainer(TrainConfig(**{**TINY, **changes}), load_data(data), out)


def flags(folder: Path, **changes: object) -> list[str]:
    """The command line of a tiny run."""
    settings = {**TINY, **changes}
    options = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if k != "compile"]
    return ["train", str(folder / "data.npz"), "--out", str(folder / "run"), "--threads", "1", "--no-compile", *options]


@pytest.mark.parametrize(("step", "decay"), [(0, 1 / 10), (10, 11 / 20), (88, 89 / 98), (10**4, 0.95)])
def test_the_averages_decay_rises_to_what_is_asked(data: Path, tmp_path: Path, step: int, decay: float) -> None:
    run = trainer(data, tmp_path / "run", ema=0.95)
    with torch.no_grad():
        for average, current in zip(run.ema.parameters(), run.model.parameters(), strict=True):
            average.fill_(1.0)
            current.zero_()
    run._update_ema(step)
    for average in run.ema.parameters():
        torch.testing.assert_close(average, torch.full_like(average, decay))


def test_a_network_is_given_its_schedules_own_times(data: Path, tmp_path: Path) -> None:
    """Flow's are one above the table's positions."""
    run, seen = trainer(data, tmp_path / "run", schedule="flow", predicts="flow"), []
    run._forward = lambda x, t, y: seen.append(t) or run.model(x, t, y)
    run._loss(0)
    assert torch.equal(seen[0], run.batch(0)[2] + 1)


def test_gradients_are_clipped(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(data, tmp_path / "run")
    loss = run._loss
    monkeypatch.setattr(run, "_loss", lambda step: 1e4 * loss(step))
    run._train_step(0)
    norms = [parameter.grad.norm() for parameter in run.model.parameters() if parameter.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(1.0, rel=1e-4)


def test_labels_are_dropped_as_often_as_asked(data: Path, tmp_path: Path) -> None:
    run = trainer(data, tmp_path / "run", label_dropout=0.3, batch=64, images=64_000)
    labels = torch.cat([run.batch(step)[1] for step in range(200)])
    dropped = (labels == 2).double().mean().item()
    # 12,800 draws: four standard deviations of a share of 0.3 are 0.016
    assert abs(dropped - 0.3) < 0.016


def test_kept_labels_belong_to_their_images(data: Path, tmp_path: Path) -> None:
    run = trainer(data, tmp_path / "run", label_dropout=0.0)
    x0, labels, *_ = run.batch(3)
    assert torch.equal((x0.mean(dim=(1, 2, 3)) > 0).long(), labels)


def test_an_epoch_shows_every_image_once(data: Path, tmp_path: Path) -> None:
    run = trainer(data, tmp_path / "run")
    shown = torch.cat([run.batch(step)[0] for step in range(8)])
    everything = torch.from_numpy(load_data(data).images).float() / 127.5 - 1
    assert torch.equal(shown.flatten(1).sum(1).sort().values, everything.flatten(1).sum(1).sort().values)


def test_steps_epochs_and_seeds_draw_anew(data: Path, tmp_path: Path) -> None:
    run, other = trainer(data, tmp_path / "run"), trainer(data, tmp_path / "other", seed=1)
    first = run.batch(0)
    for again in (run.batch(1), run.batch(8), other.batch(0)):  # an epoch has 8 steps
        assert not any(torch.equal(first[i], again[i]) for i in (0, 2, 3)), "images, t or noise"
    assert not torch.equal(run.model.x_embedder.proj.weight, other.model.x_embedder.proj.weight)


def test_a_step_is_made_with_its_own_rate_and_logged_with_it(data: Path, tmp_path: Path) -> None:
    run = trainer(data, tmp_path / "run", images=64, weight_decay=0.3)
    rates: list[float] = []

    def look(current: Trainer) -> None:
        groups = [group for optimizer in current.optimizers for group in optimizer.param_groups]
        assert {group["weight_decay"] for group in groups} == {0.3}
        (rate,) = {group["lr"] for group in groups}
        rates.append(rate)

    object.__setattr__(run.config, "sample_every", 1)
    run.run(on_sample=look)
    assert rates == [run.config.learning_rate(step) for step in range(8)]
    assert [row["lr"] for row in read_log(run.log_path)] == [f"{rates[step]:.3e}" for step in (3, 7)]


@pytest.mark.parametrize(
    ("dtype", "seconds", "chosen"),
    [
        ("fp32", (9, 1), torch.float32), ("bf16", (1, 9), torch.bfloat16),
        ("auto", (1, 9), torch.float32), ("auto", (9, 1), torch.bfloat16),
    ],
)  # fmt: skip
def test_a_step_runs_in_the_dtype_asked_for_or_in_the_faster(
    dtype: str, seconds: tuple[int, int], chosen: torch.dtype, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(data, tmp_path / "run", dtype=dtype)
    monkeypatch.setattr(run, "_time_step", dict(zip((torch.float32, torch.bfloat16), seconds, strict=True)).get)
    run._choose_arithmetic()
    seen: list[torch.dtype] = []
    run.model.final_layer.linear.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    assert run._loss(0).dtype == torch.float32
    assert seen == [chosen]


def test_muon_has_the_blocks_matrices_and_adamw_the_rest(data: Path, tmp_path: Path) -> None:
    run = trainer(data, tmp_path / "run")
    names = {parameter: name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    adamw, muon = ({names[p] for group in made.param_groups for p in group["params"]} for made in run.optimizers)
    layers = ("adaLN_modulation.1", "attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")
    assert muon == {f"blocks.0.{layer}.weight" for layer in layers}
    assert adamw | muon == set(names.values())
    assert not adamw & muon


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(data, tmp_path / "run")
    loss = run._loss
    monkeypatch.setattr(run, "_loss", lambda step: loss(step) * (math.nan if step == 5 else 1))
    with pytest.raises(fastcfg.Error, match="the loss is nan near step 7: lower lr"):
        run.run()
    assert [row["step"] for row in read_log(run.log_path)] == ["4"]
    assert trainer(data, tmp_path / "run").step == 4


@pytest.mark.parametrize("predicts", ["eps", "v", "x0", "flow"])
def test_target_gives_back_x0(predicts: str) -> None:
    """From x_t and the target the solvers' own tables recover x0: training and sampling mean the same by a prediction."""
    from fastcfg.solvers import Grid, x0_from

    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 1, 4, 4, generator=g).double()
    alpha, sigma = (0.3, 0.7) if predicts == "flow" else (0.6, 0.8)
    target = prediction_target(predicts, x0, eps, torch.tensor(alpha), torch.tensor(sigma))
    of_x, of_out = x0_from(Grid(np.array([alpha, 1.0]), np.array([sigma, 0.0]), predicts))
    recovered = of_x[0] * (alpha * x0 + sigma * eps) + of_out[0] * target
    torch.testing.assert_close(recovered, x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_equals_uninterrupted_one(data: Path, tmp_path: Path, optimizer: str) -> None:
    whole = trainer(data, tmp_path / "whole", optimizer=optimizer)
    whole.run()
    first = trainer(data, tmp_path / "parts", optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        first.run(on_sample=_interrupt_at(first, 8))
    second = trainer(data, tmp_path / "parts", optimizer=optimizer)
    assert second.step == 8
    second.run()
    for (name, a), b in zip(whole.ema.state_dict().items(), second.ema.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert _log(whole) == _log(second)


def _interrupt_at(run: Trainer, step: int):  # type: ignore[no-untyped-def]
    object.__setattr__(run.config, "sample_every", 1)

    def interrupt(current: Trainer) -> None:
        if current.step == step:
            raise KeyboardInterrupt

    return interrupt


def _log(run: Trainer) -> list[tuple[str, str, str]]:
    return [(row["step"], row["images"], row["loss"]) for row in read_log(run.log_path)]


@pytest.mark.usefixtures("data")
def test_kill_loses_at_most_one_interval(tmp_path: Path) -> None:
    """kill -9 of the command, then the same command: it goes on from the last state and ends with all files in place."""
    arguments = flags(tmp_path, images=8000, save_every=20, sample_every=100_000)
    process = subprocess.Popen(
        [sys.executable, "-c", "from fastcfg.cli import main; main()", *arguments],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    state = tmp_path / "run" / "state.safetensors"
    deadline = time.monotonic() + 60
    while not state.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    step = int(read_safetensors(state)[1]["step"])
    assert 0 < step < 1000
    assert step % 20 == 0
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert f"steps {step} to 1000" in result.output
    logged = [int(row["step"]) for row in read_log(tmp_path / "run" / "log.csv")]
    assert logged == list(range(20, 1001, 20))


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("images", [32, 96])
def test_kill_between_state_and_model_leaves_the_model_to_the_next_run(
    images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 4, amid the run or its last: the same command makes what was to follow the state there."""
    arguments, out = flags(tmp_path, images=images, sample_every=4), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("fastcfg.training.report.ema_model", _kill)
        assert CliRunner().invoke(main, arguments).exit_code == 130
    assert {path.name for path in out.iterdir()} == {"state.safetensors", "log.csv"}
    assert CliRunner().invoke(main, arguments).exit_code == 0
    grids = [f"samples-{step:06}.png" for step in range(4, images // 8 + 1, 4)]
    assert {path.name for path in out.glob("*.png")} == {*grids, *(["loss.png"] if len(grids) > 1 else [])}
    assert fastcfg.load(out / "model.safetensors").training["images_seen"] == images


def _kill(*_: object) -> None:
    raise KeyboardInterrupt


def test_another_run_is_not_continued(data: Path, tmp_path: Path) -> None:
    trainer(data, tmp_path / "run").save()
    with pytest.raises(fastcfg.Error, match=r"lr was 0\.002, now 0\.1"):
        trainer(data, tmp_path / "run", lr=0.1)


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: {"images": kept["images"] ^ (np.arange(64) == 5)[:, None, None]},
        lambda kept: {"labels": kept["labels"] ^ (np.arange(64) == 5)},
        lambda kept: {"label_names": np.array(["dark", "bright", "green"])},
    ],
    ids=["image", "label", "class"],
)
def test_other_data_of_the_same_size_are_not_gone_on_with(
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], data: Path, tmp_path: Path
) -> None:
    trainer(data, tmp_path / "run").save()
    with np.load(data) as archive:
        kept = dict(archive)
    np.savez(data, **(kept | change(kept)))
    with pytest.raises(fastcfg.Error, match=r"another run \(data_sha256 was '.{16}', now '.{16}'\)"):
        trainer(data, tmp_path / "run")
    np.savez(data, **kept)
    trainer(data, tmp_path / "run")


def test_a_run_that_does_not_know_its_data_goes_on_and_says_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As runs begun before states named their data; from the next save on it is known."""
    run = trainer(data, tmp_path / "run")
    run.step = 3
    run.save()
    tensors, metadata = read_safetensors(run.state_path)
    config = json.loads(metadata["config"])
    del config["data_sha256"]
    write_safetensors(run.state_path, tensors, {**metadata, "config": json.dumps(config)})
    again = trainer(data, tmp_path / "run")
    assert again.step == 3
    assert f"note: {run.state_path} does not say which data its run had" in capsys.readouterr().err
    again.save()
    trainer(data, tmp_path / "run")
    assert capsys.readouterr().err == ""


def test_a_batch_beyond_the_data_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(fastcfg.Error, match="batch 65 asked, but there are 64 images"):
        trainer(data, tmp_path / "run", batch=65)
    run = trainer(data, tmp_path / "run", batch=64)
    run.run()
    assert [len(run.batch(step)[0]) for step in range(run.step)] == [64, 64]
    assert read_log(run.log_path)[-1]["images"] == "128"


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.arange(64) % 10 + 1, "note: 1 of 11 classes have no image, and cannot be learnt: 0 (labels"),
        (
            np.arange(64) % 10 * 10,
            "note: 81 of 91 classes have no image, and cannot be learnt: 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, ..",
        ),
        (np.arange(64) % 10, None),
    ],
)
def test_classes_without_an_image_are_named(labels: np.ndarray, says: str | None, data: Path, tmp_path: Path) -> None:
    with np.load(data) as archive:
        np.savez(data, images=archive["images"], labels=labels)
    result = CliRunner().invoke(main, flags(tmp_path, images=8))
    assert result.exit_code == 0, result.output
    said = [line for line in result.output.splitlines() if line.startswith("note: ")]
    assert said == [] if says is None else said[0].startswith(says), result.output


@pytest.mark.usefixtures("data")
def test_command_leaves_a_model_that_samples_its_classes(tmp_path: Path) -> None:
    """Enough training to tell dark from bright: the whole way from an npz to guided samples."""
    result = CliRunner().invoke(main, flags(tmp_path, images=9600, predicts="x0", lr=0.005, save_every=300))
    assert result.exit_code == 0, result.output
    out = tmp_path / "run"
    assert {"model.safetensors", "state.safetensors", "log.csv", "loss.png", "samples-001200.png"} <= {
        p.name for p in out.iterdir()
    }
    model = fastcfg.load(out / "model.safetensors")
    assert model.label_names == ("dark", "bright")
    assert model.training["images_seen"] == 9600
    assert (model.clip, model.eta, model.low_precision) == (True, 1.0, False)  # as docs/training.md found to be best
    kept, _ = read_safetensors(out / "state.safetensors")
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, kept[f"ema/{name}"]), name
    assert not torch.equal(model.module.final_layer.linear.weight, kept["model/final_layer.linear.weight"])
    samples = fastcfg.Sampler(model, steps=20)([0] * 8 + [1] * 8, scale=2.0, seeds=1)
    brightness = samples.mean(dim=(1, 2, 3))
    assert brightness[:8].max() < brightness[8:].min()
    losses = [float(row["loss"]) for row in read_log(out / "log.csv")]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.usefixtures("data")
def test_grids_show_each_class_at_each_scale_from_the_same_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    sample = fastcfg.Sampler.__call__

    def noted(sampler: fastcfg.Sampler, labels: list[int], scale: list[float], seeds: int, *, indices: list[int]) -> Tensor:
        asked.append((labels, scale, seeds, indices))
        return sample(sampler, labels, scale, seeds, indices=indices)

    monkeypatch.setattr(fastcfg.Sampler, "__call__", noted)
    assert CliRunner().invoke(main, flags(tmp_path, images=8)).exit_code == 0
    assert asked == [([0, 0, 0, 1, 1, 1], [1.0, 2.0, 4.0] * 2, 0, [0, 0, 0, 1, 1, 1])]


@pytest.mark.usefixtures("data")
def test_model_without_null_label_is_shown_at_scale_1(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, flags(tmp_path, images=32, label_dropout=0.0, sample_every=2))
    assert result.exit_code == 0, result.output
    assert {"samples-000002.png", "samples-000004.png"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert fastcfg.load(tmp_path / "run" / "model.safetensors").null_label is None


def _fail(*_: object) -> None:
    raise RuntimeError("no compiler here\nand much more")


def _broken_backward(model: nn.Module) -> Callable[..., Tensor]:
    def forward(*inputs: Tensor) -> Tensor:
        output = model(*inputs)
        output.register_hook(_fail)
        return output

    return forward


@pytest.mark.parametrize("compiler", [lambda model: _fail, _broken_backward], ids=["forward", "backward"])
def test_run_goes_on_as_it_is_where_nothing_can_be_compiled(
    compiler: Callable[..., object],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torch compiles at the first call: that is when a missing compiler shows."""
    plain = trainer(data, tmp_path / "plain", images=32)
    plain.run()
    monkeypatch.setattr(torch, "compile", compiler)
    run = trainer(data, tmp_path / "run", images=32, compile=True)
    run.run()
    said = [line for line in capsys.readouterr().err.splitlines() if "compile" in line]
    assert said == ["note: torch.compile is not used: no compiler here"]
    for (name, a), b in zip(plain.ema.state_dict().items(), run.ema.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    trainer(data, tmp_path / "run", images=32, compile=True).run()
    assert "compile" not in capsys.readouterr().err, "a run that has ended has nothing to compile"


@pytest.mark.parametrize("seed", [-1, 2**32, 20_000_000_000, 0.5, True])
def test_seed_out_of_range_is_refused(seed: object) -> None:
    with pytest.raises(fastcfg.Error, match=rf"seed must be a whole number in 0\.\.4294967295, got {seed}"):
        TrainConfig(seed=seed)  # type: ignore[arg-type]


def test_largest_seed_trains(data: Path, tmp_path: Path) -> None:
    run = trainer(data, tmp_path / "run", images=16, seed=2**32 - 1)
    run.run()
    assert run.step == 2


HEADER = b"step,images,loss,lr,images_per_second\n"
LOGS = {
    "step no number": (HEADER + b"1,8,0.9,0.1,5\nx,16,0.8,0.1,5\n3,24,0.7,0.1,5\n", "'x', '16'"),
    "loss no number": (HEADER + b"1,8,?,0.1,5\n", "'?'"),
    "row cut short": (HEADER + b"1,8,0.9\n", "'0.9', None"),
    "row too long": (HEADER + b"1,8,0.9,0.1,5,6\n", "'6'"),
    "other columns": (b"step,loss\n1,0.9\n", "one number for each of step, images"),
    "no text": (HEADER + b"1,8,\xff\n", "cannot read"),
}


@pytest.mark.parametrize("case", LOGS)
def test_log_that_cannot_be_read_is_refused_and_kept(case: str, data: Path, tmp_path: Path) -> None:
    content, word = LOGS[case]
    run = trainer(data, tmp_path / "run")
    run.log_path.write_bytes(content)
    with pytest.raises(fastcfg.Error) as caught:
        run.run()
    assert all(part in str(caught.value) for part in (str(run.log_path), word)), str(caught.value)
    assert run.log_path.read_bytes() == content
    assert [path.name for path in run.out.iterdir()] == ["log.csv"]


def test_a_disk_that_is_full_at_a_log_row_is_one_error(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(data, tmp_path / "run")
    monkeypatch.setattr(run, "_trim_log", lambda: run.log_path.symlink_to("/dev/full"))
    with pytest.raises(fastcfg.Error, match=r"cannot write .*/log\.csv: No space left on device"):
        run.run()
    assert not run.state_path.exists()


def test_a_log_row_that_a_kill_cut_short_is_dropped(data: Path, tmp_path: Path) -> None:
    run = trainer(data, tmp_path / "run")
    run.log_path.write_bytes(HEADER + b"1,8,0.9,0.1,5\r\n2,16,0.")
    assert [row["step"] for row in read_log(run.log_path)] == ["1"]
    run.run()
    steps = [row["step"] for row in read_log(run.log_path)]
    assert steps == sorted(set(steps), key=int)


def test_constant_and_cosine_rates() -> None:
    cosine = TrainConfig(images=12_800, batch=128, warmup=10, lr=1.0)
    constant = TrainConfig(images=12_800, batch=128, warmup=10, lr=1.0, rate="constant")
    assert cosine.steps == 100
    assert cosine.learning_rate(0) == pytest.approx(0.1)
    assert cosine.learning_rate(9) == cosine.learning_rate(10) == 1.0
    assert cosine.learning_rate(55) == pytest.approx(0.5)
    assert cosine.learning_rate(99) < 0.001
    assert constant.learning_rate(99) == 1.0


def test_images_of_an_npz_keep_rows_columns_and_channels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images, arr_1=np.arange(4))
    assert np.array_equal(load_data(tmp_path / "x.npz").images, np.moveaxis(images, 3, 1))


def test_idx_folder_and_image_folder_hold_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (6, 8, 8), dtype=np.uint8), np.array([0, 1, 0, 1, 1, 0], np.uint8)
    idx, folder = tmp_path / "idx", tmp_path / "folder"
    idx.mkdir()
    (idx / "train-images-idx3-ubyte").write_bytes(
        bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes() + images.tobytes()
    )
    (idx / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + np.array([6], ">u4").tobytes() + labels.tobytes())
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"class{label}" / f"{i}.png")
    a, b = load_data(idx), load_data(folder)
    order = np.argsort(labels, kind="stable")
    assert np.array_equal(a.images[order], b.images)
    assert np.array_equal(a.labels[order], b.labels)
    assert b.label_names == ("class0", "class1")


def test_a_folder_of_colours_takes_grey_palette_and_transparent_images_as_rgb(tmp_path: Path) -> None:
    """Each saved losslessly, of the same red, green or grey pixels."""
    (tmp_path / "only").mkdir()
    rgb = np.zeros((4, 4, 3), np.uint8)
    rgb[:2], rgb[2:] = (200, 0, 0), (0, 100, 0)
    grey = np.full((4, 4), 77, np.uint8)
    whole = Image.fromarray(rgb)
    whole.save(tmp_path / "only" / "0.png")
    whole.quantize(2).save(tmp_path / "only" / "1.png")
    transparent = whole.convert("RGBA")
    transparent.putalpha(128)
    transparent.save(tmp_path / "only" / "2.png")
    Image.fromarray(grey).save(tmp_path / "only" / "3.png")
    images = load_data(tmp_path).images.transpose(0, 2, 3, 1)
    assert all(np.array_equal(image, rgb) for image in images[:3])
    assert np.array_equal(images[3], np.stack([grey] * 3, axis=2))


def test_images_that_no_set_can_hold_are_refused(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "only" / "0.png")
    with pytest.raises(fastcfg.Error, match=r"0\.png has more than 8 bits a channel"):  # all of it would be white
        load_data(tmp_path)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "only" / "0.png")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "only" / "1.png")
    with pytest.raises(fastcfg.Error, match=r"1\.png is \[4, 4, 3\], but the first image is \[4, 4, 1\]"):
        load_data(tmp_path)


def _npz(folder: Path, cut: int = 0, **arrays: object) -> Path:
    """A data set of four images without its last `cut` bytes."""
    path = folder / "data.npz"
    np.savez(path, **{"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4), **arrays})  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[: -cut or None])
    return path


def _flipped(path: Path, at: int) -> Path:
    content = bytearray(path.read_bytes())
    content[at] ^= 255
    path.write_bytes(content)
    return path


def _renamed_npy(folder: Path) -> Path:
    path = folder / "data.npz"
    with open(path, "wb") as file:
        np.save(file, np.zeros((4, 8, 8), np.uint8))
    return path


def _member(folder: Path, content: bytes) -> Path:
    """An npz whose images are `content`."""
    path = folder / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", content)
        with archive.open("labels.npy", "w") as file:
            np.save(file, np.arange(4))
    return path


def _header(text: str) -> bytes:
    """An .npy that ends with its header."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def _png(size: int = 64) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def _sized(png: bytes, side: int) -> bytes:
    """The same PNG with another width and height in its header."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def _image(folder: Path, content: bytes) -> Path:
    (folder / "a").mkdir()
    (folder / "a" / "x.png").write_bytes(content)
    return folder


def _idx_file(shape: tuple[int, ...], count: int | None = None) -> bytes:
    """Zeros of `shape`, or `count` of them behind its header."""
    values = bytes(int(np.prod(shape)) if count is None else count)
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + values


def _idx(folder: Path, images: bytes, labels: bytes | None = None, suffix: str = "") -> Path:
    (folder / f"train-images-idx3-ubyte{suffix}").write_bytes(images)
    (folder / "train-labels-idx1-ubyte").write_bytes(_idx_file((2,)) if labels is None else labels)
    return folder


def _unlike_gzip(folder: Path) -> Path:
    packed = _idx(folder, gzip.compress(_idx_file((2, 4, 4))), suffix=".gz")
    _flipped(packed / "train-images-idx3-ubyte.gz", 15)
    return packed


@pytest.mark.parametrize(
    ("folder", "count", "first"), [("Fashion-MNIST", 10, "T-shirt"), ("Fashion-MNIST", 9, "0"), ("mnist", 10, "0")]
)
def test_ten_classes_of_fashion_have_their_names(folder: str, count: int, first: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    labels = _idx_file((count,), 0) + bytes(range(count))
    names = load_data(_idx(tmp_path / folder, _idx_file((count, 4, 4)), labels)).label_names
    assert (names[0], len(names)) == (first, count)


DAMAGED: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "npz cut short": (lambda d: _npz(d, cut=100), ("data.npz", "cut short")),
    "npz of other bytes": (lambda d: _flipped(_npz(d), 200), ("data.npz", "CRC")),
    "npz that is an npy": (_renamed_npy, ("data.npz", "not an npz")),
    "npz with text for an array": (lambda d: _member(d, b"hello"), ("data.npz", "images must be uint8")),
    "npz with half a header": (lambda d: _member(d, _header("{'shape': ((")), ("data.npz", "cannot read")),
    "npz larger than memory": (
        lambda d: _member(d, _header("{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999,)}\n")),
        ("data.npz", "cannot read"),
    ),
    "npz with a label beyond counting": (lambda d: _npz(d, labels=np.arange(4) + 2**62), ("labels", "4611686018427387904")),
    "npz with one name": (lambda d: _npz(d, label_names=np.array("a")), ("data.npz", "label_names")),
    "npz of empty images": (lambda d: _npz(d, images=np.zeros((4, 0, 0), np.uint8)), ("[4, 1, 0, 0]",)),
    "image of text": (lambda d: _image(d, b"hello"), ("x.png", "cannot identify")),
    "image cut short": (lambda d: _image(d, _png()[:2000]), ("x.png", "truncated")),
    "image cut in its header": (lambda d: _image(d, _png()[:40]), ("x.png", "cannot identify")),
    "image too large": (lambda d: _image(d, _sized(_png(), 60_000)), ("x.png", "exceeds limit")),
    "gzip of other bytes": (_unlike_gzip, ("train-images-idx3-ubyte.gz", "decompressing")),
    "gzip cut short": (
        lambda d: _idx(d, gzip.compress(_idx_file((2, 4, 4)))[:-9], suffix=".gz"),
        ("train-images-idx3-ubyte.gz", "ended before"),
    ),
    "IDX cut short": (lambda d: _idx(d, _idx_file((2, 4, 4), 31)), ("train-images-idx3-ubyte", "cut short")),
    "IDX without labels": (lambda d: _idx(d, _idx_file((2, 4, 4)), _idx_file((0,))), ("train-labels-idx1-ubyte", "no values")),
    "IDX without images": (lambda d: _idx(d, _idx_file((0, 4, 4))), ("train-images-idx3-ubyte", "no values")),
    "IDX of rank 0": (lambda d: _idx(d, _idx_file((2, 4, 4)), _idx_file(())), ("train-labels-idx1-ubyte", "rank 1")),
    "IDX of sizes that overflow": (lambda d: _idx(d, _idx_file((2**31, 2**31, 4), 0)), ("images-idx3-ubyte", "cut short")),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_data_is_one_clear_error(case: str, tmp_path: Path) -> None:
    make, words = DAMAGED[case]
    path = make(tmp_path)
    with pytest.raises(fastcfg.Error) as caught:
        load_data(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", ["is_file", "is_dir", "iterdir"])
def test_folder_that_may_not_be_searched_is_an_error(asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, since root may search any folder."""
    ask = getattr(Path, asked)

    def refuse(path: Path) -> object:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return ask(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, asked, refuse)
        with pytest.raises(fastcfg.Error) as caught:
            load_data(tmp_path)
    assert str(caught.value) == f"cannot read {tmp_path}: Permission denied"


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_path_that_is_too_long_is_an_error(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(fastcfg.Error, match=r"x{300}.*: File name too long"):
        load_data(tmp_path / ("x" * 300 + suffix))
