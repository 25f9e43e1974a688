"""A job's files in a folder of an object store, through fsspec (extra `remote`)."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastcfg.errors import Error, missing_extra
from fastcfg.jobs.errors import JobError
from fastcfg.jobs.store import FREEZING, Buffer

LEASE_SECONDS = 60.0  # a lease that was not renewed for so long is its holder's no more
PAUSES = (1.0, 4.0, 16.0, 60.0)  # seconds before what failed is tried again


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
        what, target = f"cannot move {self.url}/{name} to {folder}/", self._path(f"{folder}/{name.rpartition('/')[2]}")
        # Not fsspec's mv, copy or rm: to these a path is a pattern, and job[12] means job1 and job2.
        self._put(what, lambda: self._system.cp_file(self._path(name), target))
        self._put(what, lambda: self._system.rm_file(self._path(name)))

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
                if not self._held:
                    self._renewing = None
                    return
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
