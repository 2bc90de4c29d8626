"""Pages that stay true: links, commands, figures, the tutorial, the API page and the release."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest

import hanok
from hanok.cli.main import cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), ROOT / "examples" / "README.md"],
    key=lambda path: str(path.relative_to(ROOT)),
)
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\w)")
# Too slow for each run of the suite; their arguments are still parsed.
SLOW = ("hanok bench", "hanok tune", "hanok serve", "curl", "hanok quality")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s:]+)\)", page.read_text())
    broken = [
        target for target in targets if not (page.parent / target.split("#")[0]).resolve().exists()
    ]
    assert broken == []


def test_the_index_lists_every_page() -> None:
    linked = set(re.findall(r"\]\(([^)\s:]+\.md)\)", (DOCS / "index.md").read_text()))
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"index.md"}
    assert pages <= linked


def test_the_version_has_its_notes() -> None:
    version = hanok.__version__.removesuffix(".dev0")
    notes = DOCS / "releases" / f"{version}.md"
    assert notes.is_file() or version != hanok.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog
    if version == hanok.__version__:
        assert re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.M)


def test_the_api_page_is_current() -> None:
    script = ROOT / "scripts" / "update_api.py"
    result = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_api_page_has_every_public_name() -> None:
    text = (DOCS / "api.md").read_text()
    missing = [
        name
        for name in hanok.__all__
        if not re.search(rf"^### {name}$|── {name} |^{name}$|hanok\.{name}", text, re.M)
    ]
    assert missing == ["__version__"]


def commands(text: str) -> Iterator[str]:
    """Yield what follows `$ ` in console blocks, and indented or fenced lines that call hanok."""
    for block in re.findall(r"^```(?:console|text|)\n(.*?)^```", text, re.S | re.M):
        for line in block.splitlines():
            if line.startswith(("$ ", "hanok ")):
                yield line.removeprefix("$ ")
    for line in re.findall(r"^    (hanok .*)$", text, re.M):
        yield line


def hanok_calls(text: str) -> Iterator[list[str]]:
    for line in commands(text.replace("\\\n", " ")):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        call: list[str] | None = None
        for word in lexer:
            if set(word) <= set("|&;"):
                if call is not None:
                    yield call
                call = None
            elif word == "hanok" and call is None:
                call = []
            elif call is not None:
                call.append(word)
        if call is not None:
            yield call


CALLS = [(name_of(page), call) for page in PAGES for call in hanok_calls(page.read_text())]


@pytest.mark.parametrize(
    ("page", "call"), CALLS, ids=[f"{page} {' '.join(call)}" for page, call in CALLS]
)
def test_every_command_on_a_page_parses(
    page: str, call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verb and options that exist, with values that their types take; nothing is run."""
    context = click.Context(cli, info_name="hanok")
    assert isinstance(cli, click.Group)
    name, command, words = cli.resolve_command(context, list(call))
    while isinstance(command, click.Group):
        if not words or words[0] not in command.list_commands(context):
            unnamed = command.get_command(context, "grid")  # of `hanok bench`
            command = unnamed or command
            break
        name, command, words = command.resolve_command(context, words)
    assert command is not None, name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.toml").touch()
    if "--profile" in words:  # it is read at once
        assert "--profile" in {option for item in command.params for option in item.opts}
        del words[(at := words.index("--profile")) : at + 2]
    with suppress(click.exceptions.Exit):  # --help
        command.make_context(name, list(words), parent=context)


def rounded_to(text: str, value: float) -> bool:
    """Return whether a number as a page writes it is this value, a share in per cent or a ratio."""
    written = text.replace(",", "")
    mantissa, _, exponent = written.partition("e")
    tolerance = 0.5001 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    candidates = [value, value * 100, 1 / value if value else 0.0]
    return any(abs(float(written) - candidate) <= tolerance for candidate in candidates)


def sections(text: str) -> dict[str, str]:
    return {part.split("\n")[0]: part for part in re.split(r"^## ", text, flags=re.M)[1:]}


MEASURED = {
    title: part
    for title, part in sections((ROOT / "README.md").read_text()).items()
    if "benchmarks/reports/" in part
}


@pytest.mark.parametrize("title", MEASURED)
def test_figures_of_the_readme_are_those_of_the_reports(title: str) -> None:
    """Every number of a table after such a link is in a report of the section, rounded as written."""
    part = MEASURED[title]
    reports = re.findall(r"\]\((benchmarks/reports/[^)]+)\)", part)
    texts = [(ROOT / report).read_text() for report in reports]
    texts += [
        (ROOT / report).with_suffix(".jsonl").read_text()
        for report in reports
        if (ROOT / report).with_suffix(".jsonl").exists()
    ]
    known = {float(number.replace(",", "")) for text in texts for number in NUMBER.findall(text)}
    tables = re.findall(r"((?:^[^\n|#].*\n)+)\n((?:^\|.*\n)+)", part, re.M)
    rows = [
        row
        for before, table in tables
        if "benchmarks/reports/" in before
        for row in table.splitlines()[2:]
    ]
    assert rows or not tables
    missing = [
        (number, row)
        for row in rows
        for cell in row.strip("|").split("|")[1:]
        for number in NUMBER.findall(cell)
        if not any(rounded_to(number, value) for value in known)
    ]
    assert missing == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with programs called `hanok` and `python`, as the tutorial calls them."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name, module in (("hanok", "-m hanok"), ("python", "")):
        program = folder / ".bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        program.chmod(0o755)
    return folder


def test_the_tutorial_runs(folder: Path) -> None:
    """Its commands in order, but for the slow ones; what they print is on the page where it must be."""
    pytest.importorskip("safetensors")
    assert shutil.which("bash") is not None
    text = (DOCS / "tutorial.md").read_text()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "HANOK_CACHE": str(folder / ".cache"),
        "PATH": f"{folder / '.bin'}{os.pathsep}{os.environ['PATH']}",
    }
    ran = 0
    for kind, block in re.findall(r"^```(console|python)\n(.*?)^```", text, re.S | re.M):
        if kind == "python":
            calls = [] if "openai" in block else [("python -W error -", block, "")]
        else:
            parts = re.split(r"^\$ ", block, flags=re.M)[1:]
            calls = [(part.split("\n")[0], "", part.partition("\n")[2]) for part in parts]
        for command, given, shown in calls:
            if command.startswith(SLOW) or "--profile" in command:
                continue
            result = subprocess.run(
                ["bash", "-c", command],
                input=given,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
            ran += 1
            if command.startswith(
                ("ls", "hanok convert", "hanok plan stories --context 512 --max")
            ):
                exact = [line for line in shown.splitlines() if line != "…" and "|" not in line]
                lines = [line.rstrip() for line in result.stdout.splitlines()]
                assert [line for line in exact if line not in lines] == []
    assert ran >= 10
