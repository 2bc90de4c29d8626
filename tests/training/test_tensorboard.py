"""Event files: records and checksums as TensorBoard reads them, without its package."""

import struct
from pathlib import Path

import pytest

from hanok.checkpoint.protobuf import fields
from hanok.training.tensorboard import EventFile, crc32c


def records(path: Path) -> list[dict[int, int | bytes]]:
    """The fields of each event, its checksums verified."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = data[12 : 12 + length]
        for part, at in ((data[:8], 8), (event, 12 + length)):
            (stored,) = struct.unpack("<I", data[at : at + 4])
            rotated = (stored - 0xA282EAD8) & 0xFFFFFFFF
            assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == crc32c(part)
        found.append(dict(fields(event)))
        data = data[16 + length :]
    return found


def values_of(record: dict[int, int | bytes]) -> dict[str, float]:
    found = {}
    for _, value in fields(bytes(record[5])):  # type: ignore[arg-type]  # a message
        inner = dict(fields(bytes(value)))  # type: ignore[arg-type]  # a message
        (number,) = struct.unpack("<f", bytes(inner[2]))  # type: ignore[arg-type]  # four bytes
        found[bytes(inner[1]).decode()] = number  # type: ignore[arg-type]  # text
    return found


def test_the_checksum_is_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's polynomial, the usual check value
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_steps_are_events(tmp_path: Path) -> None:
    with EventFile(tmp_path / "events", 0) as file:
        file.add(1, {"loss": 4.5, "learning_rate": 0.25})
        file.add(300, {"loss": -1.0})
    (path,) = (tmp_path / "events").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    head, start, first, second = records(path)
    assert head[3] == b"brain.Event:2"
    assert (start[2], start[7]) == (0, b"\x08\x01")
    assert (first[2], values_of(first)) == (1, {"loss": 4.5, "learning_rate": 0.25})
    assert (second[2], values_of(second)) == (300, {"loss": -1.0})


def test_tensorboard_reads_them_and_forgets_steps_that_were_lost(tmp_path: Path) -> None:
    package = "tensorboard.backend.event_processing.event_accumulator"
    reader = pytest.importorskip(package)
    for first in (0, 2):  # killed after step 4, whose checkpoint was of step 2
        with EventFile(tmp_path, first) as file:
            for step in range(first + 1, first + 5):
                file.add(step, {"loss": 10.0 * first + step})
    found = reader.EventAccumulator(str(tmp_path))
    found.Reload()
    steps = [(item.step, item.value) for item in found.Scalars("loss")]
    assert steps == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25), (6, 26)]
