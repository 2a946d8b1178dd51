"""An S3 server in a process of its own, and a network in front of it that can be cut."""

import re
import socket
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

ACCESS_KEY = "AKIDNEVERWRITTEN"
SECRET_KEY = "secret-that-is-never-written"
"""Must not turn up in any object, error or log."""


@contextmanager
def running_s3() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A moto server and its port, which the OS chooses."""
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    try:
        seen = []
        for line in server.stderr:
            seen.append(line)
            if found := re.search(r"Running on http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            pytest.fail(f"moto did not start: {''.join(seen)}")
        log = threading.Thread(target=server.stderr.read)  # a full pipe would stop the server
        log.start()
        yield server, int(found[1])
    finally:
        server.kill()
        server.wait()
    log.join()
    server.stderr.close()


def s3_environment(port: int) -> dict[str, str]:
    """What makes ``s3://`` mean a server on this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }


def make_bucket(port: int, name: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{name}", method="PUT")
    opener.open(request, timeout=30).close()


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of an S3 server."""
    with running_s3() as (_, port):
        yield port


@pytest.fixture
def bucket(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket, and the environment that makes ``s3://`` mean the test server."""
    for name, value in s3_environment(s3_port).items():
        monkeypatch.setenv(name, value)
    name = f"labels-{uuid.uuid4().hex[:8]}"
    make_bucket(s3_port, name)
    return name


class Network:
    """A TCP connection to a server that can be cut and mended, and that counts.

    Args:
        server_port: Where the server listens.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener: socket.socket | None = None
        self.port = 0
        self.requests = 0
        self.bytes_received = 0
        self.cut_after_requests: int | None = None
        """Cut by itself when the server was sent so many requests; the last is not sent."""
        self._swallows = False
        self.mend()

    def mend(self) -> None:
        """Let connections through (again)."""
        self.cut()
        self._swallows = False
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """End all connections and refuse new ones."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for pair in self._pairs:
            for end in pair:
                _shut(end)
        self._pairs.clear()

    def swallow(self) -> None:
        """Accept whatever is sent, and answer nothing."""
        self.mend()
        self._swallows = True

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
            except OSError:
                return
            self._pairs.append((client, server))
            for source, target in ((client, server), (server, client)):
                threading.Thread(
                    target=self._pump, args=(source, target, source is client), daemon=True
                ).start()

    def _pump(self, source: socket.socket, target: socket.socket, to_server: bool) -> None:
        try:
            while data := source.recv(2**16):
                if to_server:
                    self.requests += data.count(b" HTTP/1.1\r\n")
                    if self._swallows:
                        continue
                    if self.cut_after_requests in range(1, self.requests + 1):
                        self.cut_after_requests = None
                        self.cut()
                        return
                else:
                    self.bytes_received += len(data)
                target.sendall(data)
        except OSError:
            pass
        finally:
            _shut(source)
            _shut(target)


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
    finally:
        end.close()


@pytest.fixture
def network(bucket: str, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """``s3://`` goes through a network that can be cut."""
    found = Network(s3_port)
    for name, value in s3_environment(found.port).items():
        monkeypatch.setenv(name, value)
    yield found
    found.cut()
