"""Options that several commands share, and what their text means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fastcfg.engines import DTYPES, ENGINES
from fastcfg.errors import Error
from fastcfg.guidance import BASES, ClassifierGuidance
from fastcfg.models.classifier import load_classifier
from fastcfg.models.denoiser import Denoiser
from fastcfg.sampler import Sampler
from fastcfg.schedules import SPACINGS
from fastcfg.solvers import SOLVERS, VARIANCES

_SAMPLER_OPTIONS = (
    click.option("--checkpoint", default="fashion-mnist", show_default=True, help="A shipped name or a path."),
    click.option("--steps", default=50, show_default=True, help="Sampling steps."),
    click.option("--solver", default="ddim", show_default=True, help=", ".join(SOLVERS)),
    click.option("--spacing", default="dit", show_default=True, help=", ".join(SPACINGS)),
    click.option("--eta", default=None, type=float, help="DDIM's noise, 0 to 1. [default: the model's]"),
    click.option("--variance", default=None, help=f"DDPM's: {', '.join(VARIANCES)}. [default: the model's]"),
    click.option("--clip", default=None, help="Clip x0: yes, no or keep_eps. [default: the model's]"),
    click.option("--interval", default=None, help="Guide only there: 100:261 (timesteps) or sigma:0.34:1.02."),
    click.option("--rescale", default=0.0, show_default=True, help="phi of Lin et al., 0 to 1."),
    click.option("--guidance-channels", default=None, type=int, help="Guide the first this many. [default: all]"),
    click.option("--classifier", default=None, help="Guide by one: a shipped name or a path; --scale is then its own, from 0."),
    click.option("--classifier-base", default=None, help=f"What it guides: {', '.join(BASES)}. [default: {BASES[0]}]"),
    click.option("--batch", default=16, show_default=True, help="Rows in a batch."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
    click.option("--dtype", default="auto", show_default=True, help=f"auto, {', '.join(DTYPES)}"),
    click.option("--engine", default="auto", show_default=True, help=f"auto, {', '.join(ENGINES)}"),
)


def sampler_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that make a Sampler; see `make_sampler`."""
    for option in reversed(_SAMPLER_OPTIONS):
        command = option(command)
    return command


def make_sampler(model: Denoiser, options: dict[str, Any]) -> Sampler:
    """A Sampler from the values of `sampler_options` (checkpoint aside)."""
    clips = {None: None, "yes": True, "no": False, "keep_eps": "keep_eps"}
    if options["clip"] not in clips:
        raise Error(f"--clip must be yes, no or keep_eps, got {options['clip']!r}")
    classifier, base = options["classifier"], options["classifier_base"]
    if base is not None and classifier is None:
        raise Error("--classifier-base goes with --classifier: leave it out, or give both")
    by_classifier = None if classifier is None else ClassifierGuidance(load_classifier(classifier), base=base or BASES[0])
    others = ("checkpoint", "clip", "classifier", "classifier_base")
    arguments = {k: v for k, v in options.items() if k not in others}
    return Sampler(model, clip=clips[options["clip"]], classifier_guidance=by_classifier, **arguments)


def parse_numbers(text: str, name: str, kind: type[int] | type[float]) -> list[Any]:
    """ "1,1.5,2" as numbers of `kind`."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        want = "whole numbers" if kind is int else "numbers"
        raise Error(f"{name} must be {want} separated by commas, got {text!r}") from None


def parse_labels(text: str, count: int | None, num_classes: int) -> list[int]:
    """ "balanced" or "0,7,9" as labels, repeated in order up to `count` where given."""
    labels = list(range(num_classes)) if text == "balanced" else parse_numbers(text, "--labels", int)
    if count is None:
        return labels
    if count < 1:
        raise Error(f"--count must be at least 1, got {count}")
    return [labels[i % len(labels)] for i in range(count)]


def out_path(text: str, suffixes: tuple[str, ...]) -> Path:
    path = Path(text)
    if path.suffix not in suffixes:
        raise Error(f"--out must end in {', '.join(suffixes)}, got {text!r}")
    return path
