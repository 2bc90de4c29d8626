"""What benchmarks/gpu.py measures: models with random weights, and copies, each in a process of its own.

A contestant makes its model on the device, weight by weight, so that nothing is written to disk or read.
`serve` is such a process: it makes a contestant, then prepares turns and takes them as it is told.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol

import torch
from checkpoints import SHAPES, STANDARD_DEVIATION, Shape
from gpu_workers import Failure
from torch import Tensor, nn

from hanok.attention.base import ForwardBatch
from hanok.attention.cache import KVCache
from hanok.engine.cuda_graph import DecodeGraphs, why_not
from hanok.engine.passes import Passes
from hanok.memory.quantize import set_weight
from hanok.models.decoder import Decoder
from hanok.models.family import read_config
from hanok.models.linear import Linear
from hanok.quant.base import choose_layout
from hanok.quant.recipe import Recipe, read_recipe

LLAMA_8B = Shape(
    name="llama-3.1-8b",
    model_type="llama",
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    intermediate_size=14336,
    vocab_size=128256,
    is_tied=False,
    rope_theta=500000.0,
)
SMALLEST = Shape(  # for the interpreter
    name="smallest",
    model_type="llama",
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=32,
    vocab_size=32,
    is_tied=False,
)
GPU_SHAPES = {shape.name: shape for shape in (LLAMA_8B, *SHAPES.values(), SMALLEST)}
PLAIN, COPY, TRANSFORMERS = "bfloat16", "copy", "transformers bfloat16"
ROWS_AT_ONCE = 4096
CALLS_OF_A_TURN = 4
WARM_UP_STEPS = 3  # plainly, recorded, replayed
LARGEST_ERROR = 2.0**-6  # of recorded logits: the same kernels in the same order, in bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What all contestants compute."""

    shape: str
    prompt: int
    tokens: int
    call_tokens: int
    copy_bytes: int
    train_tokens: int = 2048
    product_side: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one contestant does once in each round."""

    contestant: str
    kind: Literal["decode", "call", "copy", "train", "memory", "products"]
    batch: int = 1
    graphs: bool = False

    def __str__(self) -> str:
        if self.kind != "decode":
            return f"{self.contestant}, {self.kind}"
        graphs = ", CUDA graphs" if self.graphs else ""
        return f"{self.contestant}, batch {self.batch}{graphs}"


class Contestant(Protocol):
    """A model, or what else takes turns."""

    bytes_per_step: int
    """Bytes of the weights that a step of decoding reads, whatever the batch."""

    def prepare(self, turn: Turn) -> float | None:
        """Do what only a first turn takes time for; return the error of recorded logits, if any."""

    def take(self, turn: Turn) -> float:
        """Return tokens per second; of copies GB per second, each byte counted once."""


Make = Callable[[str, Sizes, torch.device], Contestant]


# Processes


def serve(
    connection: Connection,
    name: str,
    sizes: Sizes,
    device_type: str,
    make: "Make | None" = None,
) -> None:
    """Make a contestant, send its bytes, then answer ("prepare" or "take", turn) with a number.

    `make` makes it by its name; None: `contestant_of`. An exception is answered with a `Failure`.
    """
    device = torch.device(device_type)
    made = _answer(lambda: (make or contestant_of)(name, sizes, device))
    connection.send(made if isinstance(made, Failure) else made.bytes_per_step)
    while not isinstance(made, Failure):
        try:
            action, turn = connection.recv()
        except EOFError:
            return
        do = made.prepare if action == "prepare" else made.take
        connection.send(_answer(lambda do=do, turn=turn: do(turn)))


def _answer(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:  # of any kind: it is one contestant's, and goes into the report
        return Failure.of(error)


def contestant_of(name: str, sizes: Sizes, device: torch.device) -> Contestant:
    """Return a contestant by name: "copy", "transformers bfloat16", "bfloat16" or a quantization."""
    if name == COPY:
        return Copies(sizes.copy_bytes, device)
    shape = GPU_SHAPES[sizes.shape]
    if name == TRANSFORMERS:
        return Transformers(shape, sizes, device)
    recipe = None if name == PLAIN else read_recipe(name)
    return Ours(make_decoder(shape, recipe, device), sizes)


# Models


def make_decoder(
    shape: Shape,
    recipe: Recipe | None,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Decoder:
    """Return a decoder with random weights, one float weight at a time on the device."""
    config = read_config(shape.config(), shape.name)[1]
    with torch.device("meta"):
        decoder = Decoder(config)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(decoder.named_parameters()):
        method = None
        if recipe is not None:
            method = recipe.method_for(name, is_tied=config.tie_embeddings)
        path, _, leaf = name.rpartition(".")
        if method is None:
            values = drawn(parameter.shape, generator, dtype)
            placed = nn.Parameter(values, requires_grad=False)
            decoder.get_submodule(path).register_parameter(leaf, placed)
            continue
        rows, columns = parameter.shape
        stored = choose_layout(method.format, device).empty(
            method.format, (rows, columns), device, method
        )
        for start in range(0, rows, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, rows - start)
            stored.write_rows(start, drawn((count, columns), generator, dtype))
        stored.finish()
        set_weight(decoder, path, stored, dtype)
    decoder.tie()
    decoder.eval()
    decoder.use_attention("auto")
    return decoder


def drawn(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return a matrix of N(0, 0.02²), or ones for a vector, where the generator is."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=generator.device)
    values = torch.empty(shape, dtype=dtype, device=generator.device)
    return values.normal_(0.0, STANDARD_DEVIATION, generator=generator)


def bytes_per_step(decoder: Decoder) -> int:
    """Return the bytes of the weights that every step reads: all but an untied embedding."""
    total = sum(item.nbytes for item in decoder.parameters())
    for module in decoder.modules():
        if isinstance(module, Linear) and module.stored is not None:
            total += module.stored.nbytes
    embedding = decoder.embed_tokens.get_parameter("weight")
    return total - (0 if decoder.config.tie_embeddings else embedding.nbytes)


def largest_error(answer: Tensor, expected: Tensor) -> float:
    """Return the largest error, as a share of what is expected and its row's root mean square together.

    A number is not expected to be better than those it is a sum of, which are as large as its row's.
    What is NaN in one of them alone is an infinite error.
    """
    answer, expected = answer.double(), expected.double()
    scale = expected.abs() + expected.square().mean(-1, keepdim=True).sqrt()
    error = (answer - expected).abs() / scale
    return float(error.nan_to_num(nan=float("inf")).max())


# Contestants


def settle(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(action: Callable[[], None], amount: float, device: torch.device) -> float:
    """Return `amount` per second of one action."""
    settle(device)
    start = time.perf_counter()
    action()
    settle(device)
    return amount / (time.perf_counter() - start)


def prompt_of(length: int, vocab_size: int) -> list[int]:
    """Return a prompt, the same for all."""
    return [index % vocab_size for index in range(length)]


class Copies:
    """Copies within the device."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self._source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        self.bytes_per_step = 0

    def prepare(self, turn: Turn) -> float | None:
        """See `Contestant`."""
        self.take(turn)
        return None

    def take(self, turn: Turn) -> float:
        """Copy ten times."""

        def copy() -> None:
            for _ in range(10):
                self._target.copy_(self._source)

        return rate(copy, 10 * self._source.nbytes / 1e9, self._source.device)


class Ours:
    """hanok's decoder, run as `Model.generate` runs it: `graphs` is the option of `hanok.load`."""

    def __init__(self, decoder: Decoder, sizes: Sizes) -> None:
        self._decoder = decoder
        self._sizes = sizes
        self._caches: dict[int, KVCache] = {}
        self._passes: dict[tuple[int, bool], Passes] = {}
        self.bytes_per_step = bytes_per_step(decoder)

    @torch.inference_mode()
    def prepare(self, turn: Turn) -> float | None:
        """Compile kernels; record the step, and compare what it gives then with a plain pass."""
        if turn.kind == "call":
            self.take(turn)
            return None
        passes = self._passes_of(turn)
        for _ in range(WARM_UP_STEPS):
            self._rewind(turn.batch)
            logits = self._step(passes, [1] * turn.batch)
        if not turn.graphs:
            return None
        cache = self._caches[turn.batch]
        if not isinstance(passes.recorded, DecodeGraphs):
            raise RuntimeError(f"nothing was recorded: {why_not(self._decoder, cache)}")
        recorded = logits.clone()  # the next step overwrites them
        self._rewind(turn.batch)
        plain = self._step(self._made_passes(turn.batch, graphs=False), [1] * turn.batch)
        return largest_error(recorded, plain)

    @torch.inference_mode()
    def take(self, turn: Turn) -> float:
        """Decode behind the prompt, each token to the CPU and back; or compute calls without a cache."""
        device = self._decoder.device
        if turn.kind == "call":
            prompt = prompt_of(self._sizes.call_tokens, self._decoder.config.vocab_size)
            batch = ForwardBatch.of([prompt], device=device)

            def call() -> None:
                for _ in range(CALLS_OF_A_TURN):
                    self._decoder.logits(self._decoder(batch)[-1:])

            return rate(call, CALLS_OF_A_TURN * self._sizes.call_tokens, device)
        passes = self._passes_of(turn)
        self._rewind(turn.batch)

        def decode() -> None:
            tokens = [1] * turn.batch
            for _ in range(self._sizes.tokens):
                tokens = self._step(passes, tokens).argmax(-1).tolist()

        return rate(decode, self._sizes.tokens * turn.batch, device)

    def _step(self, passes: Passes, tokens: list[int]) -> Tensor:
        return passes.step([[token] for token in tokens], range(len(tokens)))

    def _rewind(self, batch: int) -> None:
        for slot in range(batch):
            self._caches[batch].truncate(slot, self._sizes.prompt)

    def _passes_of(self, turn: Turn) -> Passes:
        key = (turn.batch, turn.graphs)
        if key not in self._passes:
            if turn.batch not in self._caches:
                self._caches[turn.batch] = self._filled_cache(turn.batch)
            self._passes[key] = self._made_passes(turn.batch, graphs=turn.graphs)
        return self._passes[key]

    def _made_passes(self, batch: int, *, graphs: bool) -> Passes:
        self._decoder.execution = replace(self._decoder.execution, records_passes=graphs)
        return Passes(self._decoder, self._caches[batch])

    def _filled_cache(self, batch: int) -> KVCache:
        prompt = prompt_of(self._sizes.prompt, self._decoder.config.vocab_size)
        cache = self._decoder.new_cache(batch, self._sizes.prompt + self._sizes.tokens)
        self._decoder(ForwardBatch.of([prompt] * batch, device=self._decoder.device), cache)
        return cache


class Transformers:
    """transformers in bfloat16, its default cache and torch's fused attention, in the usual loop."""

    def __init__(self, shape: Shape, sizes: Sizes, device: torch.device) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        options = {key: value for key, value in shape.config().items() if key != "model_type"}
        config = AutoConfig.for_model(shape.model_type, **options)
        with torch.device(device):
            self._model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            ).eval()
        self._shape, self._sizes, self._device = shape, sizes, device
        total = sum(item.nbytes for item in self._model.parameters())
        embedding = 0 if shape.is_tied else self._model.get_input_embeddings().weight.nbytes
        self.bytes_per_step = total - embedding

    def prepare(self, turn: Turn) -> float | None:
        """See `Contestant`."""
        self.take(turn)
        return None

    @torch.inference_mode()
    def take(self, turn: Turn) -> float:
        """Do what `Ours` does."""
        if turn.kind == "call":
            ids = self._prompts(1, self._sizes.call_tokens)

            def call() -> None:
                for _ in range(CALLS_OF_A_TURN):
                    self._model(ids, use_cache=False, logits_to_keep=1)

            return rate(call, CALLS_OF_A_TURN * self._sizes.call_tokens, self._device)
        prompts = self._prompts(turn.batch, self._sizes.prompt)
        cache = self._model(prompts, use_cache=True, logits_to_keep=1).past_key_values

        def decode() -> None:
            tokens = [1] * turn.batch
            for _ in range(self._sizes.tokens):
                inputs = torch.tensor(tokens, device=self._device)[:, None]
                output = self._model(
                    inputs, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                tokens = output.logits[:, -1].argmax(-1).tolist()

        return rate(decode, self._sizes.tokens * turn.batch, self._device)

    def _prompts(self, batch: int, length: int) -> Tensor:
        prompt = prompt_of(length, self._shape.vocab_size)
        return torch.tensor([prompt] * batch, device=self._device)
