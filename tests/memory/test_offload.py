"""Weights that stay on disk: the same tokens, whatever part of the model is streamed."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hanok
from hanok.attention.base import ForwardBatch
from hanok.engine import native_steps
from hanok.errors import BudgetError, CheckpointError, UnsupportedError
from hanok.memory import offload
from hanok.memory.load import Loaded, load_decoder
from hanok.memory.options import LoadOptions
from hanok.memory.plan import LoadPlan
from hanok.memory.planning import describe
from hanok.models.decoder import Decoder

ALL = ("layers.0", "layers.1", "layers.2", "layers.3", "layers.4", "norm")
PROMPT = [5, 9, 200, 31]


def plan_with(on_disk: tuple[str, ...], path: Path = hanok.BUNDLED) -> LoadPlan:
    """Return a plan that leaves some units on disk."""
    anywhere = hanok.plan_load(path, dtype="float32", may_measure=False)
    by_hand = {
        module: "disk" if item.unit.name in on_disk else "cpu"
        for item in anywhere.placements
        for module in item.unit.modules
    }
    return hanok.plan_load(path, dtype="float32", device_map=by_hand, may_measure=False)


def loaded(on_disk: tuple[str, ...], path: Path = hanok.BUNDLED) -> Loaded:
    return load_decoder(
        describe(path),
        LoadOptions(dtype="float32"),
        plan=plan_with(on_disk, path),
    )


def passes(decoder: Decoder, count: int) -> None:
    for _ in range(count):
        decoder(ForwardBatch.of([PROMPT]))


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    with torch.inference_mode():
        decoder = loaded(()).decoder
        return decoder.logits(decoder(ForwardBatch.of([PROMPT])))


@pytest.mark.parametrize(
    "on_disk", [("layers.2",), ("layers.1", "layers.4"), ("layers.0", "layers.2", "norm"), ALL]
)
@torch.inference_mode()
def test_streamed_is_resident(on_disk: tuple[str, ...], expected: torch.Tensor) -> None:
    found = loaded(on_disk)
    decoder, cache = found.decoder, found.decoder.new_cache(1, 8)
    assert found.streamer is not None
    for _ in range(3):
        assert torch.equal(decoder.logits(decoder(ForwardBatch.of([PROMPT]))), expected)
    for index, token in enumerate(PROMPT):
        hidden = decoder(ForwardBatch.of([[token]], past=[index]), cache)
    assert torch.allclose(decoder.logits(hidden)[0], expected[-1], atol=1e-4)
    assert sum(parameter.nbytes for parameter in decoder.layers[2].parameters()) == 0 or (
        "layers.2" not in on_disk
    )


def test_generation_within_a_budget_gives_the_same_tokens() -> None:
    """The bundled model has 8.5 MiB of weights; what it computes with takes more."""
    resident = hanok.load(hanok.BUNDLED, dtype="float32")
    plan = hanok.plan_load(hanok.BUNDLED, dtype="float32", may_measure=False)
    cpu = plan.tiers[0]
    allowed = cpu.peak_bytes - cpu.weight_bytes // 4
    model = hanok.load(hanok.BUNDLED, dtype="float32", max_memory={"cpu": allowed})
    assert model.decoder.execution.is_streamed
    options: Any = {"max_new_tokens": 12, "temperature": 0.8, "seed": 2}
    prompts = ["Once upon a time", "The dog"]
    found, wanted = model.generate(prompts, **options), resident.generate(prompts, **options)
    assert [item.token_ids for item in found] == [item.token_ids for item in wanted]
    with pytest.raises(UnsupportedError, match="read from disk in every pass cannot be saved"):
        model.save("nowhere")


def test_a_budget_that_nothing_fits_says_what_is_missing() -> None:
    with pytest.raises(
        BudgetError, match=r"cpu lacks [\d,]+ bytes of [\d,]+ \(max_memory\)\. What"
    ):
        hanok.load(hanok.BUNDLED, max_memory="cpu=1MiB")


def test_passes_are_not_recorded() -> None:
    found = loaded(("layers.1",))
    cache = found.decoder.new_cache(1, 8)
    found.decoder.use_attention("auto")
    reason = native_steps.why_not(found.decoder, cache)
    assert reason in ("weights are read from disk in every pass", "our kernels are not there")


@torch.inference_mode()
def test_each_pass_reads_each_unit_once_and_few_units_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[tuple[Any, str]] = []  # whose file, and which weight
    real = offload.read_parameter

    def counted(tensors: Any, source: Any, target: Any) -> None:
        read.append((tensors, source.names[0]))
        real(tensors, source, target)

    monkeypatch.setattr(offload, "read_parameter", counted)
    decoder = loaded(("layers.0", "layers.1", "layers.2")).decoder
    for _ in range(4):
        decoder(ForwardBatch.of([PROMPT]))
    # The unit that comes next is read ahead, by a thread that may not have begun.
    names = [name for _, name in read if name.endswith("o_proj.weight")]
    numbers = [int(name.split(".")[2]) for name in names]
    assert numbers[:12] == [0, 1, 2] * 4
    assert numbers[12:] in ([], [0])
    first = read[0][0]
    decoder = loaded(("layers.0", "layers.1")).decoder
    for _ in range(4):
        decoder(ForwardBatch.of([PROMPT]))
    own = [name for tensors, name in read if tensors is not first]
    assert len([name for name in own if name.endswith("o_proj.weight")]) == 2


@torch.inference_mode()
def test_a_file_that_is_cut_off_while_it_works_is_an_error_and_the_next_pass_tries_again(
    tmp_path: Path, expected: torch.Tensor
) -> None:
    for file in hanok.BUNDLED.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    decoder = loaded(ALL, tmp_path).decoder
    decoder(ForwardBatch.of([PROMPT]))
    weights.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(CheckpointError, match="the file ends after"):
        passes(decoder, 2)
    weights.write_bytes(whole)
    for _ in range(2):
        try:
            found = decoder.logits(decoder(ForwardBatch.of([PROMPT])))
        except CheckpointError:
            continue
    assert torch.equal(found, expected)


def test_passes_in_several_threads_take_turns(expected: torch.Tensor) -> None:
    decoder = loaded(ALL).decoder
    found: list[torch.Tensor] = []

    def run() -> None:
        with torch.inference_mode():
            for _ in range(3):
                found.append(decoder.logits(decoder(ForwardBatch.of([PROMPT]))))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(torch.equal(item, expected) for item in found)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    import gc

    gc.collect()
