"""A Ray cluster of two nodes on loopback, each of one CPU and in processes of its own, started and killed by tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch that makes 127.0.0.1 a node's address
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
    "OMP_NUM_THREADS": "1",
}
START_SECONDS = 120


@dataclass(frozen=True)
class Cluster:
    """address: host:port. nodes: the process number of each node's raylet, the head's first."""

    address: str
    nodes: list[int]

    def kill_workers(self) -> None:
        """SIGKILL to all that computes for a job, on both nodes."""
        for node in self.nodes:
            for process in _children(node):
                if b"Actor" in _title(process):
                    _kill(process)

    def kill_second_node(self) -> None:
        """SIGKILL to all processes of the node that is not the head."""
        for process in [self.nodes[1], *_children(self.nodes[1])]:
            _kill(process)


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Processes that use it need ENVIRONMENT too."""
    # Sockets are in there, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **ENVIRONMENT, "RAY_TMPDIR": folder},
        )
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield Cluster(**json.loads(server.stdout.readline()))
        finally:
            server.stdin.close()
            server.wait(START_SECONDS)


def _serve() -> None:
    from ray.cluster_utils import Cluster as RayCluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = RayCluster(initialize_head=True, head_node_args=node)
    nodes = [cluster.head_node, cluster.add_node(**node)]
    raylets = [n.all_processes["raylet"][0].process.pid for n in nodes]
    print(json.dumps({"address": cluster.address, "nodes": raylets}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


def _children(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _title(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
