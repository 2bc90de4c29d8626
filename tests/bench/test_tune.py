"""Tuning: the fastest setting that keeps its bounds, reasons for the others, and the profile of it."""

from dataclasses import replace
from pathlib import Path

import pytest

import hanok
from hanok.bench.fingerprint import fingerprint
from hanok.bench.profile import (
    check_checkpoint,
    machine_differences,
    profile_of,
    read_profile,
    write_profile,
)
from hanok.bench.report import Report
from hanok.bench.settings import Setting
from hanok.bench.tune import Bounds, choose, options_of
from hanok.checkpoint.files import open_checkpoint
from hanok.errors import OptionError

from .conftest import MIB, SHORT, made_report

BOUNDS = Bounds(max_kl=0.01, min_same_top1=0.98, max_memory=None)


@pytest.fixture
def short() -> Report:
    """Rows of one workload."""
    return made_report(only=SHORT)


def test_the_fastest_that_keeps_its_bounds_is_taken(short: Report) -> None:
    choice = choose(short, BOUNDS)
    assert choice.chosen.setting == Setting(attention="native", quant="int8")
    reasons = {item.label: item.excluded for item in choice.candidates}
    assert reasons == {
        "native, int4": "same top token 92.30% is below 98.00%",
        "native, int8": None,
        "native": None,
        "eager": None,
        "eager, no cache": "keeps no cache, which only shows what one saves",
    }
    speeds = [item.speed for item in choice.candidates]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(
    ("bounds", "chosen", "label", "reason"),
    [
        (replace(BOUNDS, min_same_top1=0.9), "native, int4", "native, int4", None),
        (
            replace(BOUNDS, min_same_top1=0.9, max_kl=0.001),
            "native, int8",
            "native, int4",
            "KL divergence 0.0087 is above 0.001",
        ),
        (replace(BOUNDS, min_same_top1=0.99), "native", "native, int8", "same top token 98.40% is"),
        (
            replace(BOUNDS, max_memory=195 * MIB),
            "native, int8",
            "native",
            "peak of 200 MiB is above 195 MiB",
        ),
        (replace(BOUNDS, min_same_top1=1.0), "eager", "native", "same top token 99.30% is below"),
    ],
)
def test_each_bound_excludes(
    short: Report, bounds: Bounds, chosen: str, label: str, reason: str | None
) -> None:
    choice = choose(short, bounds)
    assert choice.chosen.label == chosen
    excluded = {item.label: item.excluded for item in choice.candidates}[label]
    assert (excluded is None) == (reason is None)
    assert (excluded or "").startswith(reason or "")


def test_nothing_is_chosen_where_nothing_keeps_the_bounds(short: Report) -> None:
    with pytest.raises(OptionError, match=r"(?s)no setting keeps.*native, int8: peak of 190 MiB"):
        choose(short, replace(BOUNDS, max_memory=MIB))
    with pytest.raises(OptionError, match="quality was not measured"):
        choose(replace(short, quality_tokens=0), BOUNDS)
    unknown = replace(short, rows=tuple(replace(row, peak_bytes=None) for row in short.rows))
    with pytest.raises(OptionError, match="no time to find its peak of memory"):
        choose(unknown, replace(BOUNDS, max_memory=10**12))


def test_what_was_not_scored_is_not_chosen(short: Report) -> None:
    unscored = replace(
        short,
        rows=tuple(
            replace(row, quality=None) if row.label == "native, int8" else row for row in short.rows
        ),
    )
    choice = choose(unscored, BOUNDS)
    assert choice.chosen.label == "native"
    reasons = {item.label: item.excluded for item in choice.candidates}
    assert reasons["native, int8"] == "its quality was not measured"


def test_a_setting_must_be_measured_with_all_workloads(report: Report) -> None:
    choice = choose(report, replace(BOUNDS, min_same_top1=0.9))
    assert choice.chosen.setting == Setting(attention="native", quant="int8")
    reasons = {item.label: item.excluded for item in choice.candidates}
    assert reasons["native, int4"] == "was not measured with 2 of the workloads"


def test_settings_that_cannot_be_told_apart_are_named() -> None:
    noisy = made_report(only=SHORT, sigma=0.2)
    assert choose(noisy, BOUNDS).not_told_apart == ("native",)
    assert choose(made_report(only=SHORT, sigma=0.001), BOUNDS).not_told_apart == ()


def test_options_are_those_of_the_verbs() -> None:
    assert options_of(Setting(attention="native", dtype="bfloat16")) == {
        "attention": "native",
        "dtype": "bfloat16",
    }
    setting = Setting(
        quant="int4:head=none",
        cache_dtype="int8",
        device_map="cpu",
        speculation="ngram",
        graphs=False,
    )
    assert options_of(setting) == {
        "attention": "auto",
        "dtype": "auto",
        "quant": "int4:head=none",
        "cache_dtype": "int8",
        "device_map": "cpu",
        "graphs": "false",
        "speculate": "ngram",
    }


def test_a_profile_is_read_as_it_was_written(short: Report, tmp_path: Path) -> None:
    profile = profile_of(short, choose(short, BOUNDS), BOUNDS, None)
    file = tmp_path / "profile.json"
    write_profile(profile, file)
    found = read_profile(file)
    assert found == profile
    assert found.options == {"attention": "native", "dtype": "auto", "quant": "int8"}
    assert [row.label for row in found.rows] == ["native, int8"]
    assert {item.label: item.reason for item in found.excluded}["native"] == "slower"
    file.write_text("{}")
    with pytest.raises(OptionError, match="is not a profile in format 1"):
        read_profile(file)


def test_a_profile_belongs_to_its_checkpoint_and_machine(short: Report) -> None:
    subject = replace(
        short.checkpoint, fingerprint=fingerprint(open_checkpoint(hanok.BUNDLED)), name="bundled"
    )
    choice = choose(short, BOUNDS)
    ours = profile_of(replace(short, checkpoint=subject), choice, BOUNDS, None)
    bundled = open_checkpoint(hanok.BUNDLED)
    check_checkpoint(ours, bundled)
    theirs = profile_of(short, choice, BOUNDS, None)
    with pytest.raises(OptionError, match=r"was made for another checkpoint \(tiny"):
        check_checkpoint(theirs, bundled)
    assert machine_differences(ours, short.machine) == []
    other = {**short.machine, "cpu": "Other CPU, 8 threads"}
    (note,) = machine_differences(ours, other)
    assert "cpu was 'Some CPU, 2 threads', is 'Other CPU, 8 threads'" in note


def test_fingerprints_tell_weights_apart(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((hanok.BUNDLED / name).read_bytes())
    same = fingerprint(open_checkpoint(tmp_path))
    assert same == fingerprint(open_checkpoint(hanok.BUNDLED))
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert fingerprint(open_checkpoint(tmp_path)) != same
