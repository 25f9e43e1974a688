"""The package as it is found: in a bare checkout, under its own name and no other."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

import fastcfg

CHECKOUT = Path(__file__).resolve().parent.parent

# An interpreter that sees the checkout and the installed dependencies, but no installed fastcfg: what the editable install
# put in place is taken away first.
BARE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "


def python(code: str, folder: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


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


def test_an_sdist_makes_a_wheel_of_every_file(tmp_path: Path) -> None:
    tree, built = tmp_path / "tree", tmp_path / "built"
    for folder in ("fastcfg", "kernels", "tests"):
        shutil.copytree(CHECKOUT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, tree)
    build = "from setuptools import build_meta; build_meta.build_{}({!r})"
    result = python(build.format("sdist", str(built)), tree)
    assert result.returncode == 0, result.stderr
    shutil.unpack_archive(next(built.glob("*.tar.gz")), built)
    (source,) = (path for path in built.iterdir() if path.is_dir())
    assert not (source / "tests").exists()  # setuptools takes test_*.py alone, without what they read
    result = python(build.format("wheel", str(built)), source)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        got = {name for name in wheel.namelist() if ".dist-info/" not in name}
    roots = {tree / "fastcfg": "fastcfg", tree / "kernels": "fastcfg/kernels"}
    assert got == {f"{to}/{f.relative_to(root)}" for root, to in roots.items() for f in root.rglob("*") if f.is_file()}


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
