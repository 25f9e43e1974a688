"""Which configurations are worth measuring for a kernel: short lists by hand, of which the compiler's gates strike some.

What they try, beside the default: wider tiles, which read less per product but leave fewer registers; narrower ones, which
spread a batch of one over more processors; more warps a tile; deeper pipelines, as far as shared memory goes.
"""

from __future__ import annotations

from fastcfg.kernels._launch import family, has_descriptors
from fastcfg.kernels.tuned import Config, Key

# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages
LINEAR = (
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3), (128, 128, 32, 8, 4), (128, 128, 32, 4, 4), (128, 256, 32, 8, 3), (64, 256, 64, 4, 3),
    (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 128, 64, 4, 6), (64, 128, 128, 4, 3), (64, 64, 64, 4, 4),
    (64, 64, 64, 4, 8), (64, 64, 128, 4, 3),
)  # fmt: skip
# BLOCK_M, BLOCK_N, num_warps, num_stages
ATTENTION = (
    (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2), (128, 32, 8, 4), (128, 32, 4, 3),
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3),
)  # fmt: skip
# TOKENS, BLOCK_D, num_warps, num_stages: the kernel has as many programs as a sample has tiles, at batch 1 very few
STEP_BOUNDARY = (
    (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 64, 8, 3), (32, 64, 4, 3), (32, 64, 4, 4), (32, 128, 4, 2),
    (32, 128, 4, 3), (16, 64, 4, 3), (16, 64, 4, 4), (16, 128, 4, 3), (16, 128, 4, 4),
)  # fmt: skip
ADALN = ((1, 2), (1, 4), (1, 8), (2, 4), (2, 8), (4, 4), (4, 8), (4, 16), (8, 8), (8, 16))  # TOKENS, num_warps
GUIDED_STEP = ((256, 2), (512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8))  # BLOCK, num_warps


def candidates(key: Key, default: Config, target: str) -> list[Config]:
    """What to measure against `default` on that target."""
    names, rows = _LISTS[key.kernel]
    found = [default | dict(zip(names, row, strict=True)) for row in rows]
    if "num_stages" in names and family(target) == "gfx942":  # deeper pipelines are a thing of asynchronous copies
        found = [config | {"num_stages": min(config["num_stages"], 2)} for config in found]
    if "DESCRIPTORS" in default and has_descriptors(target):
        found.append(default | {"DESCRIPTORS": 0})
    different = {tuple(config.items()): config for config in found if config != default}
    return list(different.values())


_LISTS = {
    "linear": (("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), LINEAR),
    "attention": (("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), ATTENTION),
    "step_boundary": (("TOKENS", "BLOCK_D", "num_warps", "num_stages"), STEP_BOUNDARY),
    "adaln": (("TOKENS", "num_warps"), ADALN),
    "guided_step": (("BLOCK", "num_warps"), GUIDED_STEP),
}
