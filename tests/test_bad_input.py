"""Bad input: one clear fastcfg.Error that names what arrived and what would do, before any work and with nothing written."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fastcfg
from fastcfg import files
from fastcfg.cli import main
from fastcfg.files import check_writable, replacing
from fastcfg.guidance import Interval, scale_table
from fastcfg.metrics import load_network, open_images
from fastcfg.models.dit import DiT, DiTConfig
from fastcfg.sampler import Sampler
from fastcfg.training.config import TrainConfig
from fastcfg.training.data import ImageData, load_data
from fastcfg.verify import verify

TINY = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}


def dit(**changes: object) -> DiT:
    return DiT(**{**TINY, "learn_sigma": False, **changes}).eval()


def sampler(**changes: object) -> Sampler:
    return Sampler(dit(), **{"steps": 2, "batch": 2, **changes})


def call(*arguments: object, **keywords: object) -> Callable[[], object]:
    return lambda: sampler()(*arguments, **keywords)


class Foreign(torch.nn.Module):
    """A module that says nothing of itself."""

    def __init__(self, out: int = 1):
        super().__init__()
        self.table = torch.nn.Embedding(3, 4)
        self.out = out

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.table(y)
        return x.new_zeros(len(x), self.out, *x.shape[2:])


class Tables(torch.nn.Module):
    """A module of tables: `times` rows for t, 11 for y."""

    def __init__(self, times: int, swapped: bool = False):
        super().__init__()
        self.t, self.y, self.swapped = torch.nn.Embedding(times, 1), torch.nn.Embedding(11, 1), swapped

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        t, y = (y, t) if self.swapped else (t, y)
        return x + (self.t(t) + self.y(y)).view(-1, 1, 1, 1)


def tables(times: int = 1000, swapped: bool = False, **changes: object) -> Callable[[], object]:
    return lambda: Sampler(Tables(times, swapped).eval(), **{"shape": (1, 8, 8), "null_label": 10, "steps": 2, **changes})


class ByEmbedding(torch.nn.Module):
    """A module whose y is an embedding [N, 2]."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y.sum(dim=1).view(-1, 1, 1, 1)


def embedded(labels: object) -> Callable[[], object]:
    return lambda: Sampler(ByEmbedding().eval(), shape=(1, 8, 8), null_label=torch.zeros(2), steps=2)(labels)


def converted() -> object:
    model = dit()
    made = Sampler(model, steps=2, engine="reference")
    model.double()
    return made([0])


def foreign(out: int = 1, **changes: object) -> Callable[[], object]:
    return lambda: Sampler(Foreign(out).eval(), **{"shape": (1, 8, 8), "null_label": 2, "steps": 2, **changes})


# What is asked, and words that the message must hold: what arrived, and what would do.
CASES: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    # labels
    "label too large": (call([0, 3]), ("label 3", "0..2")),
    "label negative": (call([-1]), ("label -1", "0..2")),
    "label null": (call([0, 1, 3]), ("label 3", "0..2")),
    "labels empty": (call([]), ("labels", "at least one")),
    "labels fractional": (call([0.5]), ("labels", "float64")),
    "labels a number": (call(3), ("labels", "[B]")),
    "labels ragged": (call([[0], [1, 2]]), ("labels", "[B]")),
    "labels text": (call(["cat"]), ("labels", "whole numbers")),
    "labels ragged embeddings": (embedded([torch.zeros(2), torch.zeros(3)]), ("embeddings [B, 2]", "list of B tensors")),
    "labels text for embeddings": (embedded(["cat"]), ("embeddings [B, 2]",)),
    "labels whole numbers for embeddings": (embedded([[1, 2]]), ("the null label's kind", "float32", "int64")),
    "labels beyond num_classes, which was null_label": (
        lambda: tables(null_label=5)()([7]),  # type: ignore[operator]
        ("label 7", "0..4", "pass num_classes="),
    ),
    "labels boolean": (call([True]), ("labels", "bool")),
    # scale
    "scale below 1": (call([0], 0.5), ("0.5", "at least 1")),
    "scale 0, unconditional": (call([0], 0), ("at least 1", "null label as label", "num_classes=null_label + 1")),
    "w -1, unconditional": (call([0], w=-1), ("at least 0", "null label as label", "num_classes=null_label + 1")),
    "scale NaN": (call([0], float("nan")), ("nan", "finite")),
    "scale infinite": (call([0], float("inf")), ("inf", "finite")),
    "scale text": (call([0], "4"), ("scale", "'4'")),
    "scale wrong rows": (call([0, 1], [1.0, 2.0, 3.0]), ("3 values", "2 rows")),
    "scale wrong steps": (call([0, 1], np.ones((3, 1)) * 2), ("[2, 1]", "[3, 1]")),
    "scale empty": (call([0], []), ("scale",)),
    "scale one bad row": (call([0, 1], [2.0, 0.0]), ("at least 1", "0.0")),
    "w negative": (call([0], w=-0.5), ("w must be", "-0.5")),
    "scale and w": (call([0], 2.0, w=1.0), ("once", "w = scale - 1")),
    # seeds and noise
    "seed fractional": (call([0], seeds=0.5), ("seeds", "0.5")),
    "seed too large": (call([0], seeds=2**64), ("64 bits",)),
    "seeds wrong count": (call([0], seeds=[1, 2]), ("2 arrived", "1 rows")),
    "seeds fractional tensor": (call([0], seeds=torch.tensor([0.5])), ("seeds", "whole numbers")),
    "indices wrong count": (call([0], indices=[1, 2]), ("2 arrived", "1 rows")),
    "indices negative": (call([0], indices=[-1]), ("indices", "-1")),
    "x_T wrong size": (call([0], x_T=torch.zeros(1, 1, 9, 8)), ("[1, 1, 8, 8]", "[1, 1, 9, 8]")),
    "x_T whole numbers": (call([0], x_T=torch.zeros(1, 1, 8, 8, dtype=torch.int64)), ("x_T", "floating-point")),
    "noise wrong steps": (call([0], noise=torch.zeros(3, 1, 1, 8, 8)), ("[2, 1, 1, 8, 8]", "[3, 1, 1, 8, 8]")),
    # steps, solver, spacing
    "no steps": (lambda: sampler(steps=0), ("steps", "0")),
    "negative steps": (lambda: sampler(steps=-5), ("steps", "-5")),
    "too many steps": (lambda: sampler(steps=1001), ("1001", "1000")),
    "steps fractional": (lambda: sampler(steps=2.5), ("steps", "2.5")),
    "ddim without a stride": (lambda: sampler(steps=60, spacing="ddim"), ("60", "nearest")),
    "dit with one step": (lambda: sampler(steps=1), ("'dit'", "'trailing'")),
    "ddim with one step": (lambda: sampler(steps=1, spacing="ddim"), ("'ddim'", "'trailing'")),
    "leading with one step": (lambda: sampler(steps=1, spacing="leading"), ("'leading'", "'trailing'")),
    "linspace with one step": (lambda: sampler(steps=1, spacing="linspace"), ("'linspace'", "'trailing'")),
    "unknown spacing": (lambda: sampler(spacing="karras"), ("'karras'", "trailing")),
    "rising timesteps": (lambda: sampler(spacing=[1, 2]), ("fall",)),
    "timesteps out of range": (lambda: sampler(spacing=[1000, 1]), ("0..999", "1000")),
    "timesteps of another count": (lambda: sampler(spacing=[3, 2, 1]), ("2 steps", "(3,)")),
    "unknown solver": (lambda: sampler(solver="heun"), ("'heun'", "ddim")),
    "eta without ddim": (lambda: sampler(solver="dpmpp_2m", eta=0.5), ("no eta", "ddim")),
    "eta above 1": (lambda: sampler(eta=1.5), ("eta", "1.5")),
    "eta NaN": (lambda: sampler(eta=float("nan")), ("eta", "nan")),
    "variance without ddpm": (lambda: sampler(variance="fixed_large"), ("'ddim'", "'ddpm'")),
    "unknown variance": (lambda: sampler(solver="ddpm", variance="huge"), ("'huge'", "posterior")),
    "variance not learned": (lambda: sampler(solver="ddpm", variance="learned_range"), ("predicts no variance",)),
    "solver that is a list": (lambda: sampler(solver=["ddim"]), ("['ddim']", "dpmpp_2m")),
    "engine that is a list": (lambda: sampler(engine=["cpu"]), ("['cpu']", "reference")),
    "dtype that is a set": (lambda: sampler(dtype={"fp32"}), ("{'fp32'}", "bf16")),
    "variance that is a list": (lambda: sampler(solver="ddpm", variance=[]), ("[]", "posterior")),
    "prediction that is a list": (lambda: sampler(predicts=["v"]), ("['v']", "eps")),
    "eta that is two": (lambda: sampler(eta=np.array([0.5, 0.5])), ("eta", "[0, 1]")),
    "unknown clip": (lambda: sampler(clip="hard"), ("'hard'", "keep_eps")),
    # guidance
    "interval upside down": (lambda: sampler(interval=(261, 100)), ("261", "100", "lower")),
    "interval of one": (lambda: sampler(interval=(5,)), ("interval", "(5,)")),
    "interval text": (lambda: sampler(interval="low:high"), ("'low:high'", "100:261")),
    "interval negative": (lambda: sampler(interval=(-1, 5)), ("interval", "-1")),
    "interval NaN": (lambda: Interval(float("nan"), 5), ("interval", "nan")),
    "interval in fractions": (lambda: sampler(interval="0.2:0.8"), ("0.2:0.8", "t = 999 to 0", "wider")),
    "interval beyond the run": (lambda: sampler(interval=(5000, 6000)), ("5000:6000", "t = 999 to 0", "wider")),
    "interval between the steps": (lambda: sampler(interval=(100, 261)), ("100:261", "2 steps", "more steps")),
    "interval unit": (lambda: Interval(0, 5, "minutes"), ("'minutes'", "sigma")),
    "rescale above 1": (lambda: sampler(rescale=1.5), ("[0, 1]", "1.5")),
    "rescale negative": (lambda: sampler(rescale=-0.1), ("[0, 1]", "-0.1")),
    "no guided channels": (lambda: sampler(guidance_channels=0), ("guidance_channels", "0")),
    "too many guided channels": (lambda: sampler(guidance_channels=3), ("3", "1 channels")),
    "scale of rank 3": (lambda: scale_table(np.ones((1, 1, 1)), 1, 1), ("shape", "[1, 1, 1]")),
    "classifier guidance by a bare module": (
        lambda: sampler(classifier_guidance=torch.nn.Identity()),
        ("fastcfg.ClassifierGuidance", "Identity"),
    ),
    "classifier guidance by a name": (lambda: sampler(classifier_guidance="fashion-mnist"), ("load_classifier", "str")),
    # batch, engine, device, dtype
    "batch of none": (lambda: sampler(batch=0), ("batch", "0")),
    "unknown engine": (lambda: sampler(engine="warp"), ("'warp'", "reference")),
    "unknown dtype": (lambda: sampler(dtype="fp8"), ("'fp8'", "bf16")),
    "unknown device": (lambda: sampler(device="abacus"), ("'abacus'",)),
    "device whose library is not here": (lambda: sampler(device="hpu"), ("'hpu'",)),
    # models
    "not a module": (lambda: Sampler(lambda x, t, y: x), ("torch.nn.Module", "function")),
    "null label beyond the table": (lambda: sampler(null_label=4), ("null_label 4", "0..3")),
    "null label negative": (lambda: sampler(null_label=-1), ("null_label", "-1")),
    "model without null label": (
        lambda: Sampler(dit(class_dropout_prob=0.0), steps=2)([0], 2.0),
        ("no null label", "scale 1"),
    ),
    "another shape": (lambda: sampler(shape=(3, 8, 8)), ("(3, 8, 8)", "(1, 8, 8)")),
    "another shape, as a list": (lambda: sampler(shape=[3, 8, 8]), ("(3, 8, 8)", "(1, 8, 8)")),
    "classes it lacks": (lambda: sampler(num_classes=10), ("num_classes 10", "0..3")),
    "classes text": (lambda: sampler(num_classes="3"), ("num_classes", "'3'")),
    "foreign classes fractional": (foreign(num_classes=2.5), ("num_classes", "2.5")),
    "unknown schedule": (lambda: sampler(schedule="sigmoid"), ("'sigmoid'", "cosine")),
    "unknown prediction": (lambda: sampler(predicts="score"), ("'score'", "eps")),
    "flow schedule, eps": (lambda: sampler(schedule="flow"), ("flow", "'eps'")),
    "foreign without shape": (lambda: Sampler(Foreign(), null_label=2), ("shape=(C, H, W)",)),
    "foreign without null label": (lambda: Sampler(Foreign(), shape=(1, 8, 8)), ("null_label=",)),
    "foreign null label it lacks": (foreign(null_label=3), ("could not be called", "3")),
    "foreign null label 0, classes not told": (foreign(null_label=0), ("null_label 0", "pass num_classes=")),
    "foreign null label 0 as a tensor": (foreign(null_label=torch.tensor(0)), ("null_label 0", "pass num_classes=")),
    "null label as a tensor, beyond the table": (lambda: sampler(null_label=torch.tensor(4)), ("null_label 4", "0..3")),
    "null label a boolean tensor": (lambda: sampler(null_label=torch.tensor(True)), ("null_label", "True")),
    "Denoiser that tells no classes": (
        lambda: Sampler(fastcfg.Denoiser(Foreign().eval(), (1, 8, 8), 2, None)),
        ("pass num_classes=",),
    ),
    "foreign(x, y, t)": (tables(swapped=True), ("Tables", "t = 999 (int64)", "y = 9")),
    "foreign with 500 timesteps": (tables(500), ("t = 999 (int64)",)),
    "foreign flow whose table lacks T": (
        tables(schedule="flow", predicts="flow", solver="euler"),
        ("t = 1000 (int64)",),
    ),
    "foreign told of classes that it lacks": (tables(num_classes=20), ("y = 19", "num_classes = 20")),
    "foreign told so as a Denoiser": (
        lambda: Sampler(fastcfg.Denoiser(Tables(1000).eval(), (1, 8, 8), 10, 20)),
        ("y = 19", "num_classes = 20"),
    ),
    "foreign table of t, given fractions": (
        tables(solver="euler", spacing="linspace", steps=5),
        ("t = 999 (float32)",),
    ),
    "foreign with other channels": (foreign(out=5), ("[1, 5, 8, 8]", "1 or 2 channels")),
    "training mode": (lambda: Sampler(dit().train(), steps=2)([0], 2.0), ("training mode", "eval()")),
    "foreign in training mode": (
        lambda: Sampler(Foreign(), shape=(1, 8, 8), null_label=2),
        ("training mode", "eval()"),
    ),
    "model of another precision by now": (converted, ("torch.float64", "torch.float32", "sampler.refresh()")),
    "sampler pickled": (lambda: pickle.dumps(sampler(engine="cpu")), ("'cpu'", "make one in each process")),
    "sampler copied": (lambda: copy.deepcopy(sampler(engine="cpu")), ("'cpu'", "make one in each process")),
    "foreign's sampler pickled": (lambda: pickle.dumps(foreign(engine="cpu")()), ("'cpu'", "make one in each process")),
    "plan of a schedule's name": (lambda: fastcfg.make_plan("linear", steps=2), ("'linear'", "fastcfg.schedule")),
    # predict
    "predict: t a number": (lambda: sampler().predict(torch.zeros(1, 1, 8, 8), 5, [0]), ("t [N]", "int")),
    "predict: no rows": (lambda: sampler().predict(torch.zeros(0, 1, 8, 8), torch.zeros(0), None), ("at least 1", "[0]")),
    "DiT of a broken size": (lambda: DiT(**{**TINY, "patch_size": 3}), ("input_size 8", "patch_size 3")),
    "DiT of no known name": (lambda: DiT.from_name("DiT-XXL/2"), ("'DiT-XXL/2'", "DiT-XL/2")),
    "DiT with an odd number of heads": (lambda: DiT(**{**TINY, "num_heads": 3}), ("num_heads 3",)),
    "DiT config with unknown keys": (lambda: DiTConfig.from_json({"width": 3}), ("'width'", "hidden_size")),
    # training
    "train: dropout of 1": (lambda: TrainConfig(label_dropout=1.0), ("label_dropout", "1.0")),
    "train: unknown optimizer": (lambda: TrainConfig(optimizer="sgd"), ("'sgd'", "muon")),
    "train: no images": (lambda: TrainConfig(images=0), ("images", "0")),
    "train: flow without its schedule": (lambda: TrainConfig(predicts="flow"), ("flow",)),
    "data: oblong images": (
        lambda: ImageData(np.zeros((1, 1, 8, 9), np.uint8), np.zeros(1, np.int64), ("a",)),
        ("square", "[1, 1, 8, 9]"),
    ),
    "data: missing": (lambda: load_data("/nowhere/at/all"), ("/nowhere/at/all", "IDX")),
    # checkpoints
    "checkpoint: unknown": (lambda: fastcfg.load("fashion-nist"), ("fashion-nist", "fashion-mnist")),
    "checkpoint: unknown device": (lambda: fastcfg.load("fashion-mnist", device="abacus"), ("'abacus'", "device")),
    "feature network: unknown device": (lambda: load_network("fashion-cnn", "abacus"), ("'abacus'", "device")),
    "classifier: unknown device": (lambda: fastcfg.load_classifier("fashion-mnist", "abacus"), ("'abacus'", "device")),
    "checkpoint: a bare DiT saved": (lambda: fastcfg.save(dit(), "/nowhere/x.safetensors"), ("Denoiser", "DiT")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_python_says_what_arrived_and_what_would_do(case: str) -> None:
    action, words = CASES[case]
    with pytest.raises(fastcfg.Error) as caught:
        action()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


class Planted:
    """A pickle that would run code when loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def _truncated(folder: Path) -> Path:
    path = folder / "short.safetensors"
    fastcfg.save(fastcfg.models.denoiser.describe_dit(dit()), path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def _damaged(folder: Path, **changes: str) -> Path:
    from fastcfg.files import read_safetensors, write_safetensors

    path = folder / "damaged.safetensors"
    fastcfg.save(fastcfg.models.denoiser.describe_dit(dit()), path)
    tensors, metadata = read_safetensors(path)
    write_safetensors(path, tensors, {**metadata, **changes})
    return path


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _pickle(folder: Path) -> Path:
    return _written(folder / "planted.pt", pickle.dumps({"model": Planted(folder / "mark")}))


def _run_folder(folder: Path) -> Path:
    (folder / "run").mkdir()
    fastcfg.save(fastcfg.models.denoiser.describe_dit(dit()), folder / "run" / "model.safetensors")
    return folder / "run"


FILES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "truncated safetensors": (_truncated, ("not a whole safetensors",)),
    "empty safetensors": (lambda d: _written(d / "x.safetensors", b""), ("not a whole safetensors",)),
    "text as safetensors": (lambda d: _written(d / "x.safetensors", b"hello, world"), ("not a whole safetensors",)),
    "foreign safetensors": (lambda d: _damaged(d, format="other"), ("another kind", "fastcfg-1")),
    "config of another size": (lambda d: _damaged(d, config=json.dumps({**TINY, "depth": 2})), ("missing", "blocks.1")),
    "schedule unknown": (lambda d: _damaged(d, schedule=json.dumps({"name": "sigmoid"})), ("sigmoid",)),
    "description cut": (lambda d: _damaged(d, predicts='"ep'), ("damaged",)),
    "pickle with code": (_pickle, ("not run",)),
    "text as pt": (lambda d: _written(d / "x.pt", b"hello, world"), ("x.pt",)),
    "another suffix": (lambda d: _written(d / "x.onnx", b"hello"), (".safetensors", ".pt")),
    "folder without config": (lambda d: d, ("config.json",)),
    "folder of a training run": (_run_folder, ("no config.json", "name the model in it", "/run/model.safetensors")),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_checkpoint_is_refused(case: str, tmp_path: Path) -> None:
    make, words = FILES[case]
    path = make(tmp_path)
    with pytest.raises(fastcfg.Error) as caught:
        fastcfg.load(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "mark").exists(), "code in a pickle was run"


REACHING: dict[str, Callable[[Path], object]] = {
    "load": fastcfg.load,
    "load_classifier": fastcfg.load_classifier,
    "save": lambda path: fastcfg.save(fastcfg.models.denoiser.describe_dit(dit()), path),
    "verify": lambda path: list(verify(path, path)),
    "open_images": open_images,
    "open_images of a split": lambda path: open_images(f"{path}:test"),
    "check_writable": check_writable,
}


@pytest.mark.parametrize("case", REACHING)
def test_a_path_that_cannot_be_reached_is_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(fastcfg.Error, match=r"/aaa.*: File name too long"):
        REACHING[case](tmp_path / ("a" * 300))
    stat = os.stat

    def closed(path: object, *arguments: object, **keywords: object) -> os.stat_result:
        if str(path).startswith(f"{tmp_path}/closed/"):  # a folder of mode 700 keeps out all but root, who may be who tests
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, *arguments, **keywords)  # type: ignore[call-overload]

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "stat", closed)
    with pytest.raises(fastcfg.Error, match=r"/closed/x.*: Permission denied"):
        REACHING[case](tmp_path / "closed" / "x.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = _written(tmp_path / f"x{suffix}", b"hello")
    monkeypatch.setattr(files, "open", closed, raising=False)
    with pytest.raises(fastcfg.Error, match=rf"^cannot read {path}: Permission denied$"):
        fastcfg.load(path)


def test_a_name_too_long_for_its_temporary_is_refused_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 245 + ".png")
    with pytest.raises(fastcfg.Error, match=r"cannot write .*: File name too long"):
        check_writable(path)
    with pytest.raises(fastcfg.Error, match=r"cannot write .*: File name too long"), replacing(path) as temporary:
        temporary.write_bytes(b"")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """As /dev/null was, where root gave it for the table of a benchmark."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(fastcfg.Error, match=r"cannot write .*pipe: it is no file but a device or a pipe"):
        files.write_file(tmp_path / "pipe", lambda temporary: temporary.write_text("x"))
    assert (tmp_path / "pipe").is_fifo()


def test_who_writes_one_file_at_once_does_not_mix_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that compile the C, or two containers, where all processes are number 1: both are at it before either is
    done."""
    monkeypatch.setattr(threading, "get_native_id", os.getpid)
    path, both = tmp_path / "x", threading.Barrier(2, timeout=30)

    def write(content: bytes) -> bytes:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
            both.wait()
            return temporary.read_bytes()

    contents = [b"one" * 1000, b"another" * 1000]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, contents)) == contents
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "folder missing": (["sample", "--out", "{dir}/no/x.png"], ("does not exist",)),
    "out of another kind": (["sample", "--out", "{dir}/x.jpg"], (".png", ".npz")),
    "out is a folder": (["sample", "--out", "{dir}/folder.png"], ("is a folder",)),
    "out's name too long": (["sample", "--out", "{dir}/" + "a" * 245 + ".png"], ("too long",)),
    "vae of a model of pixels": (["sample", "--vae", "{dir}", "--out", "{dir}/x.png"], ("--vae", "pixels")),
    "labels text": (["sample", "--labels", "a,b", "--out", "{dir}/x.png"], ("--labels", "'a,b'")),
    "label out of range": (["sample", "--labels", "10", "--out", "{dir}/x.png"], ("label 10", "0..9")),
    "count of none": (["sample", "--count", "0", "--out", "{dir}/x.png"], ("--count",)),
    "scale below 1": (["sample", "--scale", "0.5", "--out", "{dir}/x.png"], ("at least 1",)),
    "scale and w": (["sample", "--scale", "2", "--w", "1", "--out", "{dir}/x.png"], ("once",)),
    "classifier missing": (["sample", "--classifier", "{dir}/none.safetensors", "--out", "{dir}/x.png"], ("none.safetensors",)),
    "base without classifier": (["sample", "--classifier-base", "null", "--out", "{dir}/x.png"], ("--classifier",)),
    "classifier and w": (["sample", "--classifier", "fashion-mnist", "--w", "1", "--out", "{dir}/x.png"], ("--w", "--scale")),
    "interval in fractions": (["sample", "--interval", "0.2:0.8", "--out", "{dir}/x.png"], ("0.2:0.8", "t = 999 to 0")),
    "clip": (["sample", "--clip", "maybe", "--out", "{dir}/x.png"], ("--clip", "keep_eps")),
    "checkpoint": (["sample", "--checkpoint", "{dir}/none.pt", "--out", "{dir}/x.png"], ("none.pt",)),
    "solver": (["explain", "--solver", "heun"], ("'heun'",)),
    "golden file missing": (["verify", "{dir}/a.safetensors", "{dir}/b.safetensors"], ("no file",)),
    "training data missing": (["train", "{dir}/none", "--out", "{dir}/run"], ("none",)),
    "threads": (["train", "{dir}/data.npz", "--threads", "0", "--out", "{dir}/run"], ("--threads",)),
    "batch beyond the data": (
        ["train", "{dir}/data.npz", "--batch", "5", "--images", "5", "--out", "{dir}/run"],
        ("batch 5", "4 images"),
    ),
    "held-out images": (
        ["train-classifier", "{dir}/data.npz", "--validation", "2", "--batch", "3", "--images", "3", "--out", "{dir}/run"],
        ("batch 3", "2 images to train on"),
    ),
    "geometry timestep": (["plot", "geometry", "--timestep", "1000", "--out", "{dir}/x.png"], ("1000", "0..999")),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_command_exits_2_and_writes_nothing(case: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    np.savez(tmp_path / "data.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
    before = sorted(tmp_path.rglob("*"))
    arguments, words = COMMANDS[case]
    result = CliRunner().invoke(main, [part.replace("{dir}", str(tmp_path)) for part in arguments])
    assert result.exit_code == 2, result.output
    assert all(word in result.output for word in words), result.output
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_unwritable_folder_is_refused_before_the_work() -> None:
    # /proc takes no files, whoever asks: a read-only place that needs no permissions to be set up.
    result = CliRunner().invoke(main, ["sample", "--out", "/proc/x.png"])
    assert result.exit_code == 2
    assert "cannot write /proc/x.png" in result.output


def test_there_are_at_least_sixty_cases() -> None:
    assert len(CASES) + len(FILES) + len(COMMANDS) >= 60
