"""Which rows of a dataset are kept: those with the smallest keyed hashes, within limits of rows and bytes.

That is a uniform sample of the different rows, the same one in any order of the file, and its beginning is one too.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence

from daemon.memory.store import keyed_hash


def choose_kept(digests: Collection[str], most: int, key: bytes) -> list[str]:
    """Choose at most `most` different rows, smallest keyed hash first."""
    return heapq.nsmallest(most, set(digests), key=lambda digest: keyed_hash(key, digest))


def fitting(sizes: Iterable[int], most: int) -> int:
    """How many items, from the first on, have at most `most` bytes together."""
    total = count = 0
    for size in sizes:
        total += size
        if total > most:
            break
        count += 1
    return count


def fair_level(sizes: Sequence[float], total: float) -> float:
    """The level to which each of `sizes` is cut so that they amount to `total`: larger ones shrink first.

    Infinite when they do not exceed it.
    """
    if sum(sizes) <= total:
        return float("inf")
    left = total
    for at, size in enumerate(ordered := sorted(sizes)):
        level = left / (len(ordered) - at)
        if size > level:
            return level
        left -= size
    return float("inf")


def shares(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """How many bytes each memory may have so that all have at most `total`; only those that have to shrink are named."""
    level = fair_level(list(sizes.values()), total)
    return {name: int(level) for name, size in sizes.items() if size > level}
