"""Naming files, writing them whole or not at all, and reading safetensors and torch's pickles with one clear error."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastcfg.errors import Error


def slug(device: str) -> str:
    """A device's name as files are named: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3, "Intel(R) .." is intel-.."""
    return re.sub(r"(\((r|tm)\)|[^a-z0-9])+", "-", device.lower()).strip("-")


def check_writable(path: Path) -> None:
    """Raises Error unless a file can be made at `path`: for asking before the work rather than after it."""
    folder = path.parent
    if not folder.is_dir():
        raise Error(f"cannot write {path}: the folder {folder} does not exist")
    if path.is_dir():
        raise Error(f"cannot write {path}: it is a folder")
    try:
        # Permission bits do not tell all (read-only mounts, root): only making a file does.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Error(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed to `path`, otherwise removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise Error(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` and moves the result to `path`."""
    check_writable(path)
    with replacing(path) as temporary:
        write(temporary)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)
    write_file(path, lambda temporary: temporary.write_bytes(data))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file."""
    if not path.is_file():
        raise Error(f"no file at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise Error(f"{path} is not a whole safetensors file: {error}") from error


def read_pickle(path: Path, *classes: type) -> Any:
    """What torch.save wrote to `path`, on the CPU, if it is made of tensors, Python's own containers and `classes` alone.

    Raises Error for anything else: code in a file is not run.
    """
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets foreign bytes with exceptions of any kind
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise Error(
                f"{path} wants {code[1]}, and code in a file is not run: keep the state dict of tensors alone"
            ) from error
        raise Error(
            f"{path} is not a whole torch checkpoint, or not a state dict of tensors alone, "
            f"and code in a file is not run ({type(error).__name__})"
        ) from error
