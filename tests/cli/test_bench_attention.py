"""`hanok bench attention`: tables, files and objects, and what is refused before it measures."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hanok.bench import attention
from hanok.cli.main import cli

SHAPE = ("--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--rounds", "1", "--ring-mib", "0")


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "read_gb_per_s", lambda device: 20.0)
    monkeypatch.setattr(attention, "gflop_per_s", lambda device, dtype: 300.0)


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["bench", "attention", *SHAPE, *args])


def test_backends_become_a_table_a_file_and_an_object(tmp_path: Path) -> None:
    file = tmp_path / "table.md"
    lengths = ("--queries", "1,40", "--keys", "32,64")
    shown = run(*lengths, "--window", "8", "--markdown", str(file))
    assert shown.exit_code == 0, shown.output
    for text in (shown.stdout, file.read_text()):
        assert "4 heads, 2 KV heads, 16 wide, bfloat16, window 8" in text
        assert "reads 20.0 GB/s and multiplies at 300 GFLOP/s" in text
        for part in (
            "1 query over 32 keys",
            "40 queries over 64 keys",
            "sdpa_math",
            "relative error",
        ):
            assert part in text
        assert "not triton: needs a CUDA device (found: cpu)" in text
        assert "left out: 40 queries over 32 keys" in text
    assert "left out: 40 queries over 32 keys" in shown.stderr
    assert "measuring 1 query over 64 keys" in shown.stderr
    found = json.loads(run(*lengths, "--json").stdout)
    cases = [(item["case"]["queries"], item["case"]["keys"]) for item in found["results"]]
    assert cases == [(1, 32), (1, 64), (40, 64)]
    assert found["left_out"][0].startswith("40 queries over 32 keys")
    assert found["results"][0]["measured"]["eager"]["ratio"]["median"] == 1.0


def test_multiples_become_a_table_and_an_object(tmp_path: Path) -> None:
    file = tmp_path / "table.md"
    options = ("--queries", "1", "--keys", "16", "--dtype", "float32", "--multiples", "64")
    shown = run(*options, "--markdown", str(file))
    assert shown.exit_code == 0, shown.output
    for text in (shown.stdout, file.read_text()):
        assert "linear, 1 token: next to 64, other multiples of 8" in " ".join(text.split())
        assert "head_dim, sdpa, 1 query over 16 keys" in text
    found = json.loads(run(*options, "--json").stdout)
    assert [row["size"] for row in found["groups"][0]["rows"]] == [56, 63, 64, 65, 72, 128]


def test_what_there_is_no_time_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = ("--queries", "1", "--keys", "16,32")
    assert "had time" not in run(*lengths, "--rounds", "2", "--budget", "1000").stdout
    monkeypatch.setattr(attention, "take_turns", lambda timers, *_: {n: [1.0] for n in timers})
    shown = run(*lengths, "--rounds", "3", "--budget", "60").stdout
    assert shown.count("1 of 3 rounds had time (--budget)") == 2
    monkeypatch.setattr(attention, "fitting", lambda calls_s, left_s: set())
    shown = run(*lengths, "--budget", "60").stdout
    assert "1 query over 16 keys" in shown
    assert "not native: no time for it within --budget (a call would take about" in shown
    assert "times as fast" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--markdown", "nowhere/table.md"), "there is no folder"),
        (("--kv-heads", "3"), "4 heads cannot share 3 KV heads"),
        (("--queries", "5", "--keys", "4"), "nothing to measure"),
        (("--device", "cuda:99"), "--device 'cuda:99' cannot be used"),
        (("--device", "abacus"), "--device 'abacus' cannot be used"),
        (("--rounds", "0"), "rounds is 0"),
        (("--multiples", "100"), "must be a multiple of 64"),
    ],
)
def test_what_cannot_be_measured_is_said(options: tuple[str, ...], message: str) -> None:
    assert message in str(run(*options).exception)


@pytest.mark.parametrize("value", ["1,x", "", "0,4", "-1"])
def test_lists_that_are_none_are_refused(value: str) -> None:
    result = run("--queries", value)
    assert result.exit_code == 2
    assert "--queries" in result.stderr
