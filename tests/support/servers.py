"""Servers for tests, on the loopback interface only: one that fails on demand, and a real nginx."""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
NO_RANGES = {"no_ranges", "no_ranges_cut", "wrong_range", "lying_range"}
NO_NGINX = "no nginx here; apt-get install -y nginx"


@dataclass
class Request:
    """What was asked for, and what was sent: `sent` counts bytes of the body."""

    path: str
    range: str | None
    authorization: str | None = None
    status: int = 0
    sent: int = 0


class FaultServer:
    """Serves bytes by HTTP, with a fault where a test wants one.

    `files` maps a path (`/a.tar`) to its bytes; `log` lists the requests. `before_cut` is
    called with the first byte of the body before a connection is cut. The faults:
    cut: the connection ends after half of the body;
    cut_without_length: the same, and no Content-Length was sent;
    no_length: the whole body, its end is the end of the connection;
    chunked, chunked_cut: no Content-Length, chunks, the last one missing when cut;
    no_ranges: the whole body whatever range was asked for;
    no_ranges_cut: half of it, without its length, whatever range was asked for;
    wrong_range: status 206 with as many bytes as were asked for, from the start of the file;
    lying_range: status 206 with the whole body, and its headers claim the range asked for;
    gzip: Content-Encoding gzip;
    hold: half of the body, the rest when `release` is set;
    stall: half of the body, then nothing until the server ends;
    silent: not even a status until the server ends;
    redirect: to itself, with a query;
    a number as text (503, 404, 403): that status.
    """

    def __init__(self, files: dict[str, bytes] | None = None, etag: bool = True) -> None:
        self.files = dict(files or {})
        self.etag = etag
        self.log: list[Request] = []
        self.release = threading.Event()
        self.before_cut: Callable[[int], None] = lambda start: None
        self._faults: dict[str, list[str]] = {}
        self._ends = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def fault(self, path: str, name: str, times: int = 10**6) -> None:
        """The next `times` requests for `path` meet this fault, after those set before."""
        self._faults.setdefault(path, []).extend([name] * min(times, 10_000))

    def cure(self, path: str) -> None:
        self._faults.pop(path, None)

    def requests(self, path: str) -> list[Request]:
        return [request for request in self.log if request.path == path]

    def next_fault(self, path: str) -> str:
        faults = self._faults.get(path)
        return faults.pop(0) if faults else "ok"

    def wait_for_end(self) -> None:
        self._ends.wait(60)

    def close(self) -> None:
        self._ends.set()
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are what these tests are about."""


def _handler(server: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        asked_for: Request

        def do_GET(self) -> None:
            self.path = self.path.partition("?")[0]
            asked = self.headers.get("Range"), self.headers.get("Authorization")
            self.asked_for = Request(self.path, *asked)
            server.log.append(self.asked_for)
            try:
                self._answer(server.next_fault(self.path))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _answer(self, fault: str) -> None:
            body = server.files.get(self.path)
            if fault == "silent":
                server.wait_for_end()
            elif fault == "redirect":
                self._head(302, {"Location": f"{self.path}?token=hidden", "Content-Length": "0"})
            elif fault.isdigit() or body is None:
                self._head(int(fault) if fault.isdigit() else 404, {"Content-Length": "0"})
            else:
                self._body(fault, body)

        def _body(self, fault: str, body: bytes) -> None:
            start, whole, etag = 0, len(body), f'"{hash(body)}"'
            asked = self.headers.get("Range", "")
            if asked and fault not in NO_RANGES:
                start = int(asked.removeprefix("bytes=").partition("-")[0])
            if start >= whole and asked:
                self._head(416, {"Content-Range": f"bytes */{whole}", "Content-Length": "0"})
                return
            if asked and fault == "wrong_range":
                body = body[: whole - int(asked[6:-1])]
            headers = {"Content-Length": str(len(body) - start)}
            if fault in {"cut_without_length", "no_length", "no_ranges_cut"}:
                headers = {"Connection": "close"}
            if fault.startswith("chunked"):
                headers = {"Transfer-Encoding": "chunked"}
            if fault == "gzip":
                headers["Content-Encoding"] = "gzip"
            partial = bool(asked) and not fault.startswith("no_ranges")
            if partial:
                claimed = asked[6:-1] if fault == "lying_range" else start
                headers["Content-Range"] = f"bytes {claimed}-{len(body) - 1}/{whole}"
            if server.etag:
                headers["ETag"] = etag
            self._head(206 if partial else 200, headers)
            self._send(fault, body[start:], start)

        def _send(self, fault: str, body: bytes, start: int) -> None:
            half = len(body) // 2
            if fault in {"cut", "cut_without_length", "no_ranges_cut"}:
                self._write(body[:half])
                server.before_cut(start)
                self.close_connection = True
            elif fault.startswith("chunked"):
                for part in (body[:half], body[half:])[: 1 if fault == "chunked_cut" else 2]:
                    self.wfile.write(b"%x\r\n" % len(part))
                    self._write(part)
                    self.wfile.write(b"\r\n")
                if fault == "chunked_cut":
                    server.before_cut(start)
                    self.close_connection = True
                else:
                    self.wfile.write(b"0\r\n\r\n")
            elif fault in {"hold", "stall"}:
                self._write(body[:half])
                server.release.wait(60) if fault == "hold" else server.wait_for_end()
                self._write(body[half:])
            else:
                self._write(body)
                self.close_connection |= fault == "no_length"

        def _head(self, status: int, headers: dict[str, str]) -> None:
            self.asked_for.status = status
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def _write(self, data: bytes) -> None:
            for at in range(0, len(data), 1 << 16):
                # Counted before it is sent: a client that has it all finds it in the log.
                self.asked_for.sent += len(data[at : at + (1 << 16)])
                self.wfile.write(data[at : at + (1 << 16)])

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def nginx(prefix: Path, root: Path, rate: str = "0") -> Iterator["Nginx"]:
    """Debian's nginx with a prefix folder of its own, serving the files of `root`.

    Args:
        prefix: an empty folder for its configuration and logs.
        root: what is served.
        rate: bytes a second and connection, in nginx's spelling (`400k`); 0 is unlimited.
    """
    assert NGINX is not None, NO_NGINX
    prefix.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        # pytest's folders are closed to nobody, the user that nginx would change to.
        user = "user root; " if os.geteuid() == 0 else ""
        scratch = "".join(
            f"  {kind}_temp_path {prefix}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (prefix / "nginx.conf").write_text(
            f"daemon off; worker_processes 1; {user}pid {prefix}/nginx.pid;\n"
            f"error_log {prefix}/error.log;\n"
            "events {}\n"
            "http {\n"
            f"{scratch}"
            "  log_format ranges '$status $uri $http_range $body_bytes_sent';\n"
            f"  access_log {prefix}/access.log ranges;\n"
            f"  sendfile on; limit_rate {rate};\n"
            f"  server {{ listen 127.0.0.1:{port}; location / {{ root {root}; }} }}\n"
            "}\n"
        )
        # nginx takes over the open socket as in an upgrade: nobody else can get the port meanwhile.
        process = subprocess.Popen(
            [NGINX, "-p", str(prefix), "-c", "nginx.conf", "-e", "error.log"],
            env={**os.environ, "NGINX": f"{listener.fileno()};"},
            pass_fds=(listener.fileno(),),
        )
    try:
        yield Nginx(f"http://127.0.0.1:{port}", prefix / "access.log", process)
    finally:
        process.terminate()
        process.wait(30)


@dataclass(frozen=True)
class Nginx:
    """A running nginx."""

    url: str
    access_log: Path
    process: subprocess.Popen[bytes]

    def requests(self, count: int) -> list[Request]:
        """The requests so far, once there are `count`: nginx logs a request after it has ended."""
        deadline = time.monotonic() + 30
        lines: list[str] = []
        while len(lines) < count and time.monotonic() < deadline:
            time.sleep(0.02)
            lines = self.access_log.read_text().splitlines() if self.access_log.exists() else []
        rows = [line.split(" ") for line in lines]
        return [
            Request(path, None if span == "-" else span, None, int(status), int(sent))
            for status, path, span, sent in rows
        ]
