"""Vectors of texts against transformers' hidden states, of base models too, which have no head."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import hanok
from hanok.bench.quality import measure_quality
from hanok.engine.engine import Engine
from hanok.engine.model import Model
from hanok.engine.speculate import Speculation
from hanok.engine.ticket import Request
from hanok.errors import GenerationError, OptionError, RequestError, UnsupportedError
from hanok.memory.planning import plan_draft, plan_load

SIZES: dict[str, Any] = {
    "vocab_size": 2048,  # the bundled tokenizer's
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    # Its head has another name, its layers another prefix.
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **{name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    ),
}
TEXTS = ["Lily had a cat.", "a", "The sun went down. " * 20, "The dog had a red ball."]
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
WORDS = "is a base model without a head: it makes embeddings"
Pooling = Literal["last", "mean"]


def save_base(folder: Path, family: str = "mistral") -> Any:
    """Save a small random base model as AutoModel does, with a tokenizer; return it."""
    torch.manual_seed(0)
    oracle = transformers.AutoModel.from_config(CONFIGS[family]()).eval()
    oracle.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(hanok.BUNDLED / name, folder / name)
    return oracle


def save_embedder(folder: Path, pooling: str) -> Any:
    """Save one as sentence-transformers does, under the name of the causal model it was made from."""
    oracle = save_base(folder, "qwen3")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["Qwen3ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return oracle


def expected(oracle: Any, all_ids: list[list[int]], pooling: Pooling) -> np.ndarray:
    """Pooled as sentence-transformers does, each text by itself, and scaled to length 1."""
    rows = []
    for ids in all_ids:
        with torch.no_grad():
            hidden = oracle(torch.tensor([ids])).last_hidden_state[0]
        vector = hidden[-1] if pooling == "last" else hidden.mean(0)
        rows.append((vector / vector.norm()).numpy())
    return np.stack(rows)


def of_engine(model: Model, texts: list[str], pooling: Pooling) -> np.ndarray:
    """What an engine pools of each text, as the server has it."""
    with Engine(model) as engine:
        tickets = [
            engine.submit_request(
                Request(sequence=model.sequence(text, {"max_new_tokens": 1}), pooling=pooling)
            )
            for text in texts
        ]
        for ticket in tickets:
            assert ticket.result() == []
        rows = [ticket.pooled for ticket in tickets if ticket.pooled is not None]
    return np.stack([(row / row.norm()).numpy() for row in rows])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    save_base(folder)
    return folder


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_base_models_vectors_are_of_transformers_hidden_states(
    tmp_path: Path, family: str, pooling: Pooling
) -> None:
    oracle = save_base(tmp_path / "model", family)
    model = hanok.load(tmp_path / "model", dtype="float32")
    assert not model.config.has_head
    assert not hasattr(model.decoder, "lm_head")
    found = model.embed(TEXTS, pooling=pooling)
    assert (found.dtype, found.device.type, found.shape) == (torch.float32, "cpu", (4, 64))
    rows = expected(oracle, [model.encode(text) for text in TEXTS], pooling)
    np.testing.assert_allclose(found.numpy(), rows, atol=2e-6)
    np.testing.assert_allclose(of_engine(model, TEXTS, pooling), rows, atol=2e-6)
    for text, row in zip(TEXTS, found, strict=True):
        alone = model.embed(text, pooling=pooling)
        assert alone.shape == (64,)
        np.testing.assert_allclose(alone.numpy(), row.numpy(), atol=2e-6)
        np.testing.assert_array_equal(model.embed(model.encode(text), pooling=pooling), alone)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_causal_models_vectors_are_its_base_models(pooling: Pooling) -> None:
    oracle = transformers.AutoModel.from_pretrained(hanok.BUNDLED, dtype=torch.float32).eval()
    model = hanok.load(hanok.BUNDLED, dtype="float32")
    rows = expected(oracle, [model.encode(text) for text in TEXTS], pooling)
    np.testing.assert_allclose(model.embed(TEXTS, pooling=pooling).numpy(), rows, atol=2e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("num_tokens", [7, 30])
def test_texts_in_many_passes_are_as_in_one(
    base: Path, monkeypatch: pytest.MonkeyPatch, pooling: Pooling, num_tokens: int
) -> None:
    model = hanok.load(base, dtype="float32")
    whole = model.embed(TEXTS, pooling=pooling)
    passes: list[int] = []
    forward = model.decoder.forward

    def watched(batch: Any, cache: Any = None) -> Tensor:
        passes.append(len(batch.token_ids))
        return forward(batch, cache)

    monkeypatch.setattr("hanok.engine.embed.PREFILL_TOKENS", num_tokens)
    monkeypatch.setattr("hanok.engine.passes.PREFILL_TOKENS", num_tokens)
    monkeypatch.setattr(model.decoder, "forward", watched)
    parts = model.embed(TEXTS, pooling=pooling)
    np.testing.assert_allclose(parts.numpy(), whole.numpy(), atol=2e-6)
    assert max(passes) <= num_tokens
    assert sum(passes) == sum(len(model.encode(text)) for text in TEXTS)


def test_the_pooling_is_the_checkpoints_unless_it_is_asked_for(tmp_path: Path) -> None:
    oracle = save_embedder(tmp_path / "model", "mean_tokens")
    model = hanok.load(tmp_path / "model", dtype="float32")
    ids = [model.encode(text) for text in TEXTS]
    np.testing.assert_allclose(model.embed(TEXTS).numpy(), expected(oracle, ids, "mean"), atol=2e-6)
    last = model.embed(TEXTS, pooling="last")
    np.testing.assert_allclose(last.numpy(), expected(oracle, ids, "last"), atol=2e-6)
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true}'
    )
    with pytest.raises(UnsupportedError, match="asks for cls_token"):
        model.embed(TEXTS)
    with pytest.raises(OptionError, match=r"pooling 'max' is unknown\. Choose last or mean"):
        model.embed(TEXTS, pooling="max")  # type: ignore[arg-type]


def test_what_cannot_be_embedded_is_told(base: Path) -> None:
    model = hanok.load(base, dtype="float32")
    for texts in ([], [[]], "a " * 2000, [[5000]]):
        with pytest.raises(RequestError):
            model.embed(texts)  # type: ignore[arg-type]
    model.decoder.norm.weight.data = model.decoder.norm.weight * float("nan")
    with pytest.raises(GenerationError, match="not finite"):
        model.embed("a")


def test_what_needs_a_head_is_refused(base: Path) -> None:
    model = hanok.load(base, dtype="float32")
    bundled = hanok.load(hanok.BUNDLED, dtype="float32", context=256)
    asked: list[Callable[[], object]] = [
        lambda: model.generate("a"),
        lambda: model.stream("a"),
        lambda: model.logits("a"),
        lambda: model.score("a"),
        lambda: measure_quality(base, ["int8"], "a text"),
        lambda: measure_quality(hanok.BUNDLED, [], "a text", others={"base": base}),
        lambda: plan_draft(base),
        lambda: Engine(model, speculation=Speculation()),
        lambda: bundled.generate("a", speculation=Speculation(method="draft", draft=model)),
    ]
    for ask in asked:
        with pytest.raises(OptionError, match=WORDS):
            ask()
    with Engine(model) as engine:
        with pytest.raises(OptionError, match=WORDS):
            engine.submit("a")
        sequence = model.sequence("a", {})
        with pytest.raises(OptionError, match=WORDS):
            engine.submit_request(Request(sequence=sequence, pooling="last", scored=0))


def test_a_saved_base_model_is_one_again(base: Path, tmp_path: Path) -> None:
    first = hanok.load(base, dtype="float32")
    first.save(tmp_path / "saved")
    again = hanok.load(tmp_path / "saved", dtype="float32")
    assert not again.config.has_head
    np.testing.assert_array_equal(again.embed(TEXTS), first.embed(TEXTS))
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    rows = expected(theirs, [first.encode(text) for text in TEXTS], "last")
    np.testing.assert_allclose(again.embed(TEXTS).numpy(), rows, atol=2e-6)


def test_a_saved_embedder_keeps_what_makes_it_one(tmp_path: Path) -> None:
    save_embedder(tmp_path / "model", "mean_tokens")
    prompts = tmp_path / "model" / "config_sentence_transformers.json"
    prompts.write_text('{"prompts": {"query": "Query: "}}')
    first = hanok.load(tmp_path / "model", dtype="float32")
    first.save(tmp_path / "saved")
    again = hanok.load(tmp_path / "saved", dtype="float32")
    np.testing.assert_array_equal(again.embed(TEXTS), first.embed(TEXTS))
    assert (tmp_path / "saved" / prompts.name).read_text() == prompts.read_text()


@pytest.mark.parametrize("quant", ["int8", "int4", "int4:head=none", "int8:embedding=int8"])
def test_a_quantized_base_model_says_almost_the_same(base: Path, quant: str) -> None:
    plain = hanok.load(base, dtype="float32").embed(TEXTS)
    model = hanok.load(base, dtype="float32", quant=quant)
    assert model.report.quantized_bytes > 0
    cosines = (model.embed(TEXTS) * plain).sum(-1)
    assert cosines.min() > (0.999 if quant.startswith("int8") else 0.95)
    told = [note for note in model.notes if "says what becomes of a head" in note]
    assert bool(told) == ("head=" in quant)


@pytest.mark.parametrize(
    "options",
    [
        {
            "device_map": {
                "embed_tokens": "cpu",
                "layers.0": "cpu",
                "layers.1": "disk",
                "norm": "cpu",
            }
        },
        {"max_memory": "core:0=120MiB,core:1=120MiB"},
    ],
    ids=["disk", "cores"],
)
def test_wherever_its_layers_are(base: Path, options: dict[str, Any]) -> None:
    whole = hanok.load(base, dtype="float32").embed(TEXTS)
    plan = plan_load(base, dtype="float32", context=64, may_measure=False, **options)
    model = hanok.load(plan=plan)
    assert model.decoder.execution.is_streamed or model.decoder.layout is not None
    np.testing.assert_allclose(model.embed(TEXTS).numpy(), whole.numpy(), atol=2e-6)
