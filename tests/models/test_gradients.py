"""A gradient reaches every parameter of every family, and is transformers'.

The gradients of both take the places of the weights and are written as files, so that they are compared
under the names and in the order of the files, fused and stacked matrices taken apart.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models.test_families import (
    CASES,
    Built,
    built,  # noqa: F401 (a fixture)
    hanok_decoder,
    rename_tensors,
)
from torch import Tensor, nn
from torch.nn import functional as F

import hanok
from hanok.attention.base import ForwardBatch
from hanok.checkpoint.files import open_checkpoint
from hanok.memory.account import understand
from hanok.memory.save import save_weights
from hanok.models.decoder import Decoder

RELATIVE = 1e-5  # of a gradient's norm: all is float32
# Embeddings scaled by 12 and no rotation: its scores, and so its gradients, are a hundred times larger.
NOISY = {"granitemoehybrid-nope": 5e-5}


def loss_of(logits: Tensor, tokens: list[int]) -> Tensor:
    return F.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="sum")


def put_gradients_in_place(model: nn.Module) -> list[str]:
    """Give each parameter the values of its gradient; return those that have none."""
    missing = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                missing.append(name)
                parameter.zero_()
            else:
                parameter.copy_(parameter.grad)
    return missing


def written_by_transformers(made: Built, name: str, folder: Path) -> dict[str, Tensor]:
    model: Any = copy.deepcopy(made.model)
    model.zero_grad()
    logits = model(torch.tensor([made.tokens]), use_cache=False).logits[0].float()
    loss_of(logits, made.tokens).backward()
    put_gradients_in_place(model)
    model.save_pretrained(folder)
    case = CASES[name]
    if case.published:
        case.published.rewrite(folder)
    if case.drop_prefix:
        rename_tensors(folder, lambda text: text.removeprefix(case.drop_prefix))
    return load_file(folder / "model.safetensors")


def learning_decoder(folder: Path) -> Decoder:
    decoder = hanok_decoder(folder)
    return decoder.requires_grad_(True)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_every_parameter_is_transformers(
    name: str,
    built: Callable[[str], Built],  # noqa: F811 (the fixture)
    tmp_path: Path,
) -> None:
    made = built(name)
    expected = written_by_transformers(made, name, tmp_path / "theirs")
    decoder = learning_decoder(made.folder)
    batch = ForwardBatch.of([made.tokens])
    loss_of(decoder.logits(decoder(batch)), made.tokens).backward()
    # Only an expert that no token chose has no gradient, and a zero one in transformers.
    assert all(".experts." in missing for missing in put_gradients_in_place(decoder))
    understood = understand(open_checkpoint(made.folder))
    save_weights(tmp_path / "ours", decoder, understood.table)
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert found
    assert found.keys() <= expected.keys()
    for tensor, value in found.items():
        norm = float(expected[tensor].norm())
        assert norm > 0 or ".experts." in tensor, tensor
        assert float((value - expected[tensor]).norm()) <= NOISY.get(name, RELATIVE) * norm, tensor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_that_learns_computes_what_one_that_serves_does(dtype: str) -> None:
    model = hanok.load(hanok.BUNDLED, dtype=dtype, weights="copied")
    tokens = [model.encode(text) for text in ("Once upon a time there was", "Lily", "The dog ran")]
    batch = ForwardBatch.of(tokens)
    with torch.no_grad():
        served = model.decoder.logits(model.decoder(batch))
    model.decoder.requires_grad_(True)
    learnt = model.decoder.logits(model.decoder(batch))
    assert learnt.requires_grad
    assert torch.equal(learnt, served)
