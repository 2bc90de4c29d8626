"""`hanok pull` against a hub on this machine: what arrives, what is kept, and what is refused."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from tests.hub.fake_hub import TOKEN, FakeHub, Fault, Stored

from hanok.errors import HubError, OptionError
from hanok.hub.client import Patience
from hanok.hub.local import RECORD, list_folder
from hanok.hub.options import PullOptions
from hanok.hub.pull import PullReport, pull

WEIGHTS = bytes(range(256)) * 16
FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "sub/model.safetensors": WEIGHTS,
    "sub/deep/notes.txt": b"text",
    "empty.txt": b"",
}
Puller = Callable[..., PullReport]


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def pulled(hub: FakeHub, patience: Patience, lines: list[str]) -> Puller:
    hub.make("org/model", FILES)

    def call(destination: Path | None = None, **options: object) -> PullReport:
        found = PullOptions(**options)  # type: ignore[arg-type]
        return pull("org/model", destination, found, patience=patience, log=lines.append)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".gitattributes", RECORD)
    }


def blobs(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "cache" / "models--org--model" / "blobs"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_pulled_is_what_transformers_finds(
    hub: FakeHub, pulled: Puller, tmp_path: Path, lines: list[str]
) -> None:
    report = pulled()
    assert contents(report.folder) == FILES
    commit = hub.repos["org/model"].refs["main"]
    assert report.commit == commit
    assert f"org/model at main is the commit {commit}" in lines
    before = len(hub.requests)
    offline = snapshot_download(
        "org/model", endpoint=hub.url, cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert Path(offline) == report.folder
    online = snapshot_download("org/model", endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert online == offline
    assert not [path for _, path, _ in hub.requests[before:] if "/resolve/" in path]
    # The same content is received and kept once.
    assert len(hub.paths("GET", "/storage/blob/")) == 1
    again = pulled()
    assert again.received_bytes == 0


def test_a_download_of_the_hubs_own_client_is_not_repeated(
    hub: FakeHub, pulled: Puller, tmp_path: Path
) -> None:
    snapshot_download("org/model", endpoint=hub.url, cache_dir=tmp_path / "cache")
    before = len(hub.paths("GET", "/resolve/"))
    assert pulled().received_bytes == 0
    assert len(hub.paths("GET", "/resolve/")) == before


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_commit_of_the_hubs_own_client_is_pulled(
    hub: FakeHub, pulled: Puller, tmp_path: Path
) -> None:
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content + b"new")
        for name, content in FILES.items()
    ]
    made = HfApi(endpoint=hub.url, token=TOKEN).create_commit(
        "org/model", operations, commit_message="by huggingface_hub"
    )
    report = pulled()
    assert report.commit == made.oid
    assert contents(report.folder) == {name: data + b"new" for name, data in FILES.items()}


def test_many_files_come_in_pages(hub: FakeHub, pulled: Puller) -> None:
    hub.page_files = 3
    assert contents(pulled().folder) == FILES


@pytest.mark.parametrize("kind", ["cut", "reset", "status"])
def test_an_interrupted_file_goes_on_where_it_was(
    hub: FakeHub, pulled: Puller, tmp_path: Path, kind: str
) -> None:
    hub.add_fault(
        Fault(
            method="GET",
            path="/storage/blob/",
            kind=kind,  # type: ignore[arg-type]
            after_bytes=1000,
            status=503,
            times=2,
        )
    )
    report = pulled()
    assert contents(report.folder) == FILES
    ranges = [
        headers.get("Range") for _, path, headers in hub.requests if path.startswith("/storage/")
    ]
    expected = [None, "bytes=1000-", "bytes=2000-"] if kind == "cut" else [None] * 3
    assert ranges == expected


def test_a_pull_that_ended_is_continued_by_the_next(
    hub: FakeHub, pulled: Puller, tmp_path: Path
) -> None:
    fault = Fault(method="GET", path="/storage/blob/", kind="cut", after_bytes=0, times=99)
    hub.add_fault(replace(fault, times=1, after_bytes=1500))
    hub.add_fault(fault)
    with pytest.raises(HubError, match=r"in a row\. What was received is kept; pull again"):
        pulled()
    found = blobs(tmp_path)
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    assert found[f"{oid}.incomplete"] == WEIGHTS[:1500]
    assert oid not in found
    assert not (tmp_path / "cache" / "models--org--model" / "snapshots").exists()
    hub.faults.clear()
    report = pulled()
    assert report.received_bytes == len(WEIGHTS) - 1500
    assert contents(report.folder) == FILES


def test_a_wrong_hash_is_removed_and_said(hub: FakeHub, pulled: Puller, tmp_path: Path) -> None:
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    hub.blobs[oid] = WEIGHTS[:-1] + b"?"
    with pytest.raises(HubError, match=rf"does not have the hash that the hub gives, {oid}"):
        pulled()
    assert not [name for name in blobs(tmp_path) if name.startswith(oid)]
    hub.blobs[oid] = WEIGHTS
    assert contents(pulled().folder) == FILES


def test_a_regular_file_is_checked_too(hub: FakeHub, pulled: Puller) -> None:
    commit = hub.repos["org/model"].commit_of("main")
    assert commit is not None
    stored = commit.files["config.json"]
    commit.files["config.json"] = Stored(size=2, blob=stored.blob, content=b"[]")
    with pytest.raises(HubError, match=r"config\.json: what the hub sends does not have the hash"):
        pulled()


def test_damaged_leftovers_are_received_again(
    hub: FakeHub, pulled: Puller, tmp_path: Path, lines: list[str]
) -> None:
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    folder = tmp_path / "cache" / "models--org--model" / "blobs"
    folder.mkdir(parents=True)
    (folder / f"{oid}.incomplete").write_bytes(b"something else")
    assert contents(pulled().folder) == FILES
    assert any("its hash is wrong; all of it is received again" in line for line in lines)
    (folder / oid).write_bytes(WEIGHTS[:-1] + b"?")
    assert pulled().received_bytes == 0  # of the right size, and not looked at
    assert pulled(verify=True).received_bytes == len(WEIGHTS)
    (folder / oid).write_bytes(WEIGHTS[:-1])
    assert pulled().received_bytes == len(WEIGHTS)
    assert contents(pulled().folder) == FILES


def test_a_destination_has_the_files_and_says_where_they_are_from(
    hub: FakeHub, pulled: Puller, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    report = pulled(target)
    assert report.folder == target
    assert contents(target) == FILES
    record = json.loads((target / RECORD).read_text())
    assert record["commit"] == report.commit
    assert record["files"]["model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    # Weights are links to the cache; small files, which people edit, are copies.
    assert (target / "model.safetensors").stat().st_nlink > 1
    assert (target / "config.json").stat().st_nlink == 1
    assert RECORD not in {file.name for file in list_folder(target).files}
    pulled(target, copy=True)
    assert (target / "model.safetensors").stat().st_nlink == 1
    assert not list(target.rglob("*.partial"))


def test_patterns_and_revisions(hub: FakeHub, pulled: Puller, tmp_path: Path) -> None:
    first = hub.repos["org/model"].refs["main"]
    hub.commit_files("org/model", {"config.json": b'{"new": 1}'}, "newer")
    report = pulled(
        tmp_path / "old", revision=first, include=("*.json", "sub/"), exclude=("*.txt",)
    )
    assert contents(report.folder) == {
        name: FILES[name] for name in ("config.json", "sub/model.safetensors")
    }
    assert report.commit == first
    with pytest.raises(OptionError, match=r"--include \*\.gguf: matches no file of org/model"):
        pulled(include=("*.gguf",))
    with pytest.raises(HubError, match="has no such branch, tag or commit"):
        pulled(revision="v9")


def test_private_and_missing_ones(
    hub: FakeHub, pulled: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match=r"nothing of this name that you may see \(HTTP 404\)"):
        pull("org/nothing")
    hub.repos["org/model"].private = True
    assert contents(pulled().folder) == FILES
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"wants to know who you are \(HTTP 401\)"):
        pulled()
    hub.add_fault(
        Fault(
            method="GET",
            path="revision",
            kind="status",
            status=403,
            headers={"X-Error-Code": "GatedRepo"},
        )
    )
    with pytest.raises(HubError, match=r"gated \(HTTP 403\)\. Accept its terms"):
        pulled()


def test_names_that_lead_elsewhere_are_refused(
    hub: FakeHub, pulled: Puller, tmp_path: Path
) -> None:
    hub.commit_files("org/model", {"../../evil.txt": b"x"}, "evil")
    with pytest.raises(HubError, match="which cannot be stored"):
        pulled()
    assert not (tmp_path / "cache").exists()


def test_offline_says_so(hub: FakeHub, pulled: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        pulled()
    assert hub.requests == []


def test_the_token_goes_to_the_hub_alone(hub: FakeHub, pulled: Puller) -> None:
    pulled()
    assert [headers for _, path, headers in hub.requests if path.startswith("/storage/")]
    for _, path, headers in hub.requests:
        assert ("Authorization" in headers) is not path.startswith("/storage/")
