"""`hanok push` against a hub on this machine: what is visible when, what is sent, what is refused."""

import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from hypothesis import given
from hypothesis import strategies as st
from tests.hub.fake_hub import TOKEN, FakeHub, Fault, account

from hanok.errors import CheckpointError, HubError, OptionError
from hanok.hub import upload
from hanok.hub.client import Patience
from hanok.hub.options import PushOptions
from hanok.hub.push import Push, PushReport, push
from hanok.hub.screening import POINTER

PART_BYTES = 1000
LARGE = "model-00001-of-00002.safetensors"
Pusher = Callable[..., PushReport]


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def pushed(
    hub: FakeHub, folder: Path, tmp_path: Path, patience: Patience, lines: list[str]
) -> Pusher:
    """Pushes the folder to me/model with some options."""

    def call(path: Path = folder, repo: str = "me/model", **options: object) -> PushReport:
        return push(
            path,
            repo,
            PushOptions(**options),  # type: ignore[arg-type]
            state_folder=tmp_path / "state",
            patience=patience,
            log=lines.append,
        )

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_push_is_one_commit_that_the_hubs_own_client_reads(
    hub: FakeHub, folder: Path, pushed: Pusher, tmp_path: Path
) -> None:
    report = pushed(message="First")
    assert hub.files("me/model") == contents(folder)
    assert hub.num_commits("me/model") == 2  # the hub's own first one, and ours
    commit = hub.repos["me/model"].commit_of("main")
    assert commit is not None
    assert (commit.sha, commit.parent, commit.message) == (report.commit, report.parent, "First")
    assert report.is_new_commit
    assert report.sent_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    # Both kinds of transfer were asked for a check where the hub wants one.
    assert len(hub.verified) == 2

    api = HfApi(endpoint=hub.url, token=TOKEN)
    assert set(api.list_repo_files("me/model")) == {*contents(folder), ".gitattributes"}
    copy = snapshot_download("me/model", endpoint=hub.url, cache_dir=tmp_path / "hf", token=TOKEN)
    assert contents(Path(copy)).items() >= contents(folder).items()
    one = hf_hub_download(
        "me/model", LARGE, endpoint=hub.url, cache_dir=tmp_path / "hf2", revision=report.commit
    )
    assert Path(one).read_bytes() == (folder / LARGE).read_bytes()


def test_a_second_push_makes_no_commit_and_a_change_sends_itself_alone(
    hub: FakeHub, folder: Path, pushed: Pusher
) -> None:
    first = pushed()
    again = pushed()
    assert (again.is_new_commit, again.sent_bytes, again.commit) == (False, 0, first.commit)
    assert hub.num_commits("me/model") == 2
    (folder / "config.json").write_text("{}")
    changed = pushed()
    assert changed.changed == ("config.json",)
    assert changed.sent_bytes == 0
    assert hub.files("me/model") == contents(folder)


def test_a_blob_that_another_repository_has_is_not_sent(hub: FakeHub, pushed: Pusher) -> None:
    pushed()
    before = sum(hub.received.values())
    report = pushed(repo="team/other")
    assert report.sent_bytes == 0
    assert sum(hub.received.values()) == before
    assert hub.files("team/other") == hub.files("me/model")


def test_equal_files_are_sent_once(
    hub: FakeHub, folder: Path, pushed: Pusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one call asks the hub about both."""
    monkeypatch.setattr(
        upload, "_ready", lambda waiting: ((file, future.result()) for file, future in waiting)
    )
    (folder / "copy.safetensors").write_bytes((folder / LARGE).read_bytes())
    pushed()
    sizes = {path.read_bytes(): path.stat().st_size for path in folder.glob("*.safetensors")}
    assert sum(hub.received.values()) == sum(sizes.values())
    assert hub.files("me/model")["copy.safetensors"] == (folder / LARGE).read_bytes()


def _oid(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


PROGRAM = """
import sys
from pathlib import Path
from huggingface_hub import constants
from hanok.hub.push import push
from hanok.hub.options import PushOptions
url, token, folder, state = sys.argv[1:]
options = PushOptions(endpoint=url)
print(push(folder, "me/model", options, token=token, state_folder=Path(state)).commit)
"""


def start(hub: FakeHub, folder: Path, state: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM, hub.url, TOKEN, str(folder), str(state)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("method", "path", "skip", "after_bytes"),
    [
        ("PUT", r"/part/", 0, 400),  # within the first part
        ("PUT", r"/part/", 3, 999),  # within another one
        ("PUT", r"/part/", 2, 0),  # after a part, before its receipt
        ("POST", r"complete_multipart", 0, 0),  # the whole blob is there, its receipt is not
    ],
)
def test_a_killed_push_sends_at_most_one_part_again(
    hub: FakeHub, folder: Path, tmp_path: Path, method: str, path: str, skip: int, after_bytes: int
) -> None:
    """kill -9 at a moment that the hub decides; the bytes that it received are counted."""
    fault = hub.add_fault(
        Fault(
            method=method,
            path=path,
            kind="stall" if after_bytes else "hold",
            skip=skip,
            after_bytes=after_bytes,
        )
    )
    with start(hub, folder, tmp_path / "state") as first:
        assert fault.reached.wait(60)
        first.send_signal(signal.SIGKILL)
        first.communicate()
    fault.release.set()
    assert hub.files("me/model") == {}  # the repository was made, nothing of the push is in it
    with start(hub, folder, tmp_path / "state") as second:
        _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert hub.files("me/model") == contents(folder)
    size = (folder / LARGE).stat().st_size
    assert size <= hub.received[_oid(folder / LARGE)] <= size + PART_BYTES
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert sum(hub.received.values()) <= total + PART_BYTES
    assert hub.num_commits("me/model") == 2


def test_an_upload_that_the_hub_forgot_begins_anew_and_says_so(
    hub: FakeHub, folder: Path, pushed: Pusher, lines: list[str]
) -> None:
    hub.add_fault(Fault(method="PUT", path="/part/4", kind="status", status=400))
    with pytest.raises(HubError, match="HTTP 400"):
        pushed()
    assert hub.received[_oid(folder / LARGE)] == 3 * PART_BYTES
    hub.uploads.clear()
    pushed()
    assert any("no longer accepts the upload" in line for line in lines)
    assert hub.files("me/model") == contents(folder)


def test_parts_may_be_sent_side_by_side(hub: FakeHub, folder: Path, pushed: Pusher) -> None:
    pushed(connections=3)
    assert hub.files("me/model") == contents(folder)
    assert hub.received[_oid(folder / LARGE)] == (folder / LARGE).stat().st_size


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_passing_failures_are_waited_for(
    hub: FakeHub, folder: Path, pushed: Pusher, waits: list[float], status: int
) -> None:
    for method, path in (("GET", "whoami"), ("POST", "batch"), ("PUT", "part/2")):
        hub.add_fault(
            Fault(
                method=method,
                path=path,
                kind="status",
                status=status,
                headers={"Retry-After": "7"} if status == 429 else {},
                times=2,
            )
        )
    pushed()
    assert hub.files("me/model") == contents(folder)
    assert waits == ([7.0] * 6 if status == 429 else [1.0, 2.0] * 3)


@pytest.mark.parametrize("kind", ["reset", "lost"])
def test_resets_are_tried_again(hub: FakeHub, folder: Path, pushed: Pusher, kind: str) -> None:
    for method, path in (
        ("GET", "revision"),
        ("POST", "create"),
        ("POST", "preupload"),
        ("PUT", "part/3"),
        ("PUT", "whole"),
        ("POST", "complete"),
    ):
        hub.add_fault(Fault(method=method, path=path, kind=kind))  # type: ignore[arg-type]
    pushed()
    assert hub.files("me/model") == contents(folder)
    assert hub.num_commits("me/model") == 2


@pytest.mark.parametrize("creates_pr", [False, True])
@pytest.mark.parametrize(
    "faults",
    [
        [Fault(method="POST", path="/commit/", kind="lost")],
        [Fault(method="POST", path="/commit/", kind="reset")],
        [Fault(method="POST", path="/commit/", kind="status", status=504)],
        [Fault(method="POST", path="/commit/", kind="status", status=500, times=2)],
    ],
    ids=["made and lost", "not made", "504", "500 twice"],
)
def test_a_commit_whose_answer_is_lost_is_made_once(
    hub: FakeHub, folder: Path, pushed: Pusher, faults: list[Fault], creates_pr: bool
) -> None:
    hub.make("me/model")
    for fault in faults:
        hub.add_fault(replace(fault))
    report = pushed(create_pr=creates_pr)
    assert hub.num_commits("me/model") == 2
    ref = "refs/pr/1" if creates_pr else "main"
    assert hub.files("me/model", ref) == contents(folder)
    assert report.commit == hub.repos["me/model"].refs[ref]
    assert (report.pull_request == f"{hub.url}/me/model/discussions/1") is creates_pr


def test_nothing_is_visible_until_the_hub_makes_the_commit(
    hub: FakeHub, folder: Path, tmp_path: Path
) -> None:
    """At every question of a push, what a reader sees is nothing; at the end it is all."""
    seen = []
    original = hub.route

    def look(request: object) -> None:
        if "me/model" in hub.repos:
            seen.append(hub.files("me/model"))
        original(request)  # type: ignore[arg-type]

    hub.route = look  # type: ignore[method-assign]
    push(folder, "me/model", state_folder=tmp_path / "state")
    assert len(seen) > 10
    assert [item for item in seen if item not in ({}, contents(folder))] == []
    assert hub.files("me/model") == contents(folder)


def test_another_commit_in_between_is_not_overwritten(
    hub: FakeHub, folder: Path, tmp_path: Path, patience: Patience
) -> None:
    hub.make("me/model", {"config.json": b"theirs"})
    with Push("me/model", state_folder=tmp_path / "state", patience=patience) as running:
        running.add(folder / "config.json")
        theirs = hub.commit_files("me/model", {"other.json": b"{}"}, "theirs")
        with pytest.raises(HubError, match=r"another commit came first \(HTTP 412\).*push again"):
            running.finish()
    assert hub.repos["me/model"].refs["main"] == theirs.sha
    assert hub.files("me/model")["config.json"] == b"theirs"


MESSAGES = {
    ("GET", "whoami", 401): "does not accept your token (HTTP 401)",
    ("POST", "create", 402): "wants a payment first (HTTP 402)",
    ("POST", "create", 403): "your token may not do this on",
    ("POST", "preupload", 403): 'Writing needs a token of the role "write"',
    ("POST", "/commit/", 400): "finds a fault in the request (HTTP 400)",
    ("POST", "/commit/", 409): "is changing it at this moment (HTTP 409)",
    ("POST", "/commit/", 412): "another commit came first (HTTP 412)",
    ("POST", "/commit/", 413): "in shards of 5 GB",
    ("POST", "batch", 429): "Wait some minutes and run it again",
    ("POST", "batch", 500): "Nothing of yours is wrong",
    ("PUT", "whole", 403): "or this machine's clock is wrong",
    ("PUT", "part/1", 413): "too large for the storage",
    ("PUT", "part/1", 503): "the storage at",
}


@pytest.mark.parametrize(("method", "path", "status"), MESSAGES)
@pytest.mark.parametrize("reads_body", [True, False])
def test_each_status_says_what_happened_and_what_to_do(
    hub: FakeHub, pushed: Pusher, method: str, path: str, status: int, reads_body: bool
) -> None:
    hub.add_fault(
        Fault(
            method=method,
            path=path,
            kind="status",
            status=status,
            times=99,
            body=json.dumps({"error": f"because {TOKEN} says so"}),
            reads_body=reads_body,
        )
    )
    with pytest.raises(HubError) as caught:
        pushed()
    text = str(caught.value)
    assert MESSAGES[method, path, status] in text
    assert "It says: because … says so" in text
    assert TOKEN not in text
    assert "me/model" not in hub.repos or hub.files("me/model") == {}


def test_a_hub_that_does_not_answer_in_time_is_asked_again(
    hub: FakeHub, folder: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    fault = hub.add_fault(Fault(method="PUT", path="part/2", kind="hold"))
    patience = Patience(sleep=lambda seconds: None, timeout_s=0.3)
    push(folder, "me/model", state_folder=tmp_path / "state", patience=patience, log=lines.append)
    assert fault.reached.is_set()
    assert any("no answer in time; trying again in 1 s (2 of 6)" in line for line in lines)
    assert hub.files("me/model") == contents(folder)


def test_what_is_noted_is_for_its_owner_alone(
    hub: FakeHub, folder: Path, pushed: Pusher, tmp_path: Path
) -> None:
    hub.add_fault(Fault(method="PUT", path="/part/4", kind="status", status=400))
    with pytest.raises(HubError):
        pushed()
    state = tmp_path / "state"
    assert state.stat().st_mode & 0o077 == 0
    notes = [path.read_text() for path in state.rglob("*.json")]
    assert any("signature" in note for note in notes)
    assert not any(TOKEN in note for note in notes)
    pushed()
    assert not list((state / "uploads").iterdir())  # a finished upload needs no note


def test_a_hub_that_asks_to_wait_for_long_is_not_waited_for(
    hub: FakeHub, pushed: Pusher, waits: list[float]
) -> None:
    hub.add_fault(
        Fault(
            method="GET",
            path="whoami",
            kind="status",
            status=429,
            headers={"Retry-After": "86400"},
        )
    )
    with pytest.raises(HubError, match="too many requests"):
        pushed()
    assert waits == []


def test_what_cannot_be_reached_says_so(folder: Path, hub: FakeHub, pushed: Pusher) -> None:
    hub.close()
    with pytest.raises(HubError, match=r"cannot be reached.*Check the network"):
        pushed()


def test_no_token(hub: FakeHub, pushed: Pusher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"there is no token.*hf auth login"):
        pushed()
    assert hub.requests == []


@pytest.mark.parametrize(
    ("who", "repo", "text"),
    [
        (account(role="read"), "me/model", 'the token has the role "read"'),
        (account(), "strangers/model", "me is not a member of strangers. Push to one of me, team"),
        (
            account(role="fineGrained", scoped=[]),
            "me/model",
            "the fine-grained token has no write access to me",
        ),
    ],
)
def test_an_account_that_may_not_write_is_refused_before_anything_is_sent(
    hub: FakeHub, pushed: Pusher, who: dict[str, object], repo: str, text: str
) -> None:
    hub.accounts[TOKEN] = who
    with pytest.raises(HubError) as caught:
        pushed(repo=repo)
    assert text in str(caught.value)
    assert [method for method, _, _ in hub.requests if method != "GET"] == []


def test_a_fine_grained_token_may_write_where_it_says(hub: FakeHub, pushed: Pusher) -> None:
    scope = {"entity": {"type": "org", "name": "team"}, "permissions": ["repo.write"]}
    hub.accounts[TOKEN] = account(role="fineGrained", scoped=[scope])
    assert pushed(repo="team/model").is_new_commit


def test_a_name_alone_is_a_repository_of_ones_own(hub: FakeHub, pushed: Pusher) -> None:
    assert pushed(repo="model").repo == "me/model"
    with pytest.raises(OptionError, match="names no repository"):
        pushed(repo="me/model/more")


def test_a_dry_run_changes_nothing_and_says_what_it_would_do(
    hub: FakeHub, folder: Path, pushed: Pusher, lines: list[str]
) -> None:
    report = pushed(dry_run=True, private=True)
    assert hub.repos == {}
    assert {method for method, _, _ in hub.requests} == {"GET"}
    text = "\n".join(lines)
    assert "you      me, with a token of the role write" in text
    assert "me/model, main" in text
    assert "(to be created, private)" in text
    assert f"the largest is {LARGE}, 5,120 bytes" in text
    assert TOKEN not in text
    assert (report.num_files, report.is_new_commit) == (5, False)


def test_the_card_is_read(hub: FakeHub, folder: Path, pushed: Pusher, lines: list[str]) -> None:
    card = folder / "README.md"
    card.write_text("---\nlicense: mit\nbase_model: org/base\n---\n# M\n")
    pushed(dry_run=True)
    assert "card     license mit, base_model org/base" in lines
    card.write_text("# No front matter\n")
    pushed(dry_run=True)
    assert any("warning  README.md: there is no front matter" in line for line in lines)
    card.write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(HubError, match=r"nothing was pushed to me/model:\n  - README\.md: "):
        pushed()
    card.unlink()
    pushed(dry_run=True)
    assert any("warning  there is no README.md" in line for line in lines)


def test_private_branch_and_pull_request(hub: FakeHub, folder: Path, pushed: Pusher) -> None:
    first = pushed(private=True)
    assert hub.repos["me/model"].private
    (folder / "config.json").write_text('{"a": 1}')
    branch = pushed(revision="int4")
    assert hub.repos["me/model"].refs["main"] == first.commit
    assert hub.repos["me/model"].refs["int4"] == branch.commit
    assert hub.files("me/model", "int4") == contents(folder)
    (folder / "config.json").write_text('{"a": 2}')
    proposed = pushed(create_pr=True)
    assert hub.repos["me/model"].refs["main"] == first.commit
    assert hub.files("me/model", "refs/pr/1") == contents(folder)
    assert proposed.pull_request is not None


def test_deletions_are_in_the_same_commit(hub: FakeHub, folder: Path, pushed: Pusher) -> None:
    old = {"old-1.safetensors": b"1", "old-2.safetensors": b"2", "keep.txt": b"", LARGE: b"x"}
    hub.make("me/model", old)
    report = pushed(delete=("*.safetensors",))
    assert report.deleted == ("old-1.safetensors", "old-2.safetensors")
    assert hub.files("me/model") == {**contents(folder), "keep.txt": b""}
    assert hub.num_commits("me/model") == 3
    with pytest.raises(OptionError, match="matches no file of me/model"):
        pushed(delete=("*.gguf",))


def test_patterns_and_what_is_never_pushed(
    hub: FakeHub, folder: Path, pushed: Pusher, lines: list[str]
) -> None:
    (folder / ".model.safetensors.0123abcd.partial").write_bytes(b"unfinished")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("")
    (folder / ".gitattributes").write_text("*.gguf filter=lfs\n")
    pushed(include=("*.json", ".git*", "sub/"), exclude=("sub/other*",))
    assert set(hub.files("me/model")) == {"config.json", "sub/notes.txt"}
    assert hub.content("me/model", ".gitattributes") == b"*.gguf filter=lfs\n"
    assert any(
        line.startswith("left out") and ".partial" in line and ".git/" in line for line in lines
    )
    with pytest.raises(OptionError, match="--include nothing: matches no file"):
        pushed(include=("nothing",))


SECRETS = {
    "a Hugging Face token": "token = hf_" + "aB1" * 12,
    "an AWS access key": "AKIA" + "ABCDEFGH12345678",
    "a private key": "-----BEGIN RSA PRIVATE KEY-----",
    "an OpenAI key": "key: sk-proj-" + "aB1-" * 12,
    "a GitHub token": "ghp_" + "aB1" * 12,
}


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_found_and_never_shown(
    hub: FakeHub, folder: Path, pushed: Pusher, kind: str
) -> None:
    secret = SECRETS[kind]
    (folder / "train.py").write_text(f"first\nsecond\n{secret}\n")
    with pytest.raises(HubError) as caught:
        pushed()
    text = str(caught.value)
    assert f"train.py: seems to hold {kind} in line 3" in text
    assert secret not in text
    assert hub.repos == {}
    assert pushed(allow_secrets=("train.py",)).is_new_commit


def test_pickles_and_pointers_are_refused(
    hub: FakeHub, folder: Path, tmp_path: Path, pushed: Pusher
) -> None:
    with zipfile.ZipFile(folder / "training_args.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    (folder / "old.pt").write_bytes(b"\x80\x02.")
    (folder / "not-a-pickle.bin").write_bytes(b"\0" * 20)
    with pytest.raises(HubError) as caught:
        pushed()
    text = str(caught.value)
    assert "training_args.bin: is a pickle" in text
    assert "old.pt: is a pickle" in text
    assert "not-a-pickle.bin" not in text
    assert pushed(allow_pickles=True).is_new_commit
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(HubError, match="is a git-lfs pointer"):
        pushed(path=pointer)


def test_a_file_that_changes_meanwhile_is_not_committed(
    hub: FakeHub, folder: Path, tmp_path: Path
) -> None:
    with Push("me/model", state_folder=tmp_path / "state") as running:
        running.add(folder / LARGE)
        (folder / LARGE).write_bytes(b"other weights")
        with pytest.raises(HubError, match="changed after it was uploaded, and nothing was"):
            running.finish()
    assert hub.files("me/model") == {}


def test_what_the_hub_ignores_is_left_out(hub: FakeHub, pushed: Pusher, lines: list[str]) -> None:
    hub.ignored.add("config.json")
    pushed()
    assert "config.json" not in hub.files("me/model")
    assert "left out because of .gitignore: config.json" in lines


def test_missing_folders_and_links(hub: FakeHub, folder: Path, pushed: Pusher) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        pushed(path=folder / "nothing")
    (folder / "weights").symlink_to(folder / "gone")
    with pytest.raises(CheckpointError, match=r"is a link to .*gone, which is missing"):
        pushed()
    assert hub.requests == []


def test_the_token_goes_to_the_hub_alone(hub: FakeHub, pushed: Pusher) -> None:
    pushed()
    with_token = [path for _, path, headers in hub.requests if "Authorization" in headers]
    assert not [path for path in with_token if path.startswith("/storage/")]
    assert hub.paths("PUT", "/storage/")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_commit_of_the_hubs_own_client_is_seen(
    hub: FakeHub, folder: Path, pushed: Pusher
) -> None:
    """Blobs that it uploaded are not sent again."""
    hub.make("me/model")
    HfApi(endpoint=hub.url, token=TOKEN).create_commit(
        "me/model",
        [CommitOperationAdd(path_in_repo=LARGE, path_or_fileobj=folder / LARGE)],
        commit_message="by huggingface_hub",
    )
    before = hub.received[_oid(folder / LARGE)]
    assert before == (folder / LARGE).stat().st_size
    report = pushed()
    assert LARGE not in report.changed
    assert hub.received[_oid(folder / LARGE)] == before


@given(
    files=st.dictionaries(
        st.text("ab", min_size=1, max_size=3).map(lambda name: f"{name}.safetensors"),
        st.binary(max_size=3500).filter(lambda data: not data.startswith(POINTER)),
        min_size=1,
        max_size=4,
    )
)
def test_any_folder_arrives_as_it_is(
    files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    found = FakeHub()
    try:
        options = PushOptions(endpoint=found.url, connections=2)
        push(
            folder,
            "me/model",
            options,
            token=TOKEN,
            state_folder=tmp_path_factory.mktemp("state"),
        )
        assert found.files("me/model") == files
        assert sum(found.received.values()) == sum(map(len, set(files.values())))
    finally:
        found.close()
