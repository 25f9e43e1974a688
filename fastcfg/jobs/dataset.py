"""Reading a job's samples where they are: a lazy dataset over its unit files, for `torch.utils.data.DataLoader`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fastcfg.errors import Error
from fastcfg.jobs.errors import DamagedError, JobError
from fastcfg.jobs.job import Job, open_job
from fastcfg.jobs.local_store import LocalStore
from fastcfg.jobs.run import status
from fastcfg.jobs.units import Arrays, Unit, damaged, decode_head, get_unit, read_unit, unit_bytes

MAPPED_UNITS = 16  # local units kept open; their pages are the system's to drop
KNOWN_UNITS = 1024  # units of an object store whose labels, seeds, indices and scales are kept: 28 bytes a sample
REQUESTS = 256  # units whose heads are asked for at once

Positions: TypeAlias = NDArray[np.int64]


class Sample(NamedTuple):
    """One sample; or n of them, each field with a first dimension n.

    image: uint8 [H, W, C], or float32 [C, H, W] for latents. label; scale, its guidance scale s; seed and index, which name
    its noise: the same index at another scale of the job is the same noise. One sample's are Python numbers, n samples' are
    int64 [n] and float32 [n].
    """

    image: NDArray[Any]
    label: Any
    seed: Any
    index: Any  # type: ignore[assignment]  # hides tuple.index
    scale: Any


def open(out: str | Path, *, partial: bool = False) -> JobDataset:
    """The samples of the job at `out`, a local folder or a URL, in the order of their numbers.

    Raises Error where units are missing, unless `partial`: then the dataset is what is there at this moment, and position p
    of it is the p-th sample that is. Files are known by size and header; `status(out, verify=True)` checks every byte.
    """
    found = status(out)
    if not (found.complete or partial):
        raise Error(f"{found}: run the job to its end, or ask for what is there with partial=True")
    return JobDataset(open_job(out), found.done)


class JobDataset(Dataset[Sample]):
    """dataset[i] is a Sample; dataset[2:9], dataset[[3, 1, 2]] and dataset[mask] are one of several, read at once.

    Nothing is read before it is asked for, and little is kept: local units are mapped into memory, and of units in an object
    store only the rows asked for are fetched. It can be pickled and forked, so a DataLoader may have workers, which fetch
    all rows of a batch at once.
    """

    def __init__(self, job: Job, units: Sequence[int] | Positions):
        """units: the numbers of those to read, ascending."""
        self.job = job
        self._units = np.asarray(units, np.int64)
        sizes = np.full(len(self._units), job.spec.unit_size)
        sizes[self._units == job.spec.unit_count - 1] = get_unit(job.spec, job.spec.unit_count - 1).size
        self._starts = np.concatenate([[0], np.cumsum(sizes)])  # positions at which units begin, and the end
        self._files = _Mapped(job) if isinstance(job.store, LocalStore) else _Ranged(job)

    def __reduce__(self) -> tuple[type[JobDataset], tuple[Job, Positions]]:
        return JobDataset, (self.job, self._units)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def labels(self) -> Positions:
        """All labels, int64 [len]: to choose or to weight samples by, without reading an image."""
        return self._column("labels", np.int64)

    @cached_property
    def scales(self) -> NDArray[np.float32]:
        """All guidance scales s, float32 [len]."""
        return self._column("scales", np.float32)

    def __getitem__(self, key: Any) -> Sample:
        if isinstance(key, slice):
            return self._read(np.arange(len(self))[key])
        positions = np.asarray(key)
        if positions.ndim == 0 and positions.dtype.kind in "iu":
            return self.__getitems__([int(positions)])[0]
        return self._read(np.arange(len(self))[positions if positions.size else positions.astype(np.int64)])

    def __getitems__(self, positions: Sequence[int]) -> list[Sample]:
        """The samples at these positions: what a DataLoader calls for a batch."""
        images, *numbers = self._read(np.arange(len(self))[np.asarray(positions, np.int64)])
        return [Sample(*row) for row in zip(images, *(column.tolist() for column in numbers), strict=True)]

    def _column(self, name: str, dtype: type[np.generic]) -> NDArray[Any]:
        return np.concatenate([np.empty(0, dtype), *(np.array(head[name]) for head in self._files.heads(self._units.tolist()))])

    def _read(self, positions: Positions) -> Sample:
        if positions.ndim != 1:
            raise IndexError(f"positions must be one number, a slice or a list, got an array {list(positions.shape)}")
        which = np.searchsorted(self._starts, positions, side="right") - 1
        places = [np.flatnonzero(which == u) for u in np.unique(which)]
        owners = [which[at[0]] for at in places]
        wanted = [(int(self._units[u]), positions[at] - self._starts[u]) for u, at in zip(owners, places, strict=True)]
        shape, dtype = image_layout(self.job)
        n = len(positions)
        images = np.empty((n, *shape), dtype)
        labels, seeds, indices = np.empty((3, n), np.int64)
        scales = np.empty(n, np.float32)
        for at, part in zip(places, self._files.read(wanted), strict=True):
            images[at], labels[at], seeds[at] = part["images"], part["labels"], part["seeds"]
            indices[at], scales[at] = part["indices"], part["scales"]
        return Sample(images, labels, seeds, indices, scales)


def image_layout(job: Job) -> tuple[tuple[int, int, int], np.dtype[Any]]:
    """(shape, dtype) of one image of a job: [H, W, C] uint8, or [C, H, W] float32 for latents."""
    C, H, W = job.resolved.shape
    return ((H, W, C), np.dtype(np.uint8)) if job.spec.output == "uint8" else ((C, H, W), np.dtype(np.float32))


class _Mapped:
    """Units of a local job, mapped into memory."""

    def __init__(self, job: Job):
        self._open = lru_cache(MAPPED_UNITS)(lambda k: read_unit(job, get_unit(job.spec, k), verify=False))

    def heads(self, units: list[int]) -> Iterator[Arrays]:
        """The arrays of each of these units; not all of them need hold the images."""
        return (self._open(k) for k in units)

    def read(self, wanted: list[tuple[int, Positions]]) -> Iterator[Arrays]:
        """For each (unit, rows of it), its arrays in these rows."""
        return ({name: array[rows] for name, array in self._open(k).items()} for k, rows in wanted)


class _Ranged:
    """Units in an object store, of which only parts are fetched: all the images of a call in one round of requests.

    A unit's images are the last part of its file, so what comes before them is its head: header, labels, seeds, indices
    and scales.
    """

    def __init__(self, job: Job):
        self._job = job
        self._heads: dict[int, Arrays] = {}
        self._process = -1
        self._shape, self._dtype = image_layout(job)
        self._image_bytes = math.prod(self._shape) * self._dtype.itemsize

    def heads(self, units: list[int]) -> Iterator[Arrays]:
        for begin in range(0, len(units), REQUESTS):
            part = [get_unit(self._job.spec, k) for k in units[begin : begin + REQUESTS]]
            known = self._heads
            unknown = [unit for unit in part if unit.k not in known]
            found = self._fetch([(unit, 0, self._head_bytes(unit)) for unit in unknown])
            known = {**known, **{unit.k: self._parse(unit, head) for unit, head in zip(unknown, found, strict=True)}}
            self._heads = dict(list(known.items())[-KNOWN_UNITS:])
            yield from (known[unit.k] for unit in part)

    def read(self, wanted: list[tuple[int, Positions]]) -> Iterator[Arrays]:
        spans = []
        for k, rows in wanted:
            unit = get_unit(self._job.spec, k)
            for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
                first = self._head_bytes(unit) + int(run[0]) * self._image_bytes
                spans.append((unit, first, first + len(run) * self._image_bytes))
        images = np.frombuffer(b"".join(self._fetch(spans)), self._dtype).reshape(-1, *self._shape)
        done = 0
        for (_, rows), head in zip(wanted, self.heads([k for k, _ in wanted]), strict=True):
            columns = {name: column[rows] for name, column in head.items()}
            yield {**columns, "images": images[done : done + len(rows)]}
            done += len(rows)

    def _head_bytes(self, unit: Unit) -> int:
        return unit_bytes(self._job, unit) - unit.size * self._image_bytes

    def _fetch(self, spans: list[tuple[Unit, int, int]]) -> list[bytes]:
        """The bytes [first, last) of each unit's file."""
        if self._process != os.getpid():  # connections are a process's own
            from fsspec.core import url_to_fs

            self._system, self._root = url_to_fs(self._job.store.url, use_listings_cache=False)
            self._process = os.getpid()
        paths = [f"{self._root}/{unit.name}" for unit, _, _ in spans]
        firsts, lasts = [first for _, first, _ in spans], [last for _, _, last in spans]
        try:
            parts: list[bytes] = self._system.cat_ranges(paths, firsts, lasts, on_error="raise")
        except Exception as error:  # each backend has its own for what a network does
            reason = " ".join(str(error).split()) or type(error).__name__
            raise JobError(f"cannot read units of {self._job.store.url}: {reason}") from error
        for path, first, last, part in zip(paths, firsts, lasts, parts, strict=True):
            if len(part) != last - first:
                raise DamagedError(f"{path} ended at byte {first + len(part)}; `job status --verify` sets it aside")
        return parts

    def _parse(self, unit: Unit, head: bytes) -> Arrays:
        try:
            return decode_head(self._job, unit, head)
        except DamagedError as error:
            raise damaged(self._job, unit, error) from error
