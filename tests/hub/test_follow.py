"""Pushing a folder while a program writes it: when its files are sent, and when the commit is made."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import save
from tests.hub.fake_hub import FakeHub

import hanok
from hanok.checkpoint.writer import TensorData, write_safetensors
from hanok.errors import HubError, OptionError
from hanok.hub.client import Patience
from hanok.hub.options import PushOptions
from hanok.hub.push import Push, push

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def shard(value: int) -> bytes:
    import numpy

    return save({f"weight.{value}": numpy.full((30, 20), value, numpy.float32)})


class Writer:
    """Writes a step of its program whenever somebody waits for it."""

    def __init__(self, steps: Iterator[None]) -> None:
        self.steps = steps
        self.waited_s = 0.0

    def sleep(self, seconds: float) -> None:
        self.waited_s += seconds
        next(self.steps, None)


@pytest.fixture
def followed(hub: FakeHub, tmp_path: Path) -> Callable[..., Writer]:
    """Follows the folder that a program writes, and returns the program."""

    def call(steps: Iterator[None], **options: object) -> Writer:
        writer = Writer(steps)
        push(
            tmp_path / "out",
            "me/model",
            PushOptions(follow=True, **options),  # type: ignore[arg-type]
            state_folder=tmp_path / "state",
            patience=Patience(sleep=writer.sleep),
        )
        return writer

    return call


def test_shards_are_sent_while_others_are_written(
    hub: FakeHub, tmp_path: Path, followed: Callable[..., Writer]
) -> None:
    """As a program that writes in place: half a shard is never sent."""
    out, seen = tmp_path / "out", []

    def program() -> Iterator[None]:
        yield
        out.mkdir()
        for number, name in enumerate(SHARDS):
            data = shard(number)
            (out / name).write_bytes(data[:-7])
            yield
            yield
            seen.append((number, len(hub.blobs), hub.files("me/model") if hub.repos else {}))
            (out / name).write_bytes(data)
            yield
            yield
        index = {"weight_map": {f"weight.{n}": name for n, name in enumerate(SHARDS)}}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        yield
        yield
        (out / "config.json").write_text("{}")

    followed(program())
    # While the second and the third were half written, one and two were there; none was visible.
    assert seen == [(0, 0, {}), (1, 1, {}), (2, 2, {})]
    assert set(hub.files("me/model")) == {*SHARDS, "config.json", "model.safetensors.index.json"}
    assert hub.files("me/model")[SHARDS[1]] == shard(1)
    assert hub.num_commits("me/model") == 2
    assert sum(hub.received.values()) == sum(len(shard(number)) for number in range(3))


def test_the_last_file_may_be_named(
    hub: FakeHub, tmp_path: Path, followed: Callable[..., Writer]
) -> None:
    out = tmp_path / "out"

    def program() -> Iterator[None]:
        out.mkdir()
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(shard(1))
        for _ in range(9):
            yield
        (out / "tokenizer.json").write_text("{}")

    followed(program(), until="tokenizer.json")
    assert set(hub.files("me/model")) == {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_file_that_is_written_again_is_sent_again(
    hub: FakeHub, tmp_path: Path, followed: Callable[..., Writer]
) -> None:
    out = tmp_path / "out"

    def program() -> Iterator[None]:
        out.mkdir()
        (out / "model.safetensors").write_bytes(shard(1))
        yield
        yield
        yield
        (out / "model.safetensors").write_bytes(shard(2) + b"")
        (out / "config.json").write_text("{}")

    followed(program())
    assert hub.files("me/model")["model.safetensors"] == shard(2)


def test_a_program_that_ends_early_is_given_up_on(
    hub: FakeHub, tmp_path: Path, followed: Callable[..., Writer]
) -> None:
    out = tmp_path / "out"

    def program() -> Iterator[None]:
        out.mkdir()
        (out / "config.json").write_text("{}")
        index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        (out / SHARDS[0]).write_bytes(shard(0))
        yield

    with pytest.raises(HubError, match=rf"within 20 s; missing: {SHARDS[1]}\. Nothing was commit"):
        followed(program(), patience_s=20.0)
    assert hub.files("me/model") == {}


def test_what_must_not_be_published_stops_it(
    hub: FakeHub, tmp_path: Path, followed: Callable[..., Writer]
) -> None:
    out = tmp_path / "out"

    def program() -> Iterator[None]:
        out.mkdir()
        (out / "log.txt").write_text("hf_" + "aB1" * 12)
        yield

    with pytest.raises(HubError, match=r"log\.txt: seems to hold a Hugging Face token"):
        followed(program())
    assert hub.blobs == {}


def test_options_that_make_no_sense_are_refused(folder: Path, hub: FakeHub) -> None:
    with pytest.raises(OptionError, match="it needs follow"):
        PushOptions(until="config.json")
    with pytest.raises(OptionError, match="connections is 0"):
        PushOptions(connections=0)
    with pytest.raises(OptionError, match="is a file; follow needs the folder"):
        push(folder / "config.json", "me/model", PushOptions(follow=True))


def test_a_program_may_add_its_files_itself(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    with Push("me/model", state_folder=tmp_path / "state") as running:
        for name in ("model-00001-of-00002.safetensors", "config.json"):
            running.add(folder / name, name=f"sub/{name}")
        assert len(hub.blobs) == 1
        assert hub.files("me/model") == {}
        report = running.finish()
    assert set(hub.files("me/model")) == set(report.changed)
    assert report.changed == ("sub/model-00001-of-00002.safetensors", "sub/config.json")


def test_a_save_hands_over_each_shard(hub: FakeHub, tmp_path: Path) -> None:
    """As `Model.save` does: a shard is on the hub before the folder that it belongs to exists."""
    model = hanok.load(hanok.BUNDLED)
    target, seen = tmp_path / "copy", []
    with Push("me/model", state_folder=tmp_path / "state") as running:

        def add(path: Path, name: str) -> None:
            running.add(path, name)
            seen.append((name, len(hub.blobs), target.exists()))

        model.save(target, on_shard=add)
        for path in target.glob("*.json"):
            running.add(path)
        running.finish()
    assert seen == [("model.safetensors", 1, False)]
    assert hub.files("me/model") == {
        path.name: path.read_bytes()
        for path in target.iterdir()
        if path.suffix in (".json", ".safetensors")
    }


def test_each_shard_of_several_is_handed_over(hub: FakeHub, tmp_path: Path) -> None:
    tensors = [
        TensorData(name=f"t{n}", dtype="U8", shape=(2000,), read=lambda n=n: bytes([n]) * 2000)
        for n in range(3)
    ]
    out, counts = tmp_path / "out", []
    with Push("me/model", state_folder=tmp_path / "state") as running:

        def add(path: Path, name: str) -> None:
            counts.append((len(hub.blobs), sorted(item.name for item in out.glob("*.safetensors"))))
            running.add(path, name)

        write_safetensors(out, tensors, max_shard_bytes=2000, on_shard=add)
        running.add(out / "model.safetensors.index.json")
        running.finish()
    assert counts == [(0, []), (1, []), (2, [])]
    assert hub.files("me/model") == {path.name: path.read_bytes() for path in out.iterdir()}
