"""A real S3 server (moto's) on a loopback port, and a proxy before it that fails on the wire as it is told."""

import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Rule = Callable[[str, str], str | None]  # (method, path) -> "500", "403", "reset", "half", "hang", or None to let it pass


@contextmanager
def moto() -> Iterator[int]:
    """A process that speaks S3 and remembers in memory; yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-c", f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **ACCESS})
    try:
        deadline = time.monotonic() + 180  # its imports take long on a busy machine
        while True:
            assert process.poll() is None, "moto's server ended"
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "moto's server did not answer"
                time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


ACCESS = {  # nothing but the loopback is asked, for credentials either
    "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "NO_PROXY": "127.0.0.1",
}  # fmt: skip


class Proxy:
    """Passes requests on, or fails as `rule` says; `seen` are the (method, path) that came, `failed` those that failed."""

    def __init__(self, target: int):
        self.rule: Rule = lambda method, path: None
        self.seen: list[tuple[str, str]] = []
        self.failed: list[tuple[str, str]] = []
        self.hanging, self.ended = threading.Event(), threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_request(self) -> None:
                proxy._handle(self, target)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

            def log_message(self, *args: object) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: object) -> None: ...  # clients are killed here

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self) -> None:
        self.rule, self.seen, self.failed = lambda method, path: None, [], []
        self.hanging.clear()

    def close(self) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    def _handle(self, client: BaseHTTPRequestHandler, target: int) -> None:
        key = (client.command, client.path.split("?")[0])
        fault = self.rule(*key)
        self.seen.append(key)
        if fault:
            self.failed.append(key)
        if fault == "reset":  # before a byte of the content is taken
            self._reset(client)
            return
        body = self._body(client)
        if fault == "hang":
            self.hanging.set()
            self.ended.wait(60)
            self._reset(client)
            return
        if fault in ("500", "403"):
            code = {"500": "InternalError", "403": "AccessDenied"}[fault]
            text = f"<Error><Code>{code}</Code><Message>told to fail</Message></Error>".encode()
            self._answer(client, int(fault), [("Content-Type", "application/xml")], text)
            return
        onward = http.client.HTTPConnection("127.0.0.1", target)
        onward.putrequest(client.command, client.path, skip_host=True, skip_accept_encoding=True)
        for name, value in client.headers.items():
            if name.lower() not in ("transfer-encoding", "content-length", "expect", "connection"):
                onward.putheader(name, value)
        onward.putheader("Content-Length", str(len(body)))
        onward.endheaders(body)
        answer = onward.getresponse()
        content = answer.read()
        onward.close()
        if fault == "half":  # the answer breaks off
            client.connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode())
            client.connection.sendall(content[: len(content) // 2])
            self._reset(client)
            return
        self._answer(client, answer.status, answer.getheaders(), content)

    @staticmethod
    def _answer(client: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        client.send_response_only(status)
        head = client.command == "HEAD"
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection") and (head or name.lower() != "content-length"):
                client.send_header(name, value)
        if not head:
            client.send_header("Content-Length", str(len(content)))
        client.end_headers()
        if not head:
            client.wfile.write(content)

    @staticmethod
    def _reset(client: BaseHTTPRequestHandler) -> None:
        client.close_connection = True
        client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.connection.shutdown(socket.SHUT_RD)
        client.connection.close()

    @staticmethod
    def _body(client: BaseHTTPRequestHandler) -> bytes:
        if "chunked" not in client.headers.get("Transfer-Encoding", ""):
            return client.rfile.read(int(client.headers.get("Content-Length") or 0))
        out = b""
        while size := int(client.rfile.readline().split(b";")[0], 16):
            out += client.rfile.read(size)
            client.rfile.readline()
        client.rfile.readline()
        return out
