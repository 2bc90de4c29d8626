"""`hanok push` and `hanok pull` as a user runs them: what is printed, and how they end."""

from pathlib import Path

from click.testing import CliRunner
from tests.hub.conftest import folder, hub  # noqa: F401
from tests.hub.fake_hub import TOKEN, FakeHub

from hanok.cli.main import cli


def run(*words: str, cache: Path) -> str:
    found = CliRunner().invoke(cli, [*words, "--cache-folder", str(cache)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert TOKEN not in found.output
    return found.output


def test_what_is_printed(hub: FakeHub, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    dry = run("push", str(folder), "me/model", "--dry-run", cache=tmp_path)
    assert "It would push 5 files to me/model, main." in dry
    first = run("push", str(folder), "me/model", "--message", "First", cache=tmp_path)
    commit = hub.repos["me/model"].refs["main"]
    assert f"Pushed 5 files in one commit, {commit}, to me/model, main" in first
    assert f"{hub.url}/me/model/commit/{commit}" in first
    again = run("push", str(folder), "me/model", cache=tmp_path)
    assert f"Nothing to do: me/model, main has these 5 files (commit {commit})." in again
    (folder / "config.json").write_text("{}")
    proposed = run(
        "push", str(folder), "me/model", "--create-pr", "--delete", "*.txt", cache=tmp_path
    )
    assert f"pull request: {hub.url}/me/model/discussions/1" in proposed
    pulled = run("pull", "me/model", str(tmp_path / "copy"), cache=tmp_path / "hf")
    assert f"me/model at main is the commit {commit}" in pulled
    assert "6 files" in pulled
    assert "hashes are right" in pulled
    assert pulled.endswith(f"{tmp_path / 'copy'}\n")
