"""What the kernel tests share."""

import torch

FLOAT_TYPES = (torch.float32, torch.float16)  # the interpreter's bf16 tl.dot is wrong


def poisoned(*shape, dtype=torch.float32):
    """An output buffer in which an element that is not written shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_error(got, want):
    """max |got - want| / max |want|, in float64; NaN anywhere in `got` gives NaN, which fails any comparison."""
    want = want.double()
    return float((got.double() - want).abs().max() / want.abs().max())


def assert_as_close_as_torch(got, exact, low):
    """The error rule: against `exact` (float64), a kernel errs at most twice as much as torch in the same precision does.

    A floor of two rounding steps of the result's own dtype allows for what any order of operations may differ by.
    """
    floor = 2 * torch.finfo(got.dtype).eps
    assert relative_error(got, exact) <= max(2 * relative_error(low, exact), floor)
