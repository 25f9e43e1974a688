"""Whether a module's weights may be sampled with: not in training, and not changed since an engine copied them."""

from __future__ import annotations

from torch import nn

from fastcfg.errors import Error

Fingerprint = tuple[tuple[int, int], ...]


def fingerprint(module: nn.Module) -> Fingerprint:
    """Changes whenever a weight is replaced or written in place (torch counts writes in `_version`, but for tensors that were
    made in inference mode)."""
    weights = (*module.parameters(), *module.buffers())
    return tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights)


def refuse_training(module: nn.Module, name: str = "model") -> None:
    """Raises Error if any part of `module` is in training mode."""
    if any(part.training for part in module.modules()):
        raise Error(f"the {name} is in training mode, where dropout would act on samples: call {name}.eval() first")


def refuse_stale(module: nn.Module, copied: Fingerprint, name: str = "model") -> None:
    """Raises Error if `module` changed since the engine copied its weights, when its fingerprint was `copied`."""
    if fingerprint(module) != copied:
        raise Error(f"the {name}'s weights changed since the sampler copied them: call sampler.refresh()")
