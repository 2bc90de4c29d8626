"""What a training adds to a model's memory: what learns, its gradients and moments, and activations.

Imports no torch. Activations are what autograd keeps of a pass over the tokens of one pack: the inputs
of what learns, and what the backward forms of norm, gate and attention compute again from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod

from hanok.attention.state import FLOAT_BYTES
from hanok.checkpoint.lora_config import LoraConfig
from hanok.models.config import LayerConfig, ModelConfig, SoftmaxAttention
from hanok.models.family import Family, Source, usual_sources

LOGITS_BYTES = 2**27
"""Of the float32 scores that are held at once, a chunk of rows; a row at the least."""
MOMENTS = 2  # of AdamW
GATE_WIDTHS = 7  # of an MLP's inner size in float32, held on the way back through its gate
# Of the activations in float32, what the heap holds of freed blocks; with layers computed again more,
# as blocks of all kinds are freed between those that stay (measured: benchmarks/train.py).
HEAP_SHARES = {False: 0.08, True: 0.35}
OWN_NAMES = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """How a model will be trained, as far as memory is concerned."""

    lora: LoraConfig | None
    """The adapter that learns; None: all weights."""
    pack_tokens: int
    """Tokens of one pass."""
    gradient_checkpointing: bool = False
    """Whether only what goes into each layer is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningBytes:
    """Bytes of a training beside the weights of the model."""

    learnt: int = 0
    """What learns, where it is not the weights themselves: adapters, float32 masters."""
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, item.name) for item in fields(self))

    def __add__(self, other: "LearningBytes") -> "LearningBytes":
        return LearningBytes(
            **{
                item.name: getattr(self, item.name) + getattr(other, item.name)
                for item in fields(self)
            }
        )


NOTHING = LearningBytes()


class LearningNeeds:
    """The bytes of a training by the units of a model, and what it holds for a moment."""

    def __init__(self, family: Family, config: ModelConfig, learning: Learning, dtype: str) -> None:
        self._config = config
        self._learning = learning
        self._size = FLOAT_BYTES[dtype]
        self._table = usual_sources(family, config)
        self._places = {
            path: (name, rows, source.shape)
            for name, source in self._table.items()
            for path, rows in zip(_paths(source), source.rows, strict=True)
        }
        self._products = [
            path
            for path, (name, *_) in self._places.items()
            if name.endswith("_proj.weight") or name == "lm_head.weight"
        ]
        self._learns, self._learnt = self._numbers()

    def of_unit(self, unit: str, parameters: Sequence[str]) -> LearningBytes:
        """Return what a unit's parameters need."""
        numbers = sum(self._learnt.get(name, 0) for name in parameters)
        if unit in ("embed_tokens", "lm_head") and self._config.tie_embeddings:
            numbers += self._learnt.get("lm_head.weight", 0)
        lora = self._learning.lora
        is_master = lora is None and self._size == 4
        grown = 2 if lora is not None and lora.is_pissa else 1
        return LearningBytes(
            learnt=0 if is_master else 4 * numbers * grown,
            gradients=4 * numbers,
            optimizer=4 * MOMENTS * numbers,
            activations=self._activations(unit),
        )

    @property
    def layer_bytes(self) -> int:
        """Held for a moment on the way back through a layer; its activations as well, if made again."""
        return max(map(self._moment, range(self._config.num_layers)))

    @property
    def heap_bytes(self) -> int:
        """Freed blocks that are not all used again."""
        widths = sum(self._widths(index) for index in range(self._config.num_layers))
        share = HEAP_SHARES[self._learning.gradient_checkpointing]
        return round(share * self._learning.pack_tokens * widths * 4)

    @property
    def head_bytes(self) -> int:
        """Held for a moment while a chunk of scores goes forward and back."""
        config = self._config
        tokens = self._learning.pack_tokens
        rows = max(1, min(tokens, LOGITS_BYTES // (4 * config.vocab_size)))
        widths = 1 + (config.logit_softcap is not None) * 2
        held = rows * config.vocab_size * (4 * widths + (self._size if self._size < 4 else 0))
        weight = self._learnt.get("lm_head.weight", 0)
        if self._learning.lora is None:
            weight = self._learnt["embed_tokens.weight"]
        # The gradient of a whole matrix is made for each chunk and added up.
        return held + weight * 4 + tokens * config.hidden_size * self._size

    def _numbers(self) -> tuple[set[str], dict[str, int]]:
        """Return which products learn, and how many numbers do by parameter."""
        lora, found = self._learning.lora, dict[str, int]()
        if lora is None:
            shapes = self._config.parameter_shapes()
            return set(self._products), {name: prod(shape) for name, shape in shapes.items()}
        embedding, head = (
            _paths(self._table[name])[0] if name in self._table else "" for name in OWN_NAMES
        )
        chosen = lora.targets(self._products, head)
        for path in chosen:
            name, rows, shape = self._places[path]
            count = lora.rank_of(path) * (rows + shape[1]) + (rows if lora.use_dora else 0)
            found[name] = found.get(name, 0) + count
        modules = [
            path
            for path, (name, *_) in self._places.items()
            if name in OWN_NAMES or name.endswith("norm.weight")
        ]
        for path in lora.whole(modules):
            name, _, shape = self._places[path]
            found[name] = found.get(name, 0) + prod(shape)
        for path, ids in lora.token_rows(embedding, head).items():
            name, _, shape = self._places[path]
            found[name] = found.get(name, 0) + len(ids) * shape[1]
        return set(chosen), found

    def _activations(self, unit: str) -> int:
        tokens, hidden = self._learning.pack_tokens, self._config.hidden_size
        if not unit.startswith("layers."):
            return tokens * hidden * self._size * (2 if unit == "norm" else 1)
        index = int(unit.removeprefix("layers."))
        if self._learning.gradient_checkpointing:
            return tokens * hidden * self._size
        return self._kept(index)

    def _moment(self, index: int) -> int:
        layer, tokens = self._config.layers[index], self._learning.pack_tokens
        inner = layer.mlp.active_size
        held = tokens * GATE_WIDTHS * inner * 4
        return held + (self._kept(index) if self._learning.gradient_checkpointing else 0)

    def _kept(self, index: int) -> int:
        """Return what autograd keeps of a layer, in bytes."""
        return self._learning.pack_tokens * self._widths(index) * self._size

    def _widths(self, index: int) -> int:
        """Return how many numbers autograd keeps of a layer for each token."""
        layer = self._config.layers[index]
        widths = _norm_widths(layer, self._config.hidden_size)
        lora = self._learning.lora
        dropout = 0.0 if lora is None else lora.lora_dropout
        for name, source in self._table.items():
            if not name.startswith(f"layers.{index}.") or not name.endswith("_proj.weight"):
                continue
            mine = [path for path in _paths(source) if path in self._learns]
            share = self._config.layers[index].mlp.active_share(
                name.removeprefix(f"layers.{index}.mlp.")
            )
            if mine:
                widths += int(source.shape[1] * (share if "experts" in name else 1))
            if mine and lora is not None:
                widths += sum(map(lora.rank_of, mine))
                if dropout:  # its mask, in the dtype of x
                    widths += source.shape[1]
        return widths + _mixer_widths(layer) + _mlp_widths(layer)


def _paths(source: Source) -> list[str]:
    return [name.removesuffix(".weight") for name in source.names]


def _norm_widths(layer: LayerConfig, hidden: int) -> int:
    """Return the widths of what norms keep: their inputs."""
    return hidden * len(layer.norm_names())


def _mixer_widths(layer: LayerConfig) -> int:
    """Return the widths of what attention keeps: queries and keys as rotated, values as projected."""
    mixer = layer.mixer
    if not isinstance(mixer, SoftmaxAttention):
        return 2 * sum(mixer.part_rows.get("qkv_proj", (0,)))
    q, k, v = mixer.qkv_sizes
    return (q + k + v) + (q + k)


def _mlp_widths(layer: LayerConfig) -> int:
    """Return the widths of what the gate keeps: its input."""
    mlp = layer.mlp
    return mlp.active_size * 2
