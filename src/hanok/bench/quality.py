"""What fewer bits cost: variants of a checkpoint against the checkpoint itself, quality and speed.

The reference is the model as it is, in the dtype asked for. Variants are quantization
recipes or dtypes, loaded one after another, so that one model is in memory at a time; what has to be
remembered of the reference, its log-probabilities, lies in a temporary file meanwhile (tokens x
vocabulary x 4 bytes). All rows score the same tokens, in windows that begin as the tokenizer begins a
text, and in the same forward pass that answers users.
"""

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from hanok.attention.base import ForwardBatch
from hanok.attention.state import FLOAT_BYTES
from hanok.bench.bandwidth import read_gb_per_s
from hanok.bench.machine import machine_facts, versions
from hanok.engine.model import Model, load
from hanok.errors import OptionError, RequestError
from hanok.memory.account import check_head
from hanok.memory.options import DeviceMap
from hanok.memory.planning import describe
from hanok.models.decoder import Decoder
from hanok.models.layers import ExpertsLayer
from hanok.models.linear import Linear, Weight
from hanok.quant.recipe import read_recipe

ROWS = 64  # of logits at a time: with 150,000 words 40 MB
PROBE_TOKENS = 64  # whose way through the layers is compared
DECODED_TOKENS = 24  # for the speed, of each of REPEATS runs
REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRow:
    """One variant. Figures without a unit are shares or ratios."""

    name: str
    weight_bytes: int
    bits_per_weight: float
    perplexity: float
    kl_mean: float
    """KL divergence from the reference to it, in nats for each token."""
    kl_p99: float
    """What 99 of 100 tokens stay below."""
    same_top: float
    """Tokens whose likeliest continuation is the reference's."""
    layer_error: float
    """The largest relative error of what a layer adds, given what the reference's layer was given."""
    worst_layer: int
    tokens_per_s: float
    bandwidth_share: float
    """Bytes of weights that a token reads, times tokens per second, over the memory's speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """All variants of one checkpoint, the reference first."""

    checkpoint: str
    date: str
    """The day it was measured, such as 2026-11-28."""
    machine: Mapping[str, str]
    """What it was measured on: versions, processor, memory, GPUs."""
    num_tokens: int
    window: int
    gb_per_s: float
    rows: tuple[QualityRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    """What went into each layer of the reference, and what it added: (tokens, hidden) float32."""

    inputs: list[Tensor]
    added: list[Tensor]


def measure_quality(  # noqa: PLR0913 (the options of a measurement are arguments of their own)
    path: str | Path,
    variants: Sequence[str],
    text: str,
    *,
    dtype: str = "auto",
    device_map: DeviceMap = "auto",
    window: int = 512,
    max_tokens: int = 2048,
    others: Mapping[str, Path] = MappingProxyType({}),
    threads: int | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> QualityReport:
    """Compare variants of a checkpoint with the checkpoint itself.

    `variants` are recipes ("int8", "int4:group_size=64") or dtypes ("bfloat16"). `dtype` is what the
    reference and the recipes compute in; float32 makes the finest comparison. `text` is cut into
    windows of at most `window` tokens, of which `max_tokens` are scored at the most. `others` are
    checkpoints of the same model that are compared too, by the name of their rows. `threads` as in
    `hanok.load`. `progress` is called with each row's name before it is measured. A variant that
    computes NaN has NaN in its row. Raises OptionError for variants that are not known or twice there,
    for sizes that cannot be and for a model without a head, RequestError where the text is too short.
    """
    _check(variants, window, max_tokens)
    for item in (path, *others.values()):
        check_head(Path(item), has_head=describe(item).config.has_head)
    progress("reference")
    model = _load(path, dtype, device_map, threads)
    gb_per_s = read_gb_per_s(model.device)
    windows = _windows(model, text, window, max_tokens)
    num_tokens = count_scored(windows)
    with tempfile.TemporaryDirectory(prefix="hanok-quality-") as folder:
        size = num_tokens * model.config.vocab_size * 4
        free = shutil.disk_usage(folder).free
        if size > free:
            raise RequestError(
                f"the reference's log-probabilities are {size / 1e9:.1f} GB and {folder} has "
                f"{free / 1e9:.1f} GB free. Score fewer tokens, or set TMPDIR to a larger place."
            )
        kept = log_prob_file(Path(folder, "log_probabilities"), num_tokens, model.config.vocab_size)
        probe = _reference_probe(model.decoder, windows[0][:PROBE_TOKENS])
        rows = [_row("reference", model, keep_scores(model.decoder, windows, kept), None, gb_per_s)]
        for name in (*variants, *others):
            del model
            progress(name)
            if name in others:
                model = _load(others[name], dtype, device_map, threads)
            else:
                model = _load_variant(path, name, dtype, device_map, threads)
            rows.append(_compare(name, model, windows, kept, probe, gb_per_s))
        del kept
    return QualityReport(
        checkpoint=Path(path).name,
        date=date.today().isoformat(),
        machine={**versions(), **machine_facts()},
        num_tokens=num_tokens,
        window=window,
        gb_per_s=gb_per_s,
        rows=tuple(rows),
    )


def _check(variants: Sequence[str], window: int, max_tokens: int) -> None:
    if window < 2:
        raise OptionError(f"the window is {window}; it needs at least 2 tokens.")
    if max_tokens < 1:
        raise OptionError(f"max_tokens is {max_tokens}; at least 1 token must be scored.")
    twice = [name for name in variants if list(variants).count(name) > 1]
    if twice:
        raise OptionError(f"variant {twice[0]!r} is there twice; name it once.")
    for name in variants:
        if name not in FLOAT_BYTES:
            read_recipe(name)


def _load_variant(
    path: str | Path, name: str, dtype: str, device_map: DeviceMap, threads: int | None
) -> Model:
    if name in FLOAT_BYTES:
        return _load(path, name, device_map, threads)
    return _load(path, dtype, device_map, threads, quant=name)


def _load(
    path: str | Path,
    dtype: str,
    device_map: DeviceMap,
    threads: int | None,
    quant: str | None = None,
) -> Model:
    return load(
        path, device_map=device_map, dtype=dtype, quant=quant, weights="copied", threads=threads
    )


def _windows(model: Model, text: str, window: int, max_tokens: int) -> list[list[int]]:
    if model.tokenizer is None:
        raise RequestError(
            f"{model.checkpoint.folder} has no tokenizer, so no text can be scored. Add the "
            "tokenizer.json or tokenizer.model that belongs to the model."
        )
    window = min(window, model.config.max_context_tokens)
    return text_windows(model.tokenizer.encode, text, window, max_tokens)


def text_windows(
    encode: Callable[[str], list[int]], text: str, window: int, max_tokens: int
) -> list[list[int]]:
    """Cut the text's tokens; each window begins with the tokens that the tokenizer puts first."""
    tokens, first = encode(text), encode("")
    rest = tokens[len(first) :] if tokens[: len(first)] == first else tokens
    step = window - len(first)
    if step < 1:
        raise OptionError(
            f"the window is {window} tokens and the tokenizer puts {len(first)} before every text, so "
            "nothing of it fits. Choose a larger window."
        )
    pieces = [first + rest[start : start + step] for start in range(0, len(rest), step)]
    found, count = [], 0
    for piece in pieces:
        piece = piece[: max_tokens - count + 1]
        if len(piece) < 2:
            continue
        found.append(piece)
        count += len(piece) - 1
        if count >= max_tokens:
            break
    if not found:
        raise RequestError(f"the text has {len(tokens)} tokens; at least 2 are needed.")
    return found


def count_scored(windows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens of some windows are scored: those with another before them."""
    return sum(len(item) - 1 for item in windows)


def log_prob_file(path: Path, num_tokens: int, vocab_size: int) -> Tensor:
    """Return what a file holds of a reference, or will: (tokens, vocab) float32, shared by processes."""
    size = num_tokens * vocab_size
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(
        num_tokens, vocab_size
    )


def keep_scores(decoder: Decoder, windows: Sequence[Sequence[int]], kept: Tensor) -> Tensor:
    """Write the log-probabilities of a reference to `kept`; return each token's loss in nats."""
    losses = []
    for place, target, log_probs in _scored(decoder, windows):
        kept[place : place + len(target)] = log_probs
        losses.append(-log_probs.gather(1, target[:, None]))
    return torch.cat(losses)


@torch.inference_mode()
def _scored(
    decoder: Decoder, windows: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, for ROWS tokens at a time, their place, what follows them, and log-probabilities.

    The last are (rows, vocab) float32. Keys and values are kept where they are rounded by that, so that
    what this costs is seen.
    """
    place = 0
    for tokens in windows:
        cache = None if decoder.execution.cache_dtype is None else decoder.new_cache(1, len(tokens))
        hidden = decoder(ForwardBatch.of([list(tokens)], device=decoder.device), cache)
        targets = torch.tensor(tokens[1:], device=decoder.device)
        for start in range(0, len(targets), ROWS):
            target = targets[start : start + ROWS]
            logits = decoder.logits(hidden[start : start + len(target)])
            yield place, target.cpu(), logits.log_softmax(-1).cpu()
            place += len(target)


def _compare(
    name: str,
    model: Model,
    windows: Sequence[Sequence[int]],
    kept: Tensor,
    probe: _Probe,
    gb_per_s: float,
) -> QualityRow:
    scores = compare_scores(model.decoder, windows, kept)
    errors = _layer_errors(model.decoder, windows[0][:PROBE_TOKENS], probe)
    # NaN is worse than any number, and compares as neither more nor less.
    worst = max(range(len(errors)), key=lambda i: (math.isnan(errors[i]), errors[i]))
    against = (scores.divergence, scores.is_same_top, errors[worst], worst)
    return _row(name, model, scores.losses, against, gb_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScores:
    """How a decoder scores some tokens, one number for each: losses and divergences in nats."""

    losses: Tensor
    divergence: Tensor
    """KL divergence from the reference."""
    is_same_top: Tensor
    """Whether the likeliest token is the reference's, bool."""


def compare_scores(decoder: Decoder, windows: Sequence[Sequence[int]], kept: Tensor) -> TextScores:
    """Score the tokens, against a reference's log-probabilities."""
    losses, divergences, same = [], [], []
    for place, target, log_probs in _scored(decoder, windows):
        reference = kept[place : place + len(target)]
        losses.append(-log_probs.gather(1, target[:, None]))
        # In float64: equal distributions differ by nothing, and close ones by little.
        # What the reference rules out adds nothing (0 log 0); a NaN of the variant stays one.
        wanted = reference.double()
        chance = wanted.exp()
        terms = torch.where(chance == 0, 0.0, chance * (wanted - log_probs.double()))
        divergences.append(terms.sum(-1))
        same.append(reference.argmax(-1) == log_probs.argmax(-1))
    return TextScores(
        losses=torch.cat(losses), divergence=torch.cat(divergences), is_same_top=torch.cat(same)
    )


def _row(
    name: str,
    model: Model,
    losses: Tensor,
    against: tuple[Tensor, Tensor, float, int] | None,
    gb_per_s: float,
) -> QualityRow:
    divergence, same, layer_error, worst = against or (torch.zeros(1), torch.ones(1), 0.0, 0)
    tokens_per_s = decode_per_s(model)
    num_weights = sum(math.prod(shape) for shape in _weight_shapes(model.decoder))
    size = weight_bytes(model.decoder)
    return QualityRow(
        name=name,
        weight_bytes=size,
        bits_per_weight=8 * size / num_weights,
        perplexity=math.exp(float(losses.double().mean())),
        kl_mean=float(divergence.double().mean()),
        kl_p99=float(divergence.double().quantile(0.99)),
        same_top=float(same.double().mean()),
        layer_error=layer_error,
        worst_layer=worst,
        tokens_per_s=tokens_per_s,
        bandwidth_share=bytes_per_token(model.decoder) * tokens_per_s / 1e9 / gb_per_s,
    )


@torch.inference_mode()
def _reference_probe(decoder: Decoder, tokens: Sequence[int]) -> _Probe:
    probe = _Probe(inputs=[], added=[])

    def keep(block: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        probe.inputs.append(arguments[0].float())
        probe.added.append(output.float() - arguments[0].float())

    handles = [block.register_forward_hook(keep) for block in decoder.layers]
    decoder(ForwardBatch.of([list(tokens)], device=decoder.device))
    for handle in handles:
        handle.remove()
    return probe


@torch.inference_mode()
def _layer_errors(decoder: Decoder, tokens: Sequence[int], probe: _Probe) -> list[float]:
    """Return the error of what each layer adds to the reference's input, relative to what that adds."""
    errors: list[float] = []

    def replace(block: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return probe.inputs[len(errors)].to(decoder.dtype), *arguments[1:]

    def compare(block: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        index = len(errors)
        wanted = probe.added[index]
        found = output.float() - arguments[0].float()
        errors.append(float((found - wanted).norm() / wanted.norm().clamp(min=1e-30)))

    handles = [block.register_forward_pre_hook(replace) for block in decoder.layers]
    handles += [block.register_forward_hook(compare) for block in decoder.layers]
    decoder(ForwardBatch.of([list(tokens)], device=decoder.device))
    for handle in handles:
        handle.remove()
    return errors


def decode_per_s(model: Model) -> float:
    """Return the tokens that one user gets per second after a short prompt."""
    prompt = [min(5, model.config.vocab_size - 1)] * 8
    rates = []
    for _ in range(REPEATS):
        events = model.stream(
            prompt, max_new_tokens=DECODED_TOKENS + 1, ignore_eos=True, temperature=0.0
        )
        next(events)
        start = time.perf_counter()
        count = sum(1 for _ in events)
        rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates)


def weight_bytes(decoder: Decoder) -> int:
    """Return the bytes of all weights, shared ones counted once."""
    return sum(item.nbytes for item in decoder.weights())


def bytes_per_token(decoder: Decoder) -> int:
    """Return the bytes of weights that one token reads: not what is only looked up, or not chosen."""
    total, seen = 0.0, set[int]()
    for module, share in _shares(decoder):
        if module is decoder.embed_tokens:
            continue
        parts: list[Weight | Tensor] = list(module.parameters(recurse=False))
        if isinstance(module, Linear) and module.stored is not None:
            parts.append(module.stored)
        for part in parts:
            if id(part) not in seen:
                seen.add(id(part))
                total += part.nbytes * share
    return round(total)


def _shares(module: nn.Module, share: float = 1.0) -> Iterator[tuple[nn.Module, float]]:
    """Yield every module with the share of its weights that a token reads."""
    yield module, share
    for child in module.children():
        inner = share
        if isinstance(module, ExpertsLayer) and child is module.experts:
            inner = share * module.num_chosen / len(module.experts)
        yield from _shares(child, inner)


def _weight_shapes(decoder: Decoder) -> list[tuple[int, ...]]:
    return [tuple(item.shape) for item in decoder.weights()]
