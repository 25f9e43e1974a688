"""The Inception-v3 of FID: TensorFlow's network of 2015-12-05, under the weight names that pytorch-fid and torch-fidelity use.

It differs from torchvision's in its pools: averages leave padding out, and the last block takes a maximum; and in its input:
TensorFlow 1's bilinear resize, which has no half-pixel centres, and (pixel - 128) / 128.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcfg.errors import Error

SIDE, FEATURES, OUTPUTS = 299, 2048, 1008
Step = tuple[str, int, tuple[int, int]]  # name, output channels, kernel
Chain = Sequence[tuple[Step, ...]]  # steps in one place take the same input, and their outputs are joined


class Conv(nn.Module):
    """Convolution, batch norm, ReLU; padding keeps the size unless it is given."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, padding: int | None = None) -> None:
        super().__init__()
        same = (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, same if padding is None else padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, joined in order, then the pooled input.

    pool: "avg" or "max", followed by a convolution to `pool_features`; "halve" takes the pooled input as it is, and the last
    convolution of each branch halves the size, too.
    """

    def __init__(self, inputs: int, branches: Sequence[Chain], pool: str, pool_features: int = 0) -> None:
        super().__init__()
        self.pool = pool
        self.chains = [[[name for name, _, _ in fork] for fork in branch] for branch in branches]
        for branch in branches:
            width = inputs
            for place, fork in enumerate(branch):
                halves = pool == "halve" and place == len(branch) - 1
                for name, outputs, kernel in fork:
                    self.add_module(name, Conv(width, outputs, kernel, *((2, 0) if halves else ())))
                width = sum(outputs for _, outputs, _ in fork)
        if pool != "halve":
            self.branch_pool = Conv(inputs, pool_features, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        joined = []
        for chain in self.chains:
            y = x
            for fork in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in fork], dim=1)
            joined.append(y)
        if self.pool == "halve":
            joined.append(F.max_pool2d(x, 3, stride=2))
        elif self.pool == "max":
            joined.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            joined.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
        return torch.cat(joined, dim=1)


def _chain(*steps: Step) -> Chain:
    return [(step,) for step in steps]


_DOUBLE_3x3 = _chain(("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3)))


def _a(inputs: int, pool_features: int) -> Mixed:
    five = _chain(("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5)))
    return Mixed(inputs, [_chain(("branch1x1", 64, (1, 1))), five, _DOUBLE_3x3], "avg", pool_features)


def _b(inputs: int) -> Mixed:
    return Mixed(inputs, [_chain(("branch3x3", 384, (3, 3))), _DOUBLE_3x3], "halve")


def _c(inputs: int, width: int) -> Mixed:
    seven = _chain(("branch7x7_1", width, (1, 1)), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1)))
    double = _chain(
        ("branch7x7dbl_1", width, (1, 1)), ("branch7x7dbl_2", width, (7, 1)), ("branch7x7dbl_3", width, (1, 7)),
        ("branch7x7dbl_4", width, (7, 1)), ("branch7x7dbl_5", 192, (1, 7)),
    )  # fmt: skip
    return Mixed(inputs, [_chain(("branch1x1", 192, (1, 1))), seven, double], "avg", 192)


def _d(inputs: int) -> Mixed:
    three = _chain(("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3)))
    seven = _chain(
        ("branch7x7x3_1", 192, (1, 1)), ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, (3, 3)),
    )  # fmt: skip
    return Mixed(inputs, [three, seven], "halve")


def _e(inputs: int, pool: str) -> Mixed:
    three = [*_chain(("branch3x3_1", 384, (1, 1))), (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1)))]
    double = [
        *_chain(("branch3x3dbl_1", 448, (1, 1)), ("branch3x3dbl_2", 384, (3, 3))),
        (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
    ]
    return Mixed(inputs, [_chain(("branch1x1", 320, (1, 1))), three, double], pool, 192)


class FIDInception(nn.Module):
    """images uint8 [N, 3, H, W] -> (features [N, 2048], logits [N, 1008]).

    The logits have no bias: TensorFlow's inception score multiplies by the last weights alone, and so do its successors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, (3, 3), stride=2, padding=0)
        self.Conv2d_2a_3x3 = Conv(32, 32, (3, 3), padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Conv(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3), padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(768, 128), _c(768, 160), _c(768, 160), _c(768, 192)
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, "avg"), _e(2048, "max")
        self.fc = nn.Linear(FEATURES, OUTPUTS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (resize_tf1(images.float(), SIDE) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))
        return features, features @ self.fc.weight.T


def resize_tf1(x: Tensor, side: int) -> Tensor:
    """x [N, C, H, W] -> [N, C, side, side] as TensorFlow 1's resize_bilinear: output i samples the input at i H / side."""
    for dim in (2, 3):
        size = x.shape[dim]
        at = torch.arange(side, dtype=x.dtype, device=x.device) * (size / side)
        low = at.long()
        shape = [side if d == dim else 1 for d in range(4)]
        start, end = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=size - 1))
        x = start + (end - start) * (at - low).view(shape)
    return x


def build_inception(tensors: Mapping[str, Tensor], source: str) -> FIDInception:
    """The network with these weights, in eval mode; `source` names them in errors."""
    with torch.device("meta"):
        network = FIDInception()
    counters = "num_batches_tracked"  # of no use here, and older files lack them
    wanted = {name: value.shape for name, value in network.state_dict().items() if not name.endswith(counters)}
    given = {name: value for name, value in tensors.items() if not name.endswith(counters)}
    wrong = sorted(wanted.keys() ^ given.keys()) or [name for name in wanted if given[name].shape != wanted[name]]
    if wrong:
        raise Error(
            f"{source} does not hold the weights of the FID Inception (pt_inception-2015-12-05): "
            f"{len(wrong)} names or shapes differ, {', '.join(wrong[:3])} first"
        )
    network.load_state_dict({name: value.float() for name, value in given.items()}, assign=True, strict=False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = torch.zeros((), dtype=torch.long)
    return network.eval().requires_grad_(False)
