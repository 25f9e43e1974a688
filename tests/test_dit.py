"""The DiT module: the official outputs, the published sizes, and every table in it against an independent formula."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcfg.errors import Error
from fastcfg.models import dit
from fastcfg.models.dit import DIT_NAMES, DiT, DiTConfig, position_embedding, timestep_frequencies
from fastcfg.verify import Golden, read_golden

GOLDEN = Path(__file__).parent / "golden"
TINY = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read_golden(GOLDEN / "dit_tiny.weights.safetensors", GOLDEN / "dit_tiny.expected.safetensors")


@torch.no_grad()
def forwards(module: DiT, golden: Golden, dtype: torch.dtype = torch.float32) -> Tensor:
    """forward and forward_null of the golden inputs, [2, B, out channels, H, W]."""
    x, t, y = (golden.expected[name] for name in "xty")
    null = torch.full_like(y, module.config.num_classes)
    return torch.stack([module(x.to(dtype), t, y), module(x.to(dtype), t, null)])


def official(golden: Golden) -> Tensor:
    return torch.stack([golden.expected["forward"], golden.expected["forward_null"]])


def test_golden_forward(golden: Golden) -> None:
    computed, expected = forwards(golden.model.module, golden), official(golden)
    for one, want in zip(computed, expected, strict=True):
        assert (one - want).abs().max() <= 1e-5 * want.abs().max()


def test_numpys_numbers_make_a_config_that_can_be_stored() -> None:
    given = {name: np.int64(value) for name, value in TINY.items()} | {
        "mlp_ratio": np.float32(2),
        "time_frequency_shift": np.int64(1),
    }
    want = DiTConfig(**TINY, mlp_ratio=2, time_frequency_shift=1)
    assert DiTConfig.from_json(json.loads(json.dumps(DiTConfig(**given).to_json()))) == want


# Million parameters in the paper's table 1 (patch 2), and how many of ours are fixed rather than trained there.
PUBLISHED = {"XL": 675, "L": 458, "B": 130, "S": 33}


@pytest.mark.parametrize("name", DIT_NAMES)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = DiT.from_name(name)
    size, patch = name.removeprefix("DiT-").split("/")
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Patches of p x p put 4 p^2 values a token into the width D and take 8 p^2 out of it; biases add 8 p^2.
    extra = 12 * (int(patch) ** 2 - 4) * model.config.hidden_size + 8 * (int(patch) ** 2 - 4)
    assert count - extra == pytest.approx(PUBLISHED[size] * 1e6, rel=0.01)
    assert model.config.tokens == (32 // int(patch)) ** 2


def test_there_are_twelve_sizes_and_no_thirteenth() -> None:
    assert len(set(DIT_NAMES)) == 12
    with pytest.raises(Error, match="DiT-M/2"):
        DiT.from_name("DiT-M/2")


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_size": 9},
        {"num_heads": 5},
        {"hidden_size": 34, "num_heads": 1},
        {"depth": 0},
        {"num_classes": True},
        {"class_dropout_prob": 1.0},
        {"in_channels": 1.5},
    ],
)
def test_impossible_configs(wrong: dict) -> None:
    with pytest.raises(Error, match="DiT"):
        DiTConfig(**(TINY | wrong))


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_initial_output_is_zero(learn_sigma: bool) -> None:
    model = DiT(**TINY, learn_sigma=learn_sigma)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])
    out = model(x, t, y)
    assert out.shape == (3, 8 if learn_sigma else 4, 8, 8)
    assert torch.count_nonzero(out) == 0
    # Only the last layer makes it so: what comes before it is alive.
    torch.nn.init.normal_(model.final_layer.linear.weight)
    assert model(x, t, y).std() > 0.1


def test_weights_begin_as_in_the_official_code() -> None:
    """Xavier's uniform for products and patches (as one product), N(0, 0.02) for embeddings, zero for gates and biases."""
    torch.manual_seed(0)
    model = DiT(**(TINY | {"hidden_size": 128}))
    for name, value in model.named_parameters():
        if name == "pos_embed":
            continue
        kept = value.detach().flatten(1) if value.ndim > 1 else value.detach()
        if value.ndim == 1 or "adaLN_modulation" in name or name.startswith("final_layer"):
            assert torch.count_nonzero(kept) == 0, name
        elif "embedder" in name and not name.startswith("x_embedder"):
            assert kept.std().item() == pytest.approx(0.02, rel=0.1), name
            assert kept.abs().max() > 0.05, name  # no uniform distribution of this deviation reaches beyond 0.035
        else:
            bound = math.sqrt(6 / sum(kept.shape))
            assert kept.abs().max().item() == pytest.approx(bound, rel=0.02), name
            assert kept.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


@pytest.mark.parametrize(("patch", "side"), [(2, 4), (4, 2), (1, 3)])
def test_patches_go_in_and_come_out_where_they_were(patch: int, side: int) -> None:
    """Every value of a marked image is found again by its official position: token = row-major patch, then p, q, channel."""
    C, size = 3, patch * side
    config = DiTConfig(input_size=size, patch_size=patch, in_channels=C, hidden_size=48, depth=1, learn_sigma=False)
    model = DiT(config)
    image = torch.arange(2 * C * size * size, dtype=torch.float32).reshape(2, C, size, size)

    proj = model.x_embedder.proj
    torch.nn.init.zeros_(proj.weight)
    for c in range(C):  # channel (c, p, q) of a token is pixel (p, q) of the patch in channel c
        for p in range(patch):
            for q in range(patch):
                proj.weight.data[(c * patch + p) * patch + q, c, p, q] = 1
    tokens = model.x_embedder(image)
    out = torch.zeros(2, side * side, patch * patch * C)
    for row in range(size):
        for column in range(size):
            token = (row // patch) * side + column // patch
            p, q = row % patch, column % patch
            for c in range(C):
                assert torch.equal(tokens[:, token, (c * patch + p) * patch + q], image[:, c, row, column])
                out[:, token, (p * patch + q) * C + c] = image[:, c, row, column]
    assert torch.equal(model.unpatchify(out), image)


@pytest.mark.parametrize(("width", "side"), [(16, 3), (64, 4), (1152, 16)])
def test_position_embedding(width: int, side: int) -> None:
    """MAE's table, entry by entry: sin then cos of the column in the first half, of the row in the second."""
    table = position_embedding(width, side)
    assert table.shape == (side * side, width)
    assert table.dtype == torch.float32
    quarter = width // 4
    for row, column, k in [(0, 0, 0), (0, side - 1, 1), (side - 1, 0, quarter - 1), (1, 2, 3), (2, 1, 2)]:
        omega = math.exp(-math.log(10000.0) * k / quarter)
        want = [f(position * omega) for position in (column, row) for f in (math.sin, math.cos)]
        got = table[row * side + column, k::quarter].tolist()
        assert got == pytest.approx(want, abs=1e-6)


def test_timestep_features_are_cos_then_sin() -> None:
    features = DiT(**TINY).t_embedder.features(torch.tensor([0, 7, 999]))
    assert features.shape == (3, 256)
    for n, t in enumerate((0, 7, 999)):
        for i in (0, 1, 64, 127):
            angle = t * 10000.0 ** (-i / 128)
            assert features[n, i].item() == pytest.approx(math.cos(angle), abs=1e-4)
            assert features[n, 128 + i].item() == pytest.approx(math.sin(angle), abs=1e-4)


def test_a_module_is_made_on_the_default_device_and_its_tables_stay_usable() -> None:
    timestep_frequencies.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        module = DiT(**TINY)
        assert module(torch.empty(1, 4, 8, 8), torch.empty(1), torch.empty(1, dtype=torch.int64)).is_meta
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    table = timestep_frequencies(0)
    assert (table.device.type, table.is_inference(), table[0].item()) == ("cpu", False, 1.0)
    assert timestep_frequencies(0, torch.device("meta")) is timestep_frequencies(0, torch.device("meta"))  # no copy a call


def test_frequencies_of_diffusers() -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    # At t = 1 and phase pi / 2 the embedding is cos(frequency); small angles come from the sine.
    theirs = embeddings.get_timestep_embedding(
        torch.tensor([1]), 256, flip_sin_to_cos=True, downscale_freq_shift=1, max_period=10000
    )[0]
    frequencies = timestep_frequencies(1)
    ours = torch.cat([frequencies.cos(), frequencies.sin()])
    assert (ours - theirs).abs().max() <= 1e-6
    official = timestep_frequencies(0)
    assert (torch.cat([official.cos(), official.sin()]) - theirs).abs().max() > 1e-3  # the two tables do differ


@pytest.fixture
def misfit(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], float]:
    """Root mean square distance of the official forwards to a float64 evaluation with the given frequency table."""
    module = DiT(golden.model.module.config).double().eval()
    module.load_state_dict(golden.model.module.state_dict())

    def of(table: Tensor) -> float:
        monkeypatch.setattr(dit, "timestep_frequencies", lambda *_: table)
        return (forwards(module, golden, torch.float64) - official(golden)).square().mean().sqrt().item()

    return of


def test_frequencies_are_those_of_the_official_outputs(misfit: Callable[[Tensor], float]) -> None:
    """No single-ulp change fits the golden forwards better, and the plain correctly rounded table fits them worse.

    Higher entries turn too slowly for an ulp of them to show in a float32 output.
    """
    table = timestep_frequencies(0)
    best = misfit(table)
    for i in range(41):
        for direction in (0.0, 2.0):
            changed = table.clone()
            changed[i] = torch.nextafter(table[i], torch.tensor(direction))
            assert misfit(changed) > best * 0.99, f"entry {i} towards {direction}"
    exponent = -math.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128
    plain = torch.exp(exponent.double()).float()
    assert torch.count_nonzero(plain != table) == 1
    assert misfit(plain) > best * 1.1
