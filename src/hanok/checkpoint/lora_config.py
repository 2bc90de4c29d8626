"""Which products get a LoRA adapter, and of what rank and scale: PEFT's names. Imports no torch."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hanok.errors import OptionError
from hanok.registry import nearest_first

ALL_LINEAR = "all-linear"
SHOWN_NAMES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Which products get an adapter, and of what rank and scale. Names and defaults are PEFT's."""

    r: int = 8
    """Rank: rows of A and columns of B."""
    lora_alpha: float = 8
    """The adapter's product is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of the inputs of A that are set to zero while training."""
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    """Names, or ends of the paths, of the products; `all-linear` for all but the head; a single text is
    a regular expression of whole paths."""
    exclude_modules: tuple[str, ...] | str = ()
    """Products that get none, named in the same way."""
    layers_to_transform: tuple[int, ...] | None = None
    """The layers that get adapters. None: all."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Regular expressions of the ends of paths, and the rank of those products."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Regular expressions of the ends of paths, and the lora_alpha of those products."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""
    base_model_name_or_path: str | None = None
    """The model that it belongs to. None: not said."""

    def __post_init__(self) -> None:
        for name, value in (("r", self.r), *self.rank_pattern.items()):
            if value < 1:
                raise OptionError(f"the rank {name} is {value}; it must be at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise OptionError(f"lora_dropout is {self.lora_dropout}; it must be in [0, 1).")

    def rank_of(self, path: str) -> int:
        """Return the rank of the product at a path such as model.layers.0.self_attn.q_proj."""
        return int(_by_pattern(self.rank_pattern, path, self.r))

    def scale_of(self, path: str) -> float:
        """Return what the adapter's product at a path is multiplied by."""
        rank = self.rank_of(path)
        alpha = float(_by_pattern(self.alpha_pattern, path, self.lora_alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, paths: Iterable[str], head: str = "lm_head") -> list[str]:
        """Return which products get an adapter, of all `paths`; `head` is the one of the head.

        Raises OptionError where a name is that of none, with the nearest.
        """
        known = list(paths)
        chosen = _matching(self.target_modules, known, head)
        excluded = (
            set(_matching(self.exclude_modules, known, head)) if self.exclude_modules else set()
        )
        layers = self.layers_to_transform
        return [
            path
            for path in chosen
            if path not in excluded and (layers is None or _layer_of(path) in layers)
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the object of adapter_config.json."""
        found = {key: _plain(value) for key, value in asdict(self).items()}
        fixed = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "bias": "none",
        }
        return dict(sorted((found | fixed | {"fan_in_fan_out": False}).items()))


def _matching(wanted: Sequence[str] | str, paths: Sequence[str], head: str) -> list[str]:
    if wanted == ALL_LINEAR or tuple(wanted) == (ALL_LINEAR,):
        return [path for path in paths if path != head]
    if isinstance(wanted, str):
        found = [path for path in paths if re.fullmatch(wanted, path)]
        if not found:
            raise OptionError(f"target_modules {wanted!r} matches none of {_shown(paths)}.")
        return found
    for name in wanted:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            names = sorted({path.rpartition(".")[2] for path in paths})
            raise OptionError(
                f"no product of this model is called {name!r}. The nearest: "
                f"{', '.join(nearest_first(name, names)[:SHOWN_NAMES])}."
            )
    return [
        path for path in paths if any(path == name or path.endswith(f".{name}") for name in wanted)
    ]


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next(
        (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", path)),
        default,
    )


def _layer_of(path: str) -> int | None:
    found = re.search(r"\.(\d+)\.", path)
    return int(found[1]) if found else None


def _shown(paths: Sequence[str]) -> str:
    return ", ".join(paths[:SHOWN_NAMES]) + (" …" if len(paths) > SHOWN_NAMES else "")


def _plain(value: Any) -> Any:
    return (
        sorted(value) if isinstance(value, tuple) and value and isinstance(value[0], str) else value
    )
