"""Mending: what has one answer is written, the folder is then sound, and no weight is touched."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from tests.check.conftest import edit
from tests.check.test_folder import BREAKS, EMBED, INDEX, check, shard

from hanok.check.finding import Finding
from hanok.check.mend import Change, apply_mends, plan_mends, shown_change
from hanok.checkpoint.writer import write_json
from hanok.errors import CheckpointError

MENDED = (
    "no head, nothing said",
    "no index",
    "an index that is no JSON",
    "an index that leads out",
    "a tensor in another shard",
    "a name without a tensor",
    "a tensor without a name",
    "a wrong total",
    "no total",
    "a leftover",
    "no padding token",
    "another end",
    "no end in the configs",
    "an end of turn that ends nothing",
)


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def worse_than_notes(findings: Iterable[Finding]) -> list[Finding]:
    return [item for item in findings if item.level != "note" or item.is_mendable]


@pytest.mark.parametrize("name", MENDED)
def test_a_mended_folder_is_sound(name: str, sound: Path) -> None:
    BREAKS[name][0](sound)
    before = weights_of(sound)
    report = check(sound)
    mendable = [item for item in report.findings if item.is_mendable]
    assert BREAKS[name][2] in {item.kind for item in mendable}
    changes = plan_mends(sound, report)
    assert weights_of(sound) == before
    assert check(sound) == report  # a plan writes nothing
    apply_mends(sound, changes)
    assert worse_than_notes(check(sound).findings) == []
    assert plan_mends(sound, check(sound)) == ()
    assert weights_of(sound) == before


@pytest.mark.parametrize("name", sorted(BREAKS.keys() - set(MENDED)))
def test_what_has_several_answers_is_not_mended(name: str, sound: Path) -> None:
    BREAKS[name][0](sound)
    own = [item for item in check(sound).findings if item.kind == BREAKS[name][2]]
    assert not any(item.is_mendable for item in own)


def test_a_rebuilt_index_is_the_one_that_was_written(sound: Path) -> None:
    before = json.loads((sound / INDEX).read_text())
    (sound / INDEX).unlink()
    apply_mends(sound, plan_mends(sound, check(sound)))
    assert json.loads((sound / INDEX).read_text()) == before


def test_other_keys_of_an_index_and_its_indentation_are_kept(sound: Path) -> None:
    content = json.loads((sound / INDEX).read_text())
    content["metadata"] |= {"total_size": 1, "total_parameters": 147616}
    (sound / INDEX).write_text(json.dumps(content, indent=4))
    (change,) = plan_mends(sound, check(sound))
    shown = shown_change(change, sound).splitlines()
    assert [line for line in shown if line[0] in "+-"][2:] == [
        '-        "total_size": 1,',
        '+        "total_size": 295232,',
    ]
    assert change.new is not None
    assert json.loads(change.new)["metadata"] == {"total_size": 295232, "total_parameters": 147616}


def test_a_damaged_folder_gets_no_index(sound: Path) -> None:
    (sound / INDEX).unlink()
    BREAKS["a shard cut off"][0](sound)
    assert plan_mends(sound, check(sound)) == ()


def test_a_file_of_one_line_stays_one(sound: Path) -> None:
    (sound / "generation_config.json").write_text('{"eos_token_id": 3, "top_k": 50}')
    (change,) = plan_mends(sound, check(sound))
    assert change.new == b'{"eos_token_id": [3, 1], "top_k": 50}\n'


def test_tensors_that_are_in_two_files_get_no_index(sound: Path) -> None:
    (sound / INDEX).unlink()
    shutil.copy(shard(sound, 1), shard(sound, 2))
    report = check(sound)
    assert {item.kind for item in report.findings} == {"no-index", "tensor-twice"}
    assert plan_mends(sound, report) == ()


def test_a_lost_head_is_not_called_tied(sound: Path) -> None:
    """An index that lists a head says that the model had one."""
    BREAKS["no head, nothing said"][0](sound)
    content = json.loads((sound / INDEX).read_text())
    content["weight_map"]["lm_head.weight"] = content["weight_map"][EMBED]
    write_json(sound / INDEX, content)
    kinds = {item.kind for item in check(sound).findings}
    assert "no-tie" not in kinds
    assert "tensors" in kinds


def test_a_new_generation_config_keeps_what_config_says(sound: Path) -> None:
    (sound / "generation_config.json").unlink()
    edit(sound / "config.json", pad_token_id=0)
    BREAKS["an end of turn that ends nothing"][0](sound)
    apply_mends(sound, plan_mends(sound, check(sound)))
    found = json.loads((sound / "generation_config.json").read_text())
    assert found == {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 0}


def test_all_files_are_written_or_none(sound: Path) -> None:
    BREAKS["a wrong total"][0](sound)
    BREAKS["another end"][0](sound)
    changes = plan_mends(sound, check(sound))
    assert len(changes) == 2
    before = {file.name: file.read_bytes() for file in sound.iterdir()}
    lost = Change(path=sound / "nowhere" / "x.json", old=None, new=b"{}")
    with pytest.raises(CheckpointError, match="cannot be written"):
        apply_mends(sound, [*changes, lost])
    assert {file.name: file.read_bytes() for file in sound.iterdir()} == before


def test_a_file_that_is_being_written_stays(sound: Path) -> None:
    import fcntl

    held = sound / ".config.json.0123abcd.partial"
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        apply_mends(sound, plan_mends(sound, check(sound)))
        assert held.exists()
