"""Loading and saving models: our safetensors, the official DiT .pt, and diffusers' DiT folders. No code in a file is run."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcfg.devices import find_device
from fastcfg.errors import Error
from fastcfg.files import is_dir, is_file, read_pickle, read_safetensors, write_safetensors
from fastcfg.models.denoiser import Denoiser, describe_dit
from fastcfg.models.diffusers_dit import dit_from_diffusers
from fastcfg.models.dit import DiT, DiTConfig
from fastcfg.schedules import schedule_from_json, stored_schedule
from fastcfg.solvers import CLIPS, PREDICTIONS

SHIPPED = ("fashion-mnist",)
FORMAT = "fastcfg-1"
DIFFUSERS = ("DiTTransformer2DModel", "Transformer2DModel")  # its name now, and as the published DiT-XL folders have it
# What else in a scheduler's config makes other noise levels than its betas
ALTERED = ("trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas", "snr_shift_scale")


def load(name: str | Path, device: str | torch.device = "cpu") -> Denoiser:
    """A model ready for `Sampler`, in eval mode.

    name: a model shipped with the package (`SHIPPED`), or a path: our .safetensors, the official DiT's .pt (with or without
    an "ema" key), or a folder that diffusers saved a DiTTransformer2DModel or a DiT pipeline to. device: as `Sampler` takes it.
    Raises Error for anything else, for a file cut short, for a pickle that holds more than tensors and for a device that is
    not here.
    """
    where = find_device(device)
    if str(name) in SHIPPED:
        with as_file(files("fastcfg").joinpath(f"assets/{name}.safetensors")) as path:
            model = _load_ours(path)
    else:
        model = _load_path(Path(name))
    model.module.to(where).eval().requires_grad_(False)
    return model


def _load_path(path: Path) -> Denoiser:
    if is_dir(path):
        return _load_diffusers(path)
    if not is_file(path):
        raise Error(f"unknown checkpoint '{path}': want a shipped name ({', '.join(SHIPPED)}) or a file or folder that exists")
    if path.suffix == ".safetensors":
        return _load_ours(path)
    if path.suffix in (".pt", ".pth"):
        return _load_official(path)
    raise Error(f"{path}: want .safetensors (ours), .pt (the official DiT's) or a diffusers folder")


def save(model: Denoiser, path: str | Path) -> None:
    """Writes `model`, whose module must be our DiT, as safetensors with everything `load` needs, whole or not at all.

    Raises Error for any other model, and for a schedule that `load` could not make again from its name and parameters.
    """
    if not isinstance(model, Denoiser):
        raise Error(f"want a fastcfg.Denoiser, as fastcfg.load and Sampler(module).model give one, got {type(model).__name__}")
    if not isinstance(model.module, DiT):
        raise Error(f"only a fastcfg DiT can be saved in this format, got {type(model.module).__name__}")
    description = {
        "config": model.module.config.to_json(),
        "schedule": stored_schedule(model.schedule),
        "predicts": model.predicts,
        "clip": model.clip,
        "eta": model.eta,
        "latent": model.latent,
        "low_precision": model.low_precision,
        "label_names": model.label_names,
        "training": dict(model.training),
    }
    metadata = {"format": FORMAT, **{key: json.dumps(value) for key, value in description.items()}}
    write_safetensors(Path(path), model.module.state_dict(), metadata)


def _load_ours(path: Path) -> Denoiser:
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise Error(f"{path} is a safetensors file of another kind: want one that fastcfg wrote (format {FORMAT})")
    try:
        stored = {key: json.loads(value) for key, value in metadata.items() if key != "format"}
        config, names = DiTConfig.from_json(stored["config"]), stored["label_names"]
        if stored["predicts"] not in PREDICTIONS or stored["clip"] not in CLIPS:
            raise Error(f"{path}: unknown prediction or clipping: {stored['predicts']!r}, {stored['clip']!r}")
        if names is not None and len(names) != config.num_classes:
            raise Error(f"{path} names {len(names)} labels, but its model has {config.num_classes}")
        return describe_dit(
            build_dit(config, tensors, str(path)),
            schedule=schedule_from_json(stored["schedule"]),
            predicts=stored["predicts"],
            clip=stored["clip"],
            eta=float(stored["eta"]),
            latent=stored["latent"],
            low_precision=bool(stored["low_precision"]),
            label_names=None if names is None else tuple(names),
            training=dict(stored["training"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise Error(f"{path}: its description is damaged ({type(error).__name__}: {error})") from error


def build_dit(config: DiTConfig, tensors: Mapping[str, Tensor], source: str) -> DiT:
    """A DiT with these weights, each checked by name and shape before any is used; `source` names them in errors."""
    with torch.device("meta"):
        model = DiT(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing, surplus = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or surplus:
        raise Error(f"{source} does not fit its DiT config: missing {missing[:4]}, surplus {surplus[:4]}")
    for name, shape in wanted.items():
        value = tensors[name]
        if tuple(value.shape) != shape or not value.is_floating_point():
            raise Error(f"{source}: {name} is {value.dtype} {list(value.shape)}, but its DiT config wants floats {list(shape)}")
    model.load_state_dict(dict(tensors), assign=True)
    return model


def _load_official(path: Path) -> Denoiser:
    """The official checkpoint: a state dict, or {"model", "ema", "opt", "args"} of which the EMA weights are taken."""
    # The official trainer stores its options as a Namespace: a class without code of its own, so safe to build.
    content = read_pickle(path, argparse.Namespace)
    state = content
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            state = content[key]
            break
    state = _state_dict(path, state, " (at top level or under 'ema')")
    return describe_dit(build_dit(infer_config(state, str(path)), state, str(path)), latent=True)


def _state_dict(path: Path, content: Any, where: str = "") -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise Error(f"{path} holds no state dict of tensors{where}")
    return content


def infer_config(state: Mapping[str, Tensor], source: str) -> DiTConfig:
    """The config of official weights, read off their shapes.

    The head count leaves no trace in them: it is the published one for a published width, else one head per 64 channels.
    """
    try:
        hidden, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        table = state["y_embedder.embedding_table.weight"].shape[0]
        out = state["final_layer.linear.weight"].shape[0] // patch**2
        inner = state["blocks.0.mlp.fc1.weight"].shape[0]
        ratio = inner / hidden
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise Error(f"{source} is not an official DiT state dict: {type(error).__name__} {error}") from error
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return DiTConfig(
        input_size=math.isqrt(tokens) * patch,
        patch_size=patch,
        in_channels=in_channels,
        hidden_size=hidden,
        depth=depth,
        num_heads={1152: 16, 1024: 16, 768: 12, 384: 6}.get(hidden, max(1, hidden // 64)),
        mlp_ratio=ratio,
        num_classes=table - 1,
        learn_sigma=out == 2 * in_channels,
    )


def _load_diffusers(path: Path) -> Denoiser:
    """A folder with a DiTTransformer2DModel, or a pipeline's with it under `transformer` and its scheduler's config."""
    folder = path / "transformer" if is_dir(path / "transformer") else path
    ours = path / "model.safetensors"
    if is_file(ours) and not is_file(folder / "config.json"):
        raise Error(f"{path} is no diffusers folder, since it has no config.json: name the model in it, {ours}")
    config = _read_json(folder / "config.json")
    if config.get("_class_name") not in DIFFUSERS:
        raise Error(f"{folder} holds a {config.get('_class_name')}: want a {DIFFUSERS[0]}")
    tensors = _read_diffusers(folder)
    try:
        dit_config, state = dit_from_diffusers(config, tensors)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise Error(f"{folder / 'config.json'} is damaged ({type(error).__name__}: {error})") from error
    scheduler = path / "scheduler" / "scheduler_config.json"
    others = _schedule_of(_read_json(scheduler)) if is_file(scheduler) else {}
    return describe_dit(build_dit(dit_config, state, str(folder)), latent=True, **others)


def _read_diffusers(folder: Path) -> dict[str, Tensor]:
    """The weights in a model's folder: one safetensors file, several with an index, or a pickle, as older folders have it."""
    single, index, pickled = (
        folder / f"diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "safetensors.index.json", "bin")
    )
    if is_file(single):
        return read_safetensors(single)[0]
    if is_file(index):
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise Error(f"{index} has no weight_map: want the index that diffusers writes beside its shards")
        shards = sorted({str(shard) for shard in weight_map.values()})
        return {k: v for shard in shards for k, v in read_safetensors(folder / Path(shard).name)[0].items()}
    if is_file(pickled):
        return _state_dict(pickled, read_pickle(pickled))
    raise Error(f"{folder} has no {single.name}: save it from diffusers with safe_serialization=True")


def _schedule_of(config: dict[str, Any]) -> dict[str, Any]:
    """schedule and prediction from a diffusers scheduler's config; what has no betas, or would change them, is refused."""
    betas, prediction = config.get("beta_schedule"), config.get("prediction_type", "epsilon")
    name = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}.get(str(betas))
    predicts = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}.get(str(prediction))
    altered = [key for key in ALTERED if config.get(key) not in (None, False)]
    if name is None or predicts is None or altered:
        raise Error(
            f"the scheduler's config is not one fastcfg knows: {config.get('_class_name')}, beta_schedule {betas!r}, "
            f"prediction_type {prediction!r}" + "".join(f", {key} {config[key]!r:.100}" for key in altered)
        )
    parameters = {"name": name, "T": config.get("num_train_timesteps", 1000)}
    if name != "cosine":
        parameters |= {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 2e-2)}
    return {"schedule": schedule_from_json(parameters), "predicts": predicts}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Error(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise Error(f"{path} must hold an object, got {type(data).__name__}")
    return data
