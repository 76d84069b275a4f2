"""What there is to be seen of a running daemon, by path: for the admin endpoint (proc/admin.py),
and for the command socket, which shows the same where there is no admin endpoint.

The page at / is one file of this package that asks for the rest once a second; nothing is built,
and nothing comes from elsewhere. Its headers forbid everything else: the browser runs this script
and no other (by its hash), and lets it speak with this daemon alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import parse_qsl

from tproxyd.proc.rows import LIMIT, MAX_LIMIT, Sort

PATHS = {
    "/": "a page that shows it to people, live",
    "/livez": "200 while the supervisor runs",
    "/readyz": "200 when every worker accepts and the kernel state is as configured, else 503",
    "/metrics": "for Prometheus",
    "/status": "everything at once, as JSON",
    "/connections": f"the open ones, as JSON; ?sort={'|'.join(Sort)}&limit={LIMIT}",
    "/history": "the last five minutes, an entry a second, as JSON; ?after=N: those behind N",
}

PAGE = Path(__file__).with_name("page.html")


class Provider(Protocol):
    """Who knows the answers; the supervisor."""

    async def unready(self) -> list[str]:
        """Why this daemon is not ready, a sentence each; empty when it is."""

    async def status(self) -> Mapping[str, object]:
        """What /status shows."""

    async def open_connections(self, sort: Sort, limit: int) -> Mapping[str, object]:
        """What /connections shows."""

    def past(self, after: int) -> Mapping[str, object]:
        """What /history shows."""

    def metrics(self) -> tuple[bytes, str]:
        """The body of /metrics and its content type."""


class Found(NamedTuple):
    code: int
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    headers: str = ""


async def find(provider: Provider, target: str) -> Found:
    """What is at a path, which may have a query."""
    path, _, query = target.partition("?")
    match path:
        case "/":
            return page()
        case "/livez":
            return _text(200, "ok")
        case "/readyz":
            reasons = await provider.unready()
            return _text(503, "\n".join(reasons)) if reasons else _text(200, "ok")
        case "/metrics":
            body, kind = provider.metrics()
            return Found(200, body, kind)
        case "/status":
            return _json(await provider.status(), indent=2)
        case "/connections" | "/history":
            try:
                asked = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
                if path == "/history":
                    return _json(provider.past(_number(asked, "after", 0, 1 << 53)))
                sort = Sort(asked.get("sort", Sort.BYTES))
                limit = _number(asked, "limit", LIMIT, MAX_LIMIT)
            except ValueError as error:
                return _text(400, f"can't read what is behind the ?: {error}; {PATHS[path]}")
            return _json(await provider.open_connections(sort, limit))
        case _:
            width = max(map(len, PATHS))
            known = "".join(f"\n  {each:<{width}}  {what}" for each, what in PATHS.items())
            return _text(404, f"there is nothing at this path; there is:{known}")


async def get(provider: Provider, request: Mapping[str, object]) -> dict[str, object]:
    """The same over the command socket: {"verb": "get", "path": "/status"}."""
    found = await find(provider, str(request.get("path")))
    return {"code": found.code, "body": found.body.decode()}


def _number(asked: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = asked.get(name, str(default))
    if not text.isdecimal() or int(text) > most:
        raise ValueError(f"{name} is a number up to {most}")
    return int(text)


@cache
def page() -> Found:
    html = PAGE.read_bytes()
    policy = (
        f"default-src 'none'; script-src {_hash(html, b'script')}; style-src"
        f" {_hash(html, b'style')}; connect-src 'self'; img-src data:; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    )
    headers = (
        f"Content-Security-Policy: {policy}\r\nX-Content-Type-Options: nosniff\r\n"
        "Referrer-Policy: no-referrer\r\nCache-Control: no-store\r\n"
    )
    return Found(200, html, "text/html; charset=utf-8", headers)


def _hash(html: bytes, tag: bytes) -> str:
    """The one element of that name, as CSP wants to know it."""
    ((inside),) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"


def _text(code: int, text: str) -> Found:
    return Found(code, f"{text}\n".encode())


def _json(what: Mapping[str, object], indent: int | None = None) -> Found:
    return Found(200, f"{json.dumps(what, indent=indent)}\n".encode(), "application/json")
