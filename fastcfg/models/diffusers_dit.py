"""diffusers' DiTTransformer2DModel as our DiT: other key names, other timestep frequencies, another LayerNorm eps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastcfg.errors import Error
from fastcfg.models.dit import DiTConfig, position_embedding

# What the conversion relies on, with diffusers' own defaults for keys that a config leaves out.
_REQUIRED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}


def dit_from_diffusers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[DiTConfig, dict[str, Tensor]]:
    """(our config, our state dict) of a diffusers DiT: its config.json and its tensors.

    Weights come out as float32, diffusers' own default. Every diffusers block embeds t and y by itself. Where all blocks
    agree, as in converted official weights, one embedder serves all; where they were trained apart, `block_conditioning`
    keeps them.
    """
    for key, want in _REQUIRED.items():
        if config.get(key, want) != want:
            raise Error(f"diffusers DiT with {key}={config[key]!r} is not supported: want {want!r}")
    depth, patch = config.get("num_layers", 28), config.get("patch_size", 2)
    in_channels = config.get("in_channels", 4)
    out_channels = config.get("out_channels") or in_channels
    if out_channels not in (in_channels, 2 * in_channels):
        raise Error(f"diffusers DiT with {out_channels} output channels for {in_channels} is not supported")
    blocks = {name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")}
    if blocks != {str(i) for i in range(depth)}:
        raise Error(f"the diffusers DiT weights have {len(blocks)} blocks, but their config says {depth}")
    embedders = [_embedder(tensors, i) for i in range(depth)]
    shared = all(torch.equal(one[key], embedders[0][key]) for one in embedders for key in one)
    heads, head_dim = config.get("num_attention_heads", 16), config.get("attention_head_dim", 72)
    dit_config = DiTConfig(
        input_size=config.get("sample_size", 32),
        patch_size=patch,
        in_channels=in_channels,
        hidden_size=heads * head_dim,
        depth=depth,
        num_heads=heads,
        num_classes=config.get("num_embeds_ada_norm", 1000),
        learn_sigma=out_channels == 2 * in_channels,
        time_frequency_shift=1,
        mlp_norm_eps=config.get("norm_eps", 1e-5),
        block_conditioning=not shared,
    )
    state = {
        "pos_embed": position_embedding(dit_config.hidden_size, dit_config.input_size // patch)[None],
        "x_embedder.proj.weight": _take(tensors, "pos_embed.proj.weight"),
        "x_embedder.proj.bias": _take(tensors, "pos_embed.proj.bias"),
        **embedders[0],
    }
    for i in range(depth):
        state |= {f"blocks.{i}.{key}": value for key, value in _block(tensors, i).items()}
        if not shared:
            # Cloned: block 0's are the final layer's too, and one tensor under two names cannot be saved.
            state |= {f"blocks.{i}.{key}": value.clone() for key, value in embedders[i].items()}
    for ours, theirs in (("adaLN_modulation.1", "proj_out_1"), ("linear", "proj_out_2")):
        state |= _layer(tensors, f"final_layer.{ours}", theirs)
    return dit_config, state


def _take(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise Error(f"the diffusers DiT weights lack {name}")
    return tensors[name].float()  # exact for half precision; the position table is float32 in any case


def _layer(tensors: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{ours}.{part}": _take(tensors, f"{theirs}.{part}") for part in ("weight", "bias")}


def _embedder(tensors: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
    prefix = f"transformer_blocks.{block}.norm1.emb"
    return {
        **_layer(tensors, "t_embedder.mlp.0", f"{prefix}.timestep_embedder.linear_1"),
        **_layer(tensors, "t_embedder.mlp.2", f"{prefix}.timestep_embedder.linear_2"),
        "y_embedder.embedding_table.weight": _take(tensors, f"{prefix}.class_embedder.embedding_table.weight"),
    }


def _block(tensors: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
    prefix = f"transformer_blocks.{block}"
    qkv = {
        f"attn.qkv.{part}": torch.cat([_take(tensors, f"{prefix}.attn1.to_{name}.{part}") for name in "qkv"])
        for part in ("weight", "bias")
    }
    return {
        **qkv,
        **_layer(tensors, "attn.proj", f"{prefix}.attn1.to_out.0"),
        **_layer(tensors, "mlp.fc1", f"{prefix}.ff.net.0.proj"),
        **_layer(tensors, "mlp.fc2", f"{prefix}.ff.net.2"),
        **_layer(tensors, "adaLN_modulation.1", f"{prefix}.norm1.linear"),
    }
