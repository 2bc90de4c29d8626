"""`hanok check`: exit codes, the page, JSON and --fix."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import hanok
from hanok.cli.main import cli


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["check", *args], catch_exceptions=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(hanok.BUNDLED, tmp_path / "model"))


def test_a_sound_folder(model: Path) -> None:
    result = run(str(model))
    assert result.exit_code == 0
    assert "llama, 4,459,264 parameters, tied head" in result.stdout
    assert result.stdout.endswith("Sound: 0 errors, 0 warnings, 0 notes.\n")
    assert result.stderr == ""


def test_errors_fail_and_warnings_only_if_asked(model: Path) -> None:
    settings = model / "generation_config.json"
    settings.write_text('{"eos_token_id": 1, "temperature": 0.5}')
    assert run(str(model)).exit_code == 0
    strict = run(str(model), "--strict")
    assert strict.exit_code == 1
    assert "warning  generation_config.json: do_sample is not set" in strict.stdout
    assert "generation-config: write do_sample: true" in strict.stdout
    settings.write_text("{")
    result = run(str(model))
    assert result.exit_code == 1
    assert "Not sound: 1 error, 0 warnings, 0 notes." in result.stdout


def test_json_is_the_report(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": 5000}')
    result = run(str(model), "--json", "--no-values")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [(item["level"], item["kind"]) for item in found["findings"]] == [
        ("error", "id-beyond-rows")
    ]
    assert found["skipped"][-1] == {"check": "values of weights", "reason": "as asked for"}
    assert found["facts"]["model"].startswith("llama")


def test_fix_shows_what_it_did_and_checks_again(model: Path) -> None:
    settings = model / "generation_config.json"
    settings.write_text('{"eos_token_id": 3}')
    (model / ".x.json.0123abcd.partial").write_text("x")
    fixed = run(str(model), "--fix", "--strict")
    assert fixed.exit_code == 0
    assert json.loads(settings.read_text()) == {"eos_token_id": [3, 1]}
    assert "--- a/generation_config.json" in fixed.stdout
    assert "removed .x.json.0123abcd.partial" in fixed.stdout
    assert not (model / ".x.json.0123abcd.partial").exists()
    again = run(str(model), "--fix")
    assert "Nothing to mend." in again.stderr
