"""Tables of measured configurations: the tiles that a kernel takes on one GPU for a model's shapes, instead of its default.

A table is a JSON file for one GPU, with a line for each entry: kernel, dtype, shape, configuration, milliseconds of the
default and of this configuration by batch, and where that was measured. Shapes are the model's and never say how many rows
there are, so that a sample's bits do not depend on its batch. An entry may hold a second configuration, for launches that
leave multiprocessors idle with the first, as at batch 1: one that gave the same bits where it was measured. Nothing is
measured here: `benchmarks/gpu_session.py --sections tune` makes tables. Those in `tables/` are shipped; the variable
FASTCFG_TUNED names another, which takes the place of the shipped one.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastcfg.errors import Error, require
from fastcfg.files import slug, write_file

Config = dict[str, int]  # tile sizes by the kernel's own names, num_warps, num_stages

FORMAT = 1
VARIABLE = "FASTCFG_TUNED"
TABLES = Path(__file__).parent / "tables"
DTYPES = ("float32", "bfloat16", "float16")

# kernel: (what its shape says, what its configuration says beside num_warps and num_stages)
FIELDS = {
    "adaln": ({"D"}, {"TOKENS"}),
    "attention": ({"tokens", "head_dim"}, {"BLOCK_M", "BLOCK_N", "DESCRIPTORS"}),
    "guided_step": ({"elements"}, {"BLOCK"}),
    "linear": ({"N", "K", "gelu", "gate_tokens"}, {"BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "DESCRIPTORS"}),
    "step_boundary": ({"columns", "D", "learned"}, {"TOKENS", "BLOCK_D"}),
}
ANY_SIZE = {"DESCRIPTORS", "GROUP_M", "num_stages"}  # all others are sizes of tiles or warps: powers of two


class Key(NamedTuple):
    """What a launch's configuration is chosen by on a GPU; mixed dtypes are joined by "+" and are in no table."""

    kernel: str
    dtype: str
    shape: tuple[tuple[str, int], ...]  # sorted

    def __str__(self) -> str:
        return " ".join([self.kernel, self.dtype, *(f"{name}={size}" for name, size in self.shape)])


def key(kernel: str, dtype: str, shape: Mapping[str, int]) -> Key:
    return Key(kernel, dtype, tuple(sorted(shape.items())))


@dataclass(frozen=True)
class Entry:
    """few: what launches take that with `config` have fewer programs than the GPU has multiprocessors; None: `config`.

    ms: by batch, the median time of the default and of what is taken there. measured: driver, versions, commit and date.
    """

    kernel: str
    dtype: str
    shape: dict[str, int]
    config: Config
    few: Config | None
    ms: dict[str, list[float]]
    measured: dict[str, str]

    @property
    def key(self) -> Key:
        return key(self.kernel, self.dtype, self.shape)

    @property
    def configs(self) -> tuple[Config, ...]:
        return (self.config,) if self.few is None else (self.config, self.few)

    def taken(self, programs: int, multiprocessors: int) -> Config:
        """The configuration of a launch that with `config` has so many programs."""
        return self.few if self.few is not None and programs < multiprocessors else self.config


@dataclass(frozen=True)
class Table:
    """gpu: as torch.cuda.get_device_name says it; target: "sm_90" and the like, which it was measured on."""

    gpu: str
    target: str
    entries: tuple[Entry, ...]


def entries_for(gpu: str) -> Mapping[Key, Entry]:
    """The entries in use on a GPU, read once. Raises Error as `table_for` does."""
    return _entries_for(gpu, os.environ.get(VARIABLE, ""))


@functools.cache
def _entries_for(gpu: str, own: str) -> Mapping[Key, Entry]:
    table = _table_for(gpu, own)
    return {} if table is None else {entry.key: entry for entry in table.entries}


def table_for(gpu: str) -> Table | None:
    """The table that FASTCFG_TUNED names, else the one shipped for this GPU, else None.

    Raises Error for a table that is damaged, of another format, for another GPU, or named and not there.
    """
    return _table_for(gpu, os.environ.get(VARIABLE, ""))


def _table_for(gpu: str, own: str) -> Table | None:
    path = Path(own) if own else TABLES / f"{slug(gpu)}.json"
    if not own and not path.is_file():
        return None
    table = read_table(path)
    require(table.gpu == gpu, f"{path} was measured on {table.gpu}, and this is {gpu}: unset {VARIABLE}, or name its table")
    return table


def shipped_tables() -> list[Table]:
    """Every table of the package. Raises Error for one that is damaged, or whose name is not its GPU's."""
    tables = []
    for path in sorted(TABLES.glob("*.json")):
        tables.append(read_table(path))
        name = f"{slug(tables[-1].gpu)}.json"
        require(path.name == name, f"{path} is for {tables[-1].gpu} and would not be found: name it {name}")
    return tables


def read_table(path: Path) -> Table:
    """Raises Error unless the file is a whole table, of this format, whose entries a kernel could take."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Error(f"cannot read the table of tuned kernels {path}: {error}") from error
    found = stored.get("format") if isinstance(stored, dict) else None
    require(found == FORMAT, f"{path} is no table of format {FORMAT} (it says {found!r}): measure it again with this version")
    try:
        table = Table(str(stored["gpu"]), str(stored["target"]), tuple(Entry(**entry) for entry in stored["entries"]))
        faults = [f"{entry.key}: {fault}" for entry in table.entries for fault in _faults(entry)]
        keys = [entry.key for entry in table.entries]
        faults += [f"{twice}: more than one entry" for twice in dict.fromkeys(k for k in keys if keys.count(k) > 1)]
    except (KeyError, TypeError, AttributeError) as error:
        raise Error(f"the table of tuned kernels {path} is damaged: {type(error).__name__}: {error}") from error
    require(not faults, f"the table of tuned kernels {path} is damaged: {'; '.join(faults)}")
    return table


def write_table(path: Path, table: Table) -> None:
    """Writes `table`, an entry a line, whole or not at all."""
    head = json.dumps({"format": FORMAT, "gpu": table.gpu, "target": table.target})[1:-1]
    entries = ",\n".join(json.dumps(asdict(entry)) for entry in sorted(table.entries, key=lambda entry: entry.key))
    write_file(path, lambda temporary: temporary.write_text(f'{{{head}, "entries": [\n{entries}\n]}}\n'))


def _faults(entry: Entry) -> Iterable[str]:
    """What no kernel could take of an entry."""
    if entry.kernel not in FIELDS or entry.dtype not in DTYPES:
        yield f"known are kernels {', '.join(FIELDS)} and dtypes {', '.join(DTYPES)}"
        return
    sizes, tiles = FIELDS[entry.kernel]
    tiles = tiles | {"num_warps", "num_stages"}
    parts = [("shape", entry.shape, sizes), *(("configuration", config, tiles) for config in entry.configs)]
    yield from (f"its {what} must say {', '.join(sorted(wanted))}" for what, given, wanted in parts if set(given) != wanted)
    yield from (f"{name} is {size!r}" for name, size in entry.shape.items() if not _whole(size, 0))
    yield from (f"{name} is {size!r}" for config in entry.configs for name, size in config.items() if not _fits(name, size))


def _fits(name: str, size: Any) -> bool:
    return _whole(size, 0 if name == "DESCRIPTORS" else 1) and (name in ANY_SIZE or size & (size - 1) == 0)


def _whole(size: Any, least: int) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= least
