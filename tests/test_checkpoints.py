"""Checkpoints: what is saved comes back, foreign formats give their own library's output, and no code in a file is run."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastcfg
from fastcfg.checkpoints import infer_config
from fastcfg.images import decode, load_vae
from fastcfg.models.classifier import Classifier, ClassifierConfig, save_classifier
from fastcfg.models.denoiser import Denoiser, describe_dit

CONFIG = {"input_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 1, "num_classes": 5}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew, so that no layer is zero and no two are equal."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "pos_embed":
                parameter.normal_(std=0.1)
    return module.eval()


def inputs(channels: int = 4, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and labels; 5 is the null label."""
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 400, 999]), torch.tensor([0, 4, 5])


@pytest.fixture(scope="module")
def model() -> Denoiser:
    module = randomise(fastcfg.DiT(**CONFIG))
    return describe_dit(
        module,
        schedule=fastcfg.schedule("scaled_linear", T=500),
        predicts="v",
        clip="keep_eps",
        latent=True,
        label_names=("T-shirt", "Hose", "Größe", "4", ""),
        training={"images": 1_000_000, "dataset": "fashion", "nested": {"lr": 1e-3}},
    )


@pytest.fixture
def saved(model: Denoiser, tmp_path: Path) -> Path:
    fastcfg.save(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": fastcfg.schedule("linear"), "predicts": "eps", "clip": False, "latent": False},
        {"schedule": fastcfg.schedule("cosine", T=100), "clip": True, "label_names": None, "training": {}, "eta": 0.7},
        {"schedule": fastcfg.schedule("log_snr_cosine", lambda_min=-15.0), "predicts": "x0"},
        {"schedule": fastcfg.schedule("flow"), "predicts": "flow", "low_precision": False},
    ],
)
def test_round_trip(model: Denoiser, changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    module = fastcfg.DiT(model.module.config)
    module.load_state_dict(model.module.state_dict())
    before = replace(model, module=module.to(dtype), **changes)
    fastcfg.save(before, tmp_path / "a.safetensors")
    after = fastcfg.load(tmp_path / "a.safetensors")
    assert after.module.config == before.module.config
    state = after.module.state_dict()
    assert state.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name], value), name
    assert np.array_equal(after.schedule.alpha, before.schedule.alpha)
    assert np.array_equal(after.schedule.sigma, before.schedule.sigma)
    for name in (field.name for field in fields(before) if field.name not in ("module", "schedule")):
        assert getattr(after, name) == getattr(before, name), name
    assert not any(module.training for module in after.module.modules())
    assert not any(parameter.requires_grad for parameter in after.module.parameters())


@pytest.mark.parametrize(
    "config",
    [
        {"class_dropout_prob": 0.0},
        {"learn_sigma": False, "in_channels": 1},
        {"time_frequency_shift": 1, "mlp_norm_eps": 1e-5, "block_conditioning": True},
        {"patch_size": 4, "mlp_ratio": 2.5},
    ],
)
def test_round_trip_of_other_configs(config: dict[str, Any], tmp_path: Path) -> None:
    before = describe_dit(randomise(fastcfg.DiT(**(CONFIG | config))))
    fastcfg.save(before, tmp_path / "a.safetensors")
    after = fastcfg.load(tmp_path / "a.safetensors")
    assert after.module.config == before.module.config
    assert (after.null_label is None) == ("class_dropout_prob" in config)
    x, t, y = inputs(before.shape[0])
    y = y.clamp(max=4)
    assert torch.equal(after.module(x, t, y), before.module(x, t, y))


def test_only_a_dit_is_saved(tmp_path: Path) -> None:
    other = Denoiser(nn.Conv2d(3, 3, 1), (3, 8, 8), 0, 5)
    with pytest.raises(fastcfg.Error, match="Conv2d"):
        fastcfg.save(other, tmp_path / "a.safetensors")
    with pytest.raises(fastcfg.Error, match=r"want a fastcfg\.Denoiser, .* got DiT"):
        fastcfg.save(fastcfg.DiT(**CONFIG), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def own_schedules() -> list[fastcfg.Schedule]:
    linear, cosine = fastcfg.schedule("linear"), fastcfg.schedule("cosine")
    return [
        replace(linear, alpha=cosine.alpha, sigma=cosine.sigma),
        replace(linear, time_offset=1.0),
        fastcfg.Schedule("mine", cosine.alpha, cosine.sigma, {}),
    ]


@pytest.mark.parametrize("schedule", own_schedules(), ids=["another table", "another offset", "another name"])
def test_a_schedule_that_would_be_lost_is_not_saved(model: Denoiser, schedule: fastcfg.Schedule, tmp_path: Path) -> None:
    with pytest.raises(fastcfg.Error, match=f"schedule '{schedule.name}' cannot be stored"):
        fastcfg.save(replace(model, schedule=schedule), tmp_path / "a.safetensors")
    with pytest.raises(fastcfg.Error, match=f"schedule '{schedule.name}' cannot be stored"):
        save_classifier(Classifier(ClassifierConfig(), schedule), tmp_path / "b.safetensors", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("load", [fastcfg.load, fastcfg.load_classifier])
def test_devices(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("abacus", "cuda:99"):
        with pytest.raises(fastcfg.Error, match=f"device '{device}' cannot be used here"):
            load("fashion-mnist", device=device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("auto", torch.device("cpu")):
        loaded = load("fashion-mnist", device=device)
        assert next(getattr(loaded, "module", loaded).parameters()).device == torch.device("cpu")


def altered(path: Path, target: Path, **metadata: str | None) -> Path:
    """A copy of our file with some metadata replaced, or removed where None."""
    with safe_open(path, "pt") as file:
        kept = {**file.metadata(), **metadata}
    save_file(load_file(path), target, {key: value for key, value in kept.items() if value is not None})
    return target


def config_with(**changes: Any) -> str:
    return json.dumps({**fastcfg.DiTConfig(**CONFIG).to_json(), **changes})


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"format": None}, "another kind"),
        ({"format": "fastcfg-9"}, "another kind"),
        ({"config": None}, "config"),
        ({"config": "{"}, "damaged"),
        ({"config": "5"}, "object"),
        ({"config": '{"depth": "x"}'}, "depth"),
        ({"config": '{"width": 5}'}, "width"),
        ({"config": config_with(depth=3)}, "blocks.2"),
        ({"config": config_with(depth=1)}, "blocks.1"),
        ({"config": config_with(hidden_size=32)}, r"\b32\]"),
        ({"config": config_with(mlp_ratio="4")}, "mlp_ratio"),
        ({"config": config_with(mlp_ratio=-1)}, "mlp_ratio"),
        ({"config": config_with(mlp_norm_eps=None)}, "mlp_norm_eps"),
        ({"config": config_with(time_frequency_shift=128)}, "time_frequency_shift"),
        ({"config": config_with(class_dropout_prob="a")}, "class_dropout_prob"),
        ({"config": config_with(learn_sigma=3)}, "learn_sigma"),
        ({"schedule": '{"name": "zz"}'}, "zz"),
        ({"schedule": '{"name": ["linear"]}'}, "schedule"),
        ({"schedule": '{"name": "linear", "beta_start": "x"}'}, "linear"),
        ({"schedule": '{"name": "linear", "T": 1}'}, "T must"),
        ({"predicts": '"noise"'}, "noise"),
        ({"clip": '"yes"'}, "yes"),
        ({"label_names": '["a"]'}, "names 1 labels"),
        ({"label_names": "5"}, "damaged"),
        ({"training": "5"}, "damaged"),
        ({"latent": None}, "latent"),
    ],
)
def test_damaged_description(saved: Path, metadata: dict[str, str | None], match: str, tmp_path: Path) -> None:
    with pytest.raises(fastcfg.Error, match=match):
        fastcfg.load(altered(saved, tmp_path / "b.safetensors", **metadata))


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99, -1])
def test_truncated_safetensors(saved: Path, kept: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[:-1] if kept == -1 else data[: int(kept * len(data))])
    with pytest.raises(fastcfg.Error, match="not a whole safetensors"):
        fastcfg.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("pos_embed"),
        lambda s: s.update(surplus=torch.zeros(1)),
        lambda s: s.update({"final_layer.linear.bias": torch.zeros(31)}),
        lambda s: s.update({"final_layer.linear.bias": torch.zeros(32, dtype=torch.int64)}),
    ],
)
def test_tensors_that_do_not_fit(saved: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    change(tensors)
    save_file(tensors, saved, metadata)
    with pytest.raises(fastcfg.Error, match=r"pos_embed|surplus|final_layer\.linear\.bias"):
        fastcfg.load(saved)


@pytest.mark.parametrize("name", ["fashion-minst", "a.safetensors", "a.bin", "empty"])
def test_nothing_to_load(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").write_bytes(b"1")
    with pytest.raises(fastcfg.Error, match=name):
        fastcfg.load(tmp_path / name)


# The official .pt


def official(key: str | None, tmp_path: Path, **others: Any) -> Path:
    """An official checkpoint whose good weights are under `key`, with other weights of the same shapes under "model"."""
    good, other = (randomise(fastcfg.DiT(**CONFIG), seed).state_dict() for seed in (1, 2))
    content = good if key is None else {"model": other, key: good, **others}
    torch.save(content, tmp_path / "DiT.pt")
    return tmp_path / "DiT.pt"


@pytest.mark.parametrize("key", [None, "ema", "model"])
def test_official_pt(key: str | None, tmp_path: Path) -> None:
    loaded = fastcfg.load(official(key, tmp_path))
    want = randomise(fastcfg.DiT(**CONFIG), 1)
    assert loaded.module.config == want.config
    assert loaded.schedule.to_json() == fastcfg.schedule("linear").to_json()
    assert (loaded.predicts, loaded.latent, loaded.null_label, loaded.clip) == ("eps", True, 5, False)
    assert torch.equal(loaded.module(*inputs()), want(*inputs()))


def test_official_training_checkpoint(tmp_path: Path) -> None:
    """As train.py of the official code writes it: an optimiser's state, and its options as an argparse.Namespace."""
    module = fastcfg.DiT(**CONFIG)
    optimiser = torch.optim.AdamW(module.parameters())
    module(*inputs()).sum().backward()
    optimiser.step()
    options = argparse.Namespace(model="DiT-XL/2", image_size=256, lr=1e-4, results_dir=None)
    loaded = fastcfg.load(official("ema", tmp_path, opt=optimiser.state_dict(), args=options))
    assert torch.equal(loaded.module(*inputs()), randomise(fastcfg.DiT(**CONFIG), 1)(*inputs()))


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 384, "num_heads": 6, "depth": 1},
        {"hidden_size": 32},
        {"learn_sigma": False, "in_channels": 3},
        {"patch_size": 4, "mlp_ratio": 3.3},
        {"num_classes": 1000, "input_size": 16, "depth": 11},
    ],
)
def test_config_is_read_off_the_shapes(config: dict[str, Any], tmp_path: Path) -> None:
    module = fastcfg.DiT(**(CONFIG | config))
    torch.save(module.state_dict(), tmp_path / "a.pt")
    read = fastcfg.load(tmp_path / "a.pt").module.config
    assert replace(read, mlp_ratio=module.config.mlp_ratio) == module.config
    assert read.mlp_width == module.config.mlp_width


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-B/8", "DiT-L/4", "DiT-XL/2"])
def test_published_shapes_have_their_heads(name: str) -> None:
    with torch.device("meta"):
        module = fastcfg.DiT.from_name(name)
    assert infer_config(module.state_dict(), name) == module.config


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return pathlib.Path.touch, (self.path,)


class OpensFile(Bomb):
    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("bomb", [Bomb, OpensFile])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(bomb: type[Bomb], inside: bool, zipped: bool, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    code: Any = bomb(target)
    content = {"ema": fastcfg.DiT(**CONFIG).state_dict(), "args": argparse.Namespace(x=code) if inside else code}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(fastcfg.Error, match=r"wants .*code in a file is not run"):
        fastcfg.load(tmp_path / "a.pt")
    assert not target.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the file is a bomb: it goes off where nobody looks
    assert target.exists()


def test_allowing_the_namespace_ends_with_the_load(tmp_path: Path) -> None:
    fastcfg.load(official("ema", tmp_path, args=argparse.Namespace()))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


STATE = {name: value.clone() for name, value in fastcfg.DiT(**CONFIG).state_dict().items()}


@pytest.mark.parametrize(
    "content",
    [
        5,
        [torch.zeros(1)],
        {},
        {"ema": {}},
        {"ema": {"a": 1}},
        {"x_embedder.proj.weight": torch.zeros(3)},
        {k: v for k, v in STATE.items() if k != "pos_embed"},
        {k: v for k, v in STATE.items() if k != "blocks.1.attn.proj.bias"},
        {k: v for k, v in STATE.items() if not k.startswith("blocks.0")},
        {**STATE, "blocks.7.attn.proj.bias": torch.zeros(64)},
        {**STATE, "pos_embed": torch.zeros(3)},
        {**STATE, "pos_embed": torch.zeros(1, 15, 64)},
        {**STATE, "final_layer.linear.weight": torch.tensor(0.0)},
        {**STATE, "x_embedder.proj.weight": torch.zeros(64, 4, 0, 0)},
        {**STATE, "x_embedder.proj.weight": torch.zeros(0, 4, 2, 2)},
        {k: v.long() for k, v in STATE.items()},
        {"x_embedder.proj.weight": nn.Linear(2, 2).state_dict()["weight"], 1: torch.zeros(1)},
    ],
)
def test_foreign_pt(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(fastcfg.Error, match=r"a\.pt"):
        fastcfg.load(tmp_path / "a.pt")


@pytest.mark.parametrize("kept", [0, 1, 4, 100, 0.5, 0.999])
def test_truncated_pt(kept: float, tmp_path: Path) -> None:
    path = official(None, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(fastcfg.Error, match="not a whole torch checkpoint"):
        fastcfg.load(path)


@pytest.mark.parametrize("data", [b"hello, this is text\n" * 20, bytes(range(256)) * 4, b"\x80\x02}q\x00."])
def test_no_checkpoint_at_all(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(fastcfg.Error, match=r"a\.pt"):
        fastcfg.load(tmp_path / "a.pt")


# diffusers


DIFFUSERS_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
}


def diffusers_dit(shared: bool = True, **changes: Any) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    module = randomise(diffusers.DiTTransformer2DModel(**(DIFFUSERS_DIT | changes)))
    if shared:
        for block in module.transformer_blocks:
            block.norm1.emb.load_state_dict(module.transformer_blocks[0].norm1.emb.state_dict())
    return module


def assert_same_function(loaded: Denoiser, module: nn.Module) -> None:
    x, t, y = inputs(loaded.shape[0], loaded.shape[1])
    with torch.no_grad():
        ours, theirs = loaded.module(x, t, y), module(x, t, y).sample
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"out_channels": 4},
        {"in_channels": 3, "out_channels": None, "patch_size": 4},
        {"attention_head_dim": 72, "num_layers": 1},
        {"num_layers": 3, "sample_size": 6, "norm_eps": 1e-2},
    ],
)
def test_diffusers_folder(shared: bool, changes: dict[str, Any], tmp_path: Path) -> None:
    module = diffusers_dit(shared, **changes)
    module.save_pretrained(tmp_path)
    loaded = fastcfg.load(tmp_path)
    assert loaded.module.config.block_conditioning == (not shared and module.config.num_layers > 1)
    assert (loaded.null_label, loaded.latent) == (5, True)
    assert_same_function(loaded, module)


def test_diffusers_in_shards(tmp_path: Path) -> None:
    module = diffusers_dit(shared=False)
    module.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_function(fastcfg.load(tmp_path), module)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(fastcfg.Error, match="safetensors"):
        fastcfg.load(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_diffusers_folder_as_dit_was_published(tmp_path: Path) -> None:
    """facebook/DiT-XL-2-256 and -512 name their class Transformer2DModel, and their weights are a pickle."""
    diffusers = pytest.importorskip("diffusers")
    kind = {"norm_type": "ada_norm_zero", "attention_bias": True, "activation_fn": "gelu-approximate"}
    module = randomise(diffusers.Transformer2DModel(**DIFFUSERS_DIT, **kind, norm_elementwise_affine=False))
    for safe in (False, True):
        module.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        assert json.loads((tmp_path / str(safe) / "config.json").read_text())["_class_name"] == "Transformer2DModel"
        loaded = fastcfg.load(tmp_path / str(safe))
        x, t, y = inputs()
        with torch.no_grad():
            ours, theirs = loaded.module(x, t, y), module(x, timestep=t, class_labels=y).sample
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    torch.save([torch.zeros(1)], tmp_path / "False" / "diffusion_pytorch_model.bin")
    with pytest.raises(fastcfg.Error, match=r"model\.bin holds no state dict of tensors$"):
        fastcfg.load(tmp_path / "False")


def test_diffusers_in_half_precision_runs_in_float32(tmp_path: Path) -> None:
    module = diffusers_dit().to(torch.bfloat16)
    module.save_pretrained(tmp_path)
    loaded = fastcfg.load(tmp_path)
    assert loaded.dtype == torch.float32
    assert_same_function(loaded, type(module).from_pretrained(tmp_path, local_files_only=True).eval())
    fastcfg.Sampler(loaded, steps=2, dtype="fp32", engine="reference")([0], 2.0)


def test_a_loaded_diffusers_model_survives_our_format(tmp_path: Path) -> None:
    module = diffusers_dit(shared=False)
    module.save_pretrained(tmp_path / "folder")
    fastcfg.save(fastcfg.load(tmp_path / "folder"), tmp_path / "ours.safetensors")
    assert_same_function(fastcfg.load(tmp_path / "ours.safetensors"), module)


@pytest.mark.parametrize(
    ("options", "schedule", "predicts"),
    [
        ({}, {"name": "linear", "T": 1000, "beta_start": 1e-4, "beta_end": 2e-2}, "eps"),
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01, "prediction_type": "v_prediction"},
            {"name": "scaled_linear", "T": 1000, "beta_start": 0.001, "beta_end": 0.01},
            "v",
        ),
        (
            {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500, "prediction_type": "sample"},
            {"name": "cosine", "T": 500},
            "x0",
        ),
    ],
)
def test_pipeline_folder(options: dict[str, Any], schedule: dict[str, Any], predicts: str, tmp_path: Path) -> None:
    module = diffusers_dit()
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(**options)
    module.save_pretrained(tmp_path / "transformer")
    scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = fastcfg.load(tmp_path)
    assert_same_function(loaded, module)
    assert loaded.schedule.to_json().items() >= schedule.items()
    assert loaded.predicts == predicts
    assert np.abs(loaded.schedule.alpha_bar - scheduler.alphas_cumprod.numpy()).max() < 1e-6


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("transformer/config.json", {"_class_name": "UNet2DModel"}, "UNet2DModel"),
        ("transformer/config.json", {"activation_fn": "geglu"}, "activation_fn"),
        ("transformer/config.json", {"norm_type": "ada_norm"}, "norm_type"),
        ("transformer/config.json", {"attention_bias": False}, "attention_bias"),
        ("transformer/config.json", {"norm_elementwise_affine": True}, "norm_elementwise_affine"),
        ("transformer/config.json", {"out_channels": 5}, "5 output channels"),
        ("transformer/config.json", {"num_layers": 3}, "3"),
        ("transformer/config.json", {"num_layers": 1}, "2 blocks"),
        ("transformer/config.json", {"num_layers": "two"}, "damaged"),
        ("transformer/config.json", {"num_layers": 0}, "blocks"),
        ("transformer/config.json", {"patch_size": 0}, "patch_size"),
        ("transformer/config.json", {"sample_size": [8, 8]}, "input_size"),
        ("transformer/config.json", {"num_embeds_ada_norm": 7}, "embedding_table"),
        ("transformer/config.json", {"attention_head_dim": 8}, "DiT config wants"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "sigmoid"),
        ("scheduler/scheduler_config.json", {"beta_schedule": ["linear"]}, "linear"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "flow"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, r"trained_betas \[0\.1, 0\.2\]"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "use_flow_sigmas True"),
        ("scheduler/scheduler_config.json", {"snr_shift_scale": 3.0}, r"snr_shift_scale 3\.0"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "many"),
    ],
)
def test_unsupported_diffusers_configs(file: str, changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    diffusers_dit().save_pretrained(tmp_path / "transformer")
    pytest.importorskip("diffusers").DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    fastcfg.load(tmp_path)  # good until edited
    edit(tmp_path / file, **changes)
    with pytest.raises(fastcfg.Error, match=match):
        fastcfg.load(tmp_path)


@pytest.mark.parametrize(
    "kind", ["FlowMatchEulerDiscrete", "EDMEuler", "EDMDPMSolverMultistep", "CMStochasticIterative", "ScoreSdeVe", "SCM"]
)
def test_schedulers_without_betas_are_refused(kind: str, tmp_path: Path) -> None:
    """They were read as DDPM's linear schedule, which none of them has."""
    diffusers_dit().save_pretrained(tmp_path / "transformer")
    getattr(pytest.importorskip("diffusers"), f"{kind}Scheduler")().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(fastcfg.Error, match=f"not one fastcfg knows: {kind}Scheduler, beta_schedule None"):
        fastcfg.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("diffusion_pytorch_model.safetensors.index.json", "{}"),
        ("diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        ("diffusion_pytorch_model.safetensors", "cut short"),
    ],
)
def test_damaged_diffusers_folder(file: str, content: str, tmp_path: Path) -> None:
    diffusers_dit().save_pretrained(tmp_path)
    if file.endswith("index.json"):
        (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / file).write_text(content)
    with pytest.raises(fastcfg.Error, match=r"json|safetensors"):
        fastcfg.load(tmp_path)


# Latents to pixels


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_decode(batch: int, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.3,
    ).eval()
    vae.save_pretrained(tmp_path)
    latents = inputs()[0]
    pixels = decode(latents, load_vae(tmp_path, 4), batch)
    with torch.no_grad():
        want = vae.decode(latents / 0.3).sample
    assert pixels.shape == (3, 3, 16, 16)
    assert (pixels - want).abs().max() <= 1e-5 * want.abs().max()
    with pytest.raises(fastcfg.Error, match="3"):
        load_vae(tmp_path, 3)


def test_decode_without_a_vae(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(fastcfg.Error, match="nowhere"):
        load_vae(tmp_path / "nowhere", 4)
    with pytest.raises(fastcfg.Error, match="AutoencoderKL"):
        load_vae(tmp_path, 4)
