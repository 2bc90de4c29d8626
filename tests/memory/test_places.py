"""Rates that are measured and kept, and devices that are described."""

import json
from pathlib import Path

import pytest

from hanok.memory import places
from hanok.memory.places import Rates, described_place, disk_bytes_per_s, memory_bytes_per_s


def test_a_rate_is_measured_once(tmp_path: Path) -> None:
    file, asked = tmp_path / "deep" / "rates.json", []

    def measure() -> float:
        asked.append(1)
        return 3.0

    for _ in range(2):
        assert Rates(file).get("x", measure, 9.0) == (3.0, "measured")
    assert len(asked) == 1
    assert json.loads(file.read_text()) == {"x": 3.0}
    file.write_text("{ broken")
    assert Rates(file).get("x", measure, 9.0) == (3.0, "measured")
    assert len(asked) == 2
    assert Rates(file, may_measure=False).get("x", measure, 9.0) == (3.0, "measured")
    assert Rates(file, may_measure=False).get("y", measure, 9.0) == (9.0, "assumed")
    assert len(asked) == 2


def test_a_rate_that_cannot_be_kept_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rates = Rates(tmp_path / "file" / "rates.json")
    assert rates.get("x", lambda: 2.0, 9.0) == (2.0, "measured")
    assert Rates(None).get("x", lambda: 2.0, 9.0) == (2.0, "measured")


def test_rates_are_of_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MEMORY_PROBE_BYTES", 2**20)
    assert memory_bytes_per_s() > 0
    file = tmp_path / "weights"
    for size in (0, 100, 2**20 + 5):
        file.write_bytes(bytes(size))
        assert disk_bytes_per_s(file) > 0


def test_a_described_device_is_its_data_sheet_and_what_differs() -> None:
    found = described_place("name=h100", 2, None)
    assert (found.name, found.kind, found.bytes_per_s) == ("2", "gpu", 3.35e12)
    assert found.budget is not None
    assert found.budget.num_bytes == 80 * 2**30
    other = described_place("name=h100,memory=60GiB,bandwidth=3TB/s,tflops=500", 0, 2**30)
    assert (other.bytes_per_s, other.flops_per_s) == (3e12, 500e12)
    assert other.budget is not None
    assert (other.budget.num_bytes, other.budget.source) == (2**30, "max_memory")
    unknown = described_place("name=mine,memory=10GiB,bandwidth=100GB/s", 0, None)
    assert unknown.flops_per_s == 200 * 100e9
