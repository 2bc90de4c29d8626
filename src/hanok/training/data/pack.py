"""Puts documents into packs of a fixed size, whole, and orders the packs of an epoch.

Best-fit decreasing: documents from the longest to the shortest, each into the fullest pack that has room
for it. All is a pure function of lengths, size, seed and epoch, so the place in the data is one integer,
whatever the number of processes. The largest pack comes first: memory fails at the first step or never.

Cost: n log n for n documents.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def pack(lengths: Sequence[int], max_tokens: int, order: Sequence[int]) -> list[list[int]]:
    """Return packs of indices into `lengths`; no pack has more than `max_tokens`, none is empty.

    `order` holds the indices to pack, each as often as it is there; documents of equal length are taken
    in this order. Raises ValueError for a document that is longer than a pack.
    """
    packs: list[list[int]] = []
    rooms: list[int] = []  # the rooms that some pack has, in ascending order
    with_room: dict[int, list[int]] = {}  # the packs by their room
    for index in sorted(order, key=lambda index: -lengths[index]):
        length = lengths[index]
        if length > max_tokens:
            raise ValueError(f"document {index} has {length} tokens, a pack {max_tokens}")
        place = bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room = len(packs), max_tokens
            packs.append([])
        else:
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        packs[chosen].append(index)
        room -= length
        if room not in with_room:
            insort(rooms, room)
            with_room[room] = []
        with_room[room].append(chosen)
    return packs


def pack_epoch(
    lengths: Sequence[int], max_tokens: int | None, order: Sequence[int], seed: int, epoch: int
) -> list[list[int]]:
    """Return the packs of an epoch in the order in which they are learnt; None: one for each document.

    The pack with most tokens is first, of equal ones that with the longest document; the others
    follow in an order that depends on seed and epoch alone.
    """
    mixed = shuffled(order, f"{seed}/{epoch}/documents")
    packs = [[i] for i in mixed] if max_tokens is None else pack(lengths, max_tokens, mixed)
    packs = shuffled(packs, f"{seed}/{epoch}/packs")
    if packs:
        sizes = [(sum(lengths[i] for i in found), lengths[found[0]]) for found in packs]
        packs.insert(0, packs.pop(max(range(len(packs)), key=sizes.__getitem__)))
    return packs


def take_times(indices: Sequence[int], times: float, seed: int, epoch: int) -> list[int]:
    """Return indices, each `times` times; of a fraction another part in each epoch.

    With 0.25, four epochs take each index once.
    """
    whole, count = int(times), round((times - int(times)) * len(indices))
    mixed = shuffled(indices, f"{seed}/fraction") if count else []
    begin = epoch * count
    return [*indices] * whole + [mixed[(begin + i) % len(mixed)] for i in range(count)]


def shuffled(items: Sequence[T], seed: str) -> list[T]:
    """Return the items in an order that depends on the seed alone, in every version of Python."""
    # Of `random`, only the numbers of `random()` are promised to stay.
    numbers = Random(seed)
    keys = [numbers.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]
