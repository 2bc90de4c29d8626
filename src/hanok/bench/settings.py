"""What a benchmark varies: how a model runs (`Setting`), what it is asked for (`Workload`), and axes.

A grid file is one table in TOML; each key is an axis, its value one setting or a list of them, and the
rows are all combinations:

    attention = ["eager", "native"]
    cache = [false, true]
    prompt_tokens = [76, 2794]
    new_tokens = 64
"""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, get_args, get_type_hints

from hanok.errors import OptionError
from hanok.memory.options import CHOICES, DeviceMap, read_device_map
from hanok.registry import nearest_first

AUTO = "auto"
NO_QUANT = "none"
SPECULATIONS = ("off", "ngram", "draft")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What rows must share to share a loaded model."""

    dtype: str
    quant: str
    device_map: str
    has_draft: bool

    @property
    def recipe(self) -> str | None:
        """The quantization as `hanok.load` takes it."""
        return None if self.quant == NO_QUANT else self.quant

    @property
    def places(self) -> DeviceMap:
        """The device map as `hanok.load` takes it."""
        return read_device_map(self.device_map)

    @property
    def label(self) -> str:
        """What people call it."""
        parts = [self.dtype, *([self.quant] if self.recipe else [])]
        parts += ["with a draft model"] if self.has_draft else []
        parts += [f"on {self.device_map}"] if self.device_map != AUTO else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a model runs."""

    attention: str = AUTO
    """Backend; `hanok info` lists them."""
    cache: bool = True
    """Whether keys and values are kept."""
    dtype: str = AUTO
    """What is computed in."""
    quant: str = NO_QUANT
    """Recipe, or "none"."""
    cache_dtype: str = AUTO
    """What keys and values are kept in: "auto" or "int8"."""
    speculation: str = "off"
    """"off", "ngram" or "draft"."""
    graphs: bool = True
    """Whether short passes are recorded and made again, where they can be."""
    device_map: str = AUTO
    """As in `hanok plan`: a name, or a JSON object of modules."""

    @property
    def load(self) -> Load:
        """What it needs loaded."""
        return Load(
            dtype=self.dtype,
            quant=self.quant,
            device_map=self.device_map,
            has_draft=self.speculation == "draft",
        )

    @property
    def numerics(self) -> tuple[str, ...]:
        """What the model's scores depend on: settings that share it share their quality."""
        return (self.attention, self.dtype, self.quant, self.cache_dtype, self.device_map)

    def label(self, usual_dtype: str) -> str:
        """Return what people call it; a dtype that is the usual one goes without saying."""
        parts = [self.attention]
        parts += [] if self.cache else ["no cache"]
        parts += [self.dtype] if self.dtype != usual_dtype else []
        parts += [self.quant] if self.quant != NO_QUANT else []
        parts += [f"{self.cache_dtype} cache"] if self.cache_dtype != AUTO else []
        parts += [f"{self.speculation} speculation"] if self.speculation != "off" else []
        parts += [] if self.graphs else ["no graphs"]
        parts += [f"on {self.device_map}"] if self.device_map != AUTO else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a model is asked for: so many sequences, so long."""

    prompt_tokens: int
    new_tokens: int
    batch: int

    @property
    def label(self) -> str:
        """What people call it."""
        sequences = "" if self.batch == 1 else f"{self.batch} sequences of "
        return f"{sequences}{self.prompt_tokens:,} + {self.new_tokens:,} tokens"

    @property
    def context(self) -> int:
        """Tokens of each sequence, at the end."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The values of each axis; the rows are all combinations, the first axis changing slowest."""

    prompt_tokens: tuple[int, ...] = (128,)
    new_tokens: tuple[int, ...] = (32,)
    batch: tuple[int, ...] = (1,)
    device_map: tuple[str, ...] = (AUTO,)
    dtype: tuple[str, ...] = (AUTO,)
    quant: tuple[str, ...] = (NO_QUANT,)
    cache_dtype: tuple[str, ...] = (AUTO,)
    speculation: tuple[str, ...] = ("off",)
    graphs: tuple[bool, ...] = (True,)
    attention: tuple[str, ...] = (AUTO,)
    cache: tuple[bool, ...] = (True,)

    def combinations(self) -> list[tuple[Setting, Workload]]:
        """Return all combinations, in order."""
        names = [item.name for item in fields(self)]
        found = []
        for values in product(*(getattr(self, name) for name in names)):
            chosen = dict(zip(names, values, strict=True))
            workload = {item.name: chosen.pop(item.name) for item in fields(Workload)}
            found.append((Setting(**chosen), Workload(**workload)))
        return found


def default_axes() -> tuple[Axes, ...]:
    """Return the short grid: each choice separately, then lengths, then several sequences at once."""
    return (
        Axes(attention=("eager", "sdpa", AUTO), cache=(False, True)),
        Axes(attention=("sdpa_math", "sdpa_flash", "sdpa_efficient", "triton")),
        Axes(quant=("int8", "int4")),
        Axes(cache_dtype=("int8",)),
        Axes(speculation=("ngram", "draft")),
        Axes(graphs=(False,)),
        Axes(dtype=("float32",)),
        Axes(prompt_tokens=(32, 512), attention=("eager", "sdpa", AUTO)),
        Axes(prompt_tokens=(32, 512), quant=("int8", "int4")),
        Axes(batch=(8,), quant=(NO_QUANT, "int8", "int4")),
    )


def core_axes() -> tuple[Axes, ...]:
    """Return what the short grid has on any machine: the kinds of attention, and fewer bits."""
    return (Axes(attention=("eager", "sdpa", AUTO)), Axes(quant=("int8", "int4")))


def read_axes(text: str, where: str) -> Axes:
    """Read a grid file; OptionError names what is wrong in it, and where."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{where} is not TOML: {error}") from None
    known = [item.name for item in fields(Axes)]
    for key in table:
        if key not in known:
            names = ", ".join(nearest_first(key, known))
            raise OptionError(f"{where}: there is no axis {key!r}. Axes: {names}.")
    return Axes(**{key: _values(key, value, where) for key, value in table.items()})


def read_setting(text: str) -> Setting:
    """Read a setting as `AXIS=VALUE,…`; what is not named is as in `hanok generate`."""
    lines = []
    for item in filter(None, text.split(",")):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise OptionError(f"{item!r} is not AXIS=VALUE, for example attention=sdpa.")
        lines.append(f"{name} = {value if value in ('true', 'false') else json.dumps(value)}")
    combinations = read_axes("\n".join(lines), repr(text)).combinations()
    return combinations[0][0]


def _values(key: str, value: Any, where: str) -> tuple[Any, ...]:
    given = value if isinstance(value, list) else [value]
    if not given:
        raise OptionError(f"{where}: {key} is an empty list; name at least one value.")
    values = tuple(json.dumps(item) if isinstance(item, dict) else item for item in given)
    kind = get_args(get_type_hints(Axes)[key])[0]
    for item in values:
        if type(item) is not kind or (type(item) is int and item < 1):
            wanted = {int: "a number from 1 on", bool: "true or false", str: "a text"}[kind]
            raise OptionError(f"{where}: {key} has {item!r}; it must be {wanted}.")
    _check_names(key, values, where)
    return values


def _check_names(key: str, values: Sequence[Any], where: str) -> None:
    """Refuse names that nothing has; backends and recipes are looked up when the grid is planned."""
    known = {**CHOICES, "speculation": SPECULATIONS}.get(key)
    for item in values:
        if known is not None and item not in known:
            names = ", ".join(nearest_first(item, list(known)))
            raise OptionError(f"{where}: {key} {item!r} is unknown. Choose one of: {names}.")
