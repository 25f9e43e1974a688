"""Tables of tuned configurations: what is read, refused and looked up, and that a sample's batch never enters."""

import contextlib
import json
import multiprocessing
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interpreted import poisoned, randn
from test_check import compiling

import fastcfg
from fastcfg import Error
from fastcfg.kernels import _launch, tuned
from fastcfg.kernels import attention as attention_module
from fastcfg.kernels._launch import offline
from fastcfg.kernels.adaln import adaln
from fastcfg.kernels.attention import attention, attention_ref
from fastcfg.kernels.check import tuned_case
from fastcfg.kernels.guided_step import guided_step
from fastcfg.kernels.linear import linear
from fastcfg.kernels.step_boundary import step_boundary
from fastcfg.kernels.tuned import Entry, Table, key, read_table, write_table

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from gpu import tune
from gpu.cases import cases
from gpu.correctness import TINY, random_dit

from fastcfg.models.dit import DiTConfig

MEASURED = {"driver": "1.2", "torch": "2.11", "triton": "3.6", "commit": "abc", "date": "2026-01-01"}
SHAPES = {
    "linear": {"N": 1152, "K": 4608, "gelu": 0, "gate_tokens": 256},
    "attention": {"tokens": 256, "head_dim": 72},
    "step_boundary": {"columns": 16, "D": 1152, "learned": 0},
    "adaln": {"D": 1152},
    "guided_step": {"elements": 4096},
}
CONFIGS = {
    "linear": {"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_K": 32, "GROUP_M": 5, "DESCRIPTORS": 0, "num_warps": 4, "num_stages": 5},
    "attention": {"BLOCK_M": 32, "BLOCK_N": 16, "DESCRIPTORS": 0, "num_warps": 2, "num_stages": 1},
    "step_boundary": {"TOKENS": 16, "BLOCK_D": 32, "num_warps": 2, "num_stages": 5},
    "adaln": {"TOKENS": 8, "num_warps": 2, "num_stages": 3},
    "guided_step": {"BLOCK": 128, "num_warps": 1, "num_stages": 2},
}


def entry(kernel="linear", dtype="bfloat16", **change):
    ms = {"batch 32": [0.3, 0.2], "batch 1": [0.02, 0.01]}
    return replace(Entry(kernel, dtype, SHAPES[kernel], CONFIGS[kernel], None, ms, MEASURED), **change)


def table(*entries, gpu="NVIDIA H100 80GB HBM3", target="sm_90"):
    few = CONFIGS["adaln"] | {"num_warps": 4}
    return Table(gpu, target, entries or tuple(entry(k, few=few if k == "adaln" else None) for k in sorted(SHAPES)))


def launches(call, lookup=lambda key: None):
    """(keys asked for, configurations launched) of a call on meta tensors."""
    keys, configs = [], []

    def answer(key):
        keys.append(key)
        return lookup(key)

    with offline("sm_90", lambda kernel, grid, config, arguments: configs.append(config), answer):
        call()
    return keys, configs


@pytest.mark.parametrize("kernel", SHAPES)
def test_an_entry_is_what_its_launch_takes(kernel):
    one = entry(kernel)
    case = tuned_case(one.key, one.config, heads=16)
    keys, configs = launches(case.call, {one.key: one.config}.get)
    assert set(keys) == {one.key}
    assert all(config == one.config for config in configs)
    _, defaults = launches(case.call)
    assert all(config != one.config for config in defaults)
    assert all(set(config) == set(one.config) for config in defaults)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def every_launch(B, halves=2):
    """The launches of a guided step of B samples of 16 tokens of 64 values; linear with and without its gate."""
    R, T, D = halves * B, 16, 64
    table, index, h, x = meta(9, 6 * D), meta(R, dtype=torch.int32), meta(R, T, D), meta(B, 4, 8, 8, dtype=torch.float32)
    solver = {"coef": meta(50, 10, dtype=torch.float32), "scale": meta(50, B, dtype=torch.float32)}
    solver["step"] = meta(B, dtype=torch.int32)
    adaln(h, table, index, 0, D)
    linear(h, meta(3 * D, D), meta(3 * D))
    linear(h, meta(D, D), meta(D), residual=h, table=table, index=index)
    linear(meta(B, D), meta(D, D), meta(D), gelu=True)
    attention(meta(R, T, 3 * D), 2)
    step_boundary(h, table, index, 0, D, meta(32, D), meta(32), x, **solver, patch=2)
    guided_step(meta(R, 8, 8, 8), x, **solver)


def test_no_key_depends_on_the_batch():
    alone, _ = launches(lambda: every_launch(1))
    assert len(alone) == len(set(alone)) == 7
    for batch, halves in ((1, 1), (3, 2), (32, 2), (50, 1)):
        assert launches(lambda batch=batch, halves=halves: every_launch(batch, halves))[0] == alone


def test_no_launch_is_compiled_again_for_another_batch():
    """As Triton does for a number that is 1, or that 16 divides and did not before: a call would wait for the compiler."""
    kernels, *differ = compiling("""
from test_tuned import every_launch

def kinds(batch, halves):
    found = []

    def add(kernel, grid, config, arguments):
        given = arguments | config
        for p in kernel.params:
            kind = check._specialise(given[p.name], p.is_constexpr, p.do_not_specialize)
            found.append((kernel.fn.__name__, p.name, kind, given[p.name] if p.is_constexpr else None))

    with check.offline("sm_90", add):
        every_launch(batch, halves)
    return found

print(len({kernel for kernel, *_ in kinds(1, 2)}))
for halves in (1, 2):
    for batch in (2, 3, 16):
        for this, one in zip(kinds(batch, halves), kinds(1, halves), strict=True):
            if this != one:
                print(batch, this, one)
""")
    assert (kernels, differ) == ("5", [])


def test_tensors_of_mixed_dtypes_take_no_entry():
    """An entry's tile may not fit the shared memory where the residual is wider than what it was measured with."""
    h, weight, index = meta(2, 256, 64), meta(64, 64), meta(2, dtype=torch.int32)
    residual = meta(2, 256, 64, dtype=torch.float32)
    keys, _ = launches(lambda: linear(h, weight, residual=residual, table=meta(3, 64), index=index))
    assert keys[0].dtype == "bfloat16+float32"
    assert keys[0].dtype not in tuned.DTYPES


def test_a_table_is_read_as_written_with_a_line_an_entry(tmp_path):
    path = tmp_path / "table.json"
    write_table(path, table())
    assert read_table(path) == table()
    lines = path.read_text().splitlines()
    assert len(lines) == 2 + len(SHAPES)
    assert ["NVIDIA H100" in line for line in lines] == [True] + [False] * (len(lines) - 1)
    assert "2026-01-01" in lines[1]
    write_table(path, replace(table(), entries=()))
    assert read_table(path).entries == ()


DAMAGE = {
    "cut off": lambda stored: json.dumps(stored)[:-9],
    "no object": lambda stored: json.dumps([stored]),
    "another format": lambda stored: json.dumps(stored | {"format": 2}),
    "no GPU": lambda stored: json.dumps({name: value for name, value in stored.items() if name != "gpu"}),
    "no list": lambda stored: json.dumps(stored | {"entries": 3}),
    "twice": lambda stored: json.dumps(stored | {"entries": stored["entries"] * 2}),
    "twice, with a list for a size": lambda stored: json.dumps(
        stored | {"entries": [stored["entries"][0] | {"shape": SHAPES["linear"] | {"N": [1152]}}] * 2}
    ),
}
DAMAGED_ENTRY = {
    "unknown kernel": {"kernel": "softmax"},
    "unknown dtype": {"dtype": "int8"},
    "unknown field": {"speed": 3},
    "batch in its shape": {"shape": SHAPES["linear"] | {"rows": 32}},
    "shape without K": {"shape": {"N": 1, "gelu": 0, "gate_tokens": 0}},
    "shape of text": {"shape": SHAPES["linear"] | {"N": "1152"}},
    "config without warps": {"config": {name: n for name, n in CONFIGS["linear"].items() if name != "num_warps"}},
    "another kernel's config": {"config": CONFIGS["adaln"]},
    "a tile of 96": {"config": CONFIGS["linear"] | {"BLOCK_M": 96}},
    "no stages": {"config": CONFIGS["linear"] | {"num_stages": 0}},
    "a fraction": {"config": CONFIGS["linear"] | {"BLOCK_N": 64.0}},
    "config of numbers": {"config": 3},
    "another kernel's config for few rows": {"few": CONFIGS["adaln"]},
    "a tile of 96 for few rows": {"few": CONFIGS["linear"] | {"BLOCK_M": 96}},
}


@pytest.mark.parametrize("damage", [*DAMAGE, *DAMAGED_ENTRY])
def test_a_damaged_table_is_one_clear_error(damage, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    write_table(path, table(entry(), gpu="interpreter"))
    stored = json.loads(path.read_text())
    if damage in DAMAGE:
        path.write_text(DAMAGE[damage](stored))
    else:
        path.write_text(json.dumps(stored | {"entries": [stored["entries"][0] | DAMAGED_ENTRY[damage]]}))
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    for _ in range(2):
        with pytest.raises(Error, match="table") as error:
            attention(randn(1, 16, 48), 1)
        assert str(path) in str(error.value)


def test_a_table_of_another_gpu_or_none_where_one_is_named_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "table.json"))
    with pytest.raises(Error, match=r"cannot read.*table\.json"):
        attention(randn(1, 16, 48), 1)
    write_table(tmp_path / "table.json", table())
    with pytest.raises(Error, match="measured on NVIDIA H100 80GB HBM3, and this is interpreter: unset FASTCFG_TUNED"):
        attention(randn(1, 16, 48), 1)


@pytest.fixture
def launched(monkeypatch):
    configs = []
    launch = attention_module.launch

    def spy(kernel, grid, device, config, **arguments):
        configs.append(config)
        launch(kernel, grid, device, config, **arguments)

    monkeypatch.setattr(attention_module, "launch", spy)
    return configs


def small_attention():
    return entry("attention", "float32", shape={"tokens": 16, "head_dim": 16})


def test_the_table_that_the_variable_names_is_used_and_its_result_right(tmp_path, monkeypatch, launched):
    qkv = randn(2, 16, 48)
    default = attention(qkv, 1, out=poisoned(2, 16, 16))
    write_table(tmp_path / "table.json", table(small_attention(), gpu="interpreter"))
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "table.json"))
    got = attention(qkv, 1, out=poisoned(2, 16, 16))
    attention(randn(2, 17, 48), 1)
    attention(qkv, 1, config=launched[0])
    assert launched[1] == small_attention().config
    assert launched[0] == launched[3] != launched[1]
    assert launched[2] != launched[1]
    assert torch.allclose(got, attention_ref(qkv, 1), atol=1e-6)
    assert torch.allclose(got, default, atol=1e-6)


@pytest.mark.parametrize("processors", [6, 7])
def test_launches_too_small_to_fill_the_gpu_take_the_second_configuration(processors, tmp_path, monkeypatch, launched):
    few = CONFIGS["attention"] | {"BLOCK_M": 16}
    write_table(tmp_path / "table.json", table(replace(small_attention(), few=few), gpu="interpreter"))
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "table.json"))
    monkeypatch.setattr(_launch, "multiprocessors", lambda tensor: processors)
    for rows in (2, 3, 4):
        attention(randn(rows, 16, 96), 2)
    assert launched == [few, few if processors == 7 else small_attention().config, small_attention().config]


def test_a_whole_loop_with_tuned_tiles(tmp_path, monkeypatch):
    """Every entry that the engine asks for, with other tiles than the defaults: the same samples, alone or among others.

    NumPy's products hold this to the bit where a row keeps its place in a tile: 64 tokens are one.
    """
    module = random_dit(**{**TINY, "input_size": 16})

    def sample(rows):
        sampler = fastcfg.Sampler(module, steps=2, batch=rows, engine="cuda", device="cpu", dtype="fp32")
        return sampler([3] * rows, 4.0, list(range(rows)))

    keys = set()
    with monkeypatch.context() as listening:
        listening.setattr(tuned, "entries_for", lambda gpu: types.SimpleNamespace(get=keys.add))
        default = sample(2)
    assert {key.kernel for key in keys} == {"linear", "attention", "adaln", "step_boundary"}
    entries = [entry(key.kernel, key.dtype, shape=dict(key.shape)) for key in keys]
    write_table(tmp_path / "table.json", table(*entries, gpu="interpreter"))
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "table.json"))
    among = sample(2)
    assert torch.allclose(among, default, rtol=1e-4, atol=1e-4 * float(default.abs().max()))
    assert not torch.equal(among, default)
    assert torch.equal(sample(1)[0], among[0])


def test_a_shipped_table_is_used_by_its_gpus_name_and_the_variable_goes_before_it(tmp_path, monkeypatch, launched):
    monkeypatch.setattr(tuned, "TABLES", tmp_path)
    tuned._entries_for.cache_clear()
    qkv = randn(2, 16, 48)
    write_table(tmp_path / "interpreter.json", table(small_attention(), gpu="interpreter"))
    attention(qkv, 1)
    own = replace(small_attention(), config=CONFIGS["attention"] | {"num_stages": 4})
    (tmp_path / "own").mkdir()
    write_table(tmp_path / "own" / "any name.json", table(own, gpu="interpreter"))
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "own" / "any name.json"))
    attention(qkv, 1)
    assert [config["num_stages"] for config in launched] == [1, 4]
    tuned._entries_for.cache_clear()


def test_a_shipped_table_under_another_name_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "TABLES", tmp_path)
    write_table(tmp_path / "nvidia-h100-80gb-hbm3.json", table())
    assert tuned.shipped_tables() == [table()]
    write_table(tmp_path / "h100.json", table())
    with pytest.raises(Error, match=r"name it nvidia-h100-80gb-hbm3\.json"):
        tuned.shipped_tables()


def test_the_check_compiles_the_shipped_tables():
    """An entry whose second configuration spills, and two for shapes that no launch has; only for the table's own target."""
    (headless, own, spilled, odd), elsewhere = shipped_rows("""
good = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "DESCRIPTORS": 1, "num_warps": 4, "num_stages": 3}
bad = good | {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 32}
entries = [Entry("linear", "bfloat16", {"N": 1152, "K": 1152, "gelu": 0, "gate_tokens": 256}, good, bad, {}, {})]
entries.append(Entry("step_boundary", "bfloat16", {"columns": 24, "D": 64, "learned": 0},
                     {"TOKENS": 16, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}, None, {}, {}))
entries.append(Entry("attention", "bfloat16", {"tokens": 256, "head_dim": 70},
                     {"BLOCK_M": 64, "BLOCK_N": 64, "DESCRIPTORS": 1, "num_warps": 4, "num_stages": 2}, None, {}, {}))
""")
    assert own.endswith("ok")
    assert "wgmma+TMA" in own
    assert "spills" in spilled
    assert "launches of this kind ask for step_boundary bfloat16 D=64 columns=32 learned=0" in odd
    assert headless.endswith("got 70")
    assert elsewhere == []


def shipped_rows(entries):
    """What `check_kernels` shows for a shipped table of `entries`: for its own target, and for another."""
    lines = compiling(f"""
import tempfile
from pathlib import Path
from fastcfg.kernels import tuned
from fastcfg.kernels.tuned import Entry, Table, write_table
{entries}
tuned.TABLES = Path(tempfile.mkdtemp())
write_table(tuned.TABLES / "some-gpu.json", Table("Some GPU", "sm_90", tuple(entries)))
check.cases = lambda: []
failed = check.check_kernels(["sm_90"], processes=1)
print("failed", len(failed))
check.check_kernels(["sm_80"], processes=1)
""")
    end = next(i for i, line in enumerate(lines) if line.startswith("failed"))
    rows, elsewhere = lines[1:end], lines[end + 2 :]
    assert lines[end] == f"failed {sum(not row.endswith('ok') for row in rows)}"
    return rows, elsewhere


def test_what_is_compiled_offline_is_what_a_launch_compiles():
    """By Triton's own reading of the arguments, on a pretended GPU: so a candidate that was compiled is found by its launch."""
    benchmarks = str(Path(tune.__file__).parents[1])
    lines = compiling(f"""
import sys
import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, {benchmarks!r})
from fastcfg.kernels._launch import offline
from fastcfg.models.dit import DiTConfig
from gpu import tune
from gpu.cases import cases

class Pretended:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = get_current_stream = staticmethod(lambda *device: 0)

class Seen(Exception):
    pass

def compile(source, target, options):
    hashes.append(source.hash() + triton.compiler.make_backend(target).parse_options(dict(options)).hash())
    raise Seen

triton.runtime.driver.set_active(Pretended())
triton.compile = triton.compiler.compile = compile
for case in cases(DiTConfig(depth=1, hidden_size=384, num_heads=6), 2, torch.bfloat16, torch.device("cpu")):
    key, config = tune.asked(case, "sm_90")
    if key is not None:
        launched, hashes = [], []
        with offline("sm_90", lambda kernel, grid, config, arguments: launched.append((kernel, config, arguments))):
            case.run()
        for kernel, tiles, arguments in launched:
            try:
                kernel.warmup(**arguments, **tiles, grid=(1,))
            except Seen:
                wanted, hashes = hashes, []
        check.compile_entry(key, config, "sm_90", heads=6)
        print(key.kernel, set(wanted) <= set(hashes))
""")
    assert [line.split()[0] for line in lines] == ["adaln", *["linear"] * 4, "attention", "guided_step", "step_boundary"]
    assert all(line.endswith("True") for line in lines)


def tile(bits=0, fills=(True, True)):
    return tune.Tile({}, bits, fills)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ([[1.0, 1.0]], 0),
        ([[1.0, 1.0], [0.99, 0.98]], 0),  # under 2 %
        ([[1.0, 1.0], [0.97, 0.97]], 1),
        ([[1.0, 1.0], [0.5, 1.03], [0.9, 0.9]], 2),  # slower at batch 1
        ([[1.0, 1.0], [0.9, 0.9], [0.97, 0.7]], 2),  # by the geometric mean
        ([[2.0, 0.1], [1.9, 0.101]], 1),
        ([[2.0, 0.1], [2.03, 0.05]], 1),  # within 2 % at batch 32
    ],
)
def test_the_choice_weighs_both_batches(times, chosen):
    assert tune.fastest([tile(bits=n) for n in range(len(times))], times) == (chosen, chosen)
    assert tune.fastest([tile()] * len(times), times) == (chosen, chosen)


WIDE = (True, False)  # fills the GPU at batch 32 alone


@pytest.mark.parametrize(
    ("times", "tiles", "chosen"),
    [
        ([[1.0, 1.0], [1.5, 0.5]], [tile(fills=WIDE), tile()], (0, 1)),
        ([[1.0, 1.0], [1.5, 0.5]], [tile(fills=WIDE), tile(bits=1)], (0, 0)),  # other bits
        ([[1.0, 1.0], [1.5, 0.5]], [tile(), tile()], (0, 0)),  # the default fills the GPU at batch 1, too
        ([[1.0, 1.0], [0.8, 1.2], [1.5, 0.5]], [*[tile(fills=WIDE)] * 2, tile()], (1, 2)),
        ([[1.0, 1.0], [0.8, 1.2], [1.5, 0.5]], [tile(fills=WIDE), tile(1, WIDE), tile()], (0, 2)),
        ([[1.0, 1.0], [0.8, 0.8], [1.5, 0.79]], [*[tile(fills=WIDE)] * 2, tile()], (1, 1)),  # under 2 % for a second
        ([[1.0, 1.0], [0.8, 0.8], [0.9, 0.6]], [*[tile(fills=WIDE)] * 2, tile()], (1, 2)),
    ],
)
def test_a_second_configuration_has_the_same_bits_and_pays_by_itself(times, tiles, chosen):
    assert tune.fastest(tiles, times) == chosen


def test_all_candidates_are_launchable_and_compute_what_the_default_does():
    """Every kernel's last candidates under the interpreter; a configuration that computes something else is told."""
    tuned_kernels = set()
    for case in cases(DiTConfig(**TINY), 1, torch.float16, torch.device("cpu")):
        key, default = tune.asked(case, "sm_90")
        if key is None or key.kernel in tuned_kernels:
            continue
        tuned_kernels.add(key.kernel)
        tiles = tune.candidates(key, default, "sm_90")
        launch = tune.Launch(case.name, key, {1: case}, [default, *tiles], [])
        wanted, got = tune._outputs(launch, default), tune._outputs(launch, tiles[-1])
        assert tune._difference(launch, got, wanted) == ""
        wanted[-1] *= 1.1
        assert tune._difference(launch, got, wanted).startswith("off by 0.09")
    assert tuned_kernels == set(tuned.FIELDS)


class Verdict:
    """What a compiler's process answers, when it is asked."""

    def __init__(self, answer):
        self.answer = answer

    def get(self, timeout):
        assert timeout > 0
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Listening:
    """A session that keeps its rows; left: the seconds that it says are left, one call after another."""

    def __init__(self, path=None, left=(60.0,) * 99):
        self.rows, self._left = [], iter(left)
        self.dry, self.device = False, torch.device("cpu")
        self.report = types.SimpleNamespace(row=lambda *row, **_: self.rows.append(row), path=path)

    def left(self):
        return next(self._left)


def test_what_is_struck_is_told_and_the_default_stays():
    case = next(iter(cases(DiTConfig(**TINY), 1, torch.float16, torch.device("cpu"))))
    key, default = tune.asked(case, "sm_90")
    right = case.kernel

    def kernel(config, **arguments):
        if config["TOKENS"] == 32:
            return right(**arguments, config=config).mul_(1.001)
        if config["TOKENS"] == 1:
            return arguments["out"]  # as it was: not written
        if config["TOKENS"] == 2:
            raise RuntimeError("too much of something\n at length")
        return right(**arguments, config=config)

    case.kernel = kernel
    tiles = [default | {"TOKENS": tokens} for tokens in (8, 1, 2, 4, 16, 64, 32)]
    faults = [["spills"], [], [], [], ["spills 8 bytes", "no wgmma"], multiprocessing.TimeoutError(), []]
    launch = tune.Launch("adaln", key, {1: case}, tiles, [Verdict(fault) for fault in faults])
    session = Listening()
    found = tune._sound(session, launch)
    assert [(tile.config["TOKENS"], tile.bits) for tile in found] == [(8, 0), (4, 0), (32, 1)]
    assert [row[:3] for row in session.rows] == [
        ("adaln", f"off by nan of the largest value of {case.shape}", "struck"),
        ("adaln", "does not run: too much of something", "struck"),
        ("adaln", "spills 8 bytes; no wgmma", "struck"),
        ("adaln", "not compiled in time", "struck"),
    ]


def test_an_entry_says_what_each_batch_takes(monkeypatch):
    (case, *_), default, few = cases(DiTConfig(**TINY), 1, torch.float16, torch.device("cpu")), {"TOKENS": 8}, {"TOKENS": 2}
    launch = tune.Launch("adaln", entry("adaln").key, {32: case, 1: case}, [], [])
    milliseconds = {8: (1.0, 1.0), 4: (0.9, 1.0), 2: (3.0, 0.25)}
    tiles = [tune.Tile(default, 0, WIDE), tune.Tile({"TOKENS": 4}, 0, WIDE), tune.Tile(few, 0, (True, True))]
    monkeypatch.setattr(tune, "_sound", lambda *_: tiles)
    monkeypatch.setattr(
        tune,
        "_times",
        lambda _session, _launch, tiles: [[(0, ms, 9) for ms in milliseconds[t.config["TOKENS"]]] for t in tiles],
    )
    session = Listening()
    session.report.machine = MEASURED
    found = tune._tune(session, launch)
    assert (found.key, found.config, found.few) == (launch.key, {"TOKENS": 4}, few)
    assert found.ms == {"batch 32": [1.0, 0.9], "batch 1": [1.0, 0.25]}
    assert session.rows[-1] == ("adaln", "takes TOKENS=4; for few rows TOKENS=2", "note")


def test_a_pass_that_runs_out_of_time_keeps_what_is_known(tmp_path, monkeypatch):
    """In use: all kernels. Measured: linear, which takes other tiles now, and adaln, which keeps its default."""
    write_table(tmp_path / "before.json", table(gpu="interpreter", target="interpreter"))
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "before.json"))
    other = entry(config=CONFIGS["linear"] | {"num_stages": 2})
    found = {entry(kernel).key: other if kernel == "linear" else None for kernel in ("linear", "adaln", "attention")}
    launches = [tune.Launch("", key, {}, [], []) for key in found]
    monkeypatch.setattr(tune, "_compilers", contextlib.nullcontext)
    monkeypatch.setattr(tune, "_launches", lambda *_: iter(launches))
    monkeypatch.setattr(tune, "_tune", lambda session, launch: found[launch.key])
    session = Listening(tmp_path / "gpu.csv", left=(2.0, 1.0, 0.0))
    tune.tune(session)
    kept = [entry(kernel) for kernel in ("attention", "guided_step")] + [other, entry("step_boundary")]
    assert read_table(tmp_path / "gpu.json") == table(*kept, gpu="interpreter", target="interpreter")
    assert [row[1][:8] for row in session.rows] == ["stopped ", "4 entrie"]


def test_keys_are_the_same_however_their_shape_is_written():
    assert key("adaln", "float32", {"a": 1, "b": 2}) == key("adaln", "float32", {"b": 2, "a": 1})
