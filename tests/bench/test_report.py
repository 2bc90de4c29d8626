"""Reports are written and read back exactly, or refused with the place that is wrong."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from hanok.bench.report import Report, read_report, write_report
from hanok.errors import OptionError


def test_a_report_is_read_as_it_was_written(report: Report, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    write_report(report, file)
    assert read_report(file) == report


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("rows", 1, "samples", 0, "seconds"), "soon", r"rows\[1\].samples\[0\].seconds is 'soon'"),
        (("rows", 0, "setting", "cache"), 1, r"rows\[0\].setting.cache is 1"),
        (("rows", 0, "verdict"), "better", r"rows\[0\].verdict is 'better'"),
        (("rows", 0, "setting", "colour"), "red", r"rows\[0\].setting does not have the fields of"),
        (("format",), 2, "not a report of `hanok bench` in format 1"),
    ],
)
def test_what_is_no_report_is_refused(
    report: Report, tmp_path: Path, place: tuple[str | int, ...], value: object, message: str
) -> None:
    values = json.loads(json.dumps(asdict(report)))
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    file = tmp_path / "report.json"
    file.write_text(json.dumps(values))
    with pytest.raises(OptionError, match=message):
        read_report(file)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        read_report(tmp_path / "nothing.json")
    (tmp_path / "text").write_text("a table")
    with pytest.raises(OptionError, match="is not JSON"):
        read_report(tmp_path / "text")
    (tmp_path / "list").write_text("[]")
    with pytest.raises(OptionError, match="is not a report"):
        read_report(tmp_path / "list")
