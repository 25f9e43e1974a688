"""Naming files, writing them whole or not at all, and reading safetensors and torch's pickles with one clear error."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


def is_file(path: Path) -> bool:
    """Whether there is a file at `path`. Raises Error where that cannot be told: no permission, a name too long."""
    return stat.S_ISREG(_mode(path))


def is_dir(path: Path) -> bool:
    """Whether there is a folder at `path`. Raises Error as `is_file` does."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    """st_mode of what is at `path`; 0 where there is nothing."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte, which no name has
        return 0
    except OSError as error:
        raise Error(f"cannot reach {path}: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Raises Error unless a file can be made at `path`: for asking before the work rather than after it."""
    folder = path.parent
    if not is_dir(folder):
        raise Error(f"cannot write {path}: the folder {folder} does not exist")
    if is_dir(path):
        raise Error(f"cannot write {path}: it is a folder")
    if _mode(path) and not is_file(path):
        raise Error(f"cannot write {path}: it is no file but a device or a pipe, which a file would replace")
    try:
        # Permission bits do not tell all (read-only mounts, root): only making a file does.
        with tempfile.TemporaryFile(dir=folder):
            pass
        with suppress(FileNotFoundError):
            os.stat(temporary_path(path))  # its name is the longer one, and may be too long
    except (OSError, ValueError) as error:
        raise Error(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def temporary_path(path: Path) -> Path:
    """A name for what is moved to `path` once it is whole. Random: machines and containers that share a folder share the
    numbers of their processes, too."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed to `path`, otherwise removed."""
    temporary = temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            sync_folder(path.parent)
    except OSError as error:
        raise Error(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # what went wrong before is what is to be said
            temporary.unlink()


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable, where its file system does that: many that are shared refuse, with EINVAL."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(folder)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Makes one Error that names `what` is read of whatever its decoder raises."""
    try:
        yield
    except Error:
        raise
    except Exception as error:  # zipfile, zlib, numpy and Pillow meet damaged bytes with exceptions of any kind
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise Error(f"cannot read {what}: {reason}") from error


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
    if not is_file(path):
        raise Error(f"no file at {path}")
    _check_readable(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise Error(f"{path} is not a whole safetensors file: {error}") from error


def _check_readable(path: Path) -> None:
    """Raises Error unless the file can be opened: the libraries that read it report one without permission as missing."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise Error(f"cannot read {path}: {error.strerror or error}") from error


def read_pickle(path: Path, *classes: type) -> Any:
    """What torch.save wrote to `path`, on the CPU, if it is made of tensors, Python's own containers and `classes` alone.

    Raises Error for anything else: code in a file is not run.
    """
    _check_readable(path)
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
