"""An HTTP proxy that loses answers (the server has done the work, and the client never hears of it) and changes the client's settings."""

from __future__ import annotations

import http.server
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import httpx

KEPT_HEADERS = ("content-type", "content-encoding", "x-api-key", "accept", "x-stainless-package-version")


def never(path: str, n: int) -> bool:
    del path, n
    return False


class Proxy:
    """Passes every request on.

    Args:
        loses: (last part of the path, n) -> whether the answer to the n-th such request (from 0) is thrown away: the connection closes
            without a byte.
        settings: laid over what the server answers to client/config and client/dynamic_config.
    """

    def __init__(self, target: str, loses: Callable[[str, int], bool] = never, settings: Mapping[str, object] | None = None) -> None:
        self._target = target
        self._loses = loses
        self._settings = dict(settings or {})
        self._lock = threading.Lock()
        self.seen = Counter[str]()
        self.lost = Counter[str]()

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Its address, while it runs."""
        proxy, client = self, httpx.Client(base_url=self._target, timeout=120.0)

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name: value for name, value in self.headers.items() if name.lower() in KEPT_HEADERS}
                path = self.path.split("?")[0].rsplit("/", 1)[-1]
                with proxy._lock:
                    number = proxy.seen[path]
                    proxy.seen[path] += 1
                response = client.request(self.command, self.path, content=body, headers=headers)
                if proxy._loses(path, number):
                    with proxy._lock:
                        proxy.lost[path] += 1
                    self.close_connection = True
                    return
                content = response.content
                if path in ("config", "dynamic_config") and response.status_code == 200:
                    content = json.dumps(response.json() | proxy._settings).encode()
                self.send_response(response.status_code)
                self.send_header("content-type", response.headers.get("content-type", "application/json"))
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = _pass_on

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            client.close()
