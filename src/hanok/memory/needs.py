"""What a checkpoint and its use will need: the sizes that a plan is made of. Imports no torch.

Only headers and config.json are read. Where there are no headers (a config alone), the files are taken
to hold what config.json declares.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Protocol

from hanok.attention.state import FLOAT_BYTES
from hanok.checkpoint.adapter_files import MAGNITUDE, AdapterFiles
from hanok.checkpoint.files import TensorRef
from hanok.errors import OptionError
from hanok.memory.learning import NOTHING, Learning, LearningNeeds
from hanok.memory.plan import Needs, Unit
from hanok.models.config import ModelConfig
from hanok.models.family import Family, Source

STORED_NAMES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CHUNK_BYTES = 2**20  # of rows that a reader holds while it quantizes or converts
PREFILL_TOKENS = 2048  # computed in one pass at the most
DRAFTED_SEQUENCES = 8  # whose keys and values a draft model has memory for, at the most
HEAP_SLACK = (
    1.5  # freed blocks of a pass are not all used again (measured: 159 MiB for 105 MiB alive)
)


class MethodBits(Protocol):
    """What is needed of a `QuantMethod`."""

    def bits_per_weight(self, columns: int) -> float:
        """See `QuantMethod.bits_per_weight`."""


class WeightBits(Protocol):
    """What is needed of a `Recipe`."""

    @property
    def shares_embedding(self) -> bool:
        """See `Recipe.shares_embedding`."""

    def method_for(self, parameter: str, *, is_tied: bool) -> MethodBits | None:
        """See `Recipe.method_for`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownBits:
    """Bits of a weight whatever its size."""

    bits: float

    def bits_per_weight(self, columns: int) -> float:
        """Return them."""
        return self.bits


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRecipe:
    """A recipe with its defaults, by its bits alone: what can be said of it without torch."""

    linear_bits: float
    head_bits: float
    shares_embedding: bool = True

    def method_for(self, parameter: str, *, is_tied: bool) -> KnownBits | None:
        """See `Recipe.method_for`."""
        module, _, leaf = parameter.rpartition(".")
        if leaf != "weight":
            return None
        if module == "lm_head" or (module == "embed_tokens" and is_tied):
            return KnownBits(bits=self.head_bits)
        return KnownBits(bits=self.linear_bits) if module.endswith("_proj") else None


KNOWN_RECIPES: Mapping[str, KnownRecipe] = {
    "int8": KnownRecipe(linear_bits=8.5, head_bits=8.5),
    "int4": KnownRecipe(linear_bits=4.5, head_bits=8.5),
    "nf4": KnownRecipe(linear_bits=4.5, head_bits=8.5),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How a model will be loaded and run."""

    dtype: str
    """What is computed in, and what weights are kept in that are not quantized."""
    context: int
    """Tokens of each sequence, prompt and answer."""
    batch: int = 1
    recipe: "WeightBits | None" = None
    """Which weights get fewer bits; None: none."""
    cache_dtype: str = "auto"
    may_map: bool = True
    """Whether weights that need no conversion may stay in their files."""
    learning: Learning | None = None
    """How it will be trained; None: it generates."""


def needs_of(
    family: Family,
    config: ModelConfig,
    table: Mapping[str, Source],
    tensors: Mapping[str, TensorRef],
    use: Use,
    *,
    num_readers: int,
    file_bytes_per_s: float,
) -> Needs:
    """Return the units of a model and what they take; without `tensors` files hold the dtype of use."""
    parameters = dict(table)
    has_own_head = use.recipe is not None and not use.recipe.shares_embedding
    if config.tie_embeddings and has_own_head:
        parameters["lm_head.weight"] = table["embed_tokens.weight"]
    sizes = {
        name: _Size.of(name, source, config, tensors, use) for name, source in parameters.items()
    }
    grouped: dict[str, list[str]] = {}
    for name in parameters:
        grouped.setdefault(unit_of(name), []).append(name)
    head = "lm_head" if "lm_head" in grouped else "embed_tokens"
    head_path = str(family.names_in(tensors)["lm_head"])
    order = ["embed_tokens", *(f"layers.{index}" for index in range(config.num_layers)), "norm"]
    learning = None
    if use.learning is not None:
        learning = LearningNeeds(family, config, use.learning, use.dtype)
    units = []
    for unit in order + (["lm_head"] if head == "lm_head" else []):
        names = tuple(grouped[unit])
        mine = [sizes[name] for name in names]
        units.append(
            Unit(
                name=unit,
                modules=_modules_of(unit, [parameters[name] for name in names], head_path, config),
                parameters=names,
                weight_bytes=sum(size.weight_bytes for size in mine),
                file_bytes=sum(size.file_bytes for size in mine),
                token_bytes=sum(size.token_bytes for size in mine),
                stream_bytes=sum(size.stream_bytes for size in mine),
                mapped_bytes=sum(size.mapped_bytes for size in mine),
                cache_bytes=_cache_bytes(config, unit, use),
                work_bytes=_head_bytes(config, use, learning)
                if unit == head and config.has_head
                else 0,
                learning=learning.of_unit(unit, names) if learning else NOTHING,
            )
        )
    return Needs(
        units=tuple(units),
        context=use.context,
        batch=use.batch,
        prompt_flops=float(config.flops_per_token(use.context // 2 or 1)) * use.context * use.batch,
        load_bytes=num_readers * max(size.load_bytes for size in sizes.values()),
        file_bytes_per_s=file_bytes_per_s,
        has_head=config.has_head,
    )


def choose_dtype(
    config: ModelConfig, tensors: Mapping[str, TensorRef], asked: str, *, is_on_cpu: bool
) -> str:
    """Return what is computed in: what was asked for, else what config.json or the files say.

    float16 becomes bfloat16 on a CPU, which multiplies it several times faster.
    """
    if asked != "auto":
        if asked not in FLOAT_BYTES:
            raise OptionError(f"dtype {asked!r} is unknown. Choose auto, {', '.join(FLOAT_BYTES)}.")
        return asked
    names = {stored: name for name, stored in STORED_NAMES.items()}
    stored = next((ref.dtype for ref in tensors.values() if "F" in ref.dtype), "F32")
    name = config.dtype or names.get(stored, "float32")
    name = name if name in FLOAT_BYTES else "float32"
    return "bfloat16" if name == "float16" and is_on_cpu else name


def activation_bytes(family: Family, config: ModelConfig, use: Use) -> int:
    """Return what one pass holds besides weights and cache, with the holes it leaves in the heap.

    In training that is what is held for a moment on the way back. Else the most is held inside a mixer
    or an MLP, besides four rows of hidden states: a block's input, what the mixer made of it, their sum,
    its norm.
    """
    if use.learning is not None:
        learning = LearningNeeds(family, config, use.learning, use.dtype)
        return learning.layer_bytes + learning.heap_bytes
    tokens = min(PREFILL_TOKENS, use.context * use.batch)
    hidden = config.hidden_size
    widths = 4 * hidden + max(layer.active_size(hidden) for layer in config.layers)
    return round(HEAP_SLACK * tokens * widths * FLOAT_BYTES[use.dtype])


def adapter_bytes(adapters: Iterable[AdapterFiles], dtype: str) -> int:
    """Return what adapters hold that are served in a dtype."""
    return sum(
        prod(ref.shape) * (4 if name.endswith(MAGNITUDE) else FLOAT_BYTES[dtype])
        for adapter in adapters
        for name, ref in adapter.tensors.items()
    )


def stays_as_it_is(source: Source, tensors: Mapping[str, TensorRef], dtype: str) -> bool:
    """Return whether a parameter's bytes lie in the file as `Decoder` wants them."""
    refs = [tensors[name] for name in source.names]
    keeps_order = source.layout == "rows" or (source.layout == "columns" and len(source.shape) == 1)
    return (
        keeps_order
        and all(ref.dtype == STORED_NAMES[dtype] and ref.strides is None for ref in refs)
        # Vector loads may assume that items start at multiples of their size.
        and refs[0].offset_bytes % FLOAT_BYTES[dtype] == 0
        and all(
            first.path == second.path
            and first.offset_bytes + first.size_bytes == second.offset_bytes
            for first, second in pairwise(refs)
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    """Bytes of one parameter."""

    weight_bytes: int
    """In its place."""
    file_bytes: int
    token_bytes: int
    """Read for each token."""
    stream_bytes: int
    """In a buffer, as floats."""
    mapped_bytes: int
    load_bytes: int
    """Held by a reader while the parameter is made, besides the parameter."""

    @classmethod
    def of(
        cls,
        name: str,
        source: Source,
        config: ModelConfig,
        tensors: Mapping[str, TensorRef],
        use: Use,
    ) -> "_Size":
        count, method = prod(source.shape), None
        if use.recipe is not None:
            method = use.recipe.method_for(name, is_tied=config.tie_embeddings)
        weight_bytes = count * FLOAT_BYTES[use.dtype]
        if method is not None:
            weight_bytes = round(count * method.bits_per_weight(source.shape[1]) / 8)
        refs = [tensors[part] for part in source.names if part in tensors]
        is_kept = method is None and (not refs or stays_as_it_is(source, tensors, use.dtype))
        load_bytes = 0
        if not is_kept:
            load_bytes = _bytes_while_made(source, refs, use.dtype, is_quantized=method is not None)
        return cls(
            weight_bytes=weight_bytes,
            file_bytes=sum(ref.size_bytes for ref in refs) or count * FLOAT_BYTES[use.dtype],
            token_bytes=_token_bytes(name, source, config, weight_bytes),
            stream_bytes=count * FLOAT_BYTES[use.dtype],
            mapped_bytes=weight_bytes if is_kept and use.may_map else 0,
            load_bytes=load_bytes,
        )


def _bytes_while_made(
    source: Source, refs: list[TensorRef], dtype: str, *, is_quantized: bool
) -> int:
    """Return what a reader holds besides the parameter itself."""
    is_moved = source.layout != "rows" or any(ref.strides is not None for ref in refs)
    if is_quantized:
        return 4 * prod(source.shape) if is_moved else CHUNK_BYTES
    converts = any(ref.dtype != STORED_NAMES[dtype] for ref in refs)
    largest = max((ref.size_bytes for ref in refs), default=0)
    return (largest if converts else 0) + (
        prod(source.shape) * FLOAT_BYTES[dtype] if is_moved else 0
    )


def _token_bytes(name: str, source: Source, config: ModelConfig, weight_bytes: int) -> int:
    if name == "embed_positions.weight" or (
        name == "embed_tokens.weight" and not config.tie_embeddings
    ):
        return weight_bytes // source.shape[0]
    return int(weight_bytes * config.active_share(name))


def _cache_bytes(config: ModelConfig, unit: str, use: Use) -> int:
    """Return the bytes of what a unit's layer keeps of all sequences."""
    if not unit.startswith("layers.") or use.learning is not None:
        return 0
    state = config.layers[int(unit.removeprefix("layers."))].mixer.state()
    dtype = "int8" if use.cache_dtype == "int8" else use.dtype
    return use.batch * state.nbytes(use.context, dtype) if state is not None else 0


def _head_bytes(config: ModelConfig, use: Use, learning: LearningNeeds | None) -> int:
    """Return the bytes of one row of scores for each sequence, as computed and in float32.

    In training those of a chunk of rows, as far as a layer does not hold as much at another moment.
    """
    if learning is not None:
        return max(0, learning.head_bytes - learning.layer_bytes)
    return use.batch * config.vocab_size * (FLOAT_BYTES[use.dtype] + 4)


def unit_of(parameter: str) -> str:
    """Return the unit that a parameter of `Decoder` is placed with."""
    parts = parameter.split(".")
    if parts[0] == "layers":
        return ".".join(parts[:2])
    return "embed_tokens" if parts[0] == "embed_positions" else parts[0]


def _modules_of(
    unit: str, found: list[Source], head_path: str, config: ModelConfig
) -> tuple[str, ...]:
    """Return how the checkpoint calls a unit: what the names of its tensors begin with."""
    names = [source.names[0] for source in found]
    if unit.startswith("layers."):
        parts = names[0].split(".")
        return (".".join(parts[: parts.index(unit.removeprefix("layers.")) + 1]),)
    modules = [name.rpartition(".")[0] for name in names]
    if unit == "lm_head" or (unit == "embed_tokens" and config.tie_embeddings):
        modules = [*(modules if unit != "lm_head" else []), head_path]
    return tuple(dict.fromkeys(modules))
