"""All that a training is asked for, as one record: what `hanok train` makes of flags and files.

A file is YAML whose keys are the names of options; `lora` has the keys of `LoraConfig`. What a later
layer says counts: defaults, a file, flags. Each option keeps where it comes from. Imports no torch.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hanok.checkpoint.lora_config import LoraConfig
from hanok.errors import OptionError
from hanok.memory.options import LoadOptions
from hanok.registry import nearest_first
from hanok.text_files import read_text
from hanok.training.data.options import DataOptions, Source, read_source
from hanok.training.options import TrainOptions
from hanok.training.report_options import ReportOptions

LOAD = ("dtype", "quant", "device_map", "max_memory", "attn_implementation", "threads")
"""The options of a load that a training has."""
LORA = "lora"
DEFAULT, ARGUMENT, FILE, FLAG = "default", "argument", "file", "flag"
"""Where an option comes from."""
SHOWN_NAMES = 5
# YAML 1.1 reads 2e-4 as text: its numbers need a point.
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)|[-+]?\.inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All that a training is asked for."""

    model: Path
    """The folder of the checkpoint."""
    data: tuple[Source, ...]
    output: Path
    """Where checkpoints, logs and the result are written."""
    options: TrainOptions = field(default_factory=TrainOptions)
    data_options: DataOptions = field(default_factory=DataOptions)
    load_options: LoadOptions = field(default_factory=lambda: LoadOptions(weights="copied"))
    report_options: ReportOptions = field(default_factory=ReportOptions)
    cache_folder: Path | None = None
    """Where tokenized documents are kept. None: nowhere."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Where options come from; those that are not here are defaults, or arguments of Python."""

    def resolved(self) -> dict[str, dict[str, Any]]:
        """Return every option's value, as JSON has it, with its origin; those of `lora` by lora.NAME."""
        found = {}
        for name, value in self._values().items():
            is_default = name in DEFAULTS and DEFAULTS[name] == value
            origin = self.origins.get(name, DEFAULT if is_default else ARGUMENT)
            found[name] = {"value": _plain(value), "origin": origin}
        return found

    def _values(self) -> dict[str, Any]:
        given = {"model": self.model, "data": self.data, "output": self.output}
        parts = (self.options, self.data_options, self.load_options, self.report_options)
        return given | _flat(part for part in parts)


def _flat(parts: Any) -> dict[str, Any]:
    """Return the options of their records, those of the adapter by lora.NAME."""
    found: dict[str, Any] = {}
    for part in parts:
        for item in fields(part):
            value = getattr(part, item.name)
            if isinstance(part, LoadOptions) and item.name not in LOAD:
                continue
            if isinstance(value, LoraConfig):
                inner = {f.name: getattr(value, f.name) for f in fields(value)}
                found |= {f"{LORA}.{name}": inside for name, inside in inner.items()}
            else:
                found[item.name] = value
    return found


DEFAULTS: Mapping[str, Any] = _flat([TrainOptions(), DataOptions(), LoadOptions(), ReportOptions()])
"""Every option's default, by its name."""
RECORDS: tuple[type, ...] = (TrainOptions, DataOptions, LoadOptions, ReportOptions)


def option_hints() -> dict[str, Any]:
    """Return the type of every key that a file may have."""
    found: dict[str, Any] = {"model": Path, "data": tuple[str, ...], "output": Path}
    for owner in RECORDS:
        for name, hint in get_type_hints(owner).items():
            if owner is not LoadOptions or name in LOAD:
                found[name] = hint
    return found


def read_config(path: Path) -> dict[str, Any]:
    """Return what a YAML file says, by the names of options, each in its type.

    Raises OptionError for a key that is unknown, with the nearest, and for a value of another kind.
    """
    return checked(read_yaml(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file is; OptionError where it is none, or says something twice."""
    # Imported here: not every training has a file.
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
        """The safe one, with numbers such as 2e-4, and without a key twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise OptionError(f"{path} has {name!r} twice; leave one of them out.")
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            return found

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    try:
        found = yaml.load(read_text(path), Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise OptionError(f"{path} is no mapping from names of options to values.")
    return found


def checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return values by the names of options, each in its type; `where` names their file in errors."""
    hints = option_hints()
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise OptionError(unknown(where, name, list(hints)))
        if name == LORA and isinstance(value, Mapping):
            own = get_type_hints(LoraConfig)
            for key in value:
                if key not in own:
                    raise OptionError(unknown(where, f"{LORA}.{key}", [f"{LORA}.{n}" for n in own]))
            found[name] = {
                key: converted(inner, own[key], f"{where}: {LORA}.{key}")
                for key, inner in value.items()
            }
        else:
            found[name] = converted(value, hints[name], f"{where}: {name}")
    return found


def unknown(where: str, name: str, known: list[str]) -> str:
    """Return what is said of a key that no option has."""
    nearest = ", ".join(nearest_first(name, known)[:SHOWN_NAMES])
    return f"{where}: there is no option {name!r}. The nearest: {nearest}."


def converted(value: Any, hint: Any, name: str) -> Any:
    """Return a value of YAML or JSON in a field's type; OptionError where it is of another kind."""
    for kind in sorted(
        _kinds(hint), key=lambda kind: kind is not str
    ):  # a text that may be one stays one
        try:
            return _as(value, kind, name)
        except TypeError:
            continue
    raise OptionError(f"{name} is {value!r}, and must be {described(hint)}.")


def from_text(text: str, hint: Any, name: str) -> Any:
    """Return a value given as text: the parts of several are joined by +, those of a mapping NAME:VALUE.

    true, false and none are words.
    """
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    for kind in sorted(_kinds(hint), key=lambda kind: kind is str):
        if get_origin(kind) is Mapping:
            pairs = [part.rpartition(":") for part in text.split("+")]
            if all(pattern for pattern, _, _ in pairs):
                inside = get_args(kind)[1]
                return {key: from_text(value, inside, name) for key, _, value in pairs}
            continue
        inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
        parts: list[Any] = [words.get(text.lower(), text)]
        if inner is not kind:
            parts = list(text.split("+"))
        if inner in (int, float):
            try:
                parts = [inner(part) for part in parts if isinstance(part, str)]
            except ValueError:
                continue
        try:
            return _as(parts if inner is not kind else parts[0], kind, name)
        except (TypeError, IndexError):
            continue
    raise OptionError(f"{name} is {text!r}, and must be {described(hint)}.")


def described(hint: Any) -> str:
    """Return in words what a field of a type may be."""
    names: Mapping[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
        NoneType: "null",
    }
    found = []
    for kind in _kinds(hint):
        if get_origin(kind) is Literal:
            found.append(f"one of {', '.join(map(str, get_args(kind)))}")
        elif get_origin(kind) is tuple:
            found.append(f"a list, each {described(get_args(kind)[0])}")
        elif isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Mapping):
            found.append("a mapping")
        elif kind is LoraConfig:
            found.append("a mapping of an adapter's options")
        else:
            found.append(names.get(kind, str(kind)))
    return " or ".join(dict.fromkeys(found))


def _kinds(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    return [hint]


def _as(value: Any, kind: Any, name: str) -> Any:
    """Return a value as one kind; TypeError where it is of another."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return _if(value in inside, value)
    if origin is tuple:
        # One text stands for a list of it, and a list is no list of letters.
        items = [value] if isinstance(value, str) and inside[0] is str else value
        _if(isinstance(items, list), items)
        return tuple(converted(item, inside[0], name) for item in items)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _if(isinstance(value, Mapping), value)
        return {
            str(key): converted(item, inside[1], f"{name}.{key}") for key, item in value.items()
        }
    if kind is float:
        return float(_if(isinstance(value, int | float) and not isinstance(value, bool), value))
    if kind is int:
        return _if(isinstance(value, int) and not isinstance(value, bool), value)
    if kind is Path:
        return Path(_if(isinstance(value, str), value))
    return _if(isinstance(kind, type) and isinstance(value, kind), value)


def _if(is_right: bool, value: Any) -> Any:
    if not is_right:
        raise TypeError
    return value


def resolve(
    layers: Sequence[tuple[str, Mapping[str, Any]]], cache_folder: Path | None
) -> TrainConfig:
    """Return what some layers say together, the later ones first; each is an origin with its values.

    `lora` is taken key by key. Raises OptionError where model, data or output is named nowhere.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for name, value in layer.items():
            if name == LORA and isinstance(value, Mapping):
                values[LORA] = {**(values.get(LORA) or {}), **value}
                origins |= {f"{LORA}.{key}": origin for key in value}
            else:
                values[name] = value
                origins[name] = origin
    lacking = [name for name in ("model", "data", "output") if not values.get(name)]
    if lacking:
        raise OptionError(
            f"{' and '.join(lacking)} must be named: on the command line, or in the file of --config."
        )
    if isinstance(values.get(LORA), Mapping):
        values[LORA] = lora_of(values[LORA])

    def made(owner: Callable[..., Any], only: Collection[str] | None = None, **own: Any) -> Any:
        names = [item.name for item in fields(owner)] if only is None else only  # type: ignore[arg-type]  # a record
        return owner(**{name: values[name] for name in names if name in values}, **own)

    return TrainConfig(
        model=Path(values["model"]),
        data=tuple(map(read_source, values["data"])),
        output=Path(values["output"]),
        options=made(TrainOptions),
        data_options=made(DataOptions),
        load_options=made(LoadOptions, LOAD, weights="copied"),
        report_options=made(ReportOptions),
        cache_folder=cache_folder,
        origins=origins,
    )


def lora_of(values: Mapping[str, Any]) -> LoraConfig:
    """Return the adapter that some of its options say; the others are those of `TrainOptions`."""
    usual = TrainOptions().lora
    return LoraConfig(**values) if usual is None else replace(usual, **values)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, Source):
        found = {item.name: getattr(value, item.name) for item in fields(value)}
        return {name: _plain(item) for name, item in found.items() if item or name == "path"}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
