"""What a decoder is made of, as data: sizes, norms, rotary embeddings, layers. Imports no torch.

A family file reads a checkpoint's `config.json` into one `ModelConfig`; nothing after that sees the
Hugging Face mapping. A layer is a mixer, which lets tokens see others, and an MLP. Each says itself
what parameters it has, what it keeps between passes and what it computes, so that a plan can be made
before a byte is read. A mixer of another kind is another `Mixer` here or in a family's file, and one
file of `models/mixers` with its module.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import prod
from typing import Any, Literal

from hanok.attention.state import FLOAT_BYTES, KeysAndValues, StateSpec

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
NormPlacement = Literal["pre", "post", "sandwich", "parallel", "shared"]
Shapes = dict[str, tuple[int, ...]]
"""Of parameters, by their names in a module; weights are (out, in)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor`, so that `original_max_positions` become that many times more."""

    factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicScaling:
    """NTK-aware base, growing with the sequence once it is longer than `max_positions`."""

    factor: float
    max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """Interpolation by wavelength with a scaled attention (arXiv 2309.00071)."""

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    query_growth: float = 0.0
    """Queries are multiplied by 1 + this x ln(1 + position // `original_max_positions`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """Per-frequency divisors, one set up to `original_max_positions`, one beyond (arXiv 2402.13753)."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int
    attention_factor: float


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding of the first `rotary_dim` components of a head."""

    theta: float
    rotary_dim: int
    is_interleaved: bool = False  # pairs are neighbours (GLM) instead of halves (GPT-NeoX, Llama)
    scaling: RopeScaling | None = None

    @property
    def query_growth(self) -> float:
        """How much queries grow with their position; 0: they do not."""
        return self.scaling.query_growth if isinstance(self.scaling, YarnScaling) else 0.0

    def angles_for(self, num_tokens: int) -> int:
        """Return the length that the angles of a sequence of `num_tokens` are computed for.

        Lengths with the same answer share their angles; 0 where the length does not matter.
        """
        match self.scaling:
            case DynamicScaling(max_positions=limit):
                return max(num_tokens, limit)
            case LongRopeScaling(original_max_positions=limit):
                return limit + 1 if num_tokens > limit else limit
            case _:
                return 0

    def scaled_positions(self, declared: int) -> int:
        """Return how many positions this rope reaches, where the model declares `declared`.

        vLLM's rule: the original length times the factor, for linear, dynamic and YaRN scaling. Files
        may declare the length of before the scaling (Qwen2.5's recipe) or of after it; llama3 and
        longrope always declare the latter. The declared length is never lowered.
        """
        match self.scaling:
            case LinearScaling(factor=factor, original_max_positions=original):
                return max(declared, int(original * factor))
            case DynamicScaling(factor=factor, max_positions=original):
                return max(declared, int(original * factor))
            case YarnScaling(factor=factor, original_max_positions=original):
                return max(declared, int(original * factor))
            case _:
                return declared


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMSNorm or LayerNorm; `unit_offset` multiplies by 1 + weight (Gemma)."""

    kind: Literal["rms", "layer"]
    eps: float
    unit_offset: bool = False
    has_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) when not gated."""

    intermediate_size: int
    activation: Activation
    is_gated: bool = True
    has_bias: bool = False

    def parameter_shapes(self, hidden_size: int) -> Shapes:
        """Return the shapes of `MlpLayer`'s parameters."""
        size, bias = self.intermediate_size, self.has_bias
        if self.is_gated:
            shapes = linear_shapes("gate_up_proj", 2 * size, hidden_size, has_bias=bias)
        else:
            shapes = linear_shapes("up_proj", size, hidden_size, has_bias=bias)
        return shapes | linear_shapes("down_proj", hidden_size, size, has_bias=bias)

    @property
    def active_size(self) -> int:
        """Inner components that are computed for a token."""
        return self.intermediate_size

    def active_share(self, name: str) -> Fraction:
        """Return the share of a parameter, by its name here, that one token is multiplied with."""
        return Fraction(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Softmax router over gated MLPs; `is_renormalised` makes the chosen weights sum to 1."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    activation: Activation
    is_renormalised: bool

    @property
    def expert(self) -> Mlp:
        """Each of the MLPs."""
        return Mlp(intermediate_size=self.intermediate_size, activation=self.activation)

    def parameter_shapes(self, hidden_size: int) -> Shapes:
        """Return the shapes of `ExpertsLayer`'s parameters."""
        shapes: Shapes = {"router.weight": (self.num_experts, hidden_size)}
        for number in range(self.num_experts):
            shapes |= _inside(f"experts.{number}", self.expert.parameter_shapes(hidden_size))
        return shapes

    @property
    def active_size(self) -> int:
        """Inner components that are computed for a token, in all its experts."""
        return self.num_experts_per_token * self.intermediate_size

    def active_share(self, name: str) -> Fraction:
        """Return the share of a parameter, by its name here, that one token is multiplied with."""
        is_one_of_many = name.startswith("experts.")
        return (
            Fraction(self.num_experts_per_token, self.num_experts)
            if is_one_of_many
            else Fraction(1)
        )


class Mixer(ABC):
    """What lets the tokens of a layer see others. A subclass is a frozen dataclass without torch.

    Its module, found by its type (`models/mixers/base.py`), has these parameters and this state.
    """

    def rotation(self) -> Rope | None:
        """Return the rotary embedding whose cosines and sines the module is given; None: it is not."""
        return None

    @property
    def part_rows(self) -> Mapping[str, tuple[int, ...]]:
        """Rows of the parts of fused weights, by module; parts that are not named are equal."""
        return {}

    @property
    def head_rows(self) -> int:
        """Rows of a head in a weight that files keep head by head (the layout "heads")."""
        return 1

    @abstractmethod
    def parameter_shapes(self, hidden_size: int) -> Shapes:
        """Return the shapes of its module's parameters."""

    @abstractmethod
    def state(self) -> StateSpec | None:
        """Return what it keeps of a sequence between passes; None: nothing."""

    @abstractmethod
    def flops_per_token(self, context_tokens: int) -> int:
        """Return the operations of a token that sees `context_tokens`, besides those of its weights."""

    @abstractmethod
    def active_size(self, hidden_size: int) -> int:
        """Return the components that are held for a token while it is computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxAttention(Mixer):
    """Attention with grouped query heads (arXiv 2305.13245), perhaps over a sliding window."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None  # None: no position information in this layer
    window: int | None = None  # tokens a query sees, itself included; None: all
    scale: float | None = None  # of scores; None: 1 / sqrt(head_dim)
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    qk_norm: Literal["head", "full"] | None = None
    has_qkv_bias: bool = False
    has_output_bias: bool = False

    def rotation(self) -> Rope | None:
        """See `Mixer`."""
        return self.rope

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the query, key and value projections."""
        key_rows = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, key_rows, key_rows

    @property
    def qk_norm_sizes(self) -> tuple[int, int]:
        """Components that the norms of queries and of keys have weights for."""
        return (self.head_dim,) * 2 if self.qk_norm == "head" else self.qkv_sizes[:2]

    @property
    def part_rows(self) -> Mapping[str, tuple[int, ...]]:
        """See `Mixer`."""
        return {"qkv_proj": self.qkv_sizes}

    @property
    def head_rows(self) -> int:
        """See `Mixer`."""
        return self.head_dim

    def parameter_shapes(self, hidden_size: int) -> Shapes:
        """See `Mixer`."""
        rows, output = sum(self.qkv_sizes), self.qkv_sizes[0]
        shapes = linear_shapes("qkv_proj", rows, hidden_size, has_bias=self.has_qkv_bias)
        shapes |= linear_shapes("o_proj", hidden_size, output, has_bias=self.has_output_bias)
        if self.qk_norm is not None:
            query, key = self.qk_norm_sizes
            shapes |= {"q_norm.weight": (query,), "k_norm.weight": (key,)}
        return shapes

    def state(self) -> KeysAndValues:
        """See `Mixer`."""
        return KeysAndValues(num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)

    def flops_per_token(self, context_tokens: int) -> int:
        """See `Mixer`: four for each head component and visible key, for scores and weighted sum."""
        seen = min(context_tokens, self.window or context_tokens)
        return 4 * self.num_heads * self.head_dim * seen

    def active_size(self, hidden_size: int) -> int:
        """See `Mixer`."""
        return 2 * sum(self.qkv_sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """One layer: x + mixer(norm(x)), then x + mlp(norm(x)), with norms where `norm_placement` says.

    A family with another block defines a subclass, and a module for it in `models/mixers`.
    """

    mixer: Mixer
    mlp: Mlp | Experts
    norm_placement: NormPlacement = "pre"
    residual_scale: float = 1.0
    """What the outputs of mixer and MLP are multiplied by before they are added."""

    @property
    def attention(self) -> SoftmaxAttention:
        """The mixer, which is attention."""
        if not isinstance(self.mixer, SoftmaxAttention):
            raise TypeError(f"the layer has no attention, but {type(self.mixer).__name__}")
        return self.mixer

    def with_attention(self, **changes: Any) -> "LayerConfig":
        """Return the layer with other fields of its `SoftmaxAttention`."""
        return replace(self, mixer=replace(self.attention, **changes))

    def with_mlp(self, **changes: Any) -> "LayerConfig":
        """Return the layer with other fields of its `Mlp`."""
        return replace(self, mlp=replace(self.mlp, **changes))

    def norm_names(self) -> tuple[str, ...]:
        """Return the names of the block's norms, in the order of their use."""
        return {
            "pre": ("attention_norm", "mlp_norm"),
            "parallel": ("attention_norm", "mlp_norm"),
            "shared": ("attention_norm",),  # parallel, and both read the same norm
            "post": ("attention_post_norm", "mlp_post_norm"),
            "sandwich": ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"),
        }[self.norm_placement]

    def parameter_shapes(self, hidden_size: int, norm: Norm) -> Shapes:
        """Return the shapes of the block's parameters. The mixer is called as Llama's attention."""
        shapes = _inside("self_attn", self.mixer.parameter_shapes(hidden_size))
        shapes |= _inside("mlp", self.mlp.parameter_shapes(hidden_size))
        for name in self.norm_names():
            shapes |= norm_shapes(name, norm, hidden_size)
        return shapes

    def active_share(self, name: str) -> Fraction:
        """Return the share of a parameter, by its name here, that one token is multiplied with."""
        part, _, inner = name.partition(".")
        return self.mlp.active_share(inner) if part == "mlp" else Fraction(1)

    def num_active_parameters(self, hidden_size: int, norm: Norm) -> int:
        """Return the components of the matrices that one token is multiplied with."""
        return sum(
            round(prod(shape) * self.active_share(name))
            for name, shape in self.parameter_shapes(hidden_size, norm).items()
            if len(shape) == 2
        )

    def active_size(self, hidden_size: int) -> int:
        """Return the components that are held for a token where the most are.

        That is in the mixer, or in the MLP: gate and up side by side, and their product.
        """
        return max(3 * self.mlp.active_size, self.mixer.active_size(hidden_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder. The defaults are Llama's; names are Hugging Face's where it has one.

    A field enters when two model types need it, and what one layer needs is a field of the layer.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    norm: Norm
    layers: tuple[LayerConfig, ...]
    tie_embeddings: bool = False
    has_head: bool = True  # False: a base model, which makes hidden states and no scores of tokens
    has_learned_positions: bool = False
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    dtype: str | None = None  # what config.json declares, a torch name ("bfloat16")
    ropes: frozenset[Rope] = field(init=False, repr=False, compare=False)
    """All rotary embeddings of the layers."""

    def __post_init__(self) -> None:
        ropes = (layer.mixer.rotation() for layer in self.layers)
        object.__setattr__(self, "ropes", frozenset(rope for rope in ropes if rope is not None))

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @property
    def attentions(self) -> list[SoftmaxAttention]:
        """The mixers that are attention, in the layers' order, equal ones once."""
        mixers = dict.fromkeys(layer.mixer for layer in self.layers)
        return [mixer for mixer in mixers if isinstance(mixer, SoftmaxAttention)]

    def with_layers(self, **changes: Any) -> "ModelConfig":
        """Return the model with other fields of every `LayerConfig`."""
        return replace(self, layers=tuple(replace(layer, **changes) for layer in self.layers))

    def with_attention(self, **changes: Any) -> "ModelConfig":
        """Return the model with other fields of every layer's `SoftmaxAttention`."""
        layers = tuple(layer.with_attention(**changes) for layer in self.layers)
        return replace(self, layers=layers)

    def with_mlp(self, **changes: Any) -> "ModelConfig":
        """Return the model with other fields of every layer's `Mlp`."""
        return replace(self, layers=tuple(layer.with_mlp(**changes) for layer in self.layers))

    @property
    def max_context_tokens(self) -> int:
        """Tokens of a sequence at the most: what every layer's positions reach, scaled or not."""
        if self.has_learned_positions:
            return self.max_positions
        reached = [rope.scaled_positions(self.max_positions) for rope in self.ropes]
        return min(reached, default=self.max_positions)

    def shares_angles(self, num_tokens: int, other: int) -> bool:
        """Return whether sequences of these lengths rotate their heads by the same angles."""
        return all(rope.angles_for(num_tokens) == rope.angles_for(other) for rope in self.ropes)

    def why_not_truncated(self) -> str | None:
        """Return why a sequence cannot go back to its first tokens; None where it can."""
        states = (layer.mixer.state() for layer in self.layers)
        names = {state.name for state in states if state is not None and not state.can_truncate}
        if not names:
            return None
        return (
            f"layers of {self.model_type} keep {' and '.join(sorted(names))}, which later tokens have "
            "changed and which cannot be truncated"
        )

    def parameter_shapes(self) -> Shapes:
        """Return the shape of every parameter, by its name in `Decoder`."""
        hidden = self.hidden_size
        shapes: Shapes = {"embed_tokens.weight": (self.vocab_size, hidden)}
        if self.has_learned_positions:
            shapes["embed_positions.weight"] = (self.max_positions, hidden)
        for index, layer in enumerate(self.layers):
            shapes |= _inside(f"layers.{index}", layer.parameter_shapes(hidden, self.norm))
        shapes |= norm_shapes("norm", self.norm, hidden)
        if self.has_head and not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def active_share(self, name: str) -> Fraction:
        """Return the share of a parameter, by its name in `Decoder`, that one token needs."""
        parts = name.split(".", 2)
        return (
            self.layers[int(parts[1])].active_share(parts[2])
            if parts[0] == "layers"
            else Fraction(1)
        )

    def num_parameters(self) -> int:
        """Return the number of parameters, tied ones counted once."""
        return sum(prod(shape) for shape in self.parameter_shapes().values())

    def num_active_parameters(self) -> int:
        """Return the parameters that one token is multiplied with: matrices of chosen experts, head."""
        head = self.vocab_size * self.hidden_size if self.has_head else 0
        layers = self.layers
        return head + sum(
            item.num_active_parameters(self.hidden_size, self.norm) for item in layers
        )

    def parameter_bytes(self, dtype: str) -> int:
        """Return the bytes of all parameters in `dtype` ("bfloat16", …)."""
        return self.num_parameters() * FLOAT_BYTES[dtype]

    def kv_cache_bytes(self, num_tokens: int, dtype: str) -> int:
        """Return the bytes of the states of one sequence of `num_tokens`, all layers; also in "int8"."""
        states = (layer.mixer.state() for layer in self.layers)
        return sum(state.nbytes(num_tokens, dtype) for state in states if state is not None)

    def flops_per_token(self, context_tokens: int) -> int:
        """Return the floating-point operations of one token that sees `context_tokens`.

        Two per parameter and token for the matrices, and what mixers compute besides (arXiv 2001.08361,
        appendix B, with windows counted).
        """
        mixed = sum(layer.mixer.flops_per_token(context_tokens) for layer in self.layers)
        return 2 * self.num_active_parameters() + mixed


def linear_shapes(name: str, rows: int, columns: int, *, has_bias: bool = False) -> Shapes:
    """Return the shapes of a `Linear` called `name`."""
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if has_bias else shapes


def norm_shapes(name: str, norm: Norm, size: int) -> Shapes:
    """Return the shapes of a `NormLayer` called `name`."""
    names = (f"{name}.weight", f"{name}.bias") if norm.has_bias else (f"{name}.weight",)
    return dict.fromkeys(names, (size,))


def _inside(path: str, shapes: Shapes) -> Shapes:
    return {f"{path}.{name}": shape for name, shape in shapes.items()}
