"""All figures of one set of samples against one reference, each with how many samples it rests on and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastcfg.errors import Error, check_known
from fastcfg.metrics.accuracy import class_accuracy
from fastcfg.metrics.arrays import SEED, Estimate, check_widths, generator, scipy
from fastcfg.metrics.features import Features, Reference
from fastcfg.metrics.frechet import frechet_distance, frechet_error
from fastcfg.metrics.kernel import SUBSET_SIZE, kid
from fastcfg.metrics.neighbours import K_DENSITY, manifold
from fastcfg.metrics.score import SPLITS, inception_score, inception_score_error

MANIFOLD = ("precision", "recall", "density", "coverage")
METRICS = ("frechet_distance", "kid", "inception_score", *MANIFOLD, "class_accuracy")
WITHOUT_REFERENCE = ("inception_score", "class_accuracy")  # figures of the samples alone
WITH_SCIPY = ("frechet_distance", "inception_score")
WIDE = 512  # features, above which a resample of the Frechet distance is no matter of milliseconds


@dataclass(frozen=True)
class Figure:
    """samples, reference: rows that it rests on; reference 0 where it takes none, None where statistics do not say."""

    name: str
    estimate: Estimate
    samples: int
    reference: int | None


def evaluate(
    samples: Features,
    reference: Reference | None,
    metrics: Sequence[str] | None = None,
    *,
    bootstrap: int | None = None,
    seed: int = SEED,
) -> list[Figure]:
    """The figures named in `metrics`, or all that these inputs allow; see `unavailable`.

    bootstrap: resamples for the errors of the Frechet distance and the inception score, 0 for none (their error is NaN then);
    unless given, 100, or 20 where the features are wide (an error is then sure to 7 % or 16 % of itself). All that is random
    follows `seed`. A reference of None will do for those in `WITHOUT_REFERENCE`. Raises Error before any work, as `check` does.
    """
    wanted = check(samples, reference, metrics, bootstrap, seed)
    lacking = [name for name in wanted if reference is None and name not in WITHOUT_REFERENCE]
    if lacking:
        raise Error(f"{', '.join(lacking)} cannot be had without a reference: give one, or name metrics that take none")
    width = samples.values.shape[1]
    count = bootstrap if bootstrap is not None else 100 if width <= WIDE else 20
    if not np.isfinite(samples.values).all():
        raise Error("the samples' features hold NaN or infinity: the network cannot judge these images")
    figures: dict[str, Figure] = {}
    for name in wanted:
        if name not in figures:
            figures |= _figures(name, samples, reference, count, seed)
    return [figures[name] for name in wanted]


def check(
    samples: Features,
    reference: Reference | None,
    metrics: Sequence[str] | None = None,
    bootstrap: int | None = None,
    seed: int = SEED,
) -> list[str]:
    """The names of `metrics`, or of all that these inputs allow.

    Raises Error for unknown names, a bootstrap of one, an impossible seed, features of two widths, and metrics that the inputs
    do not allow or for which scipy is missing. A reference of None is not known yet. samples may be a `preview`: only shapes
    and labels are looked at.
    """
    generator(seed)
    if bootstrap is not None and (bootstrap < 0 or bootstrap == 1):
        raise Error(f"the bootstrap must have 0 resamples, or at least 2, got {bootstrap}")
    if reference is not None:
        check_widths(samples.values.shape[1], len(reference.moments.mu))
    lacking = unavailable(samples, reference)
    wanted = [name for name in METRICS if name not in lacking] if metrics is None else list(metrics)
    for name in wanted:
        check_known("metric", name, METRICS)
        if name in lacking:
            raise Error(f"{name} {lacking[name]}")
        if name in WITH_SCIPY:
            scipy("linalg", name.replace("_", " "))
    return wanted


def unavailable(samples: Features, reference: Reference | None) -> dict[str, str]:
    """{metric: what it needs and lacks} for those that these inputs do not allow."""
    reasons = _lacking_pair(len(samples), reference)
    logits, labels = samples.logits, samples.labels
    if len(samples) < 2:
        reasons["frechet_distance"] = f"needs at least 2 samples, got {len(samples)}"
    if logits is None:
        needs = "needs a classifier's logits, and this feature network has none"
        return reasons | {"inception_score": needs, "class_accuracy": needs}
    if len(samples) < SPLITS:
        reasons["inception_score"] = f"needs at least {SPLITS} samples, got {len(samples)}"
    if not samples.judges_labels:
        reasons["class_accuracy"] = "needs a network whose classes are the samples' labels, and this one's are not"
    elif labels is None:
        reasons["class_accuracy"] = "needs labels, and the samples have none"
    elif labels.min() < 0 or labels.max() >= logits.shape[1]:
        classes = f"classes 0..{logits.shape[1] - 1}"
        reasons["class_accuracy"] = f"needs labels among the network's {classes}, got {labels.min()} to {labels.max()}"
    return reasons


def _lacking_pair(count: int, reference: Reference | None) -> dict[str, str]:
    """What those that compare features row by row lack."""
    if reference is not None and reference.features is None:
        return dict.fromkeys(
            ("kid", *MANIFOLD), "needs features of the reference, and its file holds statistics alone: give images"
        )
    pair = count if reference is None or reference.features is None else min(count, len(reference.features))
    least = {"kid": 2} | dict.fromkeys(MANIFOLD, K_DENSITY + 1)
    return {name: f"needs at least {n} samples on either side, got {pair}" for name, n in least.items() if pair < n}


def _figures(name: str, samples: Features, reference: Reference | None, bootstrap: int, seed: int) -> dict[str, Figure]:
    """The figure called `name`, and those that come with it at no cost."""
    x, n = samples.values, len(samples)
    if name == "inception_score" and samples.logits is not None:
        error = inception_score_error(samples.logits, resamples=bootstrap, seed=seed) if bootstrap else math.nan
        return {name: Figure(name, Estimate(inception_score(samples.logits, seed=seed), error), n, 0)}
    if name == "class_accuracy" and samples.logits is not None and samples.labels is not None:
        return {name: Figure(name, class_accuracy(samples.logits, samples.labels), n, 0)}
    assert reference is not None, name  # `evaluate` has seen to it
    if name == "frechet_distance":
        error = frechet_error(x, reference.moments, bootstrap, seed) if bootstrap else math.nan
        return {name: Figure(name, Estimate(frechet_distance(x, reference.moments), error), n, reference.count)}
    assert reference.features is not None, name  # `unavailable` has seen to it
    if name == "kid":
        size = min(SUBSET_SIZE, n, len(reference.features))
        return {name: Figure(name, kid(x, reference.features, subset_size=size, seed=seed), n, len(reference.features))}
    found = manifold(x, reference.features)._asdict()
    return {key: Figure(key, estimate, n, len(reference.features)) for key, estimate in found.items()}
