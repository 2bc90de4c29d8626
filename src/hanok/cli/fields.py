"""Click options made from the fields of a dataclass: names, types, defaults, and the texts under them.

So the command line, Python and the documentation cannot disagree about an option.
"""

import ast
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Any], Any]
"""What adds one option to a command."""
NONE = re.compile(
    r"\s*None: (.*?)\.?$", re.DOTALL
)  # the end of a field's text: what None stands for


def field_texts(owner: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass."""
    definition = ast.parse(inspect.getsource(owner)).body[0]
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    texts = {}
    for line, below in pairwise(body):
        if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
            text = ast.literal_eval(below.value)
            texts[ast.unparse(line.target)] = " ".join(str(text).split())
    return texts


def field_options(
    owner: type,
    own: Mapping[str, Mapping[str, Any]],
    *,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
) -> list[Option]:
    """Return a click option for each field of a dataclass, or for some of them, in their order there.

    `own` has what differs from a field's type and text: `flag`, its name on the command line, and
    arguments of `click.option`. An option sets the parameter named as its field.
    """
    texts, hints = field_texts(owner), get_type_hints(owner)
    names = [item.name for item in fields(owner)]
    assert {*own, *(only or ()), *without} <= set(names)
    return [
        _option(item, hints[item.name], texts.get(item.name, ""), dict(own.get(item.name, {})))
        for item in fields(owner)
        if item.name not in without and (only is None or item.name in only)
    ]


def field_values(owner: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a verb's options that are named as the fields of a dataclass."""
    return {item.name: options[item.name] for item in fields(owner) if item.name in options}


def add_options(command: Command, options: Sequence[Option]) -> Command:
    """Return the command with options, listed in their order before those it has."""
    for option in reversed(options):
        command = option(command)
    return command


def _option(item: "Field[Any]", hint: Any, text: str, own: dict[str, Any]) -> Option:
    default = None if item.default is MISSING else item.default
    spelled = re.sub("_s$", "_seconds", item.name.removeprefix("has_")).replace("_", "-")
    flag = own.pop("flag", f"--{spelled}")
    kind = _kind(hint)
    found = NONE.search(text)
    if default is None and found is not None:
        text = f"{text[: found.start()]}  [default: {found[1]}]"
    arguments: dict[str, Any] = {
        "help": text,
        "default": default,
        "show_default": default is not None,
    }
    if kind is bool:
        flag = flag if default is False else f"{flag}/--no-{flag.removeprefix('--')}"
        arguments |= {"is_flag": True, "show_default": bool(default)}
    elif get_origin(kind) is Literal:
        arguments["type"] = click.Choice(get_args(kind))
    elif get_origin(kind) is tuple:
        arguments |= {"multiple": True, "default": (), "show_default": False}
    elif kind in (int, float, str):
        arguments["type"] = kind
    elif kind is Path:
        arguments["type"] = click.Path(path_type=Path)
    return click.option(flag, item.name, **(arguments | own))


def _kind(hint: Any) -> Any:
    """Return a field's type without None."""
    if get_origin(hint) in (Literal, tuple):
        return hint
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 else (str if kinds else hint)
