"""The last part of benchmarks/gpu.py: steps of LoRA and of QLoRA on one GPU, ours and peft's.

Each side is made on the device with random weights. A step is one document of which every token but the
first is a target; activations are computed again, on both sides. An adapter of rank 16 is on all linear
products but the head. Memory is what torch's allocator held at the most, of steps and model together.

A step's work is four operations for each weight that multiplies, and token: two forward, two backward to
the activations; attention and what is computed again are not counted. Its share is that of products of
large matrices in bfloat16, measured in the same rounds.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import gpu_contestants
import gpu_report
import measure
import torch
from checkpoints import Shape
from gpu_contestants import GPU_SHAPES, Contestant, Sizes, Turn, make_decoder, prompt_of, rate
from gpu_parts import Round
from torch import nn

from hanok.attention.base import ForwardBatch
from hanok.bench.spread import Spread
from hanok.checkpoint.lora_config import LoraConfig
from hanok.memory.adapters import attach_new
from hanok.models.adapters import activate
from hanok.models.family import family_of, read_config, usual_sources
from hanok.quant.recipe import read_recipe
from hanok.training.loss import backward
from hanok.training.optimizer import Optimizer
from hanok.training.options import TrainOptions

PRODUCTS = "products"
OURS = ("hanok bfloat16", "hanok nf4")
THEIRS = ("peft bfloat16", "peft nf4")
RANK = 16
FLOP_PER_WEIGHT = 4
STEPS_OF_A_TURN = 2
PRODUCTS_OF_A_TURN = 8


def why_not(name: str) -> str | None:
    """Return why a contestant cannot take part; None: it can."""
    needed = {"peft bfloat16": ("peft",), "peft nf4": ("peft", "bitsandbytes")}.get(name, ())
    missing = [item for item in needed if find_spec(item) is None]
    return f"{name} is left out: {missing[0]} is not installed" if missing else None


def turns_of() -> dict[str, list[Turn]]:
    """Return the turns of each contestant that can take part."""
    turns = {PRODUCTS: [Turn(contestant=PRODUCTS, kind="products")]}
    for name in (*OURS, *THEIRS):
        if why_not(name) is None:
            turns[name] = [
                Turn(contestant=name, kind="train"),
                Turn(contestant=name, kind="memory"),
            ]
    return turns


def serve(connection: Connection, name: str, sizes: Sizes, device_type: str) -> None:
    """See `gpu_contestants.serve`."""
    gpu_contestants.serve(connection, name, sizes, device_type, learner_of)


def learner_of(name: str, sizes: Sizes, device: torch.device) -> Contestant:
    """Return a contestant by name."""
    if name == PRODUCTS:
        return Products(sizes.product_side, device)
    quant = None if name.endswith("bfloat16") else "nf4"
    shape = GPU_SHAPES[sizes.shape]
    made = Ours if name in OURS else Peft
    return made(shape, quant, sizes.train_tokens, device)


class Products:
    """Products of large matrices."""

    def __init__(self, side: int, device: torch.device) -> None:
        self._left = torch.randn(side, side, device=device).to(torch.bfloat16)
        self._right = torch.randn(side, side, device=device).to(torch.bfloat16)
        self._result = torch.empty_like(self._left)
        self.bytes_per_step = 0

    def prepare(self, turn: Turn) -> float | None:
        """See `Contestant`."""
        self.take(turn)
        return None

    def take(self, turn: Turn) -> float:
        """Return floating-point operations per second."""

        def multiply() -> None:
            for _ in range(PRODUCTS_OF_A_TURN):
                torch.mm(self._left, self._right, out=self._result)

        amount = 2.0 * PRODUCTS_OF_A_TURN * len(self._left) ** 3
        return rate(multiply, amount, self._left.device)


class Learner:
    """A model that learns; `bytes_per_step` is not read of it."""

    bytes_per_step = 0

    def __init__(self, device: torch.device, num_tokens: int) -> None:
        self._device, self._num_tokens = device, num_tokens

    def step(self) -> None:
        """Compute one step."""
        raise NotImplementedError

    def prepare(self, turn: Turn) -> float | None:
        """See `Contestant`."""
        if turn.kind == "train":
            self.step()
        return None

    def take(self, turn: Turn) -> float:
        """Return tokens per second, or of the turn "memory" the GB that were held at the most."""
        if turn.kind == "memory":
            is_gpu = self._device.type == "cuda"
            return torch.cuda.max_memory_allocated(self._device) / 1e9 if is_gpu else 0.0

        def steps() -> None:
            for _ in range(STEPS_OF_A_TURN):
                self.step()

        return rate(steps, STEPS_OF_A_TURN * self._num_tokens, self._device)


class Ours(Learner):
    """hanok's decoder, loss and optimizer, as `hanok.Trainer` calls them."""

    def __init__(
        self, shape: Shape, quant: str | None, num_tokens: int, device: torch.device
    ) -> None:
        super().__init__(device, num_tokens)
        recipe = None if quant is None else read_recipe(quant)
        self._decoder = make_decoder(shape, recipe, device)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        table = usual_sources(family_of(shape.config(), shape.name), self._decoder.config)
        generator = torch.Generator().manual_seed(0)
        attach_new(self._decoder, table, config, index=0, generator=generator)
        activate(self._decoder, 0)
        self._decoder.gradient_checkpointing = True
        self._decoder.train()
        self._optimizer = Optimizer(self._decoder, TrainOptions(lora=config))
        ids = prompt_of(num_tokens, shape.vocab_size)
        self._batch = ForwardBatch.of([ids], device=device)
        self._targets = torch.tensor(ids[1:], device=device)

    def step(self) -> None:
        """See `Learner`."""
        hidden = self._decoder(self._batch)[:-1]
        backward(self._decoder, hidden, self._targets, 1 / len(self._targets))
        self._optimizer.step(1e-4)
        self._decoder.weights_changed()


class Peft(Learner):
    """transformers + peft in a plain loop; with nf4, the base in bitsandbytes' products."""

    def __init__(
        self, shape: Shape, quant: str | None, num_tokens: int, device: torch.device
    ) -> None:
        import peft
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__(device, num_tokens)
        options = {key: value for key, value in shape.config().items() if key != "model_type"}
        config = AutoConfig.for_model(shape.model_type, **options)
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            )
        if quant is not None:
            quantize(base, device)
        lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        self._model: Any = peft.get_peft_model(base, lora)
        self._model.train()
        self._model.activation_checkpointing_enable({"use_reentrant": False})
        self._model.enable_input_require_grads()
        self._learnt = [item for item in self._model.parameters() if item.requires_grad]
        self._optimizer = torch.optim.AdamW(self._learnt, lr=1e-4, fused=True)
        self._ids = torch.tensor([prompt_of(num_tokens, shape.vocab_size)], device=device)
        if device.type == "cuda":  # what quantizing took is no step's
            torch.cuda.reset_peak_memory_stats(device)

    def step(self) -> None:
        """See `Learner`."""
        self._model(input_ids=self._ids, labels=self._ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(self._learnt, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def quantize(model: Any, device: torch.device) -> None:
    """Put bitsandbytes' nf4 products in place of all linear ones but the head, as QLoRA has them."""
    import bitsandbytes

    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or path == "lm_head":
            continue
        made = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        made.weight = bitsandbytes.nn.Params4bit(
            module.weight.detach().cpu(), requires_grad=False, quant_type="nf4"
        )
        made.bias = module.bias
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to(device))
    model.is_loaded_in_4bit = True  # what peft looks at


# The report


def training_table(
    turns: Mapping[str, Sequence[Turn]], rounds: Sequence[Round], shape: Shape
) -> str:
    """Return one line for each that has a figure."""
    work = FLOP_PER_WEIGHT * multiplied_weights(shape)
    (peak,) = turns[PRODUCTS]
    lines = []
    for name in (item for item in turns if item != PRODUCTS):
        train, memory = turns[name]
        values = [item[train] for item in rounds if train in item]
        if not values:
            continue
        done, best = gpu_report.both(rounds, train, peak)
        held = [item[memory] for item in rounds if memory in item]
        other = name.replace("hanok", "peft")
        times = gpu_report.NONE
        if other in turns and other != name:
            times = gpu_report.times(rounds, train, turns[other][0])
        share = (
            str(Spread.of_ratio([item * work for item in done], best)) if done else gpu_report.NONE
        )
        lines.append(
            [name, Spread.of(values), times, Spread.of(held) if held else gpu_report.NONE, share]
        )
    header = ("", "tokens/s", "× peft", "peak, GB", "share of products")
    return measure.table(header, lines)


def products_line(turns: Mapping[str, Sequence[Turn]], rounds: Sequence[Round]) -> str:
    """Return what products of large matrices reached, in a sentence, or nothing."""
    (peak,) = turns[PRODUCTS]
    values = [item[peak] / 1e12 for item in rounds if peak in item]
    return f"Products of large matrices: {Spread.of(values)} TFLOP/s." if values else ""


def multiplied_weights(shape: Shape) -> int:
    """Return the weights that a token is multiplied with: all matrices, the embedding only as a head."""
    config = read_config(shape.config(), shape.name)[1]
    embedding = 0 if shape.is_tied else shape.vocab_size * shape.hidden_size
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    return config.num_parameters() - embedding - norms
