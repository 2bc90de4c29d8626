"""`hanok train preview`: what is shown, what is refused, and that no model is loaded."""

import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

import hanok
from hanok.cli.main import cli
from hanok.errors import DataError


def preview(*args: str | Path) -> Result:
    words = ["train", "preview", *map(str, args), "--model", str(hanok.BUNDLED)]
    return CliRunner().invoke(cli, words)


def write_rows(file: Path, count: int) -> Path:
    rows = [{"instruction": f"Say {i}.", "output": "word " * (1 + i)} for i in range(count)]
    file.write_text(json.dumps(rows, indent=1))
    return file


def test_preview_shows_what_is_learnt(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.json", 30)
    result = preview(file, "--rows", 1, "--cache-folder", tmp_path, "--pack-tokens", 128)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{file}: alpaca, 30 rows, 0 of them bad; 30 documents, ")
    assert "  answers found: 30 by prefix" in lines
    assert any(line.endswith("% full.") and " packs of at most 128" in line for line in lines)
    assert result.stdout.endswith(
        f"Document 0, {file}:2: 16 tokens, 5 learnt\n"
        "<s><|user|>\nSay 0.\n<|assistant|>\n«word \n</s>»\n"
    )
    counts = [int(line.split()[-1]) for line in lines if "█" in line]
    assert sum(counts) == 30


def test_preview_refuses_at_the_end_with_the_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "", "completion": "All of it."}) + "\n")
    result = preview(file, "--cache-folder", tmp_path)
    assert isinstance(result.exception, DataError)
    assert "«All of it.</s>»" in result.stdout
    assert "none-masked: all of it would be learnt" in str(result.exception)
    assert preview(file, "--cache-folder", tmp_path, "--allow", "none-masked").exit_code == 0


def test_bad_rows_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = json.dumps({"text": "Once upon a time."})
    file.write_text(f"{row}\n{{\n{row}\n")
    result = preview(file, "--cache-folder", tmp_path, "--max-bad-rows", "0.5")
    assert result.exit_code == 0, result.output
    assert "3 rows, 1 of them bad" in result.stdout
    assert "  line 2: not valid JSON" in result.stdout


def test_nothing_of_it_imports_torch(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.json", 3)
    words = ["train", "preview", str(file), "--model", str(hanok.BUNDLED)]
    words += ["--cache-folder", str(tmp_path)]
    code = (
        f"import sys; from hanok.cli.main import cli\ncli.main({words}, standalone_mode=False)\n"
        "print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_a_terminal_shows_colours_and_nothing_that_the_data_would_do_to_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "Hi\x1b[2J", "output": "Hello"}) + "\n")
    words = ["train", "preview", str(file), "--model", str(hanok.BUNDLED)]
    words += ["--cache-folder", str(tmp_path)]
    colours = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": None}
    result = CliRunner().invoke(cli, words, env=colours)
    assert result.exit_code == 0, result.output
    assert "\x1b[1;32mHello" in result.stdout
    assert "«" not in result.stdout
    assert "\x1b[2J" not in result.stdout
    assert "Hi\\x1b[2J" in result.stdout
