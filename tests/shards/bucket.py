"""An S3 server on loopback (moto's), and a data set in a bucket of it."""

from __future__ import annotations

import http.client
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import obstore
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[int]:
    """Run an S3 server and yield its port."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # moto's own clients look for some
        os.environ.setdefault(name, "key")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


def upload(folder: Path, port: int, bucket: str, prefix: str = "") -> None:
    """Make a bucket and put the files of a folder into it."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/{bucket}")
    assert connection.getresponse().status == 200
    connection.close()
    store = S3Store(
        bucket,
        endpoint=f"http://127.0.0.1:{port}",
        access_key_id="key",
        secret_access_key="secret",
        region="us-east-1",
        client_options={"allow_http": True},
    )
    for path in sorted(folder.iterdir()):
        obstore.put(store, f"{prefix}{path.name}", path.read_bytes())
