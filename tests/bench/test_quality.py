"""The quality report: its figures against plain formulas, and against transformers."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hanok
from hanok.bench import quality
from hanok.bench.quality import bytes_per_token, measure_quality, weight_bytes
from hanok.errors import OptionError, RequestError

TEXT = (hanok.BUNDLED / "quality.txt").read_text(encoding="utf-8")[:1500]


@pytest.fixture(autouse=True)
def no_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is not tested here, and takes time."""
    monkeypatch.setattr(quality, "read_gb_per_s", lambda device: 10.0)
    monkeypatch.setattr(quality, "decode_per_s", lambda model: 100.0)


@pytest.fixture(scope="module")
def exact() -> tuple[list[list[int]], list[Tensor]]:
    """Windows of the text, and transformers' log-probabilities of what follows each token."""
    from transformers import AutoModelForCausalLM

    model = hanok.load(hanok.BUNDLED)
    tokens, first = model.encode(TEXT), model.encode("")
    rest = tokens[len(first) :]
    windows = [first + rest[i : i + 64 - len(first)] for i in range(0, len(rest), 64 - len(first))]
    windows = [item for item in windows if len(item) > 1]
    oracle = AutoModelForCausalLM.from_pretrained(hanok.BUNDLED, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = [oracle(torch.tensor([item])).logits[0, :-1] for item in windows]
    return windows, [item.double().log_softmax(-1) for item in logits]


def test_perplexity_is_transformers(exact: tuple[list[list[int]], list[Tensor]]) -> None:
    windows, log_probs = exact
    report = measure_quality(hanok.BUNDLED, [], TEXT, dtype="float32", window=64, max_tokens=10**6)
    losses = [
        -row[token]
        for tokens, rows in zip(windows, log_probs, strict=True)
        for token, row in zip(tokens[1:], rows, strict=True)
    ]
    assert report.num_tokens == len(losses)
    expected = math.exp(float(torch.stack(losses).mean()))
    assert report.rows[0].perplexity == pytest.approx(expected, rel=1e-5)
    assert report.rows[0].name == "reference"
    assert (report.rows[0].kl_mean, report.rows[0].same_top) == (0.0, 1.0)


def test_divergence_is_its_formula(exact: tuple[list[list[int]], list[Tensor]]) -> None:
    windows, reference = exact
    report = measure_quality(
        hanok.BUNDLED, ["int4"], TEXT, dtype="float32", window=64, max_tokens=10**6
    )
    model = hanok.load(hanok.BUNDLED, dtype="float32", quant="int4")
    from hanok.attention.base import ForwardBatch

    divergences, same = [], []
    for tokens, rows in zip(windows, reference, strict=True):
        with torch.inference_mode():
            hidden = model.decoder(ForwardBatch.of([tokens]))[:-1]
            other = model.decoder.logits(hidden).double().log_softmax(-1)
        divergences.append((rows.exp() * (rows - other)).sum(-1))
        same.append(rows.argmax(-1) == other.argmax(-1))
    every = torch.cat(divergences)
    row = report.rows[1]
    assert row.kl_mean == pytest.approx(float(every.mean()), rel=1e-3)
    assert row.kl_p99 == pytest.approx(float(every.quantile(0.99)), rel=1e-3)
    assert row.same_top == pytest.approx(float(torch.cat(same).double().mean()), abs=2e-3)
    assert row.bandwidth_share == pytest.approx(bytes_per_token(model.decoder) * 100 / 1e10)


def test_a_model_does_not_differ_from_itself() -> None:
    row = measure_quality(hanok.BUNDLED, ["float32"], TEXT, dtype="float32", window=64).rows[1]
    assert (row.kl_mean, row.kl_p99, row.same_top, row.layer_error) == (0.0, 0.0, 1.0, 0.0)


def test_fewer_bits_cost_more() -> None:
    variants = ["bfloat16", "int8", "int4", "nf4"]
    report = measure_quality(
        hanok.BUNDLED, variants, TEXT, dtype="float32", window=64, max_tokens=300
    )
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["reference", *variants]
    assert report.num_tokens == 300
    assert 0 < rows["int8"].kl_mean < rows["int4"].kl_mean
    assert 0 < rows["int8"].layer_error < rows["int4"].layer_error < 0.5
    assert rows["int8"].kl_mean < rows["nf4"].kl_mean
    assert rows["int4"].kl_mean <= rows["int4"].kl_p99
    assert 0.5 < rows["int4"].same_top <= rows["int8"].same_top <= 1
    sizes = [rows[name].weight_bytes for name in ("reference", "bfloat16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert rows["reference"].bits_per_weight == pytest.approx(32)
    assert rows["bfloat16"].bits_per_weight == pytest.approx(16)
    assert 4 < rows["int4"].bits_per_weight < rows["int8"].bits_per_weight < 16


def test_bytes_of_a_token_leave_out_what_is_only_looked_up() -> None:
    decoder = hanok.load(hanok.BUNDLED, dtype="float32", weights="copied").decoder
    config = decoder.config
    table = config.vocab_size * config.hidden_size * 4
    parameters = sum(item.nbytes for item in decoder.parameters())
    assert weight_bytes(decoder) == parameters
    expected = parameters if config.tie_embeddings else parameters - table
    assert bytes_per_token(decoder) == expected


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        (["int8", "int8"], "'int8' is there twice"),
        (["int5"], "'int5' is unknown"),
        (["int4:group_size=48"], "group_size is 48"),
    ],
)
def test_variants_are_checked_before_anything_is_loaded(
    variants: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(OptionError, match=words):
        measure_quality(hanok.BUNDLED, variants, TEXT)


def test_too_little_text_and_too_small_windows_are_refused() -> None:
    with pytest.raises(RequestError, match="at least 2 are needed"):
        measure_quality(hanok.BUNDLED, [], "")
    with pytest.raises(OptionError, match="the window is 1"):
        measure_quality(hanok.BUNDLED, [], TEXT, window=1)


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_no_tokens_to_score_are_refused(max_tokens: int) -> None:
    with pytest.raises(OptionError, match=f"max_tokens is {max_tokens}"):
        measure_quality(hanok.BUNDLED, [], TEXT, max_tokens=max_tokens)


def test_a_window_without_room_for_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from hanok.checkpoint.tokenizer import Tokenizer

    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [0, 0, *encode(self, text)[1:]])
    assert measure_quality(hanok.BUNDLED, [], TEXT, window=3, max_tokens=4).num_tokens == 4
    with pytest.raises(OptionError, match="the window is 2 tokens and the tokenizer puts 2"):
        measure_quality(hanok.BUNDLED, [], TEXT, window=2)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_variant_that_computes_nan_does_not_look_right(
    layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_variant = quality._load_variant

    def broken(*args: str) -> hanok.Model:
        model = load_variant(*args)
        with torch.no_grad():
            model.decoder.layers[layer].attention_norm.weight.fill_(math.nan)
        return model

    monkeypatch.setattr(quality, "_load_variant", broken)
    row = measure_quality(hanok.BUNDLED, ["int8"], TEXT, max_tokens=50).rows[1]
    figures = (row.perplexity, row.kl_mean, row.kl_p99, row.layer_error)
    assert all(map(math.isnan, figures))
    assert row.worst_layer == layer


def test_tokens_that_the_reference_rules_out_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from hanok.models.decoder import Decoder

    logits = Decoder.logits

    def ruled_out(self: Decoder, hidden: Tensor) -> Tensor:
        return logits(self, hidden).index_fill(1, torch.tensor([3]), -math.inf)

    monkeypatch.setattr(Decoder, "logits", ruled_out)
    rows = measure_quality(hanok.BUNDLED, ["bfloat16", "int4"], TEXT, max_tokens=50).rows
    assert rows[1].kl_mean == 0
    assert 0 < rows[2].kl_mean < 1


def test_without_a_tokenizer_there_is_nothing_to_score(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(hanok.BUNDLED / name)
    with pytest.raises(RequestError, match="has no tokenizer"):
        measure_quality(tmp_path, [], TEXT)


def test_a_full_disk_is_said_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(quality.shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(RequestError, match="GB free"):
        measure_quality(hanok.BUNDLED, [], TEXT)
