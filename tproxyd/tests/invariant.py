"""What holds of any bytes that a peer sends first: the invariant that scripts/fuzz tries to break.

Whatever comes, whole or in pieces: `parse` answers Header, NEED_MORE or NOT_PROXY, or raises
PeerError, and nothing else; an answer once given is the same whatever comes behind it and however
the bytes were cut; it never looks past what the header says it takes, and reads each byte a bounded
number of times. A Header can be told to the access log, and written again by us without a change.

`check(data)` is silent where that holds, and raises where it does not. tests/test_fuzz_corpus.py
replays what the fuzzer has found worth keeping.
"""

from __future__ import annotations

import json

from tproxyd.addr import Client, Endpoint, OriginalDst, fold
from tproxyd.config import SendProxy, SendTlvs
from tproxyd.configfile import LARGEST_HEADER
from tproxyd.errors import CloseReason, PeerError
from tproxyd.flow.announce import announcer
from tproxyd.flow.proxyproto import (
    DEFAULT_LIMIT,
    LONGEST_V1,
    NEED_MORE,
    V2_FIXED,
    V2_SIGNATURE,
    Header,
    NoHeader,
    describe,
    encode_v1,
    encode_v2,
    parse,
)
from tproxyd.flow.tlv import CRC32C, NOOP

Answer = Header | NoHeader | str

# The caps of a v2 header that are tried: the specification's 536, what we take unless told
# otherwise, and all there can be.
LIMITS = (536, DEFAULT_LIMIT, LARGEST_HEADER)
# A header's description has its text in it and, at 64 digits for as many bytes as it likes, the
# fingerprint of each certificate; names, quotes and brackets around every TLV of three bytes.
LONGEST_TOLD = 100

_ANYWHERE = Endpoint("192.0.2.1", 1)
_ALL_V2 = announcer(SendProxy.V2, SendTlvs(forward=None, crc32c=True), bytes)
_V1 = announcer(SendProxy.V1, SendTlvs(), bytes)


class Window:
    """Bytes that can be read by index or slice only, which counts how many were."""

    def __init__(self, data: bytes) -> None:
        self.data, self.read, self.farthest = data, 0, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: int | slice) -> int | bytes:
        part = self.data[key]
        first, last = (key, key + 1) if isinstance(key, int) else key.indices(len(self.data))[:2]
        self.read += last - first
        self.farthest = max(self.farthest, last)
        return part


def answer(data: bytes, limit: int) -> Answer:
    """What `parse` says, a refusal by its words; how much it read is checked."""
    window = Window(data)
    got: Answer
    try:
        got = parse(window, limit)  # type: ignore[arg-type]
    except PeerError as error:
        refusal = error
        got = error.detail
    if isinstance(got, str):
        assert refusal.reason is CloseReason.HEADER_INVALID, refusal
        # For a log line: words, of bounded length, in which nothing that the peer sent can forge
        # another line.
        assert 10 < len(got) < 200, got
        assert got.isascii(), ascii(got)
        assert got.isprintable(), ascii(got)
    takes = 0 if isinstance(got, NoHeader) else _claimed(data)
    assert window.farthest <= max(LONGEST_V1, takes), (window.farthest, got)
    assert window.read <= LONGEST_V1 + takes, (window.read, got)
    return got


def _claimed(data: bytes) -> int:
    """The size that a v2 header says it has: so much may be read before it is refused."""
    if len(data) < V2_FIXED or not data.startswith(V2_SIGNATURE):
        return 0
    return V2_FIXED + int.from_bytes(data[14:16], "big")


def check(data: bytes) -> None:
    """AssertionError, or whatever came out, where the invariant does not hold for `data`."""
    whole = answer(data, DEFAULT_LIMIT)
    for length in _lengths(len(data), whole):
        early = answer(data[:length], DEFAULT_LIMIT)
        assert early is NEED_MORE or _same(early, whole), (length, early, whole)
    for limit in LIMITS:
        other = answer(data, limit)
        if isinstance(other, Header):
            assert other.version == 1 or other.size <= limit, (other, limit)
        if not _about_a_limit(whole) and not _about_a_limit(other):
            assert _same(other, whole), (other, whole, limit)
    if isinstance(whole, Header):
        _check_header(data, whole)


def _lengths(size: int, whole: Answer) -> list[int]:
    """Where the bytes are cut: everywhere a short header can be, then in steps, then around the
    end of the header."""
    ends = whole.size if isinstance(whole, Header) else size
    around = range(max(0, ends - 3), min(size, ends + 2))
    return [*range(min(size, LONGEST_V1 + 1)), *range(LONGEST_V1, size, 61), *around]


def _same(one: Answer, other: Answer) -> bool:
    """Two refusals are the same: with more bytes there its words may say more."""
    return one == other or (isinstance(one, str) and isinstance(other, str))


def _about_a_limit(got: Answer) -> bool:
    return isinstance(got, str) and "the limit is" in got


def _check_header(data: bytes, header: Header) -> None:
    head = data[: header.size]
    assert len(head) == header.size > 0
    assert header.size <= (LONGEST_V1 if header.version == 1 else DEFAULT_LIMIT)
    # It takes all of its bytes, and none of those behind it.
    assert answer(head[:-1], DEFAULT_LIMIT) is NEED_MORE
    for payload in (b"", b"\xff" * 200, bytes(5), b"\r\n", head):
        assert answer(head + payload, DEFAULT_LIMIT) == header
    assert (header.source is None) == (header.destination is None)
    assert not (header.local and header.source)
    for end in (header.source, header.destination):
        if end is not None:
            assert type(end) is Endpoint
            assert end.host == fold(end.host)
            assert "%" not in end.host
            assert 0 <= end.port <= 0xFFFF
    if header.version == 2 and not header.local and header.source is not None:
        filled = sum(3 + len(each.value) for each in header.tlvs)
        assert V2_FIXED + (12 if data[13] >> 4 == 1 else 36) + filled == header.size
        assert sum(each.type == CRC32C for each in header.tlvs) <= 1

    told = describe(header)
    line = json.dumps(told)
    assert json.loads(line) == told
    assert len(line) <= LONGEST_TOLD * (1 + len(header.tlvs)) + 8 * header.size, len(line)
    _check_printable(told)
    _check_written_again(head, header)


def _check_printable(told: object) -> None:
    """No text for the log has anything in it that a terminal, or a line, would obey."""
    match told:
        case str():
            assert told.isprintable(), ascii(told)
        case dict():
            for each in told.values():
                _check_printable(each)
        case list():
            for each in told:
                _check_printable(each)


def _check_written_again(head: bytes, header: Header) -> None:
    """What is read can be written, by both encoders and by what sends on to an upstream."""
    ends = header.source, header.destination
    line = encode_v1(*ends)
    assert parse(line) == Header(1, len(line), False, *ends)
    kept = tuple(each for each in header.tlvs if each.type != CRC32C)
    local = header.source is None
    for crc32c in (False, True):
        made = encode_v2(*ends, kept, crc32c=crc32c)
        again = parse(made, LARGEST_HEADER)
        assert isinstance(again, Header)
        sealed = again.tlvs[-1:] if crc32c else ()
        assert again == Header(2, len(made), local, *ends, (*kept, *sealed))
        if head[:14] == V2_SIGNATURE + b"\x21\x11" and again.tlvs == header.tlvs:
            assert made == head

    assert _V1 is not None
    assert _ALL_V2 is not None
    client, dst = Client(_ANYWHERE), OriginalDst(_ANYWHERE)
    assert _V1(client, dst, header)[0] == line
    sent, said = _ALL_V2(client, dst, header)
    got = parse(sent, LARGEST_HEADER)
    assert isinstance(got, Header)
    assert (got.source, got.destination, said.left_out) == (*ends, 0)
    passed_on = tuple(each for each in kept if each.type != NOOP)
    assert got.tlvs == (*passed_on, *got.tlvs[-1:])
