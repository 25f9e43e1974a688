"""An S3 server on loopback: moto's, in a process of its own, with one bucket."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INSTALLED = all(importlib.util.find_spec(name) for name in ("moto", "flask", "flask_cors", "s3fs"))
BUCKET = "bucket"


@contextmanager
def s3() -> Iterator[dict[str, str]]:
    """Yields the environment with which boto, and thereby s3fs, reaches the server; the bucket is s3://BUCKET."""
    from s3fs import S3FileSystem

    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **keys},
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        yield {**keys, "AWS_ENDPOINT_URL": json.loads(server.stdout.readline())}
    finally:
        server.stdin.close()
        server.wait(60)
        S3FileSystem.clear_instance_cache()  # which knows this server's address


def _serve() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    _make_bucket(url)
    print(json.dumps(url), flush=True)
    sys.stdin.read()
    server.stop()


def _make_bucket(url: str) -> None:
    import boto3

    boto3.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)


if __name__ == "__main__":
    _serve()
