"""Training: label dropout as asked, targets by definition, and a killed run that goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fastcfg
from fastcfg.cli import main
from fastcfg.files import read_safetensors
from fastcfg.training.config import TrainConfig
from fastcfg.training.data import load_data
from fastcfg.training.loop import Trainer, prediction_target, read_log

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


def test_another_run_is_not_continued(data: Path, tmp_path: Path) -> None:
    trainer(data, tmp_path / "run").save()
    with pytest.raises(fastcfg.Error, match=r"lr was 0\.002, now 0\.1"):
        trainer(data, tmp_path / "run", lr=0.1)


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
    samples = fastcfg.Sampler(model, steps=20)([0] * 8 + [1] * 8, scale=2.0, seeds=1)
    brightness = samples.mean(dim=(1, 2, 3))
    assert brightness[:8].max() < brightness[8:].min()
    losses = [float(row["loss"]) for row in read_log(out / "log.csv")]
    assert losses[-1] < 0.7 * losses[0]


def test_constant_and_cosine_rates() -> None:
    cosine = TrainConfig(images=12_800, batch=128, warmup=10, lr=1.0)
    constant = TrainConfig(images=12_800, batch=128, warmup=10, lr=1.0, rate="constant")
    assert cosine.steps == 100
    assert cosine.learning_rate(0) == pytest.approx(0.1)
    assert cosine.learning_rate(9) == cosine.learning_rate(10) == 1.0
    assert cosine.learning_rate(55) == pytest.approx(0.5)
    assert cosine.learning_rate(99) < 0.001
    assert constant.learning_rate(99) == 1.0


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


def test_cut_idx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + np.array([2, 4, 4], ">u4").tobytes() + bytes(31))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + np.array([2], ">u4").tobytes() + bytes(2))
    with pytest.raises(fastcfg.Error, match="cut short"):
        load_data(tmp_path)
