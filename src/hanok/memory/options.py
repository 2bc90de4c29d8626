"""Every option of a load, once: for `hanok.load`, plans, the command line, benchmarks and servers.

The text under a field is its documentation everywhere: in the help of verbs, in docs/options.md and in
docs/api.md. PLANNED are those a plan is made with; the others say how a planned model is run. Imports no
torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args, get_origin, get_type_hints

from hanok.attention.state import FLOAT_BYTES
from hanok.errors import OptionError
from hanok.registry import nearest_first

Weights = Literal["auto", "mapped", "copied"]
CacheDtype = Literal["auto", "int8"]
DeviceMap = str | int | Mapping[str, str | int]
MaxMemory = str | Mapping[str | int, str | int]

DTYPES = ("auto", *FLOAT_BYTES)


class PlanArguments(TypedDict, total=False):
    """The keyword arguments of `hanok.plan_load` that `LoadOptions` explains."""

    dtype: str
    quant: str | None
    weights: Weights
    cache_dtype: CacheDtype
    device_map: DeviceMap
    max_memory: MaxMemory | None
    context: int | None
    batch: int


class LoadArguments(PlanArguments, total=False):
    """The keyword arguments of `hanok.load` that `LoadOptions` explains."""

    attn_implementation: str
    graphs: bool
    pipeline_depth: int | None
    cache_packed: str | Path | None
    threads: int | None


PLANNED = tuple(PlanArguments.__annotations__)
CHOICES: Mapping[str, tuple[str, ...]] = {
    name: get_args(kind)
    for name, kind in get_type_hints(LoadArguments).items()
    if get_origin(kind) is Literal
} | {"dtype": DTYPES}
"""The values of those options that have a few."""
COUNTS = ("context", "batch", "pipeline_depth", "threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a model is loaded. Raises OptionError for a value that no load could have."""

    dtype: str = "auto"
    """What to compute in: float32, bfloat16 or float16; auto: what the checkpoint declares."""
    quant: str | None = None
    """Make the weights smaller while they are read: int8, int4, nf4, fp8 or int8-outlier; for example
    int4:group_size=64,head=int8. `hanok info` lists them."""
    weights: Weights = "auto"
    """mapped: stay in the file, shared between processes; copied: read into memory at once;
    auto: mapped, then copied after the first answer where memory allows."""
    cache_dtype: CacheDtype = "auto"
    """What keys and values are kept in: int8, or auto: what is computed in."""
    device_map: DeviceMap = "auto"
    """Where layers go: auto, balanced, balanced_low_0, sequential, a device (cpu, cuda:1), or
    modules and their devices. See `hanok plan`."""
    max_memory: MaxMemory | None = None
    """What may be used, for example 0=24GiB,cpu=4GiB; what does not fit stays on disk and is read for
    every token. See `hanok plan`. None: what is free."""
    context: int | None = None
    """Tokens of a sequence that memory is planned for. None: 4,096, or the model's if fewer."""
    batch: int = 1
    """Sequences that memory is planned for."""
    attn_implementation: str = "auto"
    """Attention backend; `hanok info` lists them."""
    graphs: bool = True
    """Record passes over a few tokens and replay them without Python in between: CUDA graphs,
    or calls of the CPU kernels. The text is the same."""
    pipeline_depth: int | None = None
    """Groups of sequences under way where layers lie on several devices. None: one for each device."""
    cache_packed: Path | None = None
    """Folder that quantized weights are kept in, so that the next load with the same recipe only reads
    them. None: they are quantized at every load."""
    threads: int | None = None
    """CPU threads to compute with. None: one for each core, within the CPU quota."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                listed = ", ".join(nearest_first(str(value), list(choices)))
                raise OptionError(f"{name} {value!r} is unknown. Choose one of: {listed}.")
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}; it must be at least 1.")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "LoadOptions":
        """Return the options that some keyword arguments say; OptionError for an unknown name."""
        known = [item.name for item in fields(cls)]
        for name in arguments:
            if name not in known:
                guess = nearest_first(name, known)[0]
                raise OptionError(f"a load has no option {name!r}; did you mean {guess!r}?")
        values = dict(arguments)
        if values.get("cache_packed") is not None:
            values["cache_packed"] = Path(values["cache_packed"])
        return cls(**values)

    def updated(self, **changes: Any) -> "LoadOptions":
        """Return these options with some changed."""
        return replace(self, **changes)

    def for_draft(self) -> "LoadOptions":
        """Return what a model that drafts for this one is planned with: placed and cached by default."""
        return self.updated(device_map="auto", cache_dtype="auto")

    @property
    def planned(self) -> PlanArguments:
        """Those that a plan is made with, as keyword arguments."""
        return {name: getattr(self, name) for name in PLANNED}  # type: ignore[return-value]  # PLANNED are its keys

    @property
    def unplanned(self) -> LoadArguments:
        """The others, as keyword arguments of the load of a plan."""
        others = [item.name for item in fields(self) if item.name not in PLANNED]
        return {name: getattr(self, name) for name in others}  # type: ignore[return-value]  # as above


def read_device_map(text: str) -> DeviceMap:
    """Return a device map given as text: a name, or a JSON object of modules and their devices."""
    if not text.startswith("{"):
        return text
    try:
        found: dict[str, str | int] = json.loads(text)
    except ValueError as error:
        raise OptionError(f"device_map {text!r} is not a JSON object: {error}") from error
    return found


def refuse_beside_plan(given: Mapping[str, Any]) -> None:
    """Raise OptionError for options given to the load of a plan that was made with them or without."""
    decided = [name for name in PLANNED if name in given]
    if decided:
        raise OptionError(
            f"{' and '.join(decided)} given with a plan, which was made with its own: nothing is "
            "planned any more. Give them to hanok.plan_load, or give hanok.load a path."
        )
