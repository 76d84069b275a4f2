"""The fuzz target: tproxyd/tests/invariant.py, under libFuzzer by way of atheris.

    python -m fuzz.target CORPUS… -libFuzzer=options

The instrumentation sees flow/ and addr, which are what the coverage is counted of; the invariant
itself is not instrumented. Half of the mutations are mended afterwards: a v2 header whose length is
not right, or whose checksum does not match, ends at those tests, and random bytes would hardly ever
come past a CRC.
"""

from __future__ import annotations

import struct
import sys

import atheris

with atheris.instrument_imports(include=["tproxyd.flow", "tproxyd.addr"]):
    from tproxyd.flow import tlv
    from tproxyd.flow.proxyproto import V2_FIXED, V2_SIGNATURE
    from tproxyd.tests import invariant

_BLOCKS = (0, 12, 36, 216)  # bytes of an address block, by family


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    changed: bytes = atheris.Mutate(data, longest)
    return mended(changed) if seed & 1 else changed


def mended(data: bytes) -> bytes:
    """A v2 header that says how long it is; its checksum, where it has one, is right."""
    body = len(data) - V2_FIXED
    if not data.startswith(V2_SIGNATURE) or not 0 <= body <= 0xFFFF:
        return data
    header = bytearray(data)
    struct.pack_into(">H", header, 14, body)
    at = V2_FIXED + _BLOCKS[header[13] >> 4 & 3]
    while at + 3 <= len(header):
        kind, length = struct.unpack_from(">BH", header, at)
        at += 3
        if kind == tlv.CRC32C and length == 4 and at + 4 <= len(header):
            header[at : at + 4] = bytes(4)
            struct.pack_into(">I", header, at, tlv.crc32c(header))
            break
        at += length
    return bytes(header)


if __name__ == "__main__":
    atheris.Setup(sys.argv, invariant.check, custom_mutator=mutate)
    atheris.Fuzz()
