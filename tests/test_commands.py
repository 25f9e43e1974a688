"""The command line: what each command prints, writes and exits with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import fastcfg
from fastcfg.cli import COMMANDS, main
from fastcfg.files import read_safetensors
from fastcfg.images import decode, load_vae, to_uint8
from fastcfg.models.denoiser import describe_dit


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("command", [*COMMANDS, "plot geometry", "kernels check"])
def test_help_has_an_example(command: str) -> None:
    output = run(*command.split(), "--help").output
    assert f"fastcfg {command}" in output or command in ("plot", "kernels", "job")


def test_sample_writes_the_adm_layout_in_the_order_of_labels(tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    run("sample", "--labels", "balanced", "--count", 12, "--scale", "2", "--steps", 3, "--out", out)
    with np.load(out) as archive:
        assert set(archive.files) == {"arr_0", "arr_1"}
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (12, 28, 28, 1)
    assert images.dtype == np.uint8
    assert labels.tolist() == [*range(10), 0, 1]
    again = fastcfg.Sampler(fastcfg.load("fashion-mnist"), steps=3)(labels.tolist(), 2.0, 0)
    assert np.array_equal(images, to_uint8(again))


def test_sample_says_which_scale_a_row_of_an_npz_has(tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    run("sample", "--labels", "3,7", "--scale", "1,2.5", "--steps", 2, "--out", out)
    with np.load(out) as archive:
        images, labels, scales = (archive[name] for name in ("arr_0", "arr_1", "arr_2"))
    assert labels.tolist() == [3, 3, 7, 7]
    assert scales.tolist() == [1, 2.5, 1, 2.5]
    assert scales.dtype == np.float32  # as in a job's export
    sampler = fastcfg.Sampler(fastcfg.load("fashion-mnist"), steps=2)
    assert np.array_equal(images, to_uint8(sampler(labels.tolist(), scales.tolist(), 0, indices=[0, 0, 1, 1])))


def test_scales_share_the_noise_of_their_label(tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    run("sample", "--labels", "3,7", "--scale", "1,4", "--steps", 3, "--seed", 5, "--out", out)
    tensors, metadata = read_safetensors(out)
    assert tensors["labels"].tolist() == [3, 3, 7, 7]
    assert tensors["scales"].tolist() == [1, 4, 1, 4]
    assert metadata["seed"] == "5"
    sampler = fastcfg.Sampler(fastcfg.load("fashion-mnist"), steps=3)
    assert torch.equal(tensors["samples"], sampler([3, 3, 7, 7], [1, 4, 1, 4], 5, indices=[0, 0, 1, 1]))


def test_a_classifiers_scale_is_the_scale(tmp_path: Path) -> None:
    out, guided = tmp_path / "x.safetensors", ("--classifier", "fashion-mnist", "--classifier-base", "conditional")
    run("sample", *guided, "--labels", "3", "--scale", "0,4", "--steps", 3, "--out", out)
    tensors, _ = read_safetensors(out)
    assert tensors["scales"].tolist() == [0, 4]
    by_classifier = fastcfg.ClassifierGuidance(fastcfg.load_classifier("fashion-mnist"), base="conditional")
    sampler = fastcfg.Sampler(fastcfg.load("fashion-mnist"), steps=3, classifier_guidance=by_classifier)
    wanted = sampler([3, 3], classifier_scale=[0.0, 4.0], indices=[0, 0])
    assert torch.equal(tensors["samples"], wanted)
    assert not torch.equal(wanted[0], wanted[1])
    told = json.loads(run("explain", *guided, "--steps", 3, "--batch", 2, "--json").output)
    assert (told["rows"], told["classifier_rows"]) == (6, 6)


def test_w_is_scale_minus_one(tmp_path: Path) -> None:
    for name, option in (("a.npz", ("--scale", "2.5")), ("b.npz", ("--w", "1.5"))):
        run("sample", "--labels", "1", *option, "--steps", 2, "--out", tmp_path / name)
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert np.array_equal(a["arr_0"], b["arr_0"])


@pytest.mark.parametrize("name", ["x.png", "x.npz", "x.safetensors"])
def test_samples_that_are_no_numbers_are_refused(name: str, tmp_path: Path) -> None:
    """As pixels they would be black."""
    module = fastcfg.DiT(input_size=8, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=3).eval()
    torch.nn.init.constant_(module.y_embedder.embedding_table.weight[1], torch.inf)
    fastcfg.save(describe_dit(module), tmp_path / "model.safetensors")
    made = ("--checkpoint", str(tmp_path / "model.safetensors"), "--steps", "2", "--labels", "0,1,2,1")
    result = CliRunner().invoke(main, ["sample", *made, "--out", str(tmp_path / name)])
    assert result.exit_code == 2
    assert "error: 2 of 4 samples, the first of them row 1, hold NaN or infinity" in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.fixture
def latent(tmp_path: Path) -> Path:
    """A checkpoint whose samples are latents [4, 8, 8]."""
    module = fastcfg.DiT(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=3).eval()
    fastcfg.save(describe_dit(module, latent=True), tmp_path / "latent.safetensors")
    return tmp_path / "latent.safetensors"


def saved_vae(folder: Path, channels: int) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=channels)
    vae.save_pretrained(folder)
    return folder


def test_latents_are_decoded(latent: Path, tmp_path: Path) -> None:
    vae, made = saved_vae(tmp_path / "vae", 4), ("sample", "--checkpoint", latent, "--steps", 2)
    run(*made, "--vae", vae, "--out", tmp_path / "x.npz")
    run(*made, "--out", tmp_path / "x.safetensors")
    latents = read_safetensors(tmp_path / "x.safetensors")[0]["samples"]
    with np.load(tmp_path / "x.npz") as archive:
        assert np.array_equal(archive["arr_0"], to_uint8(decode(latents, load_vae(vae, 4))))


@pytest.mark.parametrize(
    ("vae", "out", "says"),
    [
        ("nowhere", "x.png", "no VAE at"),
        ("a" * 300, "x.png", "too long"),
        ("empty", "x.png", "holds no diffusers AutoencoderKL"),
        ("another", "x.npz", "the VAE decodes 3 channels, the latents have 4"),
        ("vae", "x.safetensors", "--vae would be idle"),
    ],
)
def test_a_vae_is_tried_before_the_sampling(
    vae: str, out: str, says: str, latent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    if vae in ("empty", "another"):
        saved_vae(tmp_path / "another", 3)
    monkeypatch.setattr(fastcfg.Sampler, "__call__", lambda *_, **__: pytest.fail("it sampled"))
    arguments = ("sample", "--checkpoint", latent, "--vae", tmp_path / vae, "--out", tmp_path / out)
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize(
    ("arguments", "work"),
    [
        (("sample", "--out", "{dir}/x.png"), "fastcfg.cli.sample.load"),
        (("train", "{dir}", "--out", "{dir}/run"), "fastcfg.cli.train.prepare"),
        (("sweep", "{dir}/s.toml", "--out", "{dir}/run"), "fastcfg.cli.sweep.run_sweep"),
    ],
)
def test_interrupted_commands_exit_with_130(
    arguments: tuple[str, ...], work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, interrupted)
    result = CliRunner().invoke(main, [part.replace("{dir}", str(tmp_path)) for part in arguments])
    assert result.exit_code == 130
    assert result.output.endswith("\nerror: stopped by SIGINT\n")


@pytest.mark.parametrize(("scale", "cells"), [("1,2,3", (2, 3)), ("2", (2, 1))])
def test_grid_has_a_cell_for_every_sample(tmp_path: Path, scale: str, cells: tuple[int, int]) -> None:
    out = tmp_path / "x.png"
    run("sample", "--labels", "0,9", "--scale", scale, "--steps", 2, "--out", out)
    with Image.open(out) as image:
        width, height = image.size
    # 28 pixels enlarged threefold to at least 64, and a gap of 4
    assert height == 42 + cells[0] * 88
    assert cells[1] * 88 < width < cells[1] * 88 + 120


def test_explain_counts_rows_in_and_out_of_the_interval() -> None:
    text = run("explain", "--steps", 5, "--interval", "100:800", "--batch", 4).output
    data = json.loads(run("explain", "--steps", 5, "--interval", "100:800", "--batch", 4, "--json").output)
    assert data["guided_steps"] == 3
    assert data["rows"] == 3 * 8 + 2 * 4
    assert data["flops"] == data["flops_per_row"] * data["rows"]
    assert "5 steps of ddim" in text
    assert "32: 3 guided steps x 8, 2 unguided x 4" in text


def test_geometry_is_drawn_from_the_model(tmp_path: Path) -> None:
    out = tmp_path / "g.png"
    result = run("plot", "geometry", "--label", 9, "--timestep", 300, "--out", out)
    cosine = float(result.output.split("=")[1].split(";")[0])
    assert -1 < cosine < 1
    with Image.open(out) as image:
        assert min(image.size) > 400


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"predicts": "v"}, "predicts v"),
        ({"predicts": "flow", "schedule": "flow"}, "predicts flow"),
        ({"null_label": None}, "no null label"),
    ],
)
def test_geometry_of_a_model_without_it_is_refused_before_the_sampling(
    changes: dict[str, object], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fastcfg.DiT(
        input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3, learn_sigma=False,
        class_dropout_prob=0.0 if "null_label" in changes else 0.1,
    ).eval()  # fmt: skip
    others = {name: value for name, value in changes.items() if name != "null_label"}
    if "schedule" in others:
        others["schedule"] = fastcfg.schedule(str(others["schedule"]))
    fastcfg.save(describe_dit(module, **others), tmp_path / "x.safetensors")
    monkeypatch.setattr(fastcfg.Sampler, "__call__", lambda *_, **__: pytest.fail("it sampled"))
    arguments = ("plot", "geometry", "--checkpoint", tmp_path / "x.safetensors", "--label", 1, "--out", tmp_path / "x.png")
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    assert f"{tmp_path / 'x.safetensors'} " in result.output
    assert says in result.output
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("option", "says"), [(("--timestep", 1000), "timestep 1000 is out of range: 0..999"), (("--scale", "1,inf"), "got 1, inf")]
)
def test_geometry_that_cannot_be_drawn_is_refused_before_the_sampling(
    option: tuple[object, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastcfg.Sampler, "__call__", lambda *_, **__: pytest.fail("it sampled"))
    result = CliRunner().invoke(main, ["plot", "geometry", *map(str, option), "--out", str(tmp_path / "x.png")])
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert not (tmp_path / "x.png").exists()


def test_geometry_of_a_label_that_only_the_data_has_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((1, 28, 28), np.uint8), labels=[11])
    arguments = ("plot", "geometry", "--label", 11, "--data", tmp_path / "data.npz", "--out", tmp_path / "x.png")
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    assert "label 11 is out of range: the model's labels are 0..9" in result.output


@pytest.mark.parametrize(
    ("line", "module", "extra"),
    [
        ("plot geometry --out {folder}/x.png", "matplotlib", "plot"),
        ("train {folder}/x.npz --out {folder}/run", "matplotlib", "plot"),
        ("eval {folder}/x.npz {folder}/x.npz --features fashion-cnn", "scipy.linalg", "metrics"),
        ("eval {folder}/x.npz {folder}/x.npz --features fashion-cnn --metrics inception_score", "scipy.linalg", "metrics"),
    ],
)
def test_a_missing_extra_is_named_before_the_work(
    line: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = np.zeros((20, 28, 28, 1), np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "x.npz", images=images, labels=labels, arr_0=images, arr_1=labels)
    for work in ("fastcfg.sampler.Sampler.__call__", "fastcfg.training.loop.Trainer.__init__", "fastcfg.metrics.extract"):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("it worked"))
    monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(main, line.format(folder=tmp_path).split())
    assert result.exit_code == 2, result.output
    assert f"pip install 'fastcfg[{extra}]'" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
