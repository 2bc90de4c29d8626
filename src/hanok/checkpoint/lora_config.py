"""Which products get a LoRA adapter, and of what rank and scale: PEFT's names. Imports no torch."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hanok.errors import OptionError
from hanok.registry import nearest_first

ALL_LINEAR = "all-linear"
PISSA = re.compile(r"pissa(_niter_([1-9]\d*))?")
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
    use_dora: bool = False
    """Learn the lengths of the rows of the weights apart from their directions (arXiv 2402.09353)."""
    init_lora_weights: bool | str = True
    """How A and B begin: A drawn and B zero (true, or `gaussian`), or both from the largest singular
    values of the weight (`pissa`, arXiv 2404.02948; `pissa_niter_4` finds them roughly and faster)."""
    modules_to_save: tuple[str, ...] = ()
    """Ends of the paths of embedding, head or norms that learn as a whole."""
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    """Tokens whose rows of the embedding learn, and with them those of a head that is tied to it; or
    tokens by the ends of the paths of embedding and head."""
    ensure_weight_tying: bool = False
    """Whether an embedding of `modules_to_save` stays tied to the head where the model's are."""
    base_model_name_or_path: str | None = None
    """The model that it belongs to. None: not said."""

    def __post_init__(self) -> None:
        for name, value in (("r", self.r), *self.rank_pattern.items()):
            if value < 1:
                raise OptionError(f"the rank {name} is {value}; it must be at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise OptionError(f"lora_dropout is {self.lora_dropout}; it must be in [0, 1).")
        init = self.init_lora_weights
        if isinstance(init, str) and init != "gaussian" and not PISSA.fullmatch(init):
            raise OptionError(
                f"init_lora_weights is {init!r}; it must be true, gaussian, pissa or pissa_niter_N."
            )
        if init is False:
            raise OptionError("init_lora_weights is false; an adapter begins as adding nothing.")

    @property
    def pissa_iterations(self) -> int | None:
        """Rounds of the search for singular values where they are found roughly; 0: exactly; None: A and
        B do not begin with them.
        """
        found = PISSA.fullmatch(str(self.init_lora_weights))
        return None if found is None else int(found[2] or 0)

    @property
    def is_pissa(self) -> bool:
        """Whether A and B begin with the largest singular values."""
        return self.pissa_iterations is not None

    def in_files(self) -> "LoraConfig":
        """Return the configuration of the files, which are over the base as it is.

        What is taken away of PiSSA's start stands beside what was learnt, in twice the rank.
        """
        if not self.is_pissa:
            return self
        grown = math.sqrt(2) if self.use_rslora else 2  # so that the scale stays
        return replace(
            self,
            r=2 * self.r,
            lora_alpha=grown * self.lora_alpha,
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: grown * alpha for key, alpha in self.alpha_pattern.items()},
            init_lora_weights=True,
        )

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
        excluded = {path for path in known if _ends(path, self.modules_to_save)}
        if self.exclude_modules:
            excluded |= set(_matching(self.exclude_modules, known, head))
        layers = self.layers_to_transform
        return [
            path
            for path in chosen
            if path not in excluded and (layers is None or _layer_of(path) in layers)
        ]

    def whole(self, paths: Iterable[str]) -> list[str]:
        """Return which modules of `paths` learn as a whole; OptionError where a name is of none."""
        known = list(paths)
        for name in self.modules_to_save:
            if not any(path.endswith(name) for path in known):
                names = sorted({path.rpartition(".")[2] for path in known})
                raise OptionError(
                    f"modules_to_save: no embedding, head or norm of this model is called {name!r}. The "
                    f"nearest: {', '.join(nearest_first(name, names)[:SHOWN_NAMES])}. Others learn by "
                    "target_modules."
                )
        return [path for path in known if _ends(path, self.modules_to_save)]

    def token_rows(self, embedding: str, head: str) -> dict[str, tuple[int, ...]]:
        """Return the tokens whose rows learn, ascending, by the paths of embedding and head."""
        given = self.trainable_token_indices
        if not isinstance(given, Mapping):
            return {embedding: tuple(sorted(set(given)))} if given else {}
        found = {}
        for name, ids in given.items():
            path = next((path for path in (embedding, head) if path.endswith(name)), None)
            if path is None:
                raise OptionError(
                    f"trainable_token_indices: {name!r} is neither {embedding} nor {head}, which have "
                    "rows for tokens."
                )
            found[path] = tuple(sorted(set(ids)))
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the object of adapter_config.json."""
        found = {key: _plain(value) for key, value in asdict(self).items()}
        found |= {key: found[key] or None for key in ("modules_to_save", "trainable_token_indices")}
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


def _ends(path: str, names: Iterable[str]) -> bool:
    return any(path.endswith(name) for name in names)


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
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return sorted(value) if isinstance(value, tuple) else value
