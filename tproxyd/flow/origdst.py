"""Where the client meant to go.

Facts about TPROXY, run on Linux 6.18:
- nf_tproxy assigns the packet to our listener without rewriting it. The accepted socket's local
  address is the destination that the client dialled: getsockname() is the answer.
- SO_ORIGINAL_DST reads the conntrack entry of a nat REDIRECT. It is not needed here, and asks for a
  conntrack entry that NOTRACK may have forbidden, so it can answer with an error or with an old
  connection's destination.
"""

from __future__ import annotations

from tproxyd.addr import OriginalDst
from tproxyd.flow.listen import local_endpoint
from tproxyd.flow.stream import Stream


def original_destination(downstream: Stream) -> OriginalDst:
    """The address and port that the client connected to. Raises OSError if it is gone already."""
    return OriginalDst(local_endpoint(downstream.getsockname()))
