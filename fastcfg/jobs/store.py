"""Where a job's files are: a local folder, or a folder of an object store through fsspec. Files appear whole or not at all.

job.json      what the job is, frozen when it began
spec.toml     the spec as it was given, for people
units/        unit-000000.safetensors, ..
damaged/      what `status --verify` set aside
claims        who computes what at the moment: a locked file, or a folder of leases in an object store
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from fastcfg.errors import Error, missing_extra
from fastcfg.jobs.errors import JobError

Buffer: TypeAlias = bytes | memoryview | mmap.mmap

LEASE_SECONDS = 60.0  # a lease in an object store that was not renewed for so long is its holder's no more
PAUSES = (1.0, 4.0, 16.0, 60.0)  # seconds before what failed in an object store is tried again
FREEZING = 2**40  # the number that stands for job.json among the units' claims
_TEMPORARY = re.compile(r"\.unit-([0-9]+)\.safetensors\.[0-9a-f]{16}\.tmp")


class Store(Protocol):
    """The files of one job. Names are relative: "job.json", "units/unit-000000.safetensors".

    Every store can be pickled, and then serves the process that unpickles it. Claims are the process's: what claimed a
    unit and died holds it no more (local: at once; object store: after LEASE_SECONDS).
    """

    url: str

    def names(self) -> list[str]:
        """What the folder holds at top level, [] where there is no folder."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Files in `folder` with their sizes in bytes; temporary ones are not among them."""
        ...

    def size(self, name: str) -> int | None:
        """A file's size in bytes, None where there is no such file."""
        ...

    def read(self, name: str) -> Buffer:
        """A file's content. Raises FileNotFoundError."""
        ...

    def write(self, name: str, parts: Sequence[Buffer]) -> None:
        """Makes or replaces a file, whole, durably. Raises JobError where it cannot be, leaving nothing new behind."""
        ...

    def set_aside(self, name: str, folder: str) -> None:
        """Moves a file into `folder`, over one of the same name. Raises JobError where it cannot be."""
        ...

    def prepare(self) -> None:
        """Makes the folder ready for writing. Raises JobError where it cannot be."""
        ...

    def clean(self) -> int:
        """Removes temporary files of unit files whose writer is gone; how many."""
        ...

    def claim(self, number: int) -> bool:
        """Whether this process now has unit `number` to itself. It has it until `release`, or its own end."""
        ...

    def release(self, number: int) -> None: ...

    def close(self) -> None:
        """Releases all that this process has claimed."""
        ...

    @contextmanager
    def freezing(self) -> Iterator[None]:
        """While no other process is in here; best effort in an object store."""
        ...


def open_store(out: str | Path) -> Store:
    """The store at a local path or at a URL that fsspec knows (s3://, gs://, ..). Nothing is read or made yet."""
    text = str(out)
    protocol, separator, rest = text.partition("://")
    if not separator:
        return LocalStore(Path(text))
    if protocol in ("file", "local"):
        return LocalStore(Path(rest))
    return RemoteStore(text)


class LocalStore:
    """A folder. Claims are POSIX locks on one byte a unit of the file `claims`: they end with their process, whatever ends
    it, and hold between machines where the shared file system has locks. Where it has none, claims are always granted: a
    unit may then be computed twice, to the same bytes."""

    def __init__(self, root: Path):
        self.root = root.absolute()
        self.url = str(root)
        self._locks: tuple[int, int] | None = None  # (process, file descriptor)

    def __reduce__(self) -> tuple[type[LocalStore], tuple[Path]]:
        return LocalStore, (self.root,)

    def names(self) -> list[str]:
        try:
            return os.listdir(self.root)
        except FileNotFoundError:
            return []
        except PermissionError as error:
            raise JobError(f"cannot read the folder {self.root}: {error.strerror}") from error
        except OSError as error:
            raise Error(f"cannot read the folder {self.root}: {error.strerror}") from error

    def sizes(self, folder: str) -> dict[str, int]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root / folder) as entries:
            return {e.name: e.stat().st_size for e in entries if not e.name.startswith(".")}
        return {}

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str) -> Buffer:
        with open(self.root / name, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def write(self, name: str, parts: Sequence[Buffer]) -> None:
        path = self.root / name
        # A name of its own: machines that share the folder share process numbers too.
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            with open(temporary, "xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except OSError as error:
            raise JobError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def set_aside(self, name: str, folder: str) -> None:
        path = self.root / name
        try:
            (self.root / folder).mkdir(exist_ok=True)
            os.replace(path, self.root / folder / path.name)
            _sync_folder(path.parent)
        except OSError as error:
            raise JobError(f"cannot move {path} to {folder}/: {error.strerror}") from error

    def prepare(self) -> None:
        try:
            (self.root / "units").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JobError(f"cannot write in {self.root}: {error.strerror}") from error

    def clean(self) -> int:
        removed = 0
        for path in (self.root / "units").iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            # Who writes a unit's file holds its claim: what can be claimed has no writer.
            if match and self._lock(int(match[1]), fcntl.LOCK_EX | fcntl.LOCK_NB):
                try:
                    path.unlink(missing_ok=True)
                    removed += 1
                except OSError as error:
                    raise JobError(f"cannot remove {path}: {error.strerror}") from error
                finally:
                    self.release(int(match[1]))
        return removed

    def claim(self, number: int) -> bool:
        return self._lock(number, fcntl.LOCK_EX | fcntl.LOCK_NB) is not False

    def release(self, number: int) -> None:
        self._lock(number, fcntl.LOCK_UN)

    def close(self) -> None:
        pass  # the locks end with the process

    @contextmanager
    def freezing(self) -> Iterator[None]:
        locked = self._lock(FREEZING, fcntl.LOCK_EX)
        try:
            if locked:  # nobody else writes job.json now: what is half written is a killed run's
                for path in self.root.glob(".*.tmp"):
                    path.unlink(missing_ok=True)
            yield
        finally:
            self.release(FREEZING)

    def _lock(self, number: int, operation: int) -> bool | None:
        """Whether it could be locked; None where this file system has no locks."""
        descriptor = self._descriptor()
        try:
            fcntl.lockf(descriptor, operation, 1, number)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                return None
            raise JobError(f"cannot lock {self.root / 'claims'}: {error.strerror}") from error
        return True

    def _descriptor(self) -> int:
        """Open once a process: closing any descriptor of the file would drop all its locks."""
        if self._locks is None or self._locks[0] != os.getpid():
            try:
                descriptor = os.open(self.root / "claims", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise JobError(f"cannot write in {self.root}: {error.strerror}") from error
            self._locks = os.getpid(), descriptor
        return self._locks[1]


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class RemoteStore:
    """A folder of an object store, where a file is put as one object, whole by the store's own promise.

    Claims are leases, best effort: an object made only if absent where the store can do that, renewed while its holder
    lives, and anybody's once it has not been renewed for LEASE_SECONDS. In the worst case a unit is computed twice, to
    the same bytes.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._holder = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
        self._held: set[int] = set()
        self._renewing: threading.Thread | None = None
        self._turn = threading.RLock()
        self._system, self._root = _file_system(self.url)

    def __reduce__(self) -> tuple[type[RemoteStore], tuple[str]]:
        return RemoteStore, (self.url,)

    def names(self) -> list[str]:
        return list(self._entries(self._root))

    def sizes(self, folder: str) -> dict[str, int]:
        return self._entries(self._path(folder))

    def size(self, name: str) -> int | None:
        path = self._path(name)
        try:
            found = self._try(f"cannot read {self.url}/{name}", lambda: self._system.info(path, refresh=True))
        except FileNotFoundError:
            return None
        return int(found["size"])

    def read(self, name: str) -> Buffer:
        content = self._try(f"cannot read {self.url}/{name}", lambda: self._system.cat_file(self._path(name)), pauses=())
        return bytes(content)

    def write(self, name: str, parts: Sequence[Buffer]) -> None:
        content = b"".join(parts)
        self._put(f"cannot write {self.url}/{name}", lambda: self._system.pipe_file(self._path(name), content))

    def set_aside(self, name: str, folder: str) -> None:
        target = self._path(f"{folder}/{name.rpartition('/')[2]}")
        self._put(f"cannot move {self.url}/{name} to {folder}/", lambda: self._system.mv(self._path(name), target))

    def prepare(self) -> None:
        pass  # a bucket that is missing or closed to us is found by the first write, job.json, before any work

    def clean(self) -> int:
        return 0  # an object store has no temporary files

    def claim(self, number: int) -> bool:
        what, path = f"cannot write {self.url}/claims", self._lease(number)
        with self._turn:
            content = f"{self._holder}\n{time.time():.0f}".encode()
            try:
                self._put(what, lambda: self._system.pipe_file(path, content, mode="create"))
            except FileExistsError:
                holder, renewed = self._read_lease(path)
                if holder != self._holder and abs(time.time() - renewed) < LEASE_SECONDS:
                    return False
                self._put(what, lambda: self._system.pipe_file(path, content))
            # Where two were as quick as each other, the later write stands.
            if self._read_lease(path)[0] != self._holder:
                return False
            self._held.add(number)
            self._keep_renewing()
            return True

    def release(self, number: int) -> None:
        with self._turn:
            self._held.discard(number)
            with contextlib.suppress(JobError, FileNotFoundError):  # a lease that stays only delays the next claim
                self._try("", lambda: self._system.rm_file(self._lease(number)), pauses=())

    def close(self) -> None:
        for number in list(self._held):
            self.release(number)

    @contextmanager
    def freezing(self) -> Iterator[None]:
        while not self.claim(FREEZING):
            time.sleep(0.5)
        try:
            yield
        finally:
            self.release(FREEZING)

    def _keep_renewing(self) -> None:
        if self._renewing is None:
            self._renewing = threading.Thread(target=self._renew, daemon=True, name="fastcfg-leases")
            self._renewing.start()

    def _renew(self) -> None:
        while True:
            time.sleep(LEASE_SECONDS / 4)
            with self._turn, contextlib.suppress(Exception):  # the next round tries again, well within the lease
                for number in self._held:
                    self._system.pipe_file(self._lease(number), f"{self._holder}\n{time.time():.0f}".encode())

    def _lease(self, number: int) -> str:
        return self._path(f"claims/{number:06d}")

    def _read_lease(self, path: str) -> tuple[str, float]:
        """(holder, time of its last renewal) of a lease; nobody's where there is none."""
        try:
            content = self._try(f"cannot read {self.url}/claims", lambda: self._system.cat_file(path))
            holder, _, renewed = content.decode().partition("\n")
            return holder, float(renewed)
        except (FileNotFoundError, ValueError):
            return "", 0.0

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _entries(self, path: str) -> dict[str, int]:
        try:
            entries = self._try(
                f"cannot list {self.url}", lambda: self._system.ls(path, detail=True, refresh=True), pauses=()
            )  # fmt: skip
        except FileNotFoundError:
            return {}
        names = {str(e["name"]).rstrip("/").rpartition("/")[2]: int(e.get("size") or 0) for e in entries}
        return {name: size for name, size in names.items() if name}

    def _put(self, what: str, action: Callable[[], Any]) -> None:
        """`_try`, where a FileNotFoundError means that there is no bucket."""
        try:
            self._try(what, action)
        except FileNotFoundError as error:
            raise JobError(f"{what}: no such bucket ({error})") from error

    def _try(self, what: str, action: Callable[[], Any], pauses: Sequence[float] | None = None) -> Any:
        """action(), tried again after `pauses`: every backend has exceptions of its own for what a network does.

        Raises JobError, FileNotFoundError or FileExistsError.
        """
        for pause in (*(PAUSES if pauses is None else pauses), None):
            try:
                return action()
            except (Error, FileNotFoundError, FileExistsError):
                raise
            except Exception as error:
                if pause is None or isinstance(error, PermissionError):
                    raise JobError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")


def _file_system(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it) of a URL, with no listing remembered: others write there too."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise missing_extra("remote", f"a job at {url}", error) from error
    try:
        system, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise missing_extra("remote", f"a job at {url}", error) from error
    except Exception as error:  # fsspec and its backends raise what they like
        raise Error(f"cannot open {url}: {error}: want a local path, or a URL that fsspec knows (s3://, gs://)") from error
    return system, root.rstrip("/")
