"""The thin API: a sampler is a model, a plan and an engine; calling it turns labels, scales and seeds into samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcfg.ceilings import Ceilings
from fastcfg.engines import DTYPES, Request, make_engine
from fastcfg.engines.classifier import ClassifierGradient, ClassifierTerm, RowIndex
from fastcfg.errors import Error, as_whole
from fastcfg.explain import Explanation, explain
from fastcfg.guidance import ClassifierGuidance, Guidance, Interval, scale_from_w, scale_table
from fastcfg.models.denoiser import Denoiser, as_denoiser, try_module
from fastcfg.models.dit import DiT
from fastcfg.noise import as_seed, whole_numbers
from fastcfg.plan import make_plan
from fastcfg.schedules import Array, Schedule

Numbers: TypeAlias = "Sequence[int] | NDArray[Any] | Tensor"


class Sampler:
    """Guided sampling from `model`: a Denoiser (what `fastcfg.load` returns), a DiT, or any module(x, t, y).

    Fixed when it is made: steps, solver ("ddim", "ddpm", "dpmpp_2m", "euler"), spacing, variance, interval, rescale,
    guidance_channels (see `fastcfg.Guidance`), batch, device, dtype, engine; DDIM's eta, and clip (False, True, "keep_eps"),
    where None is the model's own default. For a module that is not ours: schedule, predicts, null_label, num_classes and
    shape (C, H, W) say how it was trained; num_classes is null_label unless given. It is tried on a row of zeros at the plan's
    first t. t is the schedule's timestep, 0..T-1, and for a flow model T tau, 1..T; int64, or float32 where the plan visits
    fractions of timesteps ("euler" with "linspace"). Labels, scales and seeds change from call to call at no cost.

    classifier_guidance: a classifier's gradient on top (see `fastcfg.ClassifierGuidance`), inside the interval. On base "null"
    no conditional forward is made, so scale, rescale and guidance_channels, which are classifier-free guidance's, stay off.

    variance: DDPM's; None takes the learned range where the model has one, else the posterior's.
    Raises Error, before any work, for whatever cannot be done.
    """

    def __init__(
        self,
        model: nn.Module | Denoiser,
        *,
        steps: int = 50,
        solver: str = "ddim",
        spacing: str | Sequence[float] | NDArray[Any] = "dit",
        eta: float | None = None,
        variance: str | None = None,
        clip: bool | str | None = None,
        interval: Interval | tuple[float, float] | str | None = None,
        rescale: float = 0.0,
        guidance_channels: int | None = None,
        classifier_guidance: ClassifierGuidance | None = None,
        batch: int = 16,
        device: str | torch.device = "auto",
        dtype: str = "auto",
        engine: str = "auto",
        schedule: str | Schedule | None = None,
        predicts: str | None = None,
        null_label: int | Tensor | None = None,
        num_classes: int | None = None,
        shape: tuple[int, int, int] | None = None,
    ):
        rows = as_whole(batch)
        if rows is None or rows < 1:
            raise Error(f"batch must be a whole number of at least 1, got {batch!r}")
        self.model = as_denoiser(
            model, schedule=schedule, predicts=predicts, null_label=null_label, num_classes=num_classes, shape=shape
        )
        self.batch = rows
        self.guidance = Guidance(interval=interval, rescale=rescale, channels=guidance_channels)  # type: ignore[arg-type]
        if guidance_channels is not None and guidance_channels > self.model.shape[0]:
            raise Error(f"guidance_channels {guidance_channels} asked, but samples have {self.model.shape[0]} channels")
        self.classifier_guidance = classifier_guidance
        if classifier_guidance is not None:
            if not isinstance(classifier_guidance, ClassifierGuidance):
                raise Error(
                    f"classifier_guidance must be a fastcfg.ClassifierGuidance, got {type(classifier_guidance).__name__}: "
                    "want ClassifierGuidance(module), where fastcfg.load_classifier reads one"
                )
            _check_base(classifier_guidance, self.model, self.guidance)
        if variance is None:
            variance = "learned_range" if solver == "ddpm" and self.model.learned_variance else "posterior"
        if variance == "learned_range" and not self.model.learned_variance:
            raise Error("variance 'learned_range' asked, but the model predicts no variance: use 'posterior'")
        self.plan = make_plan(
            self.model.schedule,
            steps=steps,
            solver=solver,
            spacing=spacing,
            predicts=self.model.predicts,
            eta=eta if eta is not None else self.model.eta if solver == "ddim" else 0.0,
            variance=variance,
            clip=self.model.clip if clip is None else clip,
            guidance=self.guidance,
            by_classifier=classifier_guidance is not None,
        )
        if not isinstance(self.model.module, DiT):  # whose tables are known
            whole = torch.int64 if self.plan.whole_timesteps else torch.float32
            on_null = self._on_null or isinstance(self.model.null_label, Tensor)
            last = None if on_null else (self.model.num_classes or 1) - 1
            try_module(self.model, torch.from_numpy(self.plan.timesteps[:1]).to(whole), last)
        self.engine = make_engine(engine, self.model, self.plan, device, dtype)
        self._asked_dtype = DTYPES.get(dtype)  # None: "auto"
        self._gradient: ClassifierGradient | None = None
        if classifier_guidance is not None:
            self._gradient = ClassifierGradient(classifier_guidance.classifier, self.model, self.plan, self.engine.device)
        self._watch: _Stopwatch | None = None

    def __getstate__(self) -> dict[str, Any]:
        if self.engine.name != "reference":  # the others hold threads, or what lies on a device
            raise Error(f"a sampler on engine {self.engine.name!r} is neither pickled nor copied: make one in each process")
        return self.__dict__ | {"_watch": None}  # what it took here is no other's, and on a GPU a stream and events

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.refresh()  # by where the weights lie, and how often they were written, a converted copy would seem outdated

    def __call__(
        self,
        labels: Numbers | Sequence[Tensor],
        scale: Any = None,
        seeds: int | Numbers = 0,
        *,
        w: Any = None,
        classifier_scale: Any = None,
        indices: Numbers | None = None,
        x_T: Tensor | None = None,
        noise: Tensor | None = None,
        on_batch: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Samples, float32 [B, C, H, W] on the engine's device; the tensor is the caller's.

        labels: B whole numbers in 0..num_classes-1 (embeddings [B, ...] where the null label is one). scale: s, a number,
        [B], or [steps, 1] / [steps, B] (executed order); w = s - 1 may be given instead; 1 if neither. classifier_scale: in
        the same forms, in place of the `ClassifierGuidance`'s own; 0 is off. seeds: one number, whose sample i uses (seed,
        index i), or B numbers, each used with index 0; `indices` [B] says other indices.
        x_T [B, C, H, W], noise [steps, B, C, H, W] (executed order): given noise in place of drawn.
        on_batch(n) is called after each batch with the number of samples it finished.
        Any number of rows: they go in batches of `batch`, which changes no bit of a sample. The reference and cuda engines fill
        the last one up, at the cost of a whole one; on a CPU the others do not.
        """
        self._refuse_meta()
        y = self._labels(labels)
        rows, steps = y.shape[0], self.plan.steps
        scales = scale_table(_scale_of(scale, w), steps, rows)
        asked = scales != 1
        guided = asked & self.plan.guided[:, None]
        if self.model.null_label is None and guided.any():
            raise Error("the model has no null label (trained without label dropout): only scale 1 can be sampled")
        weight = self._classifier_weight(classifier_scale, rows)
        if self._on_null and asked.any():
            raise Error("classifier guidance on base 'null' predicts nothing for y: scale must be 1, or base 'conditional'")
        seed, index = _counters(seeds, indices, rows)
        self._check_given(x_T, noise, rows)
        conditions = torch.full_like(y, self.model.null_label) if self._on_null else y  # type: ignore[arg-type]
        pattern = guided if weight is None else np.concatenate([guided, weight != 0])
        call = Request(conditions, torch.from_numpy(scales), guided[:, 0], seed, index, x_T, noise)
        result: Tensor | None = None
        for part, count in _batches(pattern, self.batch, fill=self.engine.whole_batches):
            whole = count == rows and isinstance(part, slice)
            request = call if whole else call.rows(part, guided[:, part][:, 0])
            if weight is not None:
                request = replace(request, classifier=self._term(y[part], weight[:, part]))
            samples = self._run(request)
            if whole:
                result = samples
            else:
                result = samples.new_empty(rows, *samples.shape[1:]) if result is None else result
                result[part if isinstance(part, slice) else part[:count]] = samples[:count]
            if on_batch is not None:
                on_batch(count)
        assert result is not None
        return result

    def predict(self, x: Tensor, t: Tensor, labels: Numbers | Sequence[Tensor] | None) -> Tensor:
        """The network's output as the engine computes it, float32 [N, C or 2C, H, W].

        x: [N, C, H, W] at noise level t: [N], as the model counts timesteps. labels: [N], or None for the null label.
        """
        self._refuse_meta()
        want = f"want tensors x [N, {', '.join(map(str, self.model.shape))}] and t [N], N at least 1"
        if not isinstance(x, Tensor) or not isinstance(t, Tensor):
            raise Error(f"{want}, got {type(x).__name__}, {type(t).__name__}")
        if tuple(x.shape[1:]) != self.model.shape or t.shape != x.shape[:1] or not len(x):
            raise Error(f"{want}, got {list(x.shape)}, {list(t.shape)}")
        N = len(x)
        if labels is not None:
            y = self._labels(labels)
        elif self.model.null_label is None:
            raise Error("the model has no null label: labels must be given")
        else:
            null = torch.as_tensor(self.model.null_label, device="cpu")
            y = null.expand(N, *null.shape)
        if len(y) != N:
            raise Error(f"labels has one value a row: {len(y)} arrived for {N} rows")
        return self.engine.forward(x, t, y)

    def explain(self, ceilings: str | Ceilings | None = None) -> Explanation:
        """The plan, forwards, FLOPs and bytes of a batch, and launch by launch for a DiT; print it, or read its fields.

        ceilings: for floor times: "measured" (here, in a second or two), a GPU's name ("h100"), or `fastcfg.ceilings.Ceilings`.
        A GPU's name gives the ledger of the cuda engine there, in the sampler's dtype; if that is "auto", in that engine's own.
        """
        classifier = None if self.classifier_guidance is None else self.classifier_guidance.classifier
        return explain(
            self.model, self.plan, self.engine, self.batch, self.last_seconds, ceilings, self._asked_dtype, classifier
        )

    def refresh(self) -> None:
        """Makes the next call use weights that were changed in place since the sampler was made."""
        self.engine.refresh()
        if self._gradient is not None:
            self._gradient.refresh()

    @property
    def last_seconds(self) -> float | None:
        """What the last batch took; a GPU that is still at it is waited for. None before the first."""
        return None if self._watch is None else self._watch.seconds

    def _refuse_meta(self) -> None:
        if self.engine.device.type == "meta":
            raise Error(
                "a sampler on the meta device has no values to compute with, and is there to be explained: use a real one"
            )

    def _run(self, request: Request) -> Tensor:
        watch = _Stopwatch(self.engine.device)
        samples = self.engine.run(request)
        watch.stop()
        self._watch = watch
        return samples

    def _labels(self, labels: Any) -> Tensor:
        null = self.model.null_label
        if isinstance(null, Tensor):
            try:
                rows = isinstance(labels, (list, tuple)) and any(isinstance(row, Tensor) for row in labels)
                y = torch.stack(list(labels)) if rows else torch.as_tensor(labels)
            except (TypeError, ValueError, RuntimeError) as error:
                want = f"labels must be embeddings [B, {', '.join(map(str, null.shape))}], or a list of B tensors of one shape"
                raise Error(f"{want}: {error}") from None
            if y.ndim != null.ndim + 1 or y.shape[1:] != null.shape or not len(y):
                raise Error(f"labels must be embeddings [B, {', '.join(map(str, null.shape))}], got {list(y.shape)}")
            if y.is_floating_point() != null.is_floating_point():
                raise Error(f"labels must be of the null label's kind, {null.dtype}, got {y.dtype}")
            return y
        try:
            array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
        except (TypeError, ValueError, RuntimeError):  # tensors that NumPy has no form for, too
            raise Error(f"labels must be whole numbers [B], got {labels!r}") from None
        if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
            raise Error(f"labels must be whole numbers [B], at least one, got {array.dtype} {list(array.shape)}")
        last = (self.model.num_classes or 0) - 1
        whole = array.astype(np.int64)
        if whole.view(np.uint64).max() > last:  # where a negative number is a large one
            wrong = array[(array < 0) | (array > last)]
            guessed = null == last + 1 and not isinstance(self.model.module, DiT)
            note = f" (num_classes is null_label, {null}, unless given: pass num_classes= for more)" if guessed else ""
            raise Error(f"label {wrong[0]} is out of range: the model's labels are 0..{last}{note}")
        return torch.from_numpy(whole)

    @property
    def _on_null(self) -> bool:
        return self.classifier_guidance is not None and self.classifier_guidance.base == "null"

    def _classifier_weight(self, scale: Any, rows: int) -> Array | None:
        """What multiplies the classifier's gradient, float64 [steps, rows]; None without classifier guidance."""
        asked, column = self.classifier_guidance, self.plan.gradient
        if asked is None or column is None or self._gradient is None:
            if scale is not None:
                raise Error("classifier_scale given, but this sampler has no classifier: make it with classifier_guidance=")
            return None
        self._gradient.check()
        if scale is not None:
            asked = replace(asked, scale=scale)
        return asked.table(self.plan.steps, rows) * (column * self.plan.guided)[:, None]

    def _term(self, labels: Tensor, weight: Array) -> ClassifierTerm | None:
        """The classifier's term of a batch of rows, whose weights [steps, B] are zero in the same steps; None where in all."""
        steps = weight[:, 0] != 0
        if self._gradient is None or not steps.any():
            return None
        device = self.engine.device
        return ClassifierTerm(self._gradient, labels.to(device), torch.from_numpy(weight).to(device), steps)

    def _check_given(self, x_T: Any, noise: Any, rows: int) -> None:
        shape = (rows, *self.model.shape)
        for name, value, want in (("x_T", x_T, shape), ("noise", noise, (self.plan.steps, *shape))):
            if value is None:
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise Error(f"{name} must be a floating-point tensor {list(want)}, got {type(value).__name__}")
            if tuple(value.shape) != want:
                raise Error(f"{name} must be {list(want)}, got {list(value.shape)}")


class _Stopwatch:
    """Times what a device is given between this and `stop`. The host runs ahead of a GPU, which `seconds` waits for."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._begin = self._end = self._now()

    def stop(self) -> None:
        self._end = self._now()

    @property
    def seconds(self) -> float:
        if self._stream is None:
            return self._end - self._begin
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3

    def _now(self) -> Any:
        return time.perf_counter() if self._stream is None else self._stream.record_event(torch.cuda.Event(enable_timing=True))


def _check_base(asked: ClassifierGuidance, model: Denoiser, guidance: Guidance) -> None:
    """Raises Error where a classifier cannot guide `model`, or what is asked of classifier-free guidance would be idle."""
    if isinstance(model.null_label, Tensor):
        raise Error("classifier guidance needs whole numbers for labels, and the model's are embeddings")
    if asked.base == "null" and model.null_label is None:
        raise Error("the model has no null label (trained without label dropout): classifier guidance needs base 'conditional'")
    if asked.base == "null" and (guidance.rescale or guidance.channels is not None):
        raise Error("rescale and guidance_channels are classifier-free guidance's, and base 'null' has none: leave them out")


def _scale_of(scale: Any, w: Any) -> Any:
    if scale is not None and w is not None:
        raise Error("give the guidance strength once: scale, or w = scale - 1")
    if w is not None:
        return scale_from_w(w)
    return 1.0 if scale is None else scale


def _batches(guided: NDArray[np.bool_], batch: int, fill: bool) -> Iterator[tuple[RowIndex, int]]:
    """Splits rows into batches that are guided in the same steps: (up to `batch` row numbers, how many of them count).

    guided: [steps, rows], or [2 steps, rows] with a classifier's steps after the others. A row then never pays for a
    neighbour's null forward or gradient, nor does its arithmetic depend on it. fill: to exactly `batch`, by repeating the
    last row.
    """
    rows = guided.shape[1]
    if not (fill and rows % batch) and (rows == 1 or (guided == guided[:, :1]).all()):
        for start in range(0, rows, batch):
            stop = min(start + batch, rows)
            yield slice(start, stop), stop - start  # views: no copies
        return
    groups: dict[bytes, list[int]] = {}
    for row, pattern in enumerate(np.ascontiguousarray(np.packbits(guided, axis=0).T)):
        groups.setdefault(pattern.tobytes(), []).append(row)
    for members in groups.values():
        for start in range(0, len(members), batch):
            part = members[start : start + batch]
            yield np.array(part + part[-1:] * (fill * (batch - len(part)))), len(part)


def _counters(seeds: Any, indices: Any, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(seed, index) of every row, int64 [B] each."""
    one = as_seed(seeds)
    if one is not None:
        seed = np.full(rows, one)
        index = np.arange(rows)
    else:
        seed = _of_rows("seeds", seeds, rows)
        index = np.zeros(rows, np.int64)
    if indices is not None:
        index = _of_rows("indices", indices, rows)
        if index.min() < 0:
            raise Error(f"indices must be at least 0 and below 2^63, got {indices!r}")
    return seed, index


def _of_rows(name: str, values: Any, rows: int) -> NDArray[np.int64]:
    numbers = whole_numbers(name, values)
    if len(numbers) != rows:
        raise Error(f"{name} has one number a row: {len(numbers)} arrived for {rows} rows")
    return numbers
