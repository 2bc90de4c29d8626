"""`hanok bench`, `bench compare` and `tune` on the command line, and what a profile does elsewhere."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hanok.bench.grid import GridRow, Skipped
from hanok.bench.report import Report, read_report
from hanok.bench.settings import Setting, Workload
from hanok.cli import bench_options
from hanok.cli.bench_table import HEADER, cells, markdown_of, notes, print_report, ratio, title
from hanok.cli.main import cli

GRID = """
attention = ["eager", "native"]
prompt_tokens = 16
new_tokens = 6
"""


def run(*args: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(args), input=text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one run has written all of its files."""
    found = tmp_path_factory.mktemp("bench")
    files = [f"--{kind}={found / kind}" for kind in ("json", "markdown", "html")]
    options = ["--rounds", "2", "--quality-tokens", "100", "--threads", "1", "--grid", "-", *files]
    result = run("bench", *options, text=GRID)
    assert result.exit_code == 0, result.output
    (found / "stdout").write_text(result.stdout)
    return found


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return read_report(folder / "json")


def test_the_table_is_printed_and_written(folder: Path, report: Report) -> None:
    shown = (folder / "stdout").read_text()
    written = (folder / "markdown").read_text()
    assert [row.label for row in report.rows] == ["eager", "native"]
    for row in report.rows:
        for cell in cells(row):
            assert cell in shown
        assert f"| {' | '.join(cells(row))} |" in written
    assert f"| {' | '.join(HEADER)} |" in written
    assert written == markdown_of(report)
    assert "medians of 2 rounds" in shown
    assert "Loading, apart from the rows: bfloat16: " in shown
    page = (folder / "html").read_text()
    assert json.dumps(report.command) in page


def test_the_grid_needs_no_name_and_commands_have_theirs() -> None:
    shown = run("bench", "--help").stdout
    assert "--grid" in shown
    assert "\n  compare " in shown
    result = run("bench", "nowhere/model")
    assert result.exit_code != 0
    assert "nowhere/model: no such file or folder" in str(result.exception)


@pytest.mark.parametrize(
    ("args", "text", "message"),
    [
        (["--grid", "-"], "atention = 'sdpa'", "there is no axis 'atention'"),
        (["--grid", "-"], "attention = 'sdpaa'", "attention 'sdpaa' is unknown"),
        (["--reference", "sdpa"], None, "'sdpa' is not AXIS=VALUE"),
        (["--json", "nowhere/report.json"], None, "there is no folder nowhere"),
        (["--text", "nowhere"], None, "nowhere cannot be read"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    args: list[str], text: str | None, message: str
) -> None:
    result = run("bench", *args, text=text)
    assert result.exit_code != 0
    assert message in str(result.exception)


def test_compare_prints_changes_alone(folder: Path, tmp_path: Path) -> None:
    same = run("bench", "compare", str(folder / "json"), str(folder / "json"))
    assert same.exit_code == 0, same.output
    assert "0 of 2 rows changed" in same.stdout
    assert "ran 1 to 1 times as fast" in same.stdout
    for name, took in (("before", 8.0), ("after", 4.0)):
        values = json.loads((folder / "json").read_text())
        for sample in values["rows"][1]["samples"]:
            sample["seconds"] = took
        (tmp_path / name).write_text(json.dumps(values))
    changed = run("bench", "compare", str(tmp_path / "before"), str(tmp_path / "after"))
    assert "1 of 2 rows changed" in changed.stdout
    assert "faster" in changed.stdout


def test_ratios_in_words(report: Report) -> None:
    row = report.rows[1]
    assert cells(replace(row, is_reference=True))[6] == "1"
    known = replace(row.ratio, value=2.0, low=1.5, high=2.5)
    assert ratio(known) == "2 (1.5–2.5)"
    assert ratio(replace(known, low=0.9)) == "same (0.9–2.5)"
    assert ratio(replace(known, high=None)) == "not known"


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile that asks for int8."""
    file = tmp_path_factory.mktemp("tune") / "profile.json"
    grid = 'quant = "int4"\nprompt_tokens = 16\nnew_tokens = 4\n'
    bounds = ("--max-kl", "0.001", "--min-same-top1", "0.9", "--max-memory", "4GiB")
    options = ("--rounds", "2", "--quality-tokens", "300", "--threads", "1", "--grid", "-")
    result = run("tune", *options, *bounds, "--output", str(file), text=grid)
    assert result.exit_code == 0, result.output
    assert "KL divergence" in result.stdout
    assert "Chosen: native" in result.stdout
    values = json.loads(file.read_text())
    assert [item["reason"][:13] for item in values["excluded"] if "int4" in item["label"]] == [
        "KL divergence"
    ]
    values["options"]["quant"] = "int8"
    file.write_text(json.dumps(values))
    return file


def loaded_with(monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[dict[str, Any], Result]:
    """Return what `hanok generate` plans a load with, and loads with."""
    from hanok.engine import model
    from hanok.memory import planning

    seen: dict[str, Any] = {}
    original, loading = planning.plan_load, model.load

    def plan_load(*given: Any, **options: Any) -> Any:
        seen.update(options)
        return original(*given, **options)

    def load(**options: Any) -> Any:
        seen.update(graphs=options["graphs"])
        return loading(**options)

    monkeypatch.setattr(planning, "plan_load", plan_load)
    monkeypatch.setattr(model, "load", load)
    return seen, run("generate", "Once", "--max-new-tokens", "2", *args)


def test_a_profile_gives_the_options_that_are_not_given(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, result = loaded_with(monkeypatch, "--profile", str(profile))
    assert result.exit_code == 0, result.output
    assert (seen["quant"], seen["dtype"]) == ("int8", "bfloat16")
    assert "another machine" not in result.stderr
    assert seen["graphs"] is True
    values = json.loads(profile.read_text())
    values["options"]["graphs"] = "false"
    (tmp_path / "plain").write_text(json.dumps(values))
    seen, result = loaded_with(monkeypatch, "--profile", str(tmp_path / "plain"))
    assert (result.exit_code, seen["graphs"]) == (0, False)
    for order in (("--profile", str(profile), "--quant", "int4"), ("--quant", "int4")):
        rest = ("--profile", str(profile)) if order[0] != "--profile" else ()
        seen, result = loaded_with(monkeypatch, *order, *rest)
        assert seen["quant"] == "int4"


def test_a_profile_of_another_checkpoint_or_machine_is_told(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = json.loads(profile.read_text())
    values["machine"]["cpu"] = "Some CPU"
    (tmp_path / "machine").write_text(json.dumps(values))
    _, result = loaded_with(monkeypatch, "--profile", str(tmp_path / "machine"))
    assert result.exit_code == 0
    assert "made on another machine: cpu was 'Some CPU'" in result.stderr
    values["checkpoint"]["fingerprint"] = "0" * 32
    (tmp_path / "checkpoint").write_text(json.dumps(values))
    _, result = loaded_with(monkeypatch, "--profile", str(tmp_path / "checkpoint"))
    assert "made for another checkpoint" in str(result.exception)
    values["options"]["colour"] = "red"
    (tmp_path / "option").write_text(json.dumps(values))
    _, result = loaded_with(monkeypatch, "--profile", str(tmp_path / "option"))
    assert "asks for colour, which `hanok generate` has no option for" in str(result.exception)


def test_every_verb_that_generates_takes_a_profile() -> None:
    for verb in ("generate", "chat", "serve"):
        assert "--profile" in run(verb, "--help").stdout


def test_a_narrow_terminal_gets_two_tables(
    report: Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    monkeypatch.setattr(Console, "is_terminal", True)
    for width, tables in ((300, 1), (130, 2)):
        monkeypatch.setenv("COLUMNS", str(width))
        print_report(report)
        shown = capsys.readouterr().out
        assert ("Text and quality" in shown) == (tables == 2)
        assert len([line for line in shown.splitlines() if "native " in line]) >= tables
        for row in report.rows:
            assert all(cell in shown for cell in cells(row))


def test_guessed_tokens_are_told(report: Report) -> None:
    row = replace(report.rows[0], proposed=20, accepted=15)
    found = notes(replace(report, rows=(row, *report.rows[1:])), is_verbose=False)
    assert "eager at 16 + 6 tokens: 15 of 20 guessed tokens were right." in found
    assert "guessed" not in "".join(notes(report, is_verbose=False))


REASONS = {
    "triton": "needs a CUDA device (found: cpu)",
    "sdpa_efficient": "needs a CUDA device (found: cpu)",
    "sdpa": "no time for it within --budget (an answer takes about 3.2 s)",
    "eager": "no time for it within --budget (an answer takes about 5 s and its load 9 s)",
    "sdpa_math": "no time for it within --budget (had not answered after 9 s)",
    "native": "does not fit: cpu lacks 3.00 GiB",
}


def test_what_is_left_out_is_counted_in_a_line_and_listed_when_asked_for(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = Workload(prompt_tokens=128, new_tokens=32, batch=1)
    skipped = tuple(
        Skipped(
            row=GridRow(setting=Setting(attention=name, dtype="bfloat16"), workload=workload),
            reason=reason,
        )
        for name, reason in REASONS.items()
    )
    lacking = replace(report, skipped=skipped)
    line = (
        "6 rows left out: no time for it within --budget (3); needs a CUDA device (2); "
        "does not fit (1). -v lists them."
    )
    print_report(lacking)
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == line
    assert "found: cpu" not in shown
    print_report(lacking, is_verbose=True)
    shown = capsys.readouterr().out
    assert line not in shown
    for reason in REASONS.values():
        assert f"Left out, {reason}: " in shown
    assert "needs a CUDA device (found: cpu): triton at 128 + 32 tokens; sdpa_eff" in shown
    # A file has all of it: nobody can ask it for more.
    assert "(had not answered after 9 s): sdpa_math at" in markdown_of(lacking)
    one = notes(replace(report, skipped=skipped[:1]), is_verbose=False)[-1]
    assert one == "1 row left out: needs a CUDA device (1). -v lists them."
    none = notes(replace(report, skipped=()), is_verbose=False)
    assert not any("left out" in note for note in none)


def test_one_round_has_no_medians(report: Report) -> None:
    assert title(replace(report, rounds=1)).endswith("GFLOP/s; one round")
    assert title(report).endswith("GFLOP/s; medians of 2 rounds")


@pytest.mark.parametrize(
    ("args", "budget_s", "may_shrink", "has_core"),
    [
        (("bench",), 90.0, True, True),
        (("bench", "--budget", "45"), 45.0, True, True),
        (("bench", "--grid", "-"), None, False, False),
        (("bench", "--grid", "-", "--budget", "45"), 45.0, False, False),
        (("tune",), 90.0, True, False),
    ],
)
def test_only_the_short_grid_may_have_fewer_tokens(
    args: tuple[str, ...],
    budget_s: float | None,
    may_shrink: bool,
    has_core: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hanok.bench import measure

    seen: list[measure.BenchOptions] = []

    def run_bench(options: measure.BenchOptions, progress: object) -> Report:
        seen.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "run_bench", run_bench)
    monkeypatch.setattr(bench_options.time, "perf_counter", lambda: 7.0)
    run(*args, text=GRID)
    (options,) = seen
    assert (options.budget_s, options.may_shrink, options.began) == (budget_s, may_shrink, 7.0)
    assert bool(options.core) == has_core
    if has_core:
        wanted = {item for axes in options.axes for item in axes.combinations()}
        assert {item for axes in options.core for item in axes.combinations()} <= wanted
