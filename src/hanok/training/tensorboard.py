"""Numbers by step as TensorBoard reads them: an event file, which needs no package to be written.

A file is records of an event each: its length, a checksum of that, the event as a protobuf message, and
a checksum of it. Checksums are CRC-32C, rotated and shifted as TFRecord files have them.
"""

import struct
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

POLYNOMIAL = 0x82F63B78  # of CRC-32C, its bits reversed
MASK_DELTA = 0xA282EAD8
VERSION = b"brain.Event:2"


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


TABLE = _table()


class EventFile:
    """A new event file in a folder; a context that keeps it open.

    Other files there may have later steps than `first_step`, of a training that was killed; TensorBoard
    is told to forget them.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now_ns = time.time_ns()
        # Files are read in the order of their names.
        path = folder / f"events.out.tfevents.{now_ns // 10**9:010}.{now_ns % 10**9:09}.hanok"
        self._file = path.open("xb")
        self._write(_bytes(3, VERSION))
        # A session that starts at a step: what earlier files have from there on is old.
        start = first_step + 1 if first_step else 0
        self._write(_varint(2, start) + _bytes(7, _varint(1, 1)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step by their names."""
        summary = b"".join(
            _bytes(1, _bytes(1, name.encode()) + _number(2, value))
            for name, value in values.items()
        )
        self._write(_varint(2, step) + _bytes(5, summary))

    def _write(self, fields: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + fields  # field 1: the time
        length = struct.pack("<Q", len(event))
        self._file.write(
            length
            + struct.pack("<I", _masked(crc32c(length)))
            + event
            + struct.pack("<I", _masked(crc32c(event)))
        )
        self._file.flush()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of some bytes."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def _masked(value: int) -> int:
    return ((value >> 15 | value << 17) + MASK_DELTA) & 0xFFFFFFFF


def _bytes(field: int, value: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _size(len(value)) + value


def _varint(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _size(value)


def _number(field: int, value: float) -> bytes:
    return bytes([field << 3 | 5]) + struct.pack("<f", value)


def _size(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
