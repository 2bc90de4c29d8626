"""Reading rows: every kind of file gives the same rows, and a bad one spoils no other."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok.errors import DataError
from hanok.training.data import read
from hanok.training.data.formats import Text
from hanok.training.data.read import JsonLines, Row, capped, find_files, read_rows

ROWS = [{"text": f"row {i}\nof\t“some”"} for i in range(7)]


def write_lines(file: Path) -> None:
    file.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")


def write_array(file: Path) -> None:
    file.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")


def write_table(file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8-sig") as opened:
        writer = csv.DictWriter(opened, ["text"], delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(file: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'hanok[data]'")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.Table.from_pylist(ROWS), file)


def write_arrow(file: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pip install 'hanok[data]'")
    table = arrow.Table.from_pylist(ROWS)
    with arrow.OSFile(str(file), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_lines),
        ("rows.json", write_array),
        ("lines.json", write_lines),
        ("rows.csv", write_table),
        ("rows.tsv", write_table),
        ("rows.parquet", write_parquet),
        ("rows.arrow", write_arrow),
    ],
)
def test_every_kind_of_file_has_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    file = tmp_path / name
    write(file)
    assert [row.value for row in read_rows(file)] == ROWS
    taken = capped(read_rows(file), 3, seed=1)
    assert [row.value for row in taken] == [row.value for row in capped(read_rows(file), 3, seed=1)]
    numbers = [ROWS.index(row.value) for row in taken]
    assert len(numbers) == 3
    assert numbers == sorted(numbers)
    assert len({str(capped(read_rows(file), 3, seed=seed)) for seed in range(8)}) > 1
    assert [row.value for row in capped(read_rows(file), 99, seed=1)] == ROWS


def test_a_cap_parses_only_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    write_lines(file)
    parsed: list[Any] = []
    real = json.loads
    monkeypatch.setattr(read.json, "loads", lambda line: parsed.append(line) or real(line))
    capped(read_rows(file), 2, seed=0)
    assert len(parsed) == 2


@given(
    lines=st.lists(
        st.sampled_from([b'{"a": 1}', b"", b"  ", b"{bad", b"[2]", b"\xff", b'"\xc3\xa9"'])
    )
)
def test_rows_are_found_by_their_offsets(lines: list[bytes], tmp_path_factory: Any) -> None:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_bytes(b"\n".join(lines))
    rows = JsonLines(file)
    assert [rows[index] for index in range(len(rows))] == list(rows) == rows[:]
    assert [row.line for row in rows] == [i for i, line in enumerate(lines, 1) if line.strip()]
    for row in rows:
        is_bad = lines[row.line - 1].strip() in (b"{bad", b"\xff")
        assert bool(row.reason) == is_bad


def test_rows_of_an_array_have_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[\n {"a":\n 1},\n\n {"a": 2}, 3]')
    found = [(row.line, row.value) for row in read_rows(file)]
    assert found == [(2, {"a": 1}), (5, {"a": 2}), (5, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"a": ]', "line 2: the array cannot be read on from here"),
        ('[{"a": 1}\n{"a": 2}]', "line 1: after this row the array goes on with"),
        ('[{"a": 1}', "neither a comma nor its end"),
        ('"text"', "neither a JSON array of rows nor JSONL"),
    ],
)
def test_a_broken_array_says_where(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(DataError) as raised:
        list(read_rows(file))
    assert message in str(raised.value)
    assert str(file) in str(raised.value)


def test_a_table_counts_rows_with_other_columns(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('a,b\n1,2\n3\n"4\n",5\n6,7,8\n')
    assert list(read_rows(file)) == [
        Row(2, {"a": "1", "b": "2"}),
        Row(3, reason="1 cells, but the header names 2 columns"),
        Row(4, {"a": "4\n", "b": "5"}),
        Row(6, reason="3 cells, but the header names 2 columns"),
    ]


@given(text=st.text(st.sampled_from("ab\n é"), max_size=200), size=st.integers(1, 30))
def test_the_parts_of_a_text_are_the_text(text: str, size: int, tmp_path_factory: Any) -> None:
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "PART_BYTES", size)
        parts = [row.value for row in read_rows(file)]
    assert all(isinstance(part, Text) for part in parts)
    assert "".join(part.text for part in parts) == text
    last = len(parts) - 1
    assert [part.begins for part in parts] == [index == 0 for index in range(len(parts))]
    assert [part.ends for part in parts] == [index == last for index in range(len(parts))]


def test_a_folder_gives_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.json", "README.md", ".cache/x.jsonl", "notes.docx"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
    assert find_files(tmp_path) == [tmp_path / "a" / "c.json", tmp_path / "b.jsonl"]
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text("x")
    assert find_files(texts) == [texts / "one.txt"]


def test_what_cannot_be_read_says_what_can(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        find_files(tmp_path / "none")
    (tmp_path / "a.docx").write_text("")
    with pytest.raises(
        DataError, match=r"no file of training data in this folder; there is a\.docx"
    ):
        find_files(tmp_path)
    with pytest.raises(DataError, match=r"its ending '\.docx' says nothing"):
        find_files(tmp_path / "a.docx")


def test_columns_without_pyarrow_say_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'hanok\[data\]'"):
        list(read_rows(file))
