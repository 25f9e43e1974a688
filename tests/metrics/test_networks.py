"""Feature networks: the FID Inception against torch-fidelity's, the layouts of the files that the field uses, and refusals."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import golden_inception
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastcfg.errors import Error
from fastcfg.files import read_safetensors
from fastcfg.metrics import as_network, from_arrays, load_network
from fastcfg.metrics.inception import resize_tf1


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return golden_inception.weights(golden_inception.shapes())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_inception_is_torch_fidelitys(suffix: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Features and bias-free logits of random weights under the official names, from either kind of file."""
    path = tmp_path / f"inception{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    expected, _ = read_safetensors(golden_inception.EXPECTED)
    network = load_network(path)
    with torch.no_grad():
        features, logits = network.forward(golden_inception.images())
    assert features.shape == (2, 2048)
    for found, name in ((features, "features"), (logits, "logits")):
        assert (found - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
    assert not network.judges_labels


def test_inception_sees_grey_images_as_rgb(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "i.safetensors")
    network = load_network(tmp_path / "i.safetensors")
    grey = golden_inception.images()[:1, :1]
    with torch.no_grad():
        assert torch.equal(network.forward(grey)[0], network.forward(grey.repeat(1, 3, 1, 1))[0])
    with pytest.raises(Error, match="1 or 3 channels, got 4 x 8 x 8"):
        network.forward(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("height", "width", "side"), [(28, 28, 299), (32, 48, 299), (512, 400, 299), (299, 299, 299), (1, 1, 5)]
)
def test_resize_samples_at_i_times_the_ratio(height: int, width: int, side: int) -> None:
    """A ramp shows where it was sampled: output (i, j) is at (i H / side, j W / side), held at the border. No half pixels."""
    rows, columns = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    image = (rows[:, None] + 1000 * columns)[None, None]
    at = torch.arange(side, dtype=torch.float64)
    expected = (at * height / side).clamp(max=height - 1)[:, None] + 1000 * (at * width / side).clamp(max=width - 1)
    torch.testing.assert_close(resize_tf1(image, side)[0, 0], expected, rtol=1e-12, atol=1e-9)


def test_weights_that_do_not_fit_are_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    lacking = {name: value for name, value in weights.items() if name != "Mixed_7c.branch_pool.bn.bias"}
    save_file(lacking, tmp_path / "a.safetensors")
    with pytest.raises(Error, match=r"1 names or shapes differ, Mixed_7c\.branch_pool\.bn\.bias"):
        load_network(tmp_path / "a.safetensors")
    save_file({**weights, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "b.safetensors")
    with pytest.raises(Error, match=r"1 names or shapes differ, fc\.weight"):
        load_network(tmp_path / "b.safetensors")


class StyleGANDetector(nn.Module):
    """The interface of inception-2015-12-05.pt, with a tiny network inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.output = nn.Linear(6, 4)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        features = self.layers(img.to(torch.float16 if use_fp16 else torch.float32) / 128.0 - 1.0)
        if return_features:
            return features
        logits = nn.functional.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return nn.functional.softmax(logits, dim=1)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).float()


def scripted(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_of_stylegan(tmp_path: Path) -> None:
    """Features as asked for by name, and logits whose softmax is the file's own without the bias; grey images become RGB."""
    torch.manual_seed(0)
    detector = StyleGANDetector()
    network = load_network(scripted(detector, tmp_path / "detector.pt"))
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        features, logits = network.forward(images)
        rgb = images.repeat(1, 3, 1, 1)
        torch.testing.assert_close(features, detector(rgb, return_features=True))
        torch.testing.assert_close(logits.softmax(1), detector(rgb, no_output_bias=True))
    assert not torch.allclose(logits.softmax(1), detector(rgb))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_of_another_kind(tmp_path: Path) -> None:
    network = load_network(scripted(Flat(), tmp_path / "flat.pt"))
    images = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    features, logits = network.forward(images)
    assert torch.equal(features, images.flatten(1).float())
    assert logits is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_saved_in_training_mode_judges_without_dropout(tmp_path: Path) -> None:
    network = load_network(scripted(nn.Sequential(Flat(), nn.Dropout(0.5)).train(), tmp_path / "dropout.pt"))
    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    assert torch.equal(network.forward(images)[0], images.flatten(1).float())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_that_cannot_take_the_images(tmp_path: Path) -> None:
    network = load_network(scripted(nn.Sequential(nn.Linear(7, 2)), tmp_path / "linear.pt"))
    with pytest.raises(Error, match="could not be called with images of 1 x 4 x 4"):
        network.forward(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))


def test_fingerprints_name_the_weights(weights: dict[str, Tensor], tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    save_file(weights, paths[0])
    save_file(weights, paths[1])
    save_file({**weights, "fc.bias": weights["fc.bias"] + 1}, paths[2])
    one, same, other = (load_network(path).fingerprint for path in paths)
    assert one == same != other
    assert load_network("fashion-cnn").fingerprint.startswith("fashion-cnn ")


def test_fashion_cnn_wants_its_own_size() -> None:
    network = load_network("fashion-cnn")
    features, logits = network.forward(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    assert features.shape == (2, 128)
    assert logits is not None
    assert logits.shape == (2, 10)
    with pytest.raises(Error, match="28 x 28, got 3 x 28 x 28"):
        network.forward(torch.zeros(2, 3, 28, 28, dtype=torch.uint8))


def test_a_callable_gives_features_or_features_and_logits() -> None:
    images = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2)
    assert as_network(lambda x: x.flatten(1)).forward(images)[1] is None
    both = as_network(lambda x: (x.flatten(1), x.flatten(1)[:, :2]), judges_labels=True)
    assert both.forward(images)[1].tolist() == [[0, 1], [4, 5]]
    assert both.judges_labels


class Planted:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Detected pickle")
def test_other_files_are_refused(tmp_path: Path) -> None:
    def written(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    planted = pickle.dumps({"fc.weight": Planted(tmp_path / "mark")})
    cases = {
        tmp_path / "none.pt": "no feature network at .*none.pt.*fashion-cnn, a TorchScript",
        "fashion-cmm": "no feature network at 'fashion-cmm'",
        tmp_path: "no feature network",
        written("text.pt", b"hello, world"): "not a whole TorchScript file",
        written("planted.pth", planted): "code in a file is not run",
        written("text.pth", b"hello, world"): "not a state dict",
        written("text.safetensors", b"hello, world"): "not a whole safetensors",
        written("graph.pb", b"hello"): "no feature network that fastcfg reads",
    }
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    cases[tmp_path / "list.pth"] = "no state dict of tensors"
    for path, message in cases.items():
        with pytest.raises(Error, match=message):
            load_network(path)
    assert not (tmp_path / "mark").exists()


def test_from_arrays_takes_bytes_alone() -> None:
    with pytest.raises(Error, match=r"uint8 \[N, H, W, C\], got float32 \[2, 4\]"):
        from_arrays(torch.zeros(2, 4).numpy())
