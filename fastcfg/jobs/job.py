"""A job that exists: its frozen spec, its checkpoint's identity, the kind of machine it runs on, and its store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastcfg.checkpoints import SHIPPED, load
from fastcfg.devices import find_device
from fastcfg.engines import DTYPES, Engine
from fastcfg.engines.choice import machine
from fastcfg.errors import Error
from fastcfg.jobs.errors import JobError
from fastcfg.jobs.spec import Spec, frozen
from fastcfg.jobs.store import Store
from fastcfg.jobs.stores import open_store
from fastcfg.models.denoiser import Denoiser
from fastcfg.sampler import Sampler

FORMAT = "fastcfg-job-1"
OWN = {"units", "claims", "damaged", "spec.toml"}  # a job's, job.json aside


@dataclass(frozen=True)
class Resolved:
    """What the spec leaves to the machine, found on one and then the same for all workers.

    shape: (C, H, W) of a sample. device: "cpu" or "cuda". processor: what the bits may further depend on: the model of
    CPU or GPU, and torch's version.
    """

    dtype: str
    engine: str
    shape: tuple[int, int, int]
    device: str
    processor: str


@dataclass(frozen=True)
class Job:
    """What every worker must know; it can be pickled and sent. spec: the frozen one, with no "auto" left in it."""

    store: Store
    spec: Spec
    checkpoint_sha256: str
    resolved: Resolved

    def describe(self) -> dict[str, Any]:
        """The content of job.json."""
        return {
            "format": FORMAT,
            "spec_sha256": self.spec.sha256,
            "checkpoint_sha256": self.checkpoint_sha256,
            "shape": list(self.resolved.shape),
            "device": self.resolved.device,
            "processor": self.resolved.processor,
            "spec": self.spec.to_json(),
        }

    def make_sampler(self, device: str) -> Sampler:
        """The sampler of every unit, on one device of the job's kind; its checkpoint must be the one the job began with."""
        if torch.device(device).type != self.resolved.device:
            raise Error(f"the job was begun on {self.resolved.device!r}, where samples' bits differ from {device!r}'s")
        check_checkpoint(self.spec, self.checkpoint_sha256)
        return _make_sampler(self.spec, load(self.spec.checkpoint), device)


def resolve(spec: Spec, device: str) -> Resolved:
    """What `spec` leaves open, as this machine has it. Raises Error for what the checkpoint or device cannot do.

    device: torch's name of one. dtype "auto" is the faster on this machine, which is measured, hence frozen.
    """
    find_device(device)  # first: an error of the device is not one of the spec
    model = spec.checked("checkpoint", lambda: load(spec.checkpoint))
    spec.check_model(model)
    key = "dtype" if spec.engine == "auto" else "engine"
    engine = spec.checked(key, lambda: Sampler(model, device=device, **spec.sampler_options()).engine)
    if spec.classifier is not None:
        fixed = replace(spec, dtype=_dtype_name(engine), engine=engine.name)
        spec.checked("classifier", lambda: _make_sampler(fixed, model, device))
    return Resolved(_dtype_name(engine), engine.name, model.shape, torch.device(device).type, processor(device))


def _make_sampler(spec: Spec, model: Denoiser, device: str) -> Sampler:
    return Sampler(model, device=device, classifier_guidance=spec.classifier_guidance(), **spec.sampler_options())


def _dtype_name(engine: Engine) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == engine.dtype)


def processor(device: str) -> str:
    """The model of CPU or GPU, and torch's version."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return machine()


def open_job(out: str | Path | Store, weights: Mapping[str, str] | None = None) -> Job:
    """The job at `out`. Raises Error where there is none, or where job.json is damaged or cannot be read.

    weights: `Spec.weights` as they are now, if they are no longer where they were when the job began.
    """
    store = open_store(out) if isinstance(out, (str, Path)) else out
    try:
        data = json.loads(bytes(store.read("job.json")))
        if data["format"] != FORMAT:
            raise Error(f"{store.url} is a job of another version ({data['format']!r}): want {FORMAT}")
        spec = Spec.from_json(data["spec"])
        resolved = Resolved(spec.dtype, spec.engine, tuple(data["shape"]), data["device"], data["processor"])
        job = Job(store, spec, data["checkpoint_sha256"], resolved)
        if data["spec_sha256"] != spec.sha256 or len(job.resolved.shape) != 3:
            raise ValueError("its spec is not the one it names")
        job = replace(job, spec=spec.moved(weights or {}))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Error(f"no job at {store.url}: want a folder that `fastcfg job run` wrote to") from error
    except PermissionError as error:
        raise JobError(f"cannot read {store.url}/job.json: {error.strerror}") from error
    except OSError as error:
        raise Error(f"cannot read {store.url}/job.json: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Error(
            f"{store.url}/job.json is damaged ({error}): remove it and run the job's spec again; units that fit it stay"
        ) from error
    return job


def freeze(store: Store, spec: Spec, resolved: Resolved, text: str | None) -> Job:
    """Writes what the job is to its store, unless another run did so a moment ago; the job as it is there, with the weights
    where `spec` has them.

    text: the TOML that the spec came from.
    """
    store.prepare()
    with store.freezing():
        if "job.json" not in store.names():
            fixed = frozen(spec, resolved.dtype, resolved.engine)
            job = Job(store, fixed, checkpoint_sha256(spec), resolved)
            lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in job.describe().items())
            store.write("job.json", [b"{\n", ",\n".join(lines).encode(), b"\n}\n"])
            if text is not None:
                store.write("spec.toml", [text.encode()])
    return open_job(store, spec.weights)


def check_same(job: Job, spec: Spec) -> None:
    """Raises Error, with the difference, if `job` was begun with another spec or checkpoint than this one."""
    differences = spec.differences(job.spec)
    if differences:
        raise Error(
            f"{job.store.url} holds a job with another spec: {'; '.join(differences)}: "
            "give another --out, or the spec that it was begun with"
        )
    check_checkpoint(spec, job.checkpoint_sha256)


def check_checkpoint(spec: Spec, wanted: str) -> None:
    """Raises Error unless the checkpoint (and classifier) at the spec's path has the SHA-256 `wanted`."""
    found = checkpoint_sha256(spec)
    if found != wanted:
        raise spec.refused(
            "checkpoint",
            f"the job was begun with another {' or '.join(spec.weights)}: SHA-256 {wanted[:16]}.. there, {found[:16]}.. "
            f"in {' and '.join(spec.weights.values())}",
        )


def check_vacant(store: Store) -> None:
    """Raises Error if a folder that holds no job holds other things, which it would get mixed up with."""
    names = {name for name in store.names() if not name.startswith(".")}
    # A run killed before job.json leaves units/; without it, a spec.toml is somebody's own.
    others = sorted(names - OWN if "units" in names else names - {"claims"})
    if others:
        raise Error(f"{store.url} holds other things ({', '.join(others[:3])}): want a new or an empty folder for --out")


def checkpoint_sha256(spec: Spec) -> str:
    """SHA-256 of the checkpoint's file; of a diffusers folder that of a list of what is read from it, file by file, and of a
    checkpoint with a classifier that of a list of the two.
    """
    digests = {key: _sha256(spec, key, name) for key, name in spec.weights.items()}
    if len(digests) == 1:
        return digests["checkpoint"]
    return hashlib.sha256("".join(f"{digest}  {key}\n" for key, digest in digests.items()).encode()).hexdigest()


def _sha256(spec: Spec, key: str, name: str) -> str:
    """Of the checkpoint or the classifier."""
    path = Path(name)
    if name in SHIPPED:
        file = f"{name}.safetensors" if key == "checkpoint" else f"{name}-{key}.safetensors"
        path = Path(__file__).parents[1] / "assets" / file
    try:
        if not path.is_dir():
            return _file_sha256(path)
        patterns = ("*.json", "*.safetensors", "transformer/*.json", "transformer/*.safetensors", "scheduler/*.json")
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
        listing = "".join(f"{_file_sha256(file)}  {file.relative_to(path)}\n" for file in files)
    except OSError as error:
        raise spec.refused(key, f"cannot read the {key} {name}: {error.strerror}") from error
    return hashlib.sha256(listing.encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
