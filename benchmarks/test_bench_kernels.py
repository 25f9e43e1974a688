"""Speed of each Triton kernel on this GPU, in bf16: the shapes of DiT-S/2 at batch 8, replayed from a graph as the engine does.

Launched one by one, they would be as fast as Python: it takes longer to launch a kernel than most of these take to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    from gpu.cases import Case, cases
    from gpu.correctness import config_of
    from gpu.report import captured

    def _cases() -> Iterator[Any]:
        for case in cases(config_of("DiT-S/2"), 8, torch.bfloat16, torch.device("cuda")):
            yield pytest.param(case, id=f"{case.name} {case.shape}")

    @pytest.mark.parametrize("case", _cases())
    def test_kernel(benchmark: Any, case: Case) -> None:
        replay = captured(case.run, torch.device("cuda"))

        def call() -> None:
            replay()
            torch.cuda.synchronize()

        benchmark(call)

else:

    @pytest.mark.skip(reason="kernels are timed on a GPU, and there is none")
    def test_kernel() -> None: ...
