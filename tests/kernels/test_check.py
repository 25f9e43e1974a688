"""The compile gate, in a process of its own: it compiles kernels, which the interpreter of this process does not."""

import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from fastcfg import Error
from fastcfg.kernels import check
from fastcfg.kernels.check import Case, Row, _compile_nth, _results, compile_case
from fastcfg.kernels.noise import noise


def compiling(program):
    """What `program` prints where kernels compile; `rows(case)` is at hand, a Case's rows on sm_90."""
    prelude = """
import torch
from fastcfg.kernels import attention, check, linear

def rows(case, target="sm_90"):
    for row in check.compile_case(case, target):
        print(row)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    ran = subprocess.run([sys.executable, "-c", prelude + program], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_a_planted_spill_fails():
    good, spilled = compiling("""
def product(**tile):
    config = linear.linear_config(1152, torch.bfloat16, "sm_90") | tile
    h, weight = (torch.empty(1024, 1152, dtype=torch.bfloat16, device="meta") for _ in range(2))
    return check.Case("product", lambda: linear.linear(h, weight, config=config), product=True, work=check._tile_work)

rows(product())
rows(product(BLOCK_M=256, BLOCK_N=256, BLOCK_K=32))
""")
    assert good.endswith("ok")
    assert "wgmma+TMA" in good
    assert "spills" in spilled
    assert not spilled.endswith("ok")


def test_a_head_padded_to_128_fails():
    good, padded = compiling("""
def head():
    return check.Case("d=72", lambda: check._attention(torch.bfloat16, 256, 72), product=True, work=check._head_work(72))

rows(head())
attention.head_parts = lambda head_dim, widest=128: (128, 0)
rows(head())
""")
    assert good.endswith("ok")
    assert "wgmma+TMA" in good
    assert padded.endswith("1.78 times the multiply-adds asked for")


def test_a_product_without_its_matrix_unit_or_copies_fails():
    (row,) = compiling("""
h, weight = (torch.empty(1024, 1152, dtype=torch.bfloat16, device="meta") for _ in range(2))
config = linear.linear_config(1152, torch.bfloat16, "sm_90") | {"BLOCK_M": 32, "DESCRIPTORS": 0, "num_stages": 1}
rows(check.Case("product", lambda: linear.linear(h, weight, config=config), product=True))
""")
    assert row.endswith("no wgmma; no asynchronous copies")


def test_the_report_has_a_row_for_every_target_and_returns_what_fails():
    header, *lines, count = compiling("""
check.cases = lambda: [check.Case("d=64 T=64", lambda: check._attention(torch.float16, 64, 64), product=True, loop=True)]
print(len(check.check_kernels(processes=1)))
""")
    assert header.split() == ["kernel", "variant", "target", "registers", "spills", "shared", "uses", "verdict"]
    assert [line.split()[3] for line in lines] == ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]
    assert [line.endswith("ok") for line in lines].count(False) == int(count)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_processes_return_comes_in_order(processes):
    """Numbers, and the longest task first: the next must wait for it."""
    tasks = [partial(sum, range(10**7)), *(partial(divmod, n, 3) for n in range(20))]
    assert list(_results(tasks, processes)) == [sum(range(10**7)), *(divmod(n, 3) for n in range(20))]


def test_an_error_in_another_process_is_the_callers():
    with pytest.raises(Error, match="TRITON_INTERPRET"):
        list(_results([partial(_compile_nth, 0, "sm_90")], processes=2))


def test_every_kernel_has_a_case():
    called = compiling("""
for case in check.cases():
    with check.offline("sm_90", lambda kernel, grid, config, arguments: print(kernel.fn.__name__)):
        case.call()
""")
    kernels = "noise adaln linear attention guided_step moments step_boundary patch_embed"
    assert set(called) == {f"_{kernel}_kernel" for kernel in kernels.split()}


def test_what_does_not_compile_is_a_row():
    (row,) = compiling("""
def broken(*arguments):
    raise RuntimeError("no such luck")

check._compile = broken
rows(check.Case("broken", lambda: check._attention(torch.bfloat16, 256, 72)))
""")
    assert "does not compile: RuntimeError" in row
    assert "no such luck" in row


def test_a_launch_with_a_name_that_its_kernel_lacks_is_a_row():
    """Which the interpreter drops, and a GPU's launch does not."""
    (row,) = compiling("""
from fastcfg.kernels import noise
launch = noise.launch
noise.launch = lambda *where, **arguments: launch(*where, **arguments, colour=3)
seeds = torch.empty(4, dtype=torch.int64, device="meta")
rows(check.Case("", lambda: noise.noise(seeds, seeds, 1, out=check._samples())))
""")
    assert row.endswith("does not compile: Error: _noise_kernel has no colour, which its launch gives")


def test_an_interpreted_process_is_refused():
    with pytest.raises(Error, match="TRITON_INTERPRET"):
        compile_case(Case("", lambda: noise), "sm_90")


PLAIN = Case("", lambda: None)


def inspected(monkeypatch, target, registers=1, spills=0, shared=0, text="", stack=8, case=PLAIN, warps=4):
    """What the gates say of a kernel whose compiler printed this."""
    monkeypatch.setattr(check, "_resources", lambda cubin: (registers, stack))
    monkeypatch.setattr(check, "_spilled", lambda ptx: spills)
    counts = f".vgpr_count: {registers}\n.vgpr_spill_count: {spills}"
    asm = {"ptx": text, "cubin": b"", "amdgcn": counts + text}
    compiled = SimpleNamespace(metadata=SimpleNamespace(shared=shared), asm=asm)
    return check._inspect("kernel", case, target, {"num_warps": warps}, compiled).failures


@pytest.mark.parametrize(
    ("target", "used", "says"),
    [
        ("sm_90", {"registers": 255, "shared": 232448}, ()),
        ("sm_90", {"registers": 256}, ("256 registers, 255 at most",)),
        ("sm_90", {"spills": 4}, ("spills 4 bytes",)),
        ("sm_90", {"spills": 4, "stack": 0}, ()),
        ("sm_90", {"shared": 232449}, ("232449 bytes of shared memory, 232448 at most",)),
        ("sm_86", {"shared": 101377}, ("101377 bytes of shared memory, 101376 at most",)),
        ("sm_87", {"shared": 166912}, ()),
        ("gfx942", {"registers": 512, "shared": 65536}, ()),
        ("gfx942", {"registers": 513, "spills": 3}, ("spills 3 bytes", "513 registers, 512 at most")),
        ("gfx942", {"shared": 65537}, ("65537 bytes of shared memory, 65536 at most",)),
    ],
)
def test_gates_of_registers_spills_and_shared_memory(monkeypatch, target, used, says):
    assert inspected(monkeypatch, target, **used) == says


COPIES = "asynchronous copies"


@pytest.mark.parametrize(
    ("target", "text", "product", "lacks"),
    [
        ("sm_90", "wgmma.mma_async cp.async.bulk.tensor", {}, []),
        ("sm_90", "wgmma.mma_async cp.async.cg", {}, []),
        ("sm_90", "wgmma.mma_async", {}, [COPIES]),
        ("sm_90", "wgmma.mma_async", {"loop": False}, []),
        ("sm_90", "mma.sync cp.async.cg", {}, ["wgmma"]),
        ("sm_90", "mma.sync cp.async.cg", {"small": True}, []),
        ("sm_90", "", {"product": False}, []),
        ("sm_100", "tcgen05.mma cp.async.bulk.tensor", {}, []),
        ("sm_100", "mma.sync cp.async.bulk", {}, ["tcgen05", COPIES]),  # a copy of another kind
        ("sm_120", "mma.sync cp.async.ca", {}, []),
        ("sm_80", "", {}, ["mma", COPIES]),
        ("gfx942", "v_mfma_f32", {}, []),
        ("gfx942", "", {"small": True}, ["mfma"]),
    ],
)
def test_gates_of_matrix_units_and_copies(monkeypatch, target, text, product, lacks):
    case = Case("", lambda: None, **{"product": True, **product})
    assert inspected(monkeypatch, target, text=text, case=case) == tuple(f"no {what}" for what in lacks)


@pytest.mark.parametrize(("target", "warps", "says"), [("sm_90", 4, ()), ("sm_90", 8, ("2.00 times",)), ("sm_100", 8, ())])
def test_gate_of_padding(monkeypatch, target, warps, says):
    """Each of two warp groups makes a product of its own, of as many multiply-adds as were asked of both."""
    text = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
    case = Case("", lambda: None, work=lambda _: 64 * 128 * 16)
    found = inspected(monkeypatch, target, text=text, case=case, warps=warps)
    assert found == tuple(f"{what} the multiply-adds asked for" for what in says)


def test_a_row_says_what_failed():
    row = Row("linear", "bias", "sm_90", 255, 64, 1024, ("wgmma",), ("spills 64 bytes", "no asynchronous copies"))
    assert str(row).split()[:6] == ["linear", "bias", "sm_90", "255", "64", "1024"]
    assert str(row).endswith("spills 64 bytes; no asynchronous copies")
