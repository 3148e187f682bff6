"""Packing: which examples share a row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put every index of `lengths` into exactly one bin, so that the lengths of a bin sum to at most `budget`.

    Best-fit decreasing: the longest first, each into the fullest bin that still takes it; at most 11/9 of the fewest
    possible bins plus one (Johnson, 1973). Deterministic; indices ascend inside a bin.

    Raises:
        ValueError: a length is not positive or exceeds `budget`.

    >>> pack([5, 3, 2, 6], 8)
    [[2, 3], [0, 1]]
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= budget:
            raise ValueError(f"example {index} has {length} tokens, the budget is {budget}")
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[index], -1))
        left, number = room.pop(at) if at < len(room) else (budget, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        if left > lengths[index]:
            insort(room, (left - lengths[index], number))
    return [sorted(members) for members in bins]
