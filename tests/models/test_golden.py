"""Families against frozen logits, and a family of this test's own, computed plainly in Python's floats.

Tolerance: as in test_families.py; Python computes in float64, which differs by no more.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.golden import FOLDER, Golden, goldens
from tests.models.test_families import (
    TOLERANCE,
    VISIBLE,
    hanok_decoder,
    prefill,
    types_with_a_case,
    untested,
)
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.checkpoint.files import open_checkpoint
from hanok.memory.load import load_decoder
from hanok.memory.options import LoadOptions
from hanok.memory.planning import describe
from hanok.memory.save import save_weights
from hanok.models import family
from hanok.models.config import ModelConfig
from hanok.models.decoder import Decoder
from hanok.models.family import LLAMA_NAMES, Family, families, read_config
from hanok.models.keys import Keys, llama_config

Rows = list[list[float]]
OWN = "plain"
"""The model type that exists only here."""
CONFIG = {
    "model_type": OWN,
    "vocab_size": 19,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "embedding_multiplier": 1.7,
}


def read_plain(keys: Keys) -> ModelConfig:
    """Half of each head is rotated, and embeddings are scaled."""
    rope = keys.rope(keys.whole("head_dim"), default_partial=0.5)
    config = llama_config(keys, rope=rope)
    return replace(config, embedding_scale=keys.number("embedding_multiplier", 1.0))


PLAIN = Family(
    model_types={OWN: "nothing that is published"},
    read_config=read_plain,
    names={**LLAMA_NAMES, "embed_tokens": "model.words", "mlp.down_proj": "mlp.back"},
)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This test's family, known as one of a file."""
    found = {**families(), OWN: PLAIN}
    with monkeypatch.context() as patch:
        patch.setattr(family, "families", lambda: found)
        yield


class PlainModel:
    """The forward pass of `PLAIN`, without torch and without a line of hanok."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, list[float]]) -> None:
        self.config = config
        self._weights = weights

    def logits(self, tokens: list[int]) -> Rows:
        hidden, scale = self.config["hidden_size"], self.config["embedding_multiplier"]
        words = self._weights["model.words.weight"]
        rows = [
            [scale * value for value in words[token * hidden : (token + 1) * hidden]]
            for token in tokens
        ]
        for index in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{index}"
            mixed = self._attention(f"{layer}.self_attn", self._norm(layer, "input", rows))
            rows = [_sum(row, new) for row, new in zip(rows, mixed, strict=True)]
            normed = self._norm(layer, "post_attention", rows)
            rows = [
                _sum(row, self._mlp(f"{layer}.mlp", new))
                for row, new in zip(rows, normed, strict=True)
            ]
        rows = [self._normed("model.norm", row) for row in rows]
        return [self._product("lm_head", row) for row in rows]

    def _attention(self, path: str, rows: Rows) -> Rows:
        size, num_heads = self.config["head_dim"], self.config["num_attention_heads"]
        keys = [
            self._rotated(self._product(f"{path}.k_proj", row), position)
            for position, row in enumerate(rows)
        ]
        values = [self._product(f"{path}.v_proj", row) for row in rows]
        outputs = []
        for position, row in enumerate(rows):
            queries = self._product(f"{path}.q_proj", row)
            output: list[float] = []
            for head in range(num_heads):
                query = self._rotated(queries[head * size : (head + 1) * size], position)
                seen = position + 1
                scores = [math.exp(_dot(query, key) / math.sqrt(size)) for key in keys[:seen]]
                output += [
                    _dot(scores, [value[part] for value in values[:seen]]) / sum(scores)
                    for part in range(size)
                ]
            outputs.append(self._product(f"{path}.o_proj", output))
        return outputs

    def _rotated(self, head: list[float], position: int) -> list[float]:
        rotated = int(len(head) * self.config["partial_rotary_factor"])
        half, found = rotated // 2, list(head)
        for pair in range(half):
            angle = position * self.config["rope_theta"] ** (-2 * pair / rotated)
            first, second = head[pair], head[pair + half]
            found[pair] = first * math.cos(angle) - second * math.sin(angle)
            found[pair + half] = second * math.cos(angle) + first * math.sin(angle)
        return found

    def _mlp(self, path: str, row: list[float]) -> list[float]:
        gates = self._product(f"{path}.gate_proj", row)
        ups = self._product(f"{path}.up_proj", row)
        inner = [gate / (1 + math.exp(-gate)) * up for gate, up in zip(gates, ups, strict=True)]
        return self._product(f"{path}.back", inner)

    def _norm(self, layer: str, name: str, rows: Rows) -> Rows:
        return [self._normed(f"{layer}.{name}_layernorm", row) for row in rows]

    def _normed(self, path: str, row: list[float]) -> list[float]:
        mean = _dot(row, row) / len(row) + self.config["rms_norm_eps"]
        weight = self._weights[f"{path}.weight"]
        return [value / math.sqrt(mean) * w for value, w in zip(row, weight, strict=True)]

    def _product(self, path: str, row: list[float]) -> list[float]:
        weight = self._weights[f"{path}.weight"]
        starts = range(0, len(weight), len(row))
        return [_dot(weight[start : start + len(row)], row) for start in starts]


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _sum(a: list[float], b: list[float]) -> list[float]:
    return [x + y for x, y in zip(a, b, strict=True)]


def plain_golden() -> Golden:
    """The golden of `PLAIN`; written into its file by `plain_golden().write(FOLDER / "plain.json")`."""
    hidden, inner, head = 12, 10, 8
    tensors = {"model.words.weight": (19, hidden), "model.norm.weight": (hidden,)}
    for index in range(2):
        layer = f"model.layers.{index}"
        tensors |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (2 * head, hidden),
            f"{layer}.self_attn.k_proj.weight": (head, hidden),
            f"{layer}.self_attn.v_proj.weight": (head, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, 2 * head),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.back.weight": (hidden, inner),
        }
    tensors["lm_head.weight"] = (19, hidden)
    golden = Golden(
        source="PlainModel of tests/models/test_golden.py, in Python's floats",
        config=CONFIG,
        tensors=tensors,
        tokens=[3, 17, 5, 5, 0, 11, 8, 18, 2, 9, 3, 14],
        logits=[],
    )
    logits = PlainModel(CONFIG, golden.weights()).logits(golden.tokens)
    return replace(golden, logits=logits)


def loaded(golden: Golden, folder: Path) -> Decoder:
    golden.save(folder)
    return hanok_decoder(folder)


@pytest.fixture(params=goldens())
def golden(request: pytest.FixtureRequest) -> Golden:
    return goldens()[request.param]


def expected(golden: Golden) -> Tensor:
    return torch.tensor(golden.logits)


def test_the_plain_models_golden_is_what_it_computes() -> None:
    frozen, computed = goldens()[OWN], plain_golden()
    torch.testing.assert_close(expected(frozen), expected(computed), atol=1e-6, rtol=0)
    assert json.loads(json.dumps(computed.tensors)) == frozen.tensors
    assert (frozen.config, frozen.tokens) == (CONFIG, computed.tokens)
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(goldens())


def test_prefill_is_the_golden(golden: Golden, tmp_path: Path) -> None:
    found = prefill(loaded(golden, tmp_path), golden.tokens)
    torch.testing.assert_close(found, expected(golden), atol=TOLERANCE, rtol=0)
    assert expected(golden).std() > 0.1  # logits that say something


@torch.inference_mode()
def test_token_by_token_is_the_golden(golden: Golden, tmp_path: Path) -> None:
    decoder = loaded(golden, tmp_path)
    cache = decoder.new_cache(1, len(golden.tokens))
    rows = [
        decoder.logits(decoder(ForwardBatch.of([[token]], past=[past]), cache))[0]
        for past, token in enumerate(golden.tokens)
    ]
    torch.testing.assert_close(torch.stack(rows), expected(golden), atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_packed_beginnings_are_the_goldens(golden: Golden, tmp_path: Path) -> None:
    """No token sees a later one, so a golden holds the logits of all its beginnings."""
    decoder, tokens = loaded(golden, tmp_path), golden.tokens
    lengths = [len(tokens), 1, len(tokens) // 2]
    cache = decoder.new_cache(3, len(tokens))
    decoder(ForwardBatch.of([tokens[:2], tokens[:3]], slots=[0, 2]), cache)
    past = [2, 0, 3]
    rest = [tokens[start:end] for start, end in zip(past, lengths, strict=True)]
    batch = ForwardBatch.of(rest, past=past)
    together = decoder.logits(decoder(batch, cache))[batch.last_tokens()]
    wanted = expected(golden)[[length - 1 for length in lengths]]
    torch.testing.assert_close(together, wanted, atol=TOLERANCE, rtol=0)


def test_a_goldens_checkpoint_is_saved_as_it_was(golden: Golden, tmp_path: Path) -> None:
    golden.save(tmp_path)
    found = load_decoder(describe(tmp_path), LoadOptions(dtype="float32"))
    saved = tmp_path / "saved"
    saved.mkdir()
    save_weights(saved, found.decoder, found.sources)
    names = open_checkpoint(tmp_path).tensors
    (saved / "config.json").write_text(json.dumps(golden.config))
    assert set(open_checkpoint(saved).tensors) == set(names)
    again = hanok_decoder(saved)
    torch.testing.assert_close(again.state_dict(), found.decoder.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("partial_rotary_factor", 1.0), ("embedding_multiplier", 1.0), ("rope_theta", 1e4)],
)
def test_a_switched_off_rule_differs_from_the_golden(
    key: str, value: float, tmp_path: Path
) -> None:
    own = goldens()[OWN]
    changed = loaded(replace(own, config={**own.config, key: value}), tmp_path)
    difference = prefill(changed, own.tokens) - expected(own)
    assert difference.abs().max() > VISIBLE


def test_a_family_without_case_and_golden_is_missed() -> None:
    assert OWN not in types_with_a_case()
    known = {*families(), OWN}
    assert untested(known, {}) == {OWN}
    assert untested(known, {"plain": goldens()[OWN]}) == set()
    assert read_config(CONFIG, "config.json")[0] is PLAIN
