"""Hubs that do not work, on this machine's loopback address, for what depends on the network."""

import contextlib
import http.server
import threading
from collections.abc import Iterator

LOGIN_PAGE = b"<!doctype html><html><body>Please log in</body></html>"


@contextlib.contextmanager
def bad_hub(kind: str) -> Iterator[str]:
    """The address of a hub that answers every request with a login page ("login"), with a redirect to one
    ("redirect"), with the status 503 ("busy"), or not at all ("silent")."""
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            if kind == "silent":
                over.wait(300)
                return
            status, body = {"busy": (503, b""), "redirect": (302, b"")}.get(kind, (200, LOGIN_PAGE))
            if self.path == "/login":
                status, body = 200, LOGIN_PAGE
            self.send_response(status)
            self.send_header("Location", "/login")
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()
