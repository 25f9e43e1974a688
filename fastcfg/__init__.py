"""fastcfg: high-throughput sampling with classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

from fastcfg._checkout import register as _register

_register()

from fastcfg.checkpoints import load, save  # noqa: E402 - the kernels' finder comes first
from fastcfg.errors import Error  # noqa: E402
from fastcfg.guidance import ClassifierGuidance, Guidance, Interval  # noqa: E402
from fastcfg.models.classifier import load_classifier  # noqa: E402
from fastcfg.models.denoiser import Denoiser  # noqa: E402
from fastcfg.models.dit import DiT, DiTConfig  # noqa: E402
from fastcfg.plan import Plan, make_plan  # noqa: E402
from fastcfg.sampler import Sampler  # noqa: E402
from fastcfg.schedules import Schedule, schedule  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "ClassifierGuidance",
    "Denoiser",
    "DiT",
    "DiTConfig",
    "Error",
    "Guidance",
    "Interval",
    "Plan",
    "Sampler",
    "Schedule",
    "load",
    "load_classifier",
    "make_plan",
    "save",
    "schedule",
]
