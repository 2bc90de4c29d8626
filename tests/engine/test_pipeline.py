"""Several devices at once: the same tokens as one after the other, in every shape of work."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import hanok
from hanok.engine.model import Model
from hanok.engine.pipeline import Pipeline
from hanok.errors import OptionError
from hanok.memory.plan import LoadPlan

CORES = sorted(os.sched_getaffinity(0))
PROMPTS = ["Once upon a time", "The dog", "A very small boat went out to sea and", "She", "No"]

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores to use as devices")


def two_cores() -> LoadPlan:
    names = [f"core:{core}" for core in CORES[:2]]
    return hanok.plan_load(
        hanok.BUNDLED,
        dtype="float32",
        device_map="balanced",
        max_memory=dict.fromkeys(names, "1GiB"),
        may_measure=False,
    )


@pytest.fixture(scope="module")
def resident() -> Model:
    return hanok.load(hanok.BUNDLED, dtype="float32")


@pytest.mark.parametrize("depth", [None, 1, 2, 7])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_pipelined_is_plain(resident: Model, depth: int | None, prompts: list[str]) -> None:
    model = hanok.load(plan=two_cores(), pipeline_depth=depth)
    options: Any = {"max_new_tokens": 14, "temperature": 0.7, "seed": 3}
    found, wanted = model.generate(prompts, **options), resident.generate(prompts, **options)
    assert [item.token_ids for item in found] == [item.token_ids for item in wanted]
    assert [item.text for item in found] == [item.text for item in wanted]
    assert not [item.name for item in threading.enumerate() if "hanok-stage" in item.name]


def test_a_long_prompt_goes_in_chunks(resident: Model) -> None:
    """Chunks of one prompt follow each other through the stages: each finds the keys before it."""
    prompt = [7 + n % 500 for n in range(300)]
    model = hanok.load(plan=two_cores(), pipeline_depth=3)
    found = model.generate([prompt, prompt[:70]], max_new_tokens=6)
    wanted = resident.generate([prompt, prompt[:70]], max_new_tokens=6)
    assert [item.token_ids for item in found] == [item.token_ids for item in wanted]


def test_layers_lie_where_the_plan_says_and_all_stages_work() -> None:
    model = hanok.load(plan=two_cores())
    layout = model.decoder.layout
    assert layout is not None
    assert [stage.core for stage in layout.stages] == CORES[:2]
    assert [index for stage in layout.stages for index in stage.blocks] == list(
        range(model.config.num_layers)
    )
    assert set(model.hf_device_map.values()) == {f"core:{core}" for core in CORES[:2]}
    sequences = [model.sequence(prompt, {"max_new_tokens": 5}) for prompt in PROMPTS]
    with Pipeline(model.decoder) as pipeline:
        events = list(pipeline.generate(sequences))
        assert all(seconds > 0 for seconds in pipeline.busy_s)
    assert len(events) == sum(len(item.generated_ids) for item in sequences)


def test_the_caller_keeps_its_threads() -> None:
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    model = hanok.load(plan=two_cores())
    model.generate("Once", max_new_tokens=2)
    assert torch.get_num_threads() == before
    with ThreadPoolExecutor(1) as pool:  # so do the threads to come
        assert pool.submit(torch.get_num_threads).result() == before
    assert os.sched_getaffinity(0) == cores


def test_a_failing_stage_ends_the_call_and_leaves_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = hanok.load(plan=two_cores())
    last = model.decoder.layers[-1]

    def fail(*inputs: Any) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(last, "forward", fail)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        model.generate(PROMPTS, max_new_tokens=3)
    assert not [item.name for item in threading.enumerate() if "hanok-stage" in item.name]


def test_whoever_stops_reading_leaves_no_thread() -> None:
    model = hanok.load(plan=two_cores())
    events = model.stream("Once upon", max_new_tokens=50)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert not [item.name for item in threading.enumerate() if "hanok-stage" in item.name]


def test_no_pipeline_over_one_device_and_no_depth_of_zero(resident: Model) -> None:
    with pytest.raises(ValueError, match="one device computes all"):
        Pipeline(resident.decoder)
    with pytest.raises(OptionError, match="pipeline_depth is 0"):
        hanok.load(plan=two_cores(), pipeline_depth=0).generate("a", max_new_tokens=1)


def test_a_core_that_is_not_there() -> None:
    with pytest.raises(OptionError, match=r"core:4095 is not a core that this process may use"):
        hanok.plan_load(hanok.BUNDLED, max_memory={"core:4095": "1GiB"}, may_measure=False)
    with pytest.raises(OptionError, match="devices only without other devices"):
        hanok.plan_load(
            Path(hanok.BUNDLED), max_memory={"core:0": "1GiB", "cpu": "1GiB"}, may_measure=False
        )
