"""The demo's application: an HTTP server that answers with the address it sees.

    whoami.py PORT      on every IPv4 and IPv6 address

It knows nothing of proxies, headers or marks; that is the point.
"""

from __future__ import annotations

import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WhoAmI(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10

    def answer(self, code: int, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def visitor(self) -> str:
        return str(self.client_address[0]).removeprefix("::ffff:")

    def do_GET(self) -> None:
        self.answer(200, f"you are {self.visitor()}\n")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.request_version = "HTTP/1.1"  # as if: else the answer would have no status line
        self.close_connection = True
        first_line = self.requestline
        self.answer(code, f'you are {self.visitor()}, and "{first_line}" is no request of HTTP\n')

    def log_message(self, format: str, *args: object) -> None:
        """The demo shows the daemon's log, not ours."""


class DualStackServer(ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    DualStackServer(("::", int(sys.argv[1])), WhoAmI).serve_forever()
