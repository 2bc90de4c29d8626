"""One reader for every text that people give: what it takes, and what it says otherwise."""

import difflib
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok.errors import RequestError
from hanok.text_files import STANDARD_INPUT, decode, read_text, unified_diff


@given(text=st.text(st.characters(exclude_characters="\0\r\ufeff", exclude_categories=["Cs"])))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_same_text_whatever_wrote_it(text, encoding, end):
    assert decode(text.replace("\n", end).encode(encoding), "x") == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("déjà".encode("latin-1"), r"x is not UTF-8 text, at byte 1 \(0xE9\); it may be Latin-1"),
        (
            "hi".encode("utf-16"),
            r"at byte 0 \(0xFF\); it begins like UTF-16.*iconv -f UTF-16 -t UTF-8",
        ),
        (b"\xfe\xff\x00h", r"at byte 0 \(0xFE\); it begins like UTF-16"),
        ("hi".encode("utf-32"), r"begins like UTF-32.*iconv -f UTF-32 -t UTF-8"),
        ("hi".encode("utf-16-le"), r"contains a NUL.* at byte 1 .*iconv -f UTF-16LE -t UTF-8"),
        ("hi".encode("utf-16-be"), r"contains a NUL.* at byte 0 .*iconv -f UTF-16BE -t UTF-8"),
        ("한글 hi".encode("utf-16-le"), r"not UTF-8 text.*iconv -f UTF-16LE -t UTF-8"),
        (b"\xef\xbb\xbfab\xff", r"at byte 5 \(0xFF\)"),
        (b"ab\xec\x9a", r"at byte 2 \(0xEC\)"),
    ],
)
def test_other_encodings_are_named(data, message):
    with pytest.raises(RequestError, match=message):
        decode(data, "x")


def test_files_and_standard_input(tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(file) == "one\ntwo"
    with pytest.raises(RequestError, match=r"nothing cannot be read: No such file"):
        read_text(tmp_path / "nothing")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xef\xbb\xbfthree")))
    assert read_text(STANDARD_INPUT) == "three"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"caf\xe9")))
    with pytest.raises(RequestError, match="standard input is not UTF-8 text, at byte 3"):
        read_text(Path("-"))


@pytest.mark.parametrize("changed", [[0], [50], [99], [2, 6, 40, 97]])
@pytest.mark.parametrize("new", [[], ["new"], ["one", "two"]])
def test_a_diff_of_long_texts_is_the_one_of_the_whole_texts(changed, new):
    old = [f"line {number}" for number in range(100)]
    after = [
        item for number, line in enumerate(old) for item in (new if number in changed else [line])
    ]
    whole = difflib.unified_diff(old, after, "old", "new", lineterm="")
    assert list(unified_diff("\n".join(old), "\n".join(after), "old", "new")) == list(whole)
