"""`hanok card`: what is written, what is only shown, and what is named."""

import re
import shlex
import shutil
from datetime import date
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard

import hanok
from hanok.cli.main import cli
from hanok.errors import OptionError


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["card", *args], catch_exceptions=False)


def copied(folder: Path) -> Path:
    target = folder / "model"
    shutil.copytree(hanok.BUNDLED, target)
    return target


def test_the_card_of_a_model(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    before = (folder / "README.md").read_bytes()
    options = ("--license", "apache-2.0", "--language", "en", "--dataset", "roneneldan/TinyStories")
    shown = run(str(folder), *options, "--dry-run")
    assert shown.exit_code == 0
    assert "+license: apache-2.0" in shown.stdout.splitlines()
    assert "Nothing written" in shown.stderr
    assert (folder / "README.md").read_bytes() == before
    wrote = run(str(folder), *options)
    assert wrote.stdout == shown.stdout
    assert "problem" not in wrote.stderr
    after = (folder / "README.md").read_bytes()
    assert before in after
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert data == {
        "license": "apache-2.0",
        "language": ["en"],
        "datasets": ["roneneldan/TinyStories"],
        "library_name": "transformers",
    }
    assert b"hanok generate ." in after
    again = run(str(folder), *options)
    assert (again.stdout, (folder / "README.md").read_bytes()) == ("", after)
    assert "says all of this already" in again.stderr


def test_what_the_card_says_about_running_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code runs in the folder, with transformers and with hanok."""
    folder = copied(tmp_path)
    run(str(folder))
    text = (folder / "README.md").read_text()
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(compile(code, "card", "exec"), {})
    assert "Hello!" in capsys.readouterr().out
    (commands,) = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    generate, serve = commands.splitlines()
    words = [*shlex.split(generate)[1:], "--max-new-tokens", "4"]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    assert serve == "hanok serve ."


def test_a_quality_report_becomes_a_table(tmp_path: Path) -> None:
    folder, file = copied(tmp_path), tmp_path / "report.json"
    options = ["--quant", "int8", "--max-tokens", "8", "--window", "8", "--json"]
    report = CliRunner().invoke(cli, ["quality", str(folder), *options], catch_exceptions=False)
    file.write_text(report.stdout)
    run(str(folder), "--quality", str(file))
    text = (folder / "README.md").read_text()
    assert f"Measured on {date.today().isoformat()}. checkpoint model, num tokens 8," in text
    assert re.search(r"^\| int8 \| [\d,]+ \|", text, re.MULTILINE)
    assert re.search(r"^Machine: hanok: .*; torch: .*; cpu: ", text, re.MULTILINE)


def test_problems_and_unknown_bases_are_named(tmp_path: Path) -> None:
    folder, base = copied(tmp_path), tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: gemma\n---\n")
    lacking = run(str(folder), "--dry-run")
    assert "problem: license is missing" in lacking.stderr
    away = run(str(folder), "--base-model", "org/away", "--dry-run")
    assert "note: the card of org/away is not on this disk" in away.stderr
    inherited = run(str(folder), "--base-folder", str(base), "--dry-run")
    assert "+license: gemma" in inherited.stdout
    other = run(str(folder), "--base-folder", str(base), "--license", "mit", "--dry-run")
    assert "+license: mit" in other.stdout
    assert "problem: the licence is mit, and the base model's card says gemma" in other.stderr


def test_a_path_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nowhere is not a folder"):
        run(str(tmp_path / "nowhere"))
