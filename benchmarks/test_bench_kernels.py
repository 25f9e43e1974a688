"""Speed of each Triton kernel on this GPU, in bf16: the shapes of DiT-S/2 at batch 8, the call that the engine makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    from gpu.cases import Case, cases
    from gpu.correctness import config_of

    def _cases() -> Iterator[Any]:
        for case in cases(config_of("DiT-S/2"), 8, torch.bfloat16, torch.device("cuda")):
            yield pytest.param(case, id=f"{case.name} {case.shape}")

    @pytest.mark.parametrize("case", _cases())
    def test_kernel(benchmark: Any, case: Case) -> None:
        def call() -> None:
            case.run()
            torch.cuda.synchronize()

        benchmark(call)

else:

    @pytest.mark.skip(reason="kernels are timed on a GPU, and there is none")
    def test_kernel() -> None: ...
