"""How much of the machine's speed a step uses: its operations, and the best rate of such products.

The operations are those of the formula, whatever computes them: what is computed again on the way back
(`gradient_checkpointing`) counts once, and so do products of a quantized weight.
"""

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from hanok.kernels.processor import multiplies
from hanok.models.config import Mixer, ModelConfig
from hanok.models.decoder import Decoder

PROBE_S = 0.8  # of all products together; what a first call costs comes on top
FEWEST_TOKENS = 64
CALLS, CALLS_S = 5, 0.02  # of each product at least, as far as the time allows; the best counts
MOST_WEIGHTS = 2**24  # of a product that is timed: rows beyond them would not make it faster
LEARNING_PASSES = 3  # over a matrix that learns: its product, and the gradients of both sides


class StepSpeed:
    """Tells which share of the products' best rate a step reached. Making it measures the rate."""

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        """`tokens` are those of a pack. What learns must need gradients by now."""
        config = decoder.config
        learning = {name: item for name, item in decoder.named_parameters() if item.requires_grad}
        # Below the first layer where something learns no gradient is needed.
        first = min((_layer_of(name) for name in learning), default=0)
        self._token_passes = sum(
            2 * size * _passes(_layer_of(name) >= first, name in learning)
            for name, size in _active_sizes(config).items()
        ) + _adapter_passes(learning, "layers.")
        head = "embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
        own = any(re.fullmatch(r"lm_head\.lora\..*\.weight", name) for name in learning)
        self._target_passes = 2 * config.vocab_size * config.hidden_size * _passes(
            True, own or head in learning
        ) + _adapter_passes(learning, "lm_head.")
        mixers = Counter[tuple[Mixer, int]](
            (layer.mixer, 3 if index >= first else 1) for index, layer in enumerate(config.layers)
        )

        @cache
        def of_length(length: int) -> int:
            # Scores and sums have no weights: their gradients are two products for each one forward.
            return sum(
                count * passes * mixer.flops_per_token(seen)
                for (mixer, passes), count in mixers.items()
                for seen in range(1, length + 1)
            )

        self._mixing = of_length
        shapes = _product_shapes(config)
        self.best_per_s = max(
            _best_per_s(shapes, tokens, dtype, decoder.device)
            for dtype in _dtypes(decoder.dtype, decoder.device)
        )
        """Operations a second of the model's products, forward."""

    def flops(self, lengths: Iterable[int], num_targets: int) -> int:
        """Return the operations of a step over documents of these lengths, forward and backward."""
        found = num_targets * self._target_passes
        for length in lengths:
            found += length * self._token_passes + self._mixing(length)
        return found

    def share(self, lengths: Iterable[int], num_targets: int, seconds: float) -> float:
        """Return which share of the best rate a step of so many seconds reached."""
        return self.flops(lengths, num_targets) / seconds / self.best_per_s


def _passes(is_above: bool, is_learning: bool) -> int:
    """Return the passes over a matrix: its product, and the gradients of its inputs and of itself."""
    return 1 + is_above + is_learning


def _adapter_passes(learning: Mapping[str, Tensor], part: str) -> int:
    """Return the operations of a part's adapters, those beside its weights, for one row."""
    return sum(
        2 * item.numel() * LEARNING_PASSES
        for name, item in learning.items()
        if name.startswith(part) and ".lora." in name
        if item.dim() == 2 and not name.endswith(".weight")  # such stand in place of a weight
    )


def _layer_of(name: str) -> int:
    """Return the layer of a parameter; -1 for the embedding, a high number for what follows layers."""
    head, _, rest = name.partition(".")
    if head == "layers":
        return int(rest.partition(".")[0])
    return -1 if head.startswith("embed") else 10**6


def _active_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the numbers of each matrix of the layers that one token is multiplied with."""
    return {
        name: round(shape[0] * shape[1] * config.active_share(name))
        for name, shape in config.parameter_shapes().items()
        if name.startswith("layers.") and len(shape) == 2
    }


def _product_shapes(config: ModelConfig) -> Counter[tuple[int, int]]:
    return Counter(
        (shape[0], shape[1])
        for name, shape in config.parameter_shapes().items()
        if name.startswith("layers.") and len(shape) == 2 and config.active_share(name) == 1
    )


def _dtypes(dtype: torch.dtype, device: torch.device) -> Sequence[torch.dtype]:
    """Return what products may be computed in; a CPU that lacks 16-bit products widens to float32."""
    return [dtype] if multiplies(dtype, device) else [torch.float32]


def _best_per_s(
    shapes: Counter[tuple[int, int]], tokens: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Return operations a second over all shapes, each as often as the model has it."""
    flops = seconds = 0.0
    limit_s = PROBE_S / max(1, len(shapes))
    for (rows, columns), count in shapes.items():
        fewer, threads = min(rows, MOST_WEIGHTS // columns), torch.get_num_threads()
        rate = _product_rate((fewer, columns), tokens, dtype, device, limit_s, threads)
        flops += count * rows * columns
        seconds += count * rows * columns / rate
    return flops / seconds if seconds else float("inf")


@cache
def _product_rate(
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    limit_s: float,
    threads: int,
) -> float:
    """Return the best rate of one product with as many of the tokens as fit into the time.

    It is measured once in a process, for a number of threads.
    """
    rows, columns = shape
    weight = torch.full((rows, columns), 0.01, dtype=dtype, device=device)
    count, best, began = min(FEWEST_TOKENS, tokens), 0.0, time.perf_counter()
    while True:
        values = torch.ones(count, columns, dtype=dtype, device=device)
        _timed(values, weight)  # a first call claims memory
        started, calls, taken_s = time.perf_counter(), 0, 0.0
        while calls < CALLS or time.perf_counter() - started < CALLS_S:
            taken_s = _timed(values, weight)
            best = max(best, 2 * count * rows * columns / taken_s)
            calls += 1
            if time.perf_counter() - began + taken_s > limit_s:
                break
        # Of the next size at least two calls must fit.
        left_s = limit_s - (time.perf_counter() - began)
        fitting = int(count * left_s / (2 * taken_s))
        if count == tokens or fitting <= count:
            return best
        count = min(tokens, fitting, 8 * count)


def _timed(values: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    torch.mm(values, weight.t())
    if values.device.type != "cpu":
        torch.accelerator.synchronize(values.device)
    return max(1e-9, time.perf_counter() - start)
