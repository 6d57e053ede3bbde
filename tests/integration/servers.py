"""Servers that do what no real one does on request: hang, drip, turn away; alone or in front of a real one."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Handler = Callable[[socket.socket, threading.Event], None]
"""Serves one connection, until the event is set at the latest."""


class RawServer:
    """Accepts connections on a free port, and hands each to its handler in a thread of its own."""

    def __init__(self, handler: Handler, tls: ssl.SSLContext | None = None) -> None:
        self.accepted = 0
        self._handler = handler
        self._tls = tls
        self._over = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://localhost:{self._listening.getsockname()[1]}"

    def _accept(self) -> None:
        while not self._over.is_set():
            connection, _ = self._listening.accept()
            self.accepted += 1
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with closing(connection), suppress(OSError):
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with closing(connection):
                self._handler(connection, self._over)

    def leave(self) -> None:
        """Let all connections go, and take no more."""
        self._over.set()

    def stop(self) -> None:
        self.leave()
        with suppress(OSError), closing(socket.create_connection(self._listening.getsockname())):
            pass  # wakes the thread that accepts
        for thread in self._threads:
            thread.join()
        self._listening.close()


@contextmanager
def raw_server(
    handler: Handler, tls: ssl.SSLContext | None = None, *, stays: float | None = None
) -> Iterator[RawServer]:
    """Serve until the end of the block, or for so many seconds, whatever still waits for an answer then."""
    server = RawServer(handler, tls)
    leaving = threading.Timer(stays or 0, server.leave)
    if stays is not None:
        leaving.start()
    try:
        yield server
    finally:
        leaving.cancel()
        server.stop()


def read_request(connection: socket.socket) -> bytes:
    """Read a whole HTTP request."""
    request = b""
    while b"\r\n\r\n" not in request:
        request += _more(connection)
    length = re.search(rb"(?i)content-length: *(\d+)", request)
    until = request.index(b"\r\n\r\n") + 4 + (int(length[1]) if length else 0)
    while len(request) < until:
        request += _more(connection)
    return request


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise ConnectionError
    return data


def silent(connection: socket.socket, over: threading.Event) -> None:
    """Take whatever comes, and never say a word."""
    connection.settimeout(0.05)
    while not over.is_set():
        with suppress(TimeoutError):
            if not connection.recv(65536):
                return


def dripping(beginning: bytes, step: float = 0.3) -> Handler:
    """Make a server that begins an answer, and goes on with a byte now and then for ever."""

    def drip(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(beginning)
        while not over.wait(step):
            connection.sendall(b"a")

    return drip


def chosen_by_kind(handlers: Mapping[str, Handler]) -> Handler:
    """Make a server that treats each generation by its kind."""

    def choose(connection: socket.socket, over: threading.Event) -> None:
        body = read_request(connection).partition(b"\r\n\r\n")[2]
        kind = json.loads(body)["p_kind"]
        handlers[kind](connection, over)

    return choose


def relay_to(url: str, seen: Callable[[socket.socket], None] = lambda _: None) -> Handler:
    """Make a server that passes everything on to a real one, and back."""
    host, _, port = url.removeprefix("http://").rpartition(":")

    def relay(connection: socket.socket, over: threading.Event) -> None:
        seen(connection)
        with closing(socket.create_connection((host, int(port)))) as real:
            back = threading.Thread(target=_copy, args=(real, connection, over))
            back.start()
            _copy(connection, real, over)
            back.join()

    return relay


def _copy(source: socket.socket, target: socket.socket, over: threading.Event) -> None:
    source.settimeout(0.05)
    with suppress(OSError):
        while not over.is_set():
            with suppress(TimeoutError):
                data = source.recv(65536)
                if not data:
                    break
                target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def certificate(directory: Path) -> tuple[ssl.SSLContext, Path]:
    """Make a server's TLS for localhost that also offers HTTP/2, and the file by which clients trust it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    trusted, secret = directory / "certificate.pem", directory / "key.pem"
    trusted.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted, secret)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context, trusted
