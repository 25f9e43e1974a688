"""Devices by name."""

from __future__ import annotations

import torch

from fastcfg.errors import Error


def find_device(name: str | torch.device) -> torch.device:
    """ "auto" (a GPU where there is one, else the CPU), or a device or its name; as tensors on it say it: cuda:0 for cuda.

    Raises Error for one that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise Error(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
