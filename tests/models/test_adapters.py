"""Adapters on fused and quantized products: each token's own, and everybody else's text untouched."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hanok
from hanok.attention.base import ForwardBatch
from hanok.checkpoint.files import open_checkpoint
from hanok.engine.model import Model
from hanok.engine.speculate import most_exact_tokens
from hanok.errors import CheckpointError, UnsupportedError
from hanok.memory.account import understand
from hanok.models.adapters import Weights, activate, attach, detach, merge
from hanok.models.family import Source
from hanok.models.lora import Part

RANK, SCALE = 3, 2.0


@pytest.fixture(scope="module")
def sources() -> Mapping[str, Source]:
    return understand(open_checkpoint(hanok.BUNDLED)).table


def drawn(sources: Mapping[str, Source], targets: str, seed: int = 0) -> dict[str, Part]:
    """An adapter on the parts that a pattern names."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for source in sources.values():
        for name, rows in zip(source.names, source.rows, strict=True):
            if re.search(targets, name):
                a = torch.randn(RANK, source.shape[1], generator=generator)
                found[name.removesuffix(".weight")] = Part(
                    a=a / source.shape[1] ** 0.5,
                    b=0.3 * torch.randn(rows, RANK, generator=generator),
                    scale=SCALE,
                )
    return found


def merged(model: Model, sources: Mapping[str, Source], parts: Mapping[str, Part]) -> None:
    """Add scale x B A to the floats of each part: the definition."""
    for name, source in sources.items():
        start = 0
        for path, rows in zip(source.names, source.rows, strict=True):
            part = parts.get(path.removesuffix(".weight"))
            if part is not None:
                with torch.no_grad():
                    weight = model.decoder.get_parameter(name)[start : start + rows]
                    weight += SCALE * (part.b @ part.a)
            start += rows


@pytest.mark.parametrize("targets", ["_proj", "q_proj|v_proj", "up_proj"])
def test_an_adapter_is_the_merged_weight(sources: Mapping[str, Source], targets: str) -> None:
    tensors = drawn(sources, targets)
    model, other = (hanok.load(hanok.BUNDLED, dtype="float32", weights="copied") for _ in range(2))
    base = model.logits([5, 9, 200])
    merged(other, sources, tensors)
    attach(model.decoder, sources, Weights(parts=tensors), index=0)
    assert torch.equal(model.logits([5, 9, 200]), base)  # attached, and nobody's
    activate(model.decoder, 0)
    torch.testing.assert_close(
        model.logits([5, 9, 200]), other.logits([5, 9, 200]), atol=1e-3, rtol=0
    )
    assert model.generate([5, 9], max_new_tokens=12).token_ids == (
        other.generate([5, 9], max_new_tokens=12).token_ids
    )
    detach(model.decoder, 0)
    assert torch.equal(model.logits([5, 9, 200]), base)


def test_half_of_a_batch_over_an_int4_base_uses_an_adapter(sources: Mapping[str, Source]) -> None:
    """Tokens with one are as if all had it; the others are the base's, bit for bit."""
    model = hanok.load(hanok.BUNDLED, quant="int4", dtype="float32")
    decoder, prompts = model.decoder, [[5, 9, 200], [7, 8], [11, 12, 13, 14]]
    attach(decoder, sources, Weights(parts=drawn(sources, "_proj")), index=0)
    attach(decoder, sources, Weights(parts=drawn(sources, "q_proj|down_proj", seed=1)), index=4)
    with torch.inference_mode():
        alone = {}
        for index in (None, 0, 4):
            activate(decoder, index)
            alone[index] = [decoder(ForwardBatch.of([prompt])) for prompt in prompts]
        activate(decoder, None)
        batch = ForwardBatch.of(prompts, adapters=[0, -1, 4])
        found = decoder(batch).split([3, 2, 4])
    assert torch.equal(found[1], alone[None][1])
    for row, index in ((0, 0), (2, 4)):
        torch.testing.assert_close(found[row], alone[index][row], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found[row], alone[None][row], atol=1e-2)


@pytest.mark.parametrize("targets", ["_proj", "q_proj|v_proj"])
def test_merging_adds_the_adapter_to_the_weights(
    sources: Mapping[str, Source], targets: str, tmp_path: Path
) -> None:
    model, other = (hanok.load(hanok.BUNDLED, dtype="float32", weights="copied") for _ in range(2))
    tensors = drawn(sources, targets)
    merged(other, sources, tensors)
    attach(model.decoder, sources, Weights(parts=tensors), index=2)
    with pytest.raises(UnsupportedError, match="adapters attached cannot be saved"):
        model.save(tmp_path / "attached")
    merge(model.decoder, 2)
    for (name, ours), theirs in zip(
        model.decoder.named_parameters(), other.decoder.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=name)
    model.save(tmp_path / "merged")
    quantized = hanok.load(hanok.BUNDLED, quant="int4", dtype="float32").decoder
    attach(quantized, sources, Weights(parts=tensors), index=2)
    with pytest.raises(UnsupportedError, match="cannot be merged into quantized weights"):
        merge(quantized, 2)


def test_adapters_with_targets_of_their_own_come_and_go(sources: Mapping[str, Source]) -> None:
    model = hanok.load(hanok.BUNDLED, quant="int4:head=int4", dtype="float32")
    decoder, base = model.decoder, model.logits([5, 9, 200])
    exact = most_exact_tokens(decoder)
    attach(decoder, sources, Weights(parts=drawn(sources, "_proj")), index=0)
    attach(decoder, sources, Weights(parts=drawn(sources, "q_proj", seed=1)), index=4)
    with pytest.raises(ValueError, match="adapter 4 is attached already"):
        attach(decoder, sources, Weights(parts=drawn(sources, "q_proj")), index=4)
    # Our kernel multiplies by adapters as well: a token's bits do not depend on the tokens next to it.
    assert most_exact_tokens(decoder) == exact
    detach(decoder, 4)
    assert torch.equal(model.logits([5, 9, 200]), base)
    detach(decoder, 0)
    assert most_exact_tokens(decoder) == exact
    assert not any(".lora" in name for name, _ in decoder.named_parameters())


def test_an_adapter_that_does_not_fit_leaves_nothing_behind(
    sources: Mapping[str, Source],
) -> None:
    decoder = hanok.load(hanok.BUNDLED, dtype="float32").decoder
    tensors = drawn(sources, "_proj")
    last = list(tensors)[-1]
    wrong = replace(tensors[last], b=torch.ones(9, RANK))
    with pytest.raises(CheckpointError):
        attach(decoder, sources, Weights(parts={**tensors, last: wrong}), index=0)
    assert not any(".lora" in name for name, _ in decoder.named_parameters())
    attach(decoder, sources, Weights(parts=tensors), index=0)


def test_only_the_adapter_gets_gradients(sources: Mapping[str, Source]) -> None:
    model = hanok.load(hanok.BUNDLED, quant="nf4", dtype="float32")
    attach(model.decoder, sources, Weights(parts=drawn(sources, "_proj")), index=0)
    activate(model.decoder, 0)
    hidden = model.decoder(ForwardBatch.of([[5, 9, 200]]))
    model.decoder.logits(hidden).log_softmax(-1)[:, 7].sum().backward()
    for name, parameter in model.decoder.named_parameters():
        assert (parameter.grad is not None) == (".lora." in name), name


def test_tensors_that_belong_nowhere_or_to_another_base_are_named(
    sources: Mapping[str, Source],
) -> None:
    decoder = hanok.load(hanok.BUNDLED, dtype="float32").decoder
    tensors = drawn(sources, "layers.0.self_attn.q_proj")
    (path,) = tensors
    wrong = replace(tensors[path], b=torch.ones(9, RANK))
    with pytest.raises(
        CheckpointError, match=rf"lora_A of {re.escape(path)} .* lora_B \[9, 3\]; .*"
    ):
        attach(decoder, sources, Weights(parts={path: wrong}), index=0)
    strange = {"model.layers.99.mlp.up_proj": tensors[path]}
    with pytest.raises(CheckpointError, match="1 modules of the adapter belong to no projection"):
        attach(decoder, sources, Weights(parts=strange), index=1)
