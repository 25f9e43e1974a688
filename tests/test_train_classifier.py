"""Training a classifier of noisy images: as accurate as Bayes' rule allows, resumed exactly, and fit to guide."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from fastcfg import Denoiser, Error, Sampler, schedule
from fastcfg.cli import main
from fastcfg.files import read_safetensors
from fastcfg.guidance import ClassifierGuidance
from fastcfg.models.classifier import load_classifier
from fastcfg.schedules import Schedule
from fastcfg.training.classifier import LEVELS, ClassifierTrainer
from fastcfg.training.config import TrainClassifierConfig
from fastcfg.training.data import hold_out, load_data
from fastcfg.training.run import read_log

TINY = {
    "width": 8, "levels": 2, "blocks": 1, "batch": 32, "images": 1920, "validation": 1000, "warmup": 5, "lr": 0.005,
    "save_every": 20, "dtype": "fp32", "compile": False,
}  # fmt: skip
FASHION = Path("/usr/share/datasets/fashion-mnist")
SIZE, GREY = 8, 0.2  # images of one grey value, -0.2 for class 0 and 0.2 for class 1


@pytest.fixture
def data(tmp_path: Path) -> Path:
    labels = np.arange(1600) % 2
    images = np.broadcast_to(np.where(labels, 153, 102)[:, None, None], (1600, SIZE, SIZE)).astype(np.uint8)
    path = tmp_path / "data.npz"
    np.savez(path, images=images, labels=labels, label_names=np.array(["dark", "bright"]))
    return path


def trainer(data: Path, out: Path, **changes: object) -> ClassifierTrainer:
    out.mkdir(exist_ok=True)
    return ClassifierTrainer(TrainClassifierConfig(**{**TINY, **changes}), load_data(data), out)


def run(folder: Path, **changes: object) -> Result:
    options = [f"--{k.replace('_', '-')}={v}" for k, v in {**TINY, **changes}.items() if k != "compile"]
    arguments = ["train-classifier", str(folder / "data.npz"), "--out", str(folder / "run"), "--threads", "1", "--no-compile"]
    return CliRunner().invoke(main, [*arguments, *options])


def bayes(t: int, levels: Schedule) -> float:
    """The accuracy of the best guess, the sign of the sum: Phi(alpha |x0| / sigma), |x0| the norm of an image."""
    distance = levels.alpha[t] / levels.sigma[t] * GREY * SIZE
    return 0.5 * (1 + math.erf(distance / math.sqrt(2)))


class TwoImages(nn.Module):
    """E[eps | x_t] of the two grey images, even odds: x0 = grey tanh(alpha grey sum(x_t) / sigma^2)."""

    def __init__(self, levels: Schedule):
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha, sigma = (torch.from_numpy(v)[t].view(-1, 1, 1, 1) for v in (self.levels.alpha, self.levels.sigma))
        total = x.sum((1, 2, 3), keepdim=True)
        return (x - alpha * GREY * torch.tanh(alpha * GREY * total / sigma**2)) / sigma


@pytest.mark.usefixtures("data")
def test_command_leaves_a_classifier_as_good_as_bayes_rule_that_guides(tmp_path: Path) -> None:
    """The whole way: data, training, its log, the file, and samples of which the classifier alone decides the class."""
    result = run(tmp_path, images=9600, save_every=150)
    assert result.exit_code == 0, result.output
    out = tmp_path / "run"
    assert {path.name for path in out.iterdir()} == {"classifier.safetensors", "state.safetensors", "log.csv"}
    last, levels = read_log(out / "log.csv")[-1], schedule("cosine")
    for t in LEVELS:
        # 1,000 held-out images: three standard deviations of a share of 0.7 are 0.044
        assert float(last[f"accuracy_t{t}"]) == pytest.approx(bayes(t, levels), abs=0.045), t
    model = Denoiser(TwoImages(levels).eval(), (1, SIZE, SIZE), 2, 2, schedule=levels)
    classifier = load_classifier(out / "classifier.safetensors")
    sampler = Sampler(model, steps=20, batch=64, spacing="trailing", classifier_guidance=ClassifierGuidance(classifier))
    labels = [0, 1] * 32
    for scale, low, high in ((0.0, 0.2, 0.8), (6.0, 0.95, 1.0)):
        bright = sampler(labels, seeds=3, classifier_scale=scale).mean((1, 2, 3)) > 0
        assert low <= (bright == torch.tensor(labels)).double().mean() <= high, scale


def test_resumed_run_equals_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    whole = trainer(data, tmp_path / "whole")
    whole.train()
    first = trainer(data, tmp_path / "parts")

    def interrupt() -> None:
        if first.step == 45:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(interrupt)
    second = trainer(data, tmp_path / "parts")
    assert second.step == 40
    second.train()
    for (name, a), b in zip(whole.ema.state_dict().items(), second.ema.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    logs = [read_log(run.log_path) for run in (whole, second)]
    for row in (*logs[0], *logs[1]):
        row.pop("images_per_second")
    assert logs[0] == logs[1]
    assert [int(row["step"]) for row in logs[0]] == [20, 40, 60]


def test_kill_between_the_last_files_loses_neither(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("classifier.save_classifier", "run.save_state"):
        out = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(f"fastcfg.training.{name}", kill)
            with pytest.raises(KeyboardInterrupt):
                trainer(data, out, images=64).train()
        again = trainer(data, out, images=64)
        again.train()
        kept = load_classifier(again.classifier_path).state_dict()
        assert all(torch.equal(value, kept[key]) for key, value in again.ema.state_dict().items()), name


def test_the_file_is_the_averaged_weights_and_says_how_they_came_about(data: Path, tmp_path: Path) -> None:
    made = trainer(data, tmp_path / "run", images=64, schedule="linear")
    made.train()
    read = load_classifier(made.classifier_path)
    for (name, a), b in zip(made.ema.state_dict().items(), read.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert read.schedule.name == "linear"
    assert '"images_seen": 64' in read_safetensors(made.classifier_path)[1]["training"]


def test_held_out_images_are_never_shown(tmp_path: Path) -> None:
    images = np.arange(100, dtype=np.uint8)[:, None, None].repeat(SIZE, 1).repeat(SIZE, 2)
    np.savez(tmp_path / "numbered.npz", images=images, labels=np.arange(100) % 2)
    rest, held = hold_out(load_data(tmp_path / "numbered.npz"), 30, seed=5)
    assert sorted([*rest.images[:, 0, 0, 0], *held.images[:, 0, 0, 0]]) == list(range(100))
    assert np.array_equal(held.labels, held.images[:, 0, 0, 0] % 2)
    assert len(held.images) == 30
    assert not np.array_equal(held.images, hold_out(load_data(tmp_path / "numbered.npz"), 30, seed=6)[1].images)
    made = trainer(tmp_path / "numbered.npz", tmp_path / "run", validation=30, seed=5, batch=10)
    shown = {int(value) for step in range(7) for value in made.data.images[made._draw(step)[0], 0, 0, 0]}
    assert shown == set(rest.images[:, 0, 0, 0].tolist())
    with pytest.raises(Error, match="cannot hold 100 images out of 100"):
        hold_out(load_data(tmp_path / "numbered.npz"), 100, seed=5)


def test_noisy_images_are_q_of_x_t(data: Path, tmp_path: Path) -> None:
    """alpha x0 + sigma eps with eps ~ N(0, 1), t uniform: what is left after alpha x0 is taken away says so."""
    made = trainer(data, tmp_path / "run", batch=200)
    x_t, labels, t = (torch.cat(parts) for parts in zip(*(made.batch(step) for step in range(30)), strict=True))
    levels = schedule("cosine")
    alpha, sigma = (torch.from_numpy(v)[t].view(-1, 1, 1, 1) for v in (levels.alpha, levels.sigma))
    eps = (x_t - alpha * torch.where(labels == 1, GREY, -GREY).view(-1, 1, 1, 1)) / sigma
    assert abs(eps.mean()) < 0.01  # 384,000 values: six standard deviations
    assert abs(eps.var() - 1) < 0.015
    assert abs(t.double().mean() - 499.5) < 4 * 288.7 / math.sqrt(6000)


def test_a_classifier_is_given_its_schedules_own_times(data: Path, tmp_path: Path) -> None:
    """Flow's are one above the table's positions, in training and where the averaged weights' accuracy is measured."""
    made, seen = trainer(data, tmp_path / "run", schedule="flow"), []
    made._forward = lambda x, t: seen.append(t) or made.model(x, t)
    made._loss(0)
    assert torch.equal(seen[0], made.batch(0)[2] + 1)
    asked = set()

    class Guess(nn.Module):
        """Class 1, whatever it sees."""

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            asked.update(t.tolist())
            return torch.tensor([0.0, 1.0]).expand(len(x), 2)

    made.ema = Guess()  # type: ignore[assignment]
    assert made._figures() == [float(made.held.labels.mean())] * len(LEVELS)
    assert asked == {level + 1 for level in LEVELS}


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Fashion-MNIST")
def test_the_shipped_classifier_is_as_accurate_as_its_docs_say(tmp_path: Path) -> None:
    """On 1,000 test images: docs/classifier-guidance.md tells of as many held out in training."""
    made = ClassifierTrainer(TrainClassifierConfig(compile=False), load_data(FASHION, "test"), tmp_path)
    made.ema = load_classifier("fashion-mnist")
    for found, told in zip(made._figures(), (0.899, 0.892, 0.868, 0.790, 0.651), strict=True):
        assert found == pytest.approx(told, abs=0.06)  # three standard deviations between two such sets


def test_another_run_is_not_continued(data: Path, tmp_path: Path) -> None:
    trainer(data, tmp_path / "run").save()
    with pytest.raises(Error, match="width was 8, now 16"):
        trainer(data, tmp_path / "run", width=16)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 12}, "width must be a multiple of 8, got 12"),
        ({"levels": 0}, "levels must be a whole number of at least 1, got 0"),
        ({"validation": 1600}, "cannot hold 1600 images out of 1600"),
        ({"schedule": "sigmoid"}, "unknown schedule 'sigmoid'"),
        ({"lr": -1.0}, "lr must lie in"),
        ({"seed": -1}, "seed must be a whole number in 0..4294967295, got -1"),
        ({"seed": 2**32}, "seed must be a whole number in 0..4294967295, got 4294967296"),
        ({"threads": 0}, "--threads must be at least 1"),
    ],
)
@pytest.mark.usefixtures("data")
def test_bad_input_exits_2_and_writes_nothing(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    result = run(tmp_path, **changes)
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert "Traceback" not in result.output
    assert not list((tmp_path / "run").glob("*"))
