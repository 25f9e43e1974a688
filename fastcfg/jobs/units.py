"""Units: the pieces of a job, computed to the same bytes whoever computes them, and the files they are kept in."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastcfg.errors import Error
from fastcfg.images import check_finite, to_uint8
from fastcfg.jobs.errors import DamagedError, JobError
from fastcfg.jobs.job import Job
from fastcfg.jobs.spec import Spec
from fastcfg.jobs.store import Buffer
from fastcfg.sampler import Sampler

FORMAT = "fastcfg-unit-1"
_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype(np.int64), "F32": np.dtype(np.float32), "U8": np.dtype(np.uint8)}

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Unit:
    """Samples start..stop-1 of a job, the k-th piece of it."""

    k: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        """Its file in the job's store."""
        return f"units/unit-{self.k:06d}.safetensors"


def get_unit(spec: Spec, k: int) -> Unit:
    """Unit k of 0..spec.unit_count-1."""
    if not 0 <= k < spec.unit_count:
        raise Error(f"unit {k} asked, but the job has units 0..{spec.unit_count - 1}")
    return Unit(k, k * spec.unit_size, min((k + 1) * spec.unit_size, spec.samples))


def all_units(spec: Spec) -> Iterator[Unit]:
    return (get_unit(spec, k) for k in range(spec.unit_count))


def compute(sampler: Sampler, spec: Spec, unit: Unit, on_batch: Callable[[int], object] | None = None) -> Arrays:
    """The samples of a unit: images (uint8 [n, H, W, C], or float32 [n, C, H, W] for latents), labels, seeds, indices
    (int64 [n]; the noise is that of (seed, index)), scales (float32 [n]).

    The rows depend on the unit alone, and so do the batches that they are split to: the same bytes from every
    worker. on_batch(n) is called after each batch with the number of samples it finished. Raises Error for samples that hold
    NaN or infinity.
    """
    i = np.arange(unit.start, unit.stop)
    index, which = np.divmod(i, len(spec.scales))
    classes = sampler.model.num_classes
    labels = index % classes if spec.labels == "balanced" else np.asarray(spec.labels, np.int64)[index]
    scales = np.asarray(spec.scales, np.float64)[which]  # as a Sampler takes them: a classifier's act in float64
    seeds = np.full(unit.size, spec.seed, np.int64)
    kind = "scale" if spec.classifier is None else "classifier_scale"
    given = {kind: torch.from_numpy(scales), "seeds": seeds.tolist(), "indices": index.tolist()}
    x = sampler(torch.from_numpy(labels), **given, on_batch=on_batch)  # type: ignore[arg-type]
    images = to_uint8(x) if spec.output == "uint8" else check_finite(x).cpu().numpy()
    return {"labels": labels, "seeds": seeds, "indices": index, "scales": scales.astype(np.float32), "images": images}


def encode(job: Job, unit: Unit, arrays: Arrays) -> list[Buffer]:
    """A unit's file, in pieces to be written one after the other: the safetensors format.

    Written out here because safetensors' own writer orders metadata at random, and equal units must be equal files.
    """
    data = [memoryview(np.ascontiguousarray(arrays[name]).view(np.uint8).data).cast("B") for name in _layout(job, unit)]
    return [_header(job, unit, _content_sha256(job, unit, data)), *data]


def decode(job: Job, unit: Unit, content: Buffer, *, verify: bool = True) -> Arrays:
    """The arrays of a unit's file, views of `content`. verify: whether to check every byte of it; its length and header
    always are. Raises DamagedError.
    """
    if len(content) != unit_bytes(job, unit):
        raise DamagedError(f"{len(content)} bytes, not {unit_bytes(job, unit)}")
    view = memoryview(content)[_check_header(job, unit, content) :]
    if verify and _content_sha256(job, unit, [view]) != _sha256_of(content):
        raise DamagedError("its content is not what was written (SHA-256)")
    return _arrays(view, _layout(job, unit))


def decode_head(job: Job, unit: Unit, content: Buffer) -> Arrays:
    """What `decode` gives but the images, of the bytes that come before these, unverified but for the header."""
    layout = _layout(job, unit)
    del layout["images"]
    return _arrays(memoryview(content)[_check_header(job, unit, content) :], layout)


def write_unit(job: Job, unit: Unit, arrays: Arrays) -> None:
    """Raises JobError where the store cannot be written to."""
    job.store.write(unit.name, encode(job, unit, arrays))


def read_unit(job: Job, unit: Unit, *, verify: bool = True) -> Arrays:
    """A unit's arrays, as `compute` made them; read-only, and for a local job mapped rather than read.

    Raises DamagedError, Error where the unit is not there yet, and JobError where its file cannot be read.
    """
    try:
        return decode(job, unit, _read(job, unit), verify=verify)
    except FileNotFoundError as error:
        raise Error(f"unit {unit.k} is not in {job.store.url}: `fastcfg job run` computes what is missing") from error
    except DamagedError as error:
        raise damaged(job, unit, error) from error


def damaged(job: Job, unit: Unit, reason: object) -> DamagedError:
    return DamagedError(f"{job.store.url}/{unit.name} is damaged: {reason}; `job status --verify` sets it aside")


def check_unit(job: Job, unit: Unit) -> str | None:
    """What is wrong with a unit's file, read whole; None if nothing. Raises FileNotFoundError, or JobError as `read_unit`."""
    try:
        decode(job, unit, _read(job, unit))
    except DamagedError as error:
        return str(error)
    return None


def _read(job: Job, unit: Unit) -> Buffer:
    try:
        return job.store.read(unit.name)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise JobError(f"cannot read {job.store.url}/{unit.name}: {error.strerror or error}") from error


def unit_bytes(job: Job, unit: Unit) -> int:
    """The size of a unit's file, which is known before it is made."""
    data = sum(math.prod(shape) * _DTYPES[kind].itemsize for kind, shape in _layout(job, unit).values())
    return len(_header(job, unit, "0" * 64)) + data


def _layout(job: Job, unit: Unit) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each tensor's safetensors type and shape, in the order of the file: wide elements first, so that all are aligned."""
    C, H, W = job.resolved.shape
    n = unit.size
    images = ("U8", (n, H, W, C)) if job.spec.output == "uint8" else ("F32", (n, C, H, W))
    whole = ("I64", (n,))
    return {"labels": whole, "seeds": whole, "indices": whole, "scales": ("F32", (n,)), "images": images}


def _header(job: Job, unit: Unit, sha256: str) -> bytes:
    """Length and JSON of a safetensors file; the same for every writer, and of the same length for every `sha256`."""
    metadata = {
        "format": FORMAT,
        "unit": str(unit.k),
        "spec": job.spec.sha256,
        "checkpoint": job.checkpoint_sha256,
        "sha256": sha256,
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, (kind, shape) in _layout(job, unit).items():
        stop = start + math.prod(shape) * _DTYPES[kind].itemsize
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _content_sha256(job: Job, unit: Unit, data: list[memoryview]) -> str:
    """Of the header without it, and of the tensors: so it also says whose unit it is."""
    digest = hashlib.sha256(_header(job, unit, ""))
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def _check_header(job: Job, unit: Unit, content: Buffer) -> int:
    """The length of a file's header, if it is that of this unit of this job. Raises DamagedError."""
    header = _header(job, unit, _sha256_of(content))
    if content[: len(header)] != header:
        raise DamagedError(_whose(job, unit, content))
    return len(header)


def _arrays(data: memoryview, layout: dict[str, tuple[str, tuple[int, ...]]]) -> Arrays:
    arrays, start = {}, 0
    for name, (kind, shape) in layout.items():
        count = math.prod(shape)
        arrays[name] = np.frombuffer(data, _DTYPES[kind], count, start).reshape(shape)
        start += arrays[name].nbytes
    return arrays


def _metadata(content: Buffer) -> dict[str, str]:
    try:
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(bytes(content[8 : 8 + length]))["__metadata__"]
        return {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError("its header cannot be read") from error


def _sha256_of(content: Buffer) -> str:
    return _metadata(content).get("sha256", "")


def _whose(job: Job, unit: Unit, content: Buffer) -> str:
    """Why a header is not the one expected."""
    metadata = _metadata(content)
    if metadata.get("spec") != job.spec.sha256:
        return "it belongs to a job with another spec"
    if metadata.get("checkpoint") != job.checkpoint_sha256:
        return "it was made with another checkpoint"
    if metadata.get("unit") != str(unit.k):
        return f"it is unit {metadata.get('unit')}"
    return "its header is not what was written"
