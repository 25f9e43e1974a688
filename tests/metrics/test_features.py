"""References: computed once, kept in ADM's layout, read from it, and never taken for another's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcfg.errors import Error
from fastcfg.metrics import (
    FeatureNetwork,
    Images,
    as_network,
    extract,
    from_arrays,
    moments,
    open_reference,
    preview,
    reference_of,
)
from fastcfg.metrics.features import cache_path


def pictures(n: int = 30) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 2, 2, 1), dtype=np.uint8)


def counting(fingerprint: str = "flat 1") -> tuple[FeatureNetwork, list[int]]:
    """A network whose features are the pixels, and the sizes of the batches it has seen."""
    seen: list[int] = []

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(images))
        flat = images.flatten(1).float()
        return flat, -flat

    return FeatureNetwork("flat", forward, fingerprint, batch=8), seen


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastcfg" / "features"


def test_extract_keeps_order_and_goes_by_batches() -> None:
    network, seen = counting()
    told: list[int] = []
    found = extract(from_arrays(pictures(), np.arange(30)), network, told.append)
    assert np.array_equal(found.values, pictures().reshape(30, 4))
    assert np.array_equal(found.logits, -found.values)
    assert found.labels.tolist() == list(range(30))
    assert seen == told == [8, 8, 8, 6]


def test_extract_lays_channels_out_for_the_network() -> None:
    """[n, H, W, C] arrives as [n, C, H, W]."""
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 2), dtype=np.uint8)
    network = as_network(lambda x: x[:, 1].flatten(1))
    assert np.array_equal(extract(from_arrays(images), network).values, images[..., 1].reshape(3, 20))


def test_preview_has_the_shapes_of_the_whole() -> None:
    network, seen = counting()
    images = from_arrays(pictures(), np.arange(30))
    found, whole = preview(images, network), extract(images, network)
    assert seen[0] == 1
    assert found.values.shape == whole.values.shape
    assert found.logits.shape == whole.logits.shape
    assert found.labels is whole.labels


def test_statistics_are_computed_once_for_pixels_and_weights(cache: Path) -> None:
    network, seen = counting()
    first = reference_of(from_arrays(pictures()), network)
    assert sum(seen) == 30
    again = reference_of(from_arrays(pictures()), network)
    assert sum(seen) == 30, "the network ran again"
    for one, other in ((first.moments.mu, again.moments.mu), (first.moments.sigma, again.moments.sigma)):
        assert np.array_equal(one, other)
    assert np.array_equal(first.features, again.features)
    assert again.count == 30
    reference_of(from_arrays(pictures(31)), network)
    assert sum(seen) == 61
    other_network, other_seen = counting("flat 2")
    reference_of(from_arrays(pictures()), other_network)
    assert sum(other_seen) == 30
    assert len(list(cache.iterdir())) == 3


def test_what_is_kept_is_a_statistics_file_of_adm() -> None:
    network, _ = counting()
    images = from_arrays(pictures())
    reference_of(images, network)
    with np.load(cache_path(images, network), allow_pickle=False) as archive:
        x = pictures().reshape(30, 4).astype(np.float64)
        np.testing.assert_allclose(archive["mu"], x.mean(0))
        np.testing.assert_allclose(archive["sigma"], np.cov(x, rowvar=False))
        assert archive["features"].dtype == np.float32
    given = open_reference(cache_path(images, network), network)
    assert given.count == 30
    assert given.features is not None


def test_damaged_cache_is_made_again() -> None:
    network, seen = counting()
    images = from_arrays(pictures())
    reference_of(images, network)
    cache_path(images, network).write_bytes(b"damaged")
    assert reference_of(images, network).features is not None
    assert sum(seen) == 60
    reference_of(images, network)
    assert sum(seen) == 60


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert reference_of(from_arrays(pictures()), counting()[0]).count == 30


def test_a_callable_leaves_nothing_behind(cache: Path) -> None:
    reference_of(from_arrays(pictures()), as_network(lambda x: x.flatten(1)))
    assert not cache.exists()


def statistics(path: Path, width: int = 4, **more: np.ndarray) -> Path:
    fitted = moments(np.random.default_rng(0).standard_normal((50, width)))
    np.savez(path, mu=fitted.mu, sigma=fitted.sigma, **more)
    return path


def test_statistics_alone(tmp_path: Path) -> None:
    network, seen = counting()
    found = open_reference(statistics(tmp_path / "s.npz"), network)
    assert found.features is None
    assert found.count is None
    assert not seen


def test_statistics_with_images_serve_both_ways(tmp_path: Path) -> None:
    """ADM's reference batches: mu and sigma of the whole data set beside some of its images."""
    network, _ = counting()
    path = statistics(tmp_path / "s.npz", arr_0=pictures())
    found = open_reference(path, network)
    with np.load(path) as archive:
        assert np.array_equal(found.moments.mu, archive["mu"])
    assert np.array_equal(found.features, pictures().reshape(30, 4))
    assert found.count is None, "the statistics may be of more images"


def test_statistics_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    network, _ = counting()
    cases = {
        statistics(tmp_path / "a.npz", network=np.array("flat 2")): "of another network",
        statistics(tmp_path / "b.npz", features=np.zeros((3, 5), np.float32)): r"features \[3, 5\] beside mu \[4\]",
    }
    np.savez(tmp_path / "c.npz", mu=np.zeros(4), sigma=np.zeros((4, 3)))
    cases[tmp_path / "c.npz"] = r"cannot read .*c\.npz: statistics must be mu \[D\] and sigma \[D, D\]"
    np.savez(tmp_path / "text.npz", mu=np.array(["a"] * 4), sigma=np.eye(4))
    cases[tmp_path / "text.npz"] = r"cannot read .*text\.npz: could not convert string"
    cases[statistics(tmp_path / "counts.npz", count=np.arange(3))] = r"cannot read .*counts\.npz"
    np.savez(tmp_path / "d.npz", mu=np.array([None] * 4), sigma=np.eye(4))
    cases[tmp_path / "d.npz"] = "cannot read"
    (tmp_path / "e.npz").write_text("hello")
    cases[tmp_path / "e.npz"] = "cannot read"
    for path, message in cases.items():
        with pytest.raises(Error, match=message):
            open_reference(path, network)


def test_networks_and_images_that_give_no_features_are_refused() -> None:
    cases: dict[Callable[[Tensor], Any], str] = {
        lambda x: x: r"features \[n, D\], a tensor, for n images, got \[30, 1, 2, 2\] for 30",
        lambda x: x.flatten(1)[:3]: r"features .* got \[3, 4\] for 30",
        lambda x: x.flatten(1).numpy(): "features .* got ndarray for 30",
        lambda x: (x.flatten(1), x.flatten(1).numpy()): r"logits \[n, K\], a tensor, for n images, got ndarray for 30",
        lambda x: (x.flatten(1), x.flatten()): r"logits .* got \[120\] for 30",
    }
    for features, message in cases.items():
        with pytest.raises(Error, match=message):
            extract(from_arrays(pictures()), as_network(features))
    with pytest.raises(Error, match="nothing has no images"):
        extract(replace(from_arrays(pictures()), name="nothing", read=lambda batch: iter(())), counting()[0])
    with pytest.raises(Error, match="nothing has no images"):
        preview(Images("nothing", 0, None, lambda batch: iter(())), counting()[0])


def test_features_are_made_without_gradients() -> None:
    layer = torch.nn.Linear(4, 3)
    assert extract(from_arrays(pictures()), as_network(lambda x: layer(x.flatten(1).float()))).values.shape == (30, 3)
