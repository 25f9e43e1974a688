"""Reading a job's spec: what it means, and that whatever is wrong with it is said with its line, before any work."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastcfg
from fastcfg.cli import main
from fastcfg.guidance import Interval
from fastcfg.jobs import Spec
from fastcfg.jobs.toml import tomllib

GOOD = {
    "checkpoint": '"{checkpoint}"',
    "count": "20",
    "labels": '"balanced"',
    "scales": "[1.0, 3.0]",
    "steps": "3",
    "solver": '"ddim"',
    "spacing": '"dit"',
    "eta": "0.5",
    "interval": "[100, 600]",
    "rescale": "0.7",
    "guidance_channels": "3",
    "clip": '"keep_eps"',
    "dtype": '"fp32"',
    "engine": '"cpu"',
    "seed": "5",
    "unit_size": "6",
    "batch": "4",
    "output": '"uint8"',
}

# TOML values by what they are not
_words = st.from_regex(r"[a-z][a-z0-9_-]{0,12}", fullmatch=True).map(lambda word: f'"{word}x"')
_others = st.sampled_from(["1979-05-27", "{ a = 1 }", "[]", '""', "[[1], [2]]", "07:32:00", "[{}]", '"\\u0000"'])
_fractions = st.sampled_from(["0.5", "-1.5", "nan", "inf", "-inf", "3.0"])
_booleans = st.sampled_from(["true", "false"])
_below = st.integers(-(2**70), 0).map(str)
_not_whole = _words | _others | _fractions | _booleans | _below | st.sampled_from([str(2**80), "0x" + "f" * 5000])
_not_share = _words | _others | _booleans | st.sampled_from(["-0.1", "1.5", "nan", "inf", "-1", "2"])
_not_name = _words | _others | _fractions | st.integers().map(str)
_not_list = _words | _others | _fractions | _booleans | _below
_no_intervals = ["[5]", "[261, 100]", "[-1, 5]", '"sigma:2:1"', "[nan, 5]", "[0, inf]", '["a", "b"]', "7", "{}"]
BAD = {
    "checkpoint": _not_name | _booleans,
    "count": _not_whole,
    "labels": _not_list | st.sampled_from(["[0, 5]", "[-1]", "[0.5]", '["a"]', "[true]"]),
    "scales": _not_list | st.sampled_from(["[0.5]", "[nan]", "[1.0, inf]", "[2, 2]", '["2"]', "2.0"]),
    "steps": _not_whole | st.sampled_from(["1001", "1"]),
    "solver": _not_name | _booleans,
    "spacing": _not_name | _booleans,
    "eta": _not_share,
    "interval": _words | _booleans | st.sampled_from([*_no_intervals, "[100, 261]"]),  # the last holds no step
    "rescale": _not_share,
    "guidance_channels": _not_whole | st.just("4"),
    "clip": _not_name,
    "dtype": _not_name | _booleans,
    "engine": _not_name | _booleans,
    "seed": _words | _others | _fractions | _booleans | st.sampled_from([str(2**64), str(-(2**64))]),
    "unit_size": _not_whole,
    "batch": _not_whole | st.just("2000000"),
    "output": _not_name | _booleans,
}


def toml(values: dict[str, str], checkpoint: Path) -> str:
    return "".join(f"{key} = {value}\n" for key, value in values.items()).replace("{checkpoint}", str(checkpoint))


@st.composite
def malformed(draw: st.DrawFn) -> tuple[str, str, str | None]:
    """(TOML, the key that is wrong in it, the value): one value wrong, a key unknown, missing, or at odds with another."""
    keys = draw(st.permutations(list(GOOD)))
    lines = [f"{key} = {GOOD[key]}" for key in keys]
    lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(["", "# steps = 5", '  # labels = "none"'])))
    kind = draw(st.sampled_from(["value", "value", "value", "unknown", "missing", "odds", "twice", "cut"]))
    if kind == "value":
        key = draw(st.sampled_from(list(BAD)))
        value = draw(BAD[key])
        lines = [f"{key} = {value}" if line.startswith(f"{key} =") else line for line in lines]
        if value == "[0, 5]":  # wrong for the model alone
            lines = [line for line in lines if not line.startswith("count")]
    elif kind == "unknown":
        key = draw(st.sampled_from(["stpes", "scale", "out", "Steps", "labels_", "w", "device", "a.b", "[steps2]", "[[x]]"]))
        lines.append(key if key.startswith("[") else f"{key} = 3")
        key = key.strip("[]").split(".")[0]
    elif kind == "missing":
        key = draw(st.sampled_from(["checkpoint", "scales", "count"]))
        lines = [line for line in lines if not line.startswith(f"{key} =")]
    elif kind == "odds":
        key, line = draw(
            st.sampled_from([("count", "labels = [0, 1]"), ("eta", 'solver = "euler"'), ("unit_size", "count = 99999999")])
        )
        lines = [line if other.startswith(line.split(" ")[0] + " ") else other for other in lines]
    elif kind == "twice":
        key = draw(st.sampled_from(list(GOOD)))
        lines.append(f"{key} = {GOOD[key]}")
    else:
        key = ""
        lines[0] = lines[0][: draw(st.integers(1, 8))] + "\n"
        try:
            tomllib.loads("\n".join(lines))
            lines[0] = '"'
        except tomllib.TOMLDecodeError:
            pass
    return "\n".join(lines) + "\n", key, kind


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(malformed())
def test_malformed_spec_is_one_clear_error(tiny_checkpoint: Path, tmp_path: Path, case: tuple[str, str, str]) -> None:
    text, key, kind = case
    path, out = tmp_path / "spec.toml", tmp_path / "out"
    path.write_text(text.replace("{checkpoint}", str(tiny_checkpoint)))
    result = CliRunner().invoke(main, ["job", "run", str(path), "--out", str(out), "--devices", "cpu"])
    assert result.exit_code == 2, (result.output, text)
    lines = result.output.splitlines()
    assert len(lines) == 1, result.output
    assert lines[0].startswith("error: ")
    assert not out.exists()
    if kind == "missing":
        assert key in lines[0]
    elif kind in ("value", "unknown", "odds"):
        number = next(n for n, line in enumerate(text.splitlines(), 1) if re.match(rf"\[*{key}\b", line))
        assert f"{path} line {number}: " in lines[0], (lines[0], number)
    else:  # what TOML itself refuses, with the parser's words for the place
        assert "is not TOML" in lines[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interval": [0.0, math.inf]}, "interval: bounds must be finite, got inf"),
        ({"checkpoint": "a\0b"}, r"checkpoint must be text, got 'a\\x00b'"),
    ],
)
def test_what_json_or_a_path_cannot_hold_is_refused(tiny_spec: Spec, change: dict[str, Any], message: str) -> None:
    with pytest.raises(fastcfg.Error, match=message):
        replace(tiny_spec, **change)


def test_numpys_numbers_are_numbers(tiny_spec: Spec) -> None:
    numbers = {"scales": [np.float32(1.0), np.int64(3)], "steps": np.int32(3), "eta": np.float64(1.0), "seed": np.uint8(5)}
    spec = replace(tiny_spec, **numbers, count=None, labels=list(np.arange(20) % 5))  # type: ignore[arg-type]
    assert spec == replace(tiny_spec, count=None, labels=tuple(i % 5 for i in range(20)))
    assert json.loads(json.dumps(spec.to_json()))["scales"] == [1.0, 3.0]


def test_the_good_spec_is_good(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What the malformed ones are made from; otherwise any error would do."""
    path = tmp_path / "spec.toml"
    path.write_text(toml(GOOD, tiny_checkpoint))
    spec = Spec.from_toml(path)
    spec.check_model(fastcfg.load(tiny_checkpoint))
    assert spec.scales == (1.0, 3.0)
    assert spec.interval == Interval(100, 600)
    assert (spec.samples, spec.unit_count) == (40, 7)


def test_lines_inside_texts_and_lists_are_not_mistaken_for_keys(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    text = f'checkpoint = "{tiny_checkpoint}"\nsolver = """\nsteps = 3\n"""\nlabels = [\n0,\n1,\n]\nscales = [1]\nsteps = 5\n'
    path.write_text(text)
    with pytest.raises(fastcfg.Error, match=r"line 2: unknown solver"):
        Spec.from_toml(path)
    path.write_text(text.replace("steps = 5", "steps = 0"))
    with pytest.raises(fastcfg.Error, match=r"line 10: steps"):
        Spec.from_toml(path)


def test_unknown_keys_are_told_what_is_near(tiny_spec_path: Path) -> None:
    tiny_spec_path.write_text(tiny_spec_path.read_text() + "stpes = 3\n")
    with pytest.raises(fastcfg.Error, match=r"unknown key 'stpes': did you mean 'steps'\?"):
        Spec.from_toml(tiny_spec_path)


def test_labels_file_has_one_label_a_line(write_spec: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("3\n0\n4\n")
    path = write_spec(count=None, labels_file="labels.txt")
    assert Spec.from_toml(path).labels == (3, 0, 4)
    assert Spec.from_toml(path).samples == 6
    for content, word in (
        ("3\ncat\n", "line 2"),
        ("3\n\n4\n", "line 2"),
        ("-1\n", "line 1"),
        ("", "at least one"),
        ("٣\n", "line 1"),
    ):
        (tmp_path / "labels.txt").write_text(content)
        with pytest.raises(fastcfg.Error, match=word):
            Spec.from_toml(path)
    (tmp_path / "labels.txt").write_text("3\n5\n")
    with pytest.raises(fastcfg.Error, match=r"label 5, .*0\.\.4"):
        Spec.from_toml(path).check_model(fastcfg.load(Spec.from_toml(path).checkpoint))


def test_paths_are_taken_from_the_specs_folder(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text('checkpoint = "weights/a.safetensors"\ncount = 1\nscales = [1]\n')
    assert Spec.from_toml(tmp_path / "spec.toml").checkpoint == str(tmp_path / "weights" / "a.safetensors")


def test_identity_is_what_decides_the_samples(tiny_spec: Spec) -> None:
    assert replace(tiny_spec, checkpoint="elsewhere").sha256 == tiny_spec.sha256
    changes = {
        "scales": (1.0, 2.0), "count": 21, "steps": 4, "solver": "ddpm", "spacing": "trailing", "interval": (1, 2),
        "rescale": 0.5, "guidance_channels": 1, "clip": True, "dtype": "bf16", "engine": "reference", "seed": 6,
        "unit_size": 7, "batch": 5, "output": "latents",
    }  # fmt: skip
    others = {name: replace(tiny_spec, **{"eta": None, name: value}) for name, value in changes.items()}
    assert len({spec.sha256 for spec in others.values()} | {tiny_spec.sha256}) == len(changes) + 1
    for name, spec in others.items():
        assert [line.split(":")[0] for line in spec.differences(replace(tiny_spec, eta=None))] == [name]
    guided = replace(tiny_spec, classifier="a.safetensors")
    assert guided.sha256 == replace(guided, classifier="elsewhere").sha256 != tiny_spec.sha256
    assert guided.sha256 != replace(guided, classifier_base="conditional").sha256
    assert guided.differences(tiny_spec) == ["classifier_base: None there, 'null' here"]


def test_auto_agrees_with_what_was_chosen(tiny_spec: Spec) -> None:
    asked = replace(tiny_spec, dtype="auto", engine="auto")
    assert asked.differences(tiny_spec) == []
    assert tiny_spec.differences(replace(tiny_spec, dtype="bf16")) == ["dtype: 'bf16' there, 'fp32' here"]


def test_differences_of_long_lists_name_the_place(tiny_spec: Spec) -> None:
    one = replace(tiny_spec, count=None, labels=tuple(range(4)) * 10)
    two = replace(one, labels=(*one.labels[:17], 0, *one.labels[18:]))
    assert two.differences(one) == ["labels: number 18 is 1 there, 0 here"]
    assert replace(one, labels=one.labels[:-1]).differences(one) == ["labels: 40 of them there, 39 here"]


def test_json_and_pickle_keep_everything(write_spec: Callable[..., Path]) -> None:
    spec = Spec.from_toml(write_spec(interval="sigma:0.34:1.02", eta=None, clip=True, seed=-(2**63)))
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))).sha256 == spec.sha256
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_latents_are_not_pixels(tiny_spec: Spec) -> None:
    model = replace(fastcfg.load(tiny_spec.checkpoint), latent=True)
    with pytest.raises(fastcfg.Error, match='output = "latents"'):
        tiny_spec.check_model(model)
    replace(tiny_spec, output="latents").check_model(model)


def test_a_job_has_at_most_as_many_units_as_a_folder_bears() -> None:
    assert Spec("fashion-mnist", scales=(1.0,), count=100_000, unit_size=1).unit_count == 100_000
    with pytest.raises(fastcfg.Error, match="100001 units: want at most 100000"):
        Spec("fashion-mnist", scales=(1.0,), count=100_001, unit_size=1)
