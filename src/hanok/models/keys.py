"""Reads a `config.json` and keeps account of it: an unread key is an error, never ignored silently.

An unread key may be the one that makes the model another model (a new rope, a new norm). A family
therefore reads each key, demands a value it assumes, or ignores it by name.
"""

import math
from collections.abc import Mapping
from typing import Any

from hanok.checkpoint.formats import quantization_of, quantized_error
from hanok.errors import CheckpointError, UnsupportedError
from hanok.models.config import (
    Activation,
    DynamicScaling,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Mlp,
    ModelConfig,
    Norm,
    Rope,
    RopeScaling,
    SoftmaxAttention,
    YarnScaling,
)
from hanok.models.neutral import says_nothing

# What old files call a key: read where the key itself is not there.
OLD_NAMES: Mapping[str, str] = {"max_position_embeddings": "max_sequence_length"}
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ROPE_NUMBERS = frozenset(
    ("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
)
_REQUIRED = object()


class Keys:
    """The keys of one `config.json`; every read is remembered."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self._where = where
        self._read: set[str] = set()

    @property
    def model_type(self) -> str:
        """The `model_type` of the file."""
        return str(self._config["model_type"])

    @property
    def where(self) -> str:
        """The file, for messages."""
        return self._where

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a key or its old name, `default` when both are absent or null."""
        self._read.add(name)
        value = self._config.get(name)
        if name in OLD_NAMES:
            self._read.add(OLD_NAMES[name])
            value = self._config.get(OLD_NAMES[name]) if value is None else value
        return default if value is None else value

    def whole(self, name: str, default: int | object = _REQUIRED, *, least: int = 1) -> int:
        """Return a whole number of at least `least`."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = "a positive whole number" if least == 1 else f"a whole number from {least} on"
            raise self._wrong(name, value, kind)
        return value

    def whole_or_none(self, name: str, default: int | None = None) -> int | None:
        """Return a positive whole number; None where the file says null, `default` without the key."""
        return None if self._unless_absent(name, default) is None else self.whole(name, default)

    def above_zero(self, name: str, default: float | object = _REQUIRED) -> float:
        """Return a number above 0."""
        return self._above_zero(name, self._required(name, default))

    def above_zero_or_none(self, name: str, default: float | None = None) -> float | None:
        """Return a number above 0; None where the file says null, `default` without the key."""
        return (
            None if self._unless_absent(name, default) is None else self.above_zero(name, default)
        )

    def kv_heads(self, num_heads: int) -> int:
        """Return `num_key_value_heads`, by default one for each head; heads share them evenly."""
        value = self.whole("num_key_value_heads", num_heads)
        if num_heads % value:
            raise self._wrong("num_key_value_heads", value, f"a divisor of the {num_heads} heads")
        return value

    def agreed(self, *names: str, default: float) -> float:
        """Return the number that each of some names of one thing has, where it is there at all."""
        values = {name: self.number(name) for name in names if self.get(name) is not None}
        if len(set(values.values())) > 1:
            raise CheckpointError(
                f"{self._where} contradicts itself: {values!r}. Keep one of them."
            )
        return next(iter(values.values()), default)

    def even_head_dim(self, hidden: int, num_heads: int) -> int:
        """Return the components of a head where the heads share the hidden size evenly."""
        if hidden % num_heads:
            raise CheckpointError(
                f"{self._where}: {num_heads} heads do not share a hidden size of {hidden} evenly."
            )
        return hidden // num_heads

    def listed(self, name: str, default: list[Any], *, length: int | None = None) -> list[Any]:
        """Return a list, of `length` items where that is given."""
        value = self.get(name, default)
        if not isinstance(value, list) or (length is not None and len(value) != length):
            count = "" if length is None else f" of {length} items"
            raise self._wrong(name, value, f"a list{count}")
        return value

    def number(self, name: str, default: float | object = _REQUIRED) -> float:
        """Return a number."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value, "a number")
        return float(value)

    def flag(self, name: str, default: bool | object = _REQUIRED) -> bool:
        """Return true or false."""
        value = self._required(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def demand(self, name: str, *allowed: Any) -> None:
        """Refuse the file when the key is there with a value that the family does not implement."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise UnsupportedError(
                f"{self._where}: {name} is {value!r}; hanok's {self.model_type} supports {choices}."
            )

    def ignore(self, *names: str) -> None:
        """Account for keys that do not change what the model computes."""
        self._read.update(names)

    def inside(self, name: str, beneath: Mapping[str, Any], *, model_type: str) -> "Keys":
        """Return the keys of an object in the file, read as those of a `model_type`.

        What the object leaves out is taken from `beneath`.
        """
        values = {**beneath, **self.object(name), "model_type": model_type}
        return Keys(values, f"{self._where}: {name}")

    def activation(self, *names: str, default: str = "silu") -> Activation:
        """Return the activation that the first present of `names` names."""
        values = [value for name in names if (value := self.get(name)) is not None]
        value = values[0] if values else default
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise UnsupportedError(
                f"{self._where}: activation {value!r} is not one of {', '.join(ACTIVATIONS)}."
            )
        return ACTIVATIONS[value]

    def layer_kinds(self, num_layers: int, default: list[str]) -> list[str]:
        """Return "full_attention" or "sliding_attention" for each layer (`layer_types`)."""
        kinds = self.listed("layer_types", default, length=num_layers)
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise UnsupportedError(
                    f"{self._where}: layer_types has {kind!r}; hanok's {self.model_type} supports "
                    "'full_attention' and 'sliding_attention'."
                )
        return kinds

    def rope(
        self,
        head_dim: int,
        *,
        kind: str = "full_attention",
        default_theta: float = 10000.0,
        default_partial: float | None = None,
        default_positions: int | object = _REQUIRED,
        is_interleaved: bool = False,
    ) -> Rope:
        """Return the rotary embedding, from `rope_parameters` or `rope_theta` and `rope_scaling`.

        `kind` picks the entry when `rope_parameters` holds one for each kind of layer. Without
        `default_partial` the family rotates whole heads, and a file that asks for less is refused.
        """
        values, scaling = self.object("rope_parameters"), self.object("rope_scaling")
        if values and not scaling.items() <= values.items():
            raise CheckpointError(
                f"{self._where} has rope_parameters {values!r} and, in contradiction to them, "
                f"rope_scaling {scaling!r}. Write into rope_parameters what is meant, and remove "
                "rope_scaling."
            )
        values = values or scaling
        if isinstance(values.get(kind), Mapping):
            values = dict(values[kind])
        values = {name: value for name, value in values.items() if value is not None}
        values.pop("finetuned", None)  # how the makers of YaRN came to the weights
        kind_name = values.pop("rope_type", None) or values.pop("type", None) or "default"
        if kind_name == "default" and "factor" in values:
            raise self._wrong("rope_scaling", scaling or values, "without a factor, or of a type")
        values.pop("type", None)
        # A token of text has the same position in time, height and width, by which mrope rotates: it is
        # the plain rotation then.
        values.pop("mrope_section", None)
        values.pop("mrope_interleaved", None)
        kind_name = "default" if kind_name == "mrope" else kind_name
        top_theta = self.get("rope_theta", default_theta)
        theta = self._above_zero("rope_theta", values.pop("rope_theta", None) or top_theta)
        top_partial = self.get("partial_rotary_factor", default_partial or 1.0)
        given_partial = values.pop("partial_rotary_factor", None) or top_partial
        partial = self._above_zero("partial_rotary_factor", given_partial)
        if partial > 1:
            raise self._wrong("partial_rotary_factor", partial, "at most 1")
        if partial != 1 and default_partial is None:
            raise UnsupportedError(
                f"{self._where}: partial_rotary_factor is {partial!r}; hanok's {self.model_type} "
                "rotates whole heads (1.0)."
            )
        rotary_dim = int(head_dim * partial)
        if rotary_dim < 2 or rotary_dim % 2:
            raise CheckpointError(
                f"{self._where}: {rotary_dim} of a head's {head_dim} components are rotated; they are "
                "rotated in pairs."
            )
        max_positions = self.whole("max_position_embeddings", default_positions)
        scaled = self._scaling(kind_name, values, rotary_dim, max_positions)
        values.pop("max_position_embeddings", None)  # the file's own, once more
        if values and (kind_name != "default" or "llama_4_scaling_beta" in values):
            raise UnsupportedError(
                f"{self._where}: rope type {kind_name!r} has parameters that hanok does not know: "
                f"{', '.join(sorted(values))}."
            )
        return Rope(
            theta=theta, rotary_dim=rotary_dim, is_interleaved=is_interleaved, scaling=scaled
        )

    def _scaling(
        self, kind: str, values: dict[str, Any], rotary_dim: int, max_positions: int
    ) -> RopeScaling | None:
        inner_original = values.pop("original_max_position_embeddings", None)
        # Phi-3 keeps the original length outside the rope, and that one counts.
        original = self.get("original_max_position_embeddings") or inner_original or max_positions
        self._above_zero("original_max_position_embeddings", original)
        for name in _ROPE_NUMBERS & values.keys():
            self._above_zero(f"{name} of the rope type {kind!r}", values[name])
        factor = values.pop("factor", None)
        try:
            if kind == "default":
                return None
            if kind == "linear":
                return LinearScaling(factor=float(factor), original_max_positions=int(original))
            if kind == "dynamic":
                return DynamicScaling(factor=float(factor), max_positions=max_positions)
            if kind == "llama3":
                return Llama3Scaling(
                    factor=float(factor),
                    low_freq_factor=float(values.pop("low_freq_factor")),
                    high_freq_factor=float(values.pop("high_freq_factor")),
                    original_max_positions=int(original),
                )
            ratio = float(factor or max_positions / original)
            if kind == "yarn":
                return YarnScaling(
                    factor=ratio,
                    original_max_positions=int(original),
                    attention_factor=_yarn_attention_factor(ratio, values),
                    beta_fast=float(values.pop("beta_fast", None) or 32),
                    beta_slow=float(values.pop("beta_slow", None) or 1),
                    truncate=bool(values.pop("truncate", True)),
                    query_growth=float(values.pop("llama_4_scaling_beta", None) or 0),
                )
            if kind in ("longrope", "su"):
                return self._longrope(values, int(original), ratio, rotary_dim)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{self._where}: rope type {kind!r} is incomplete or has a wrong value: {error}."
            ) from error
        raise UnsupportedError(
            f"{self._where}: rope type {kind!r} is not one of default, linear, dynamic, llama3, "
            "yarn, longrope."
        )

    def _longrope(
        self, values: dict[str, Any], original: int, ratio: float, rotary_dim: int
    ) -> LongRopeScaling:
        factors = {}
        for name in ("short_factor", "long_factor"):
            factors[name] = tuple(float(value) for value in values.pop(name))
            if len(factors[name]) != rotary_dim // 2:
                raise CheckpointError(
                    f"{self._where}: rope {name} has {len(factors[name])} values; "
                    f"{rotary_dim} rotated components need {rotary_dim // 2}."
                )
        grown = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        given = values.pop("attention_factor", None)
        return LongRopeScaling(
            short_factor=factors["short_factor"],
            long_factor=factors["long_factor"],
            original_max_positions=original,
            attention_factor=float(given if given is not None else grown),
        )

    def refuse_unread(self) -> None:
        """Raise unless every key was read or is ignored."""
        if method := quantization_of(self._config):
            raise quantized_error(self._where, method)
        unread = sorted(
            name
            for name, value in self._config.items()
            if name not in self._read and not says_nothing(name, value)
        )
        if unread:
            shown = ", ".join(f"{name} = {self._config[name]!r}" for name in unread)
            raise UnsupportedError(
                f"{self._where}: hanok's {self.model_type} does not account for {shown}. If the "
                "key does not change what the model computes, remove it from config.json; "
                "otherwise the model would be computed wrongly."
            )

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is _REQUIRED:
            raise CheckpointError(f"{self._where} has no {name}; {self.model_type} needs it.")
        return value

    def _unless_absent(self, name: str, default: Any) -> Any:
        """Return what a key holds, null too; `default` when it is not there at all."""
        self.ignore(name)
        return self._config.get(name, default)

    def _above_zero(self, name: str, value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise self._wrong(name, value, "a number above 0")
        return float(value)

    def object(self, name: str) -> dict[str, Any]:
        """Return an object of names and values, a copy; an empty one when it is absent."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self._wrong(name, value, "an object of names and values")
        return dict(value)

    def _wrong(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: {name} is {value!r}; it must be {expected}.")


def llama_config(
    keys: Keys,
    *,
    rope: Rope | None = None,
    head_dim: int | None = None,
    default_eps: float = 1e-6,
) -> ModelConfig:
    """Read the keys that Llama and its descendants share; families change what differs.

    All layers see everything and share one rope. `rope` and `head_dim` are given where a family reads
    them otherwise.
    """
    hidden, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    head_dim = head_dim or keys.whole("head_dim", hidden // heads)
    attention = SoftmaxAttention(
        num_heads=heads,
        num_kv_heads=keys.kv_heads(heads),
        head_dim=head_dim,
        rope=rope or keys.rope(head_dim),
    )
    mlp = Mlp(
        intermediate_size=keys.whole("intermediate_size"), activation=keys.activation("hidden_act")
    )
    return ModelConfig(
        model_type=keys.model_type,
        vocab_size=keys.whole("vocab_size"),
        hidden_size=hidden,
        max_positions=keys.whole("max_position_embeddings"),
        norm=Norm(kind="rms", eps=keys.number("rms_norm_eps", default_eps)),
        layers=(LayerConfig(mixer=attention, mlp=mlp),) * keys.whole("num_hidden_layers"),
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        dtype=declared_dtype(keys),
    )


def windows_above(keys: Keys, layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
    """Return the layers with Qwen's window: on those from `max_window_layers` on, when it is used."""
    is_used = keys.flag("use_sliding_window", False)
    window = keys.whole_or_none("sliding_window", 4096)
    first = keys.whole("max_window_layers", 28, least=0)
    default = [
        "sliding_attention" if is_used and index >= first else "full_attention"
        for index in range(len(layers))
    ]
    kinds = keys.layer_kinds(len(layers), default)
    return tuple(
        layer.with_attention(window=window if is_used and kind == "sliding_attention" else None)
        for layer, kind in zip(layers, kinds, strict=True)
    )


def declared_dtype(keys: Keys) -> str | None:
    """Return the torch name of the dtype that the file declares (`dtype`, once `torch_dtype`)."""
    value = keys.get("dtype") or keys.get("torch_dtype")
    return str(value).removeprefix("torch.") if value else None


def _yarn_attention_factor(factor: float, values: dict[str, Any]) -> float:
    given = values.pop("attention_factor", None)
    scale, scale_all = values.pop("mscale", None), values.pop("mscale_all_dim", None)
    if given is not None:
        return float(given)

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return grown(scale) / grown(scale_all) if scale and scale_all else grown(1.0)


GPT2_SUMMARY = ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")


def gpt2_config(keys: Keys, *, default_activation: str) -> ModelConfig:
    """Read the keys that GPT-2 and StarCoder share; families change what differs."""
    hidden, heads = keys.whole("n_embd"), keys.whole("n_head")
    head_dim = keys.even_head_dim(hidden, heads)
    keys.ignore("resid_pdrop", "embd_pdrop", "attn_pdrop")
    keys.ignore(*(f"summary_{name}" for name in GPT2_SUMMARY))
    scales = keys.flag("scale_attn_weights", True)
    attention = SoftmaxAttention(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        rope=None,
        scale=None if scales else 1.0,
        has_qkv_bias=True,
        has_output_bias=True,
    )
    mlp = Mlp(
        intermediate_size=keys.whole("n_inner", 4 * hidden),
        activation=keys.activation("activation_function", default=default_activation),
        is_gated=False,
        has_bias=True,
    )
    return ModelConfig(
        model_type=keys.model_type,
        vocab_size=keys.whole("vocab_size"),
        hidden_size=hidden,
        max_positions=keys.whole("n_positions", 1024),
        norm=Norm(kind="layer", eps=keys.number("layer_norm_epsilon", 1e-5), has_bias=True),
        layers=(LayerConfig(mixer=attention, mlp=mlp),) * keys.whole("n_layer"),
        has_learned_positions=True,
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        dtype=declared_dtype(keys),
    )
