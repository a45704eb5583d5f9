"""A server on 127.0.0.1 that plays the Hugging Face hub and the release pages, and misbehaves as
told.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Environment variables that would lead requests elsewhere.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
# Answers a GET for a file: (request, content)
Answer = Callable[["Request", bytes], None]


@dataclass
class Server:
    """files: content by URL path. moved: URL that a path leads to, as the hub leads to its storage.

    etags: what a mirror says in place of a path's digest.
    answers: what is done with each GET of a path in turn; then, or without any, it is served
    rightly.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    gets: list[tuple[str, str | None]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def hub(self, repository: str, name: str, content: bytes) -> str:
        """Puts a file on the hub; returns its URL path."""
        path = f"/{repository}/resolve/main/{name}"
        self.files[path] = content
        return path

    def release(self, path: str, content: bytes) -> str:
        """Puts a file on a release page; returns its URL path."""
        self.files["/" + path] = content
        return "/" + path


class Request(BaseHTTPRequestHandler):
    server: ThreadingHTTPServer
    protocol_version = "HTTP/1.1"

    @property
    def state(self) -> Server:
        return self.server.state  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass

    def head(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_HEAD(self) -> None:
        content = self.state.files.get(self.path)
        if content is None:
            self.head(404, 0)
        else:
            digest = self.state.etags.get(self.path, hashlib.sha256(content).hexdigest())
            linked = {
                "X_Linked_Etag": f'"{digest}"',
                "X_Linked_Size": str(len(content)),
                "X_Repo_Commit": "0" * 40,
            }
            if self.path in self.state.moved:
                self.head(302, 0, Location=self.state.moved[self.path], **linked)
            else:
                self.head(200, len(content), ETag=f'"{digest}"', **linked)

    def do_GET(self) -> None:
        # huggingface_hub also asks the hub for things of its own.
        if not self.path.startswith("/api/"):
            self.state.gets.append((self.path, self.headers.get("Range")))
        waiting = self.state.answers.get(self.path)
        content = self.state.files.get(self.path)
        if waiting:
            waiting.pop(0)(self, content or b"")
        elif self.path in self.state.moved:
            self.head(302, 0, Location=self.state.moved[self.path])
        elif content is None:
            self.head(404, 0)
        else:
            serve(self, content)

    def start_of(self, content: bytes) -> int:
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if wanted:
            self.head(
                206,
                len(content) - start,
                Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}",
            )
        else:
            self.head(200, len(content))
        return start


def serve(request: Request, content: bytes) -> None:
    request.wfile.write(content[request.start_of(content) :])


def cut(request: Request, content: bytes) -> None:
    """Breaks off at 40 %."""
    request.wfile.write(content[request.start_of(content) : len(content) * 2 // 5])
    request.wfile.flush()
    request.close_connection = True
    request.connection.shutdown(2)


def stall(request: Request, content: bytes) -> None:
    """Sends 40 % and then nothing, until released."""
    request.wfile.write(content[request.start_of(content) : len(content) * 2 // 5])
    request.wfile.flush()
    request.state.released.wait(60)
    request.close_connection = True


def other(request: Request, content: bytes) -> None:
    """Other content of the same size."""
    serve(request, bytes(reversed(content)))


def web_page(request: Request, content: bytes) -> None:
    page = b"<!DOCTYPE html><html><body>Please wait for your download</body></html>"
    request.head(200, len(page), Content_Type="text/html")
    request.wfile.write(page)


def status(code: int, **headers: str) -> Answer:
    return lambda request, content: request.head(code, 0, **headers)


@contextmanager
def running() -> Iterator[Server]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Request) as http:
        http.daemon_threads = True
        state = http.state = Server(f"http://127.0.0.1:{http.server_port}")  # type: ignore[attr-defined]
        threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield state
        finally:
            state.released.set()
            http.shutdown()
