"""What is sampled: a model in our form and in diffusers' form with the same weights, and one request for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastcfg
from fastcfg.explain import count_flops
from fastcfg.models.denoiser import Denoiser, describe_dit
from fastcfg.models.dit import DiT

STEPS = 4  # all guided: a time is that of a whole call, over this
SCALE = 4.0  # guidance scale s
# What diffusers' DiT fixes and the official one has otherwise: with it the same weights are the same function in both
DIFFUSERS_FORM: dict[str, Any] = {"time_frequency_shift": 1, "mlp_norm_eps": 1e-5}


@dataclass(frozen=True)
class Case:
    """A request of `batch` samples in `steps` guided DDIM steps (eta 0, "leading" spacing) from a given x_T [B, C, H, W].

    flops: of one guided step, as the module itself would compute it: two multiply-adds for each weight and token, of 2B rows.
    """

    name: str
    model: Denoiser
    labels: list[int]
    x_T: Tensor
    steps: int
    flops: int

    @property
    def batch(self) -> int:
        return len(self.labels)

    @property
    def title(self) -> str:
        return f"{self.name}, batch {self.batch}"


def make_cases(dry: bool) -> list[Case]:
    """The session's cases; in a dry run, one of a model of no size."""
    if dry:
        return [_case("tiny", tiny_model(), batch=2, steps=2)]
    small = random_model("DiT-S/2")
    cases = [_case("DiT-S/2 at 256 px", small, batch, STEPS) for batch in (1, 8)]
    return [*cases, _case("fashion-mnist", shipped_model(), 64, STEPS)]


def overhead_case(dry: bool) -> Case:
    """One small sample: where a call has least arithmetic to hide behind."""
    return _case("tiny", tiny_model(), 1, 2) if dry else _case("fashion-mnist", shipped_model(), 1, steps=20)


def tiny_model() -> Denoiser:
    return random_model(input_size=8, hidden_size=64, depth=2, num_heads=1, num_classes=10)


def random_model(name: str | None = None, **config: Any) -> Denoiser:
    """A DiT all of whose weights matter, gates and last layer included; its output is about as large as the noise."""
    module = DiT.from_name(name, **config, **DIFFUSERS_FORM) if name else DiT(**config, **DIFFUSERS_FORM)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key == "pos_embed":
                continue
            spread = 1 if "embedding_table" in key else 0.02 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return describe_dit(module.eval())


def shipped_model() -> Denoiser:
    """The shipped model's weights, read as diffusers would: the timestep's frequencies are another table there."""
    shipped = fastcfg.load("fashion-mnist")
    assert isinstance(shipped.module, DiT)
    module = DiT(replace(shipped.module.config, **DIFFUSERS_FORM)).eval()
    module.load_state_dict(shipped.module.state_dict())
    return replace(shipped, module=module)


def _case(name: str, model: Denoiser, batch: int, steps: int) -> Case:
    classes = model.num_classes
    assert classes is not None
    x_T = torch.randn(batch, *model.shape, generator=torch.Generator().manual_seed(1))
    labels = [i * 7 % classes for i in range(batch)]
    return Case(name, model, labels, x_T, steps, 2 * batch * count_flops(model))


def diffusers_twin(model: Denoiser) -> nn.Module:
    """diffusers' DiTTransformer2DModel with the same weights, float32."""
    from diffusers import DiTTransformer2DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of every cast to another dtype
    module = model.module
    assert isinstance(module, DiT)
    config = module.config
    twin: Any = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=config.mlp_norm_eps,
    )
    missing, unexpected = twin.load_state_dict(dict(_diffusers_tensors(module)), strict=False)
    assert not unexpected
    assert set(missing) <= {"pos_embed.pos_embed"}  # a fixed table, which both make
    return twin.eval().requires_grad_(False)


def _diffusers_tensors(module: DiT) -> Iterator[tuple[str, Tensor]]:
    """Weights under diffusers' names. Each of its blocks embeds t and y by itself: they get copies of the one embedder."""
    yield from _parts("pos_embed.proj", module.x_embedder.proj)
    for i, block in enumerate(module.blocks):
        name: str = f"transformer_blocks.{i}"
        inner: Any = block
        for part in ("weight", "bias"):
            for kind, value in zip("qkv", getattr(inner.attn.qkv, part).chunk(3), strict=True):
                yield f"{name}.attn1.to_{kind}.{part}", value
        yield f"{name}.norm1.emb.class_embedder.embedding_table.weight", module.y_embedder.embedding_table.weight
        layers = {
            "norm1.emb.timestep_embedder.linear_1": module.t_embedder.mlp[0],
            "norm1.emb.timestep_embedder.linear_2": module.t_embedder.mlp[2],
            "norm1.linear": inner.adaLN_modulation[1],
            "attn1.to_out.0": inner.attn.proj,
            "ff.net.0.proj": inner.mlp.fc1,
            "ff.net.2": inner.mlp.fc2,
        }
        for key, layer in layers.items():
            yield from _parts(f"{name}.{key}", layer)
    yield from _parts("proj_out_1", module.final_layer.adaLN_modulation[1])
    yield from _parts("proj_out_2", module.final_layer.linear)


def _parts(name: str, layer: Any) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", layer.weight
    yield f"{name}.bias", layer.bias
