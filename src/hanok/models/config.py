"""What a decoder is made of, as data: sizes, norms, rotary embeddings, layers. Imports no torch.

A family file reads a checkpoint's `config.json` into one `ModelConfig`; nothing after that sees the
Hugging Face mapping. A field enters when two families need it. What differs from layer to layer
stands in `layers`, never in a pattern string. Formulas for parameters, bytes and FLOPs are here too,
so that a plan can be made before a byte is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


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
        """Return how many positions this rope tells apart, where the model declares `declared`.

        vLLM's rule: the original length times the factor, for linear, dynamic and YaRN scaling. Files
        may declare the length of before the scaling (Qwen2.5's recipe) or of after it; llama3 and
        longrope always declare the latter. What is declared is never taken back.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Softmax router over gated MLPs; `is_renormalised` makes the chosen weights sum to 1."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    is_renormalised: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What may differ from layer to layer."""

    rope: Rope | None  # None: no position information in this layer
    window: int | None = None  # tokens a query sees, itself included; None: all
    has_experts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder. The defaults are Llama's; names are Hugging Face's where it has one."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: Norm
    mlp: Mlp
    layers: tuple[LayerConfig, ...]
    experts: Experts | None = None
    tie_embeddings: bool = False
    has_head: bool = True  # False: a base model, which makes hidden states and no scores of tokens
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    norm_placement: Literal["pre", "post", "sandwich", "parallel", "shared"] = "pre"
    qk_norm: Literal["head", "full"] | None = None
    has_learned_positions: bool = False
    attention_scale: float = field(default=0.0)  # 0: 1 / sqrt(head_dim)
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    dtype: str | None = None  # what config.json declares, a torch name ("bfloat16")

    def __post_init__(self) -> None:
        if self.attention_scale == 0.0:
            object.__setattr__(self, "attention_scale", self.head_dim**-0.5)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @property
    def max_context_tokens(self) -> int:
        """Tokens of a sequence at the most: what every layer's positions reach, scaled or not."""
        ropes = {layer.rope for layer in self.layers if layer.rope is not None}
        if self.has_learned_positions:
            return self.max_positions
        reached = [rope.scaled_positions(self.max_positions) for rope in ropes]
        return min(reached, default=self.max_positions)

    def shares_angles(self, num_tokens: int, other: int) -> bool:
        """Return whether sequences of these lengths turn their heads by the same angles."""
        ropes = {layer.rope for layer in self.layers if layer.rope is not None}
        return all(rope.angles_for(num_tokens) == rope.angles_for(other) for rope in ropes)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the query, key and value projections."""
        key_rows = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, key_rows, key_rows

    def norm_names(self) -> tuple[str, ...]:
        """Return the names of a block's norms, in the order of their use."""
        return {
            "pre": ("attention_norm", "mlp_norm"),
            "parallel": ("attention_norm", "mlp_norm"),
            "shared": ("attention_norm",),  # parallel, and both read the same norm
            "post": ("attention_post_norm", "mlp_post_norm"),
            "sandwich": ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"),
        }[self.norm_placement]

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter, by its name in `Decoder` (weights are (out, in))."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, hidden)}
        if self.has_learned_positions:
            shapes["embed_positions.weight"] = (self.max_positions, hidden)
        for index, layer in enumerate(self.layers):
            for name, shape in self._layer_shapes(layer).items():
                shapes[f"layers.{index}.{name}"] = shape
        shapes |= self._norm_shapes("norm", hidden)
        if self.has_head and not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def _layer_shapes(self, layer: LayerConfig) -> dict[str, tuple[int, ...]]:
        hidden, (query_rows, key_rows, _) = self.hidden_size, self.qkv_sizes
        shapes = _linear("self_attn.qkv_proj", query_rows + 2 * key_rows, hidden, self.has_qkv_bias)
        shapes |= _linear("self_attn.o_proj", hidden, query_rows, self.has_output_bias)
        if self.qk_norm is not None:
            sizes = (self.head_dim,) * 2 if self.qk_norm == "head" else (query_rows, key_rows)
            for name, size in zip(("q_norm", "k_norm"), sizes, strict=True):
                shapes[f"self_attn.{name}.weight"] = (size,)
        if layer.has_experts and self.experts is not None:
            shapes["mlp.router.weight"] = (self.experts.num_experts, hidden)
            for expert in range(self.experts.num_experts):
                prefix, size = f"mlp.experts.{expert}", self.experts.intermediate_size
                shapes |= _linear(f"{prefix}.gate_up_proj", 2 * size, hidden, False)
                shapes |= _linear(f"{prefix}.down_proj", hidden, size, False)
        else:
            size, first = (
                self.mlp.intermediate_size,
                "gate_up_proj" if self.mlp.is_gated else "up_proj",
            )
            rows = 2 * size if self.mlp.is_gated else size
            shapes |= _linear(f"mlp.{first}", rows, hidden, self.mlp.has_bias)
            shapes |= _linear("mlp.down_proj", hidden, size, self.mlp.has_bias)
        for name in self.norm_names():
            shapes |= self._norm_shapes(name, hidden)
        return shapes

    def _norm_shapes(self, name: str, size: int) -> dict[str, tuple[int, ...]]:
        names = (f"{name}.weight", f"{name}.bias") if self.norm.has_bias else (f"{name}.weight",)
        return dict.fromkeys(names, (size,))

    def num_parameters(self) -> int:
        """Return the number of parameters, tied ones counted once."""
        return sum(prod(shape) for shape in self.parameter_shapes().values())

    def num_active_parameters(self) -> int:
        """Return the parameters that one token is multiplied with: matrices of chosen experts, head."""
        total = self.vocab_size * self.hidden_size if self.has_head else 0
        for layer in self.layers:
            for name, shape in self._layer_shapes(layer).items():
                share = 1.0
                if self.experts is not None and name.startswith("mlp.experts."):
                    share = self.experts.num_experts_per_token / self.experts.num_experts
                if len(shape) == 2:
                    total += round(prod(shape) * share)
        return total

    def parameter_bytes(self, dtype: str) -> int:
        """Return the bytes of all parameters in `dtype` ("bfloat16", …)."""
        return self.num_parameters() * DTYPE_BYTES[dtype]

    def kv_cache_bytes(self, num_tokens: int, dtype: str) -> int:
        """Return the bytes of keys and values of one sequence of `num_tokens`, all layers."""
        per_token = 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]
        return self.num_layers * num_tokens * per_token

    def flops_per_token(self, context_tokens: int) -> int:
        """Return the floating-point operations of one token that sees `context_tokens`.

        Two per parameter and token for the matrices, and four per head component and visible key for
        scores and their weighted sum (arXiv 2001.08361, appendix B, with windows counted).
        """
        seen = sum(min(context_tokens, layer.window or context_tokens) for layer in self.layers)
        return 2 * self.num_active_parameters() + 4 * self.num_heads * self.head_dim * seen


def _linear(name: str, rows: int, columns: int, has_bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    if has_bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes
