"""The memory in which workers count each client's connections; flow/clients.py says how.

Anonymous shared memory, made before the first worker is forked; pages that no client was ever
counted in are never taken. The seed is drawn once a process, and the size is what the open-file
limit allows, so that workers after a reload read what those before it still have open.
"""

from __future__ import annotations

import mmap
import os
from typing import ClassVar

from tproxyd.flow.clients import SEED, table_size


class ClientTables:
    """One table per worker slot, and the seed of the hash that they share."""

    seed: ClassVar[bytes] = os.urandom(SEED)

    def __init__(self, slots: int, connections: int) -> None:
        """`connections` is what one worker can hold: half the open files it may have."""
        size = table_size(connections)
        self.tables: list[mmap.mmap] = [mmap.mmap(-1, size) for _ in range(slots)]

    def reset(self, slot: int) -> None:
        """The slot's worker is gone, and what it had open with it.

        To be called after its process has been waited for, and before the next one is forked.
        """
        table = self.tables[slot]
        try:
            table.madvise(mmap.MADV_REMOVE)  # reads as zero, and its pages are given back
        except OSError:
            table[:] = bytes(len(table))
