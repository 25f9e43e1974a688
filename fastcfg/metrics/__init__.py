"""Figures for sets of images: how far from a reference, how varied, how recognisable. docs/metrics.md says what each means.

from fastcfg import metrics

network = metrics.load_network("fashion-cnn")
samples = metrics.extract(metrics.open_images("samples.npz"), network)
reference = metrics.open_reference("/usr/share/datasets/fashion-mnist:test", network)
for figure in metrics.evaluate(samples, reference):
    print(figure.name, figure.estimate.value, figure.estimate.interval)
"""

from fastcfg.metrics.accuracy import class_accuracy
from fastcfg.metrics.arrays import CONFIDENCE, SEED, Estimate
from fastcfg.metrics.features import Features, Reference, extract, open_reference, preview, reference_of
from fastcfg.metrics.figures import METRICS, WITHOUT_REFERENCE, Figure, check, evaluate, unavailable
from fastcfg.metrics.frechet import Moments, frechet_distance, frechet_error, moments
from fastcfg.metrics.kernel import kid, mmd2
from fastcfg.metrics.neighbours import Manifold, manifold
from fastcfg.metrics.networks import FeatureNetwork, as_network, load_network
from fastcfg.metrics.score import inception_score, inception_score_error
from fastcfg.metrics.sources import Images, from_arrays, open_images
from fastcfg.metrics.variety import within_class_distance

__all__ = [
    "CONFIDENCE",
    "METRICS",
    "SEED",
    "WITHOUT_REFERENCE",
    "Estimate",
    "FeatureNetwork",
    "Features",
    "Figure",
    "Images",
    "Manifold",
    "Moments",
    "Reference",
    "as_network",
    "check",
    "class_accuracy",
    "evaluate",
    "extract",
    "frechet_distance",
    "frechet_error",
    "from_arrays",
    "inception_score",
    "inception_score_error",
    "kid",
    "load_network",
    "manifold",
    "mmd2",
    "moments",
    "open_images",
    "open_reference",
    "preview",
    "reference_of",
    "unavailable",
    "within_class_distance",
]
