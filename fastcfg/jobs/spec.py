"""What a batch job samples: one frozen record, read from TOML, checked before any work."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fastcfg.checkpoints import SHIPPED
from fastcfg.engines import DTYPES, ENGINES
from fastcfg.errors import Error
from fastcfg.guidance import BASES, ClassifierGuidance, Guidance, Interval
from fastcfg.jobs import values as v
from fastcfg.jobs.toml import parse_table, read_labels, read_text
from fastcfg.models.classifier import load_classifier
from fastcfg.models.denoiser import Denoiser
from fastcfg.plan import Plan, make_plan
from fastcfg.schedules import SPACINGS
from fastcfg.solvers import CLIPS, SOLVERS

OUTPUTS = ("uint8", "latents")
MOST_UNITS = 100_000
AUTO = ("dtype", "engine")  # "auto" here is resolved once, when the job is frozen
WEIGHTS = ("checkpoint", "classifier")  # known by their content: they may move while a job is under way


@dataclass(frozen=True)
class Spec:
    """A job's samples. Sample i of len(labels) * S, S = len(scales), has label i // S, scale i % S, noise (seed, i // S).

    checkpoint: a shipped name or a path. labels: "balanced" (0, 1, .., classes - 1, repeated up to `count`) or the labels
    themselves. scales: each label is sampled at each, from the same noise. steps, solver, spacing, eta, interval, rescale,
    guidance_channels, clip, dtype, engine: as `fastcfg.Sampler` takes them; eta and clip None are the model's own.
    classifier, classifier_base: guidance by a classifier (a shipped name or a path), as `fastcfg.ClassifierGuidance` takes it;
    `scales` are then the classifier's, from 0, and the classifier-free scale is 1. seed: 64 bits. unit_size: samples in a unit,
    which is what is computed, written and, after a crash, lost as a whole. batch: rows computed at once. output: "uint8" pixels
    [n, H, W, C], or "latents", the samples as float32 [n, C, H, W].
    places: where each key was written, for errors.
    """

    checkpoint: str
    scales: tuple[float, ...]
    labels: str | tuple[int, ...] = "balanced"
    count: int | None = None
    steps: int = 50
    solver: str = "ddim"
    spacing: str = "dit"
    eta: float | None = None
    interval: Interval | None = None
    rescale: float = 0.0
    guidance_channels: int | None = None
    classifier: str | None = None
    classifier_base: str | None = None
    clip: bool | str | None = None
    dtype: str = "auto"
    engine: str = "auto"
    seed: int = 0
    unit_size: int = 1000
    batch: int = 50
    output: str = "uint8"
    places: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, convert in _CONVERSIONS.items():
            object.__setattr__(self, name, self.checked(name, partial(convert, name, getattr(self, name))))
        self._check_guidance()
        if self.labels == "balanced" and self.count is None:
            raise self.refused("labels", 'labels "balanced" needs count, the number of labels: count = 50000')
        if self.labels != "balanced" and self.count is not None:
            raise self.refused("count", 'count goes with labels = "balanced": listed labels are as many as they are')
        if self.eta is not None and self.solver != "ddim":
            raise self.refused("eta", f"solver {self.solver!r} has no eta: leave it out, or use 'ddim'")
        if self.unit_count > MOST_UNITS:
            raise self.refused(
                "unit_size", f"{self.samples} samples in units of {self.unit_size} are {self.unit_count} units: "
                f"want at most {MOST_UNITS}, so a larger unit_size"
            )  # fmt: skip

    def _check_guidance(self) -> None:
        """Raises Error where scales, or what acts on classifier-free guidance, do not go with the kind of guidance."""
        if self.classifier is None:
            if self.classifier_base is not None:
                raise self.refused("classifier_base", "classifier_base goes with a classifier, and there is none: leave it out")
            if min(self.scales) < 1:
                raise self.refused("scales", f"scales: each must be at least 1, which is no guidance, got {min(self.scales):g}")
            return
        if self.classifier_base is None:
            object.__setattr__(self, "classifier_base", BASES[0])
        for key in ("rescale", "guidance_channels"):
            if self.classifier_base == "null" and getattr(self, key):
                raise self.refused(key, f"{key} is classifier-free guidance's, and base 'null' has none: leave it out")

    @property
    def samples(self) -> int:
        """Number of samples: labels times scales."""
        return (self.count or len(self.labels)) * len(self.scales)

    @property
    def unit_count(self) -> int:
        return -(-self.samples // self.unit_size)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all that decides the samples, the weights aside: those are known by their content, not their path."""
        identity = {key: value for key, value in self.to_json().items() if key not in WEIGHTS}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_toml(cls, path: str | Path, text: str | None = None) -> Spec:
        """The spec in a TOML file. Relative paths in it are taken from the file's folder. text: the file's, if it is read.

        Besides the fields, `labels_file` names a file of one label a line. Raises Error with the line of what is wrong.
        """
        data, places = parse_table(read_text(path) if text is None else text, path)
        return cls.from_table(data, path, places)

    @classmethod
    def from_table(cls, data: Mapping[str, Any], path: str | Path, places: Mapping[str, str]) -> Spec:
        """The spec that a TOML file's content describes; see `from_toml`. places: as `parse_table` finds them."""
        known = [f.name for f in fields(cls) if f.compare] + ["labels_file"]
        for key in data:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise Error(f"{places.get(key, path)}: unknown key {key!r}: {hint}known are {', '.join(known)}")
        for key, example in (("checkpoint", '"fashion-mnist"'), ("scales", "[1.5, 4.0]")):
            if key not in data:
                raise Error(f"{path}: {key} is missing: want for example {key} = {example}")
        values, places, folder = dict(data), dict(places), Path(path).parent
        if "labels_file" in values:
            where, name = places.get("labels_file", str(path)), values.pop("labels_file")
            if "labels" in values or "count" in values:
                raise Error(f"{where}: labels_file stands alone: leave out labels and count")
            if not isinstance(name, str):
                raise Error(f"{where}: labels_file must be text, got {name!r}")
            values["labels"], places["labels"] = read_labels(folder / name, where), where
        for key in WEIGHTS:
            name = values.get(key)
            if isinstance(name, str) and name and name not in SHIPPED:
                values[key] = str((folder / name).absolute())
        return cls(**values, places=places)

    @property
    def weights(self) -> dict[str, str]:
        """Where its checkpoint and, if it has one, its classifier are: names of shipped ones, or paths."""
        return {key: getattr(self, key) for key in WEIGHTS if getattr(self, key) is not None}

    def moved(self, weights: Mapping[str, str]) -> Spec:
        """The same spec with its own of `weights` where they are now."""
        moved: dict[str, Any] = {key: path for key, path in weights.items() if key in self.weights}
        return replace(self, **moved)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "places"}

    @classmethod
    def from_json(cls, data: Any) -> Spec:
        """The spec that `to_json` described. Raises Error, TypeError or KeyError where it did not."""
        interval = data["interval"]
        return cls(**{**data, "interval": None if interval is None else Interval(**interval)})

    def differences(self, frozen: Spec) -> list[str]:
        """What `frozen`, the spec of a job that exists, has otherwise; "auto" here agrees with whatever was chosen there."""
        names = [f.name for f in fields(self) if f.compare and f.name not in WEIGHTS]
        differing = [n for n in names if getattr(self, n) != getattr(frozen, n)]
        return [
            _difference(name, getattr(frozen, name), getattr(self, name))
            for name in differing
            if not (name in AUTO and getattr(self, name) == "auto")
        ]

    def check_model(self, model: Denoiser) -> None:
        """Raises Error for what `model` cannot sample."""
        C = model.shape[0]
        if model.num_classes is None:
            raise self.refused("checkpoint", f"{self.checkpoint} takes embeddings for labels: jobs sample whole-number labels")
        for position, label in enumerate(self.labels if isinstance(self.labels, tuple) else ()):
            if label >= model.num_classes:
                raise self.refused(
                    "labels", f"label {label}, number {position + 1} of the list, is out of range: "
                    f"the model's labels are 0..{model.num_classes - 1}"
                )  # fmt: skip
        if model.latent and self.output == "uint8":
            raise self.refused("output", f'{self.checkpoint} makes latents, which are not pixels: want output = "latents"')
        if self.guidance_channels is not None and self.guidance_channels > C:
            raise self.refused("guidance_channels", f"guidance_channels {self.guidance_channels} asked, but samples have {C}")
        if model.null_label is None and self.classifier is None and any(scale != 1 for scale in self.scales):
            raise self.refused("scales", "the model has no null label (trained without label dropout): want scales = [1.0]")
        self.checked("steps", lambda: replace(self, interval=None).make_plan(model))
        self.checked("interval", lambda: self.make_plan(model))

    def make_plan(self, model: Denoiser) -> Plan:
        """What `model` is asked step by step."""
        return make_plan(
            model.schedule,
            steps=self.steps,
            solver=self.solver,
            spacing=self.spacing,
            predicts=model.predicts,
            eta=self.eta or 0.0,
            guidance=Guidance(interval=self.interval),
            by_classifier=self.classifier is not None,
        )

    def sampler_options(self) -> dict[str, Any]:
        """The keywords of `fastcfg.Sampler` for this spec, the device and the classifier aside."""
        names = ("steps", "solver", "spacing", "eta", "clip", "interval", "rescale", "guidance_channels", "batch", *AUTO)
        return {name: getattr(self, name) for name in names}

    def classifier_guidance(self) -> ClassifierGuidance | None:
        """Its classifier, loaded; None without one. Raises Error where it cannot be."""
        if self.classifier is None or self.classifier_base is None:
            return None
        return ClassifierGuidance(load_classifier(self.classifier), base=self.classifier_base)

    def refused(self, key: str, message: str) -> Error:
        """The error for `key`, with the place it was written at."""
        place = self.places.get(key)
        return Error(f"{place}: {message}" if place else message)

    def checked(self, key: str, action: Callable[[], Any]) -> Any:
        """action(), whose errors are said to be those of `key`."""
        try:
            return action()
        except Error as error:
            raise self.refused(key, str(error)) from error


def _difference(name: str, there: Any, here: Any) -> str:
    if isinstance(there, tuple) and isinstance(here, tuple) and max(len(there), len(here)) > 8:
        if len(there) != len(here):
            return f"{name}: {len(there)} of them there, {len(here)} here"
        position = next(i for i, pair in enumerate(zip(there, here, strict=True)) if pair[0] != pair[1])
        return f"{name}: number {position + 1} is {there[position]} there, {here[position]} here"
    there, here = (f"{len(v)} listed" if isinstance(v, tuple) and len(v) > 8 else _shown(v) for v in (there, here))
    return f"{name}: {there} there, {here} here"


def _shown(value: Any) -> str:
    if isinstance(value, Interval):
        return f"{'sigma ' if value.unit == 'sigma' else ''}{value.lo:g} to {value.hi:g}"
    return str(list(value)) if isinstance(value, tuple) else repr(value)


_CONVERSIONS: dict[str, Callable[[str, Any], Any]] = {
    "checkpoint": v.text,
    "scales": v.scales,
    "labels": v.labels,
    "count": v.optional(v.whole(1, 2**40)),
    "steps": v.whole(1),
    "solver": v.one_of(*SOLVERS),
    "spacing": v.one_of(*SPACINGS),
    "eta": v.optional(v.number(0, 1)),
    "interval": v.interval,
    "rescale": v.number(0, 1),
    "guidance_channels": v.optional(v.whole(1)),
    "classifier": v.optional(v.text),
    "classifier_base": v.optional(v.one_of(*BASES)),
    "clip": v.optional(v.one_of(*CLIPS)),
    "dtype": v.one_of("auto", *DTYPES),
    "engine": v.one_of("auto", *ENGINES),
    "seed": v.seed,
    "unit_size": v.whole(1),
    "batch": v.whole(1, 2**20),
    "output": v.one_of(*OUTPUTS),
}


def frozen(spec: Spec, dtype: str, engine: str) -> Spec:
    """`spec` with what "auto" came to."""
    return replace(spec, dtype=dtype, engine=engine)
