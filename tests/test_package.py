"""The package as it is found: in a bare checkout, under its own name and no other."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import fastcfg

CHECKOUT = Path(__file__).resolve().parent.parent

# An interpreter that sees the checkout and the installed dependencies, but no installed fastcfg: what the editable install
# put in place is taken away first.
BARE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)


def test_bare_checkout_imports_with_its_kernels() -> None:
    result = python(BARE + "import fastcfg.kernels; print(fastcfg.kernels.__file__)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(CHECKOUT / "kernels" / "__init__.py")


def test_importing_fastcfg_loads_neither_triton_nor_what_extras_bring() -> None:
    heavy = "{'triton', 'matplotlib', 'diffusers', 'scipy', 'click'}"
    result = python(f"import sys, fastcfg; print(sorted({heavy} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_kernels_by_their_bare_name_are_refused() -> None:
    result = python("import kernels")
    assert result.returncode == 1
    assert "ImportError: this folder is the package fastcfg.kernels" in result.stderr


def test_public_names_are_there_and_documented() -> None:
    for name in fastcfg.__all__:
        assert getattr(fastcfg, name).__doc__, name


@pytest.mark.parametrize("asset", ["fashion-mnist.safetensors", "fashion-cnn.safetensors"])
def test_assets_are_shipped_and_small(asset: str) -> None:
    path = files("fastcfg").joinpath(f"assets/{asset}")
    assert 0 < len(path.read_bytes()) <= 25 * 2**20


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("matplotlib", "from fastcfg.plots import pyplot; pyplot()", "plot"),
        ("scipy", "from fastcfg.metrics.frechet import frechet_distance as f; f([[0.0]] * 2, [[0.0]] * 2)", "metrics"),
        ("diffusers", "from pathlib import Path; from fastcfg.images import load_vae; load_vae(Path('.'), 4)", "diffusers"),
    ],
)
def test_missing_extra_is_named(module: str, call: str, extra: str) -> None:
    result = python(f"import sys; sys.modules['{module}'] = None; {call}")
    assert f"pip install 'fastcfg[{extra}]'" in result.stderr, result.stderr
