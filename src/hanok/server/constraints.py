"""Constraints on an answer, under the names of the servers that clients were written for.

OpenAI's and TGI's `response_format`; vLLM's `structured_outputs` and the older `guided_*`; llama.cpp's
`json_schema`; SGLang's `json_schema` and `regex`. Whatever cannot be followed exactly is refused: free
text in place of a requested format would go unnoticed until it does harm.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from hanok.engine.grammar_spec import GrammarSpec
from hanok.server import tgi_limits
from hanok.server.errors import invalid
from hanok.server.openai_models import Sampling
from hanok.server.tgi_models import Grammar

_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~\-/]")
_INSTEAD = "send a JSON schema, a regex, or a Lark grammar as `structured_outputs.grammar`"


def constraint_of(asked: Sampling) -> GrammarSpec | None:
    """Return the constraint on a request's answer; None if there is none.

    Raises ServerError, which names the field, for an unsupported constraint and for two at once.
    """
    found = {name: read(getattr(asked, name), name) for name, read in _READERS.items()}
    given = {name: spec for name, spec in found.items() if spec is not None}
    if len(given) > 1:
        first, second = list(given)[:2]
        raise invalid(f"`{first}` and `{second}` both constrain the answer: give one", second)
    return next(iter(given.values()), None)


def _response_format(value: dict[str, Any] | None, name: str) -> GrammarSpec | None:
    kind = value.get("type") if value is not None else None
    if value is None or kind in (None, "text"):
        return None
    if kind not in ("json", "json_object", "json_schema", "regex"):
        raise invalid(
            f"`{name}.type` is {kind!r}; it must be text, json_object, json_schema, json or regex",
            name,
        )
    inner = value.get("value")
    if kind == "json_schema" and inner is None:
        described = value.get("json_schema")
        if not isinstance(described, dict) or "schema" not in described:
            raise invalid(f"`{name}.json_schema.schema` is missing", name)
        inner = described["schema"]
    if kind in ("json", "json_object") and inner is None:
        inner = value.get("schema")
    return tgi_limits.grammar_of(Grammar(type=kind, value=inner))


def _schema(value: Any, name: str) -> GrammarSpec | None:
    """A schema, or the JSON text of one."""
    if value is None:
        return None
    if not isinstance(value, dict | str):
        raise invalid(f"`{name}` must be a JSON schema or its JSON text", name)
    return tgi_limits.grammar_of(Grammar(type="json", value=value))


def _regex(value: Any, name: str) -> GrammarSpec | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise invalid(f"`{name}` must be a string", name)
    return GrammarSpec("regex", value)


def _choice(value: Any, name: str) -> GrammarSpec | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
        raise invalid(f"`{name}` must be a list of one text or more", name)
    escaped = (_SPECIAL.sub(r"\\\g<0>", text) for text in value)
    return GrammarSpec("regex", f"({'|'.join(escaped)})")


def _lark(value: Any, name: str) -> GrammarSpec | None:
    """A grammar in Lark notation; the notations of other servers are recognized by their rules."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise invalid(f"`{name}` must be a string", name)
    if "::=" in value:
        raise invalid(f"`{name}` is in GBNF or EBNF, which is not supported: {_INSTEAD}", name)
    return GrammarSpec("lark", value)


def _json_object(value: Any, name: str) -> GrammarSpec | None:
    return GrammarSpec("json_object", "{}") if value else None


def _unsupported(value: Any, name: str) -> None:
    """Any value except the defaults, which ask for nothing."""
    if value is not None and value is not False:
        raise invalid(f"`{name}` is not supported: {_INSTEAD}", name)


def _structured_outputs(value: dict[str, Any] | None, name: str) -> GrammarSpec | None:
    found: dict[str, GrammarSpec] = {}
    for key, item in (value or {}).items():
        if key not in _WITHOUT_MEANING:
            spec = _OF_STRUCTURED_OUTPUTS.get(key, _unsupported)(item, f"{name}.{key}")
            found |= {key: spec} if spec is not None else {}
    if len(found) > 1:
        both = " and ".join(f"`{name}.{key}`" for key in list(found)[:2])
        raise invalid(f"{both} both say what the answer is: give one", name)
    return next(iter(found.values()), None)


_Reader = Callable[[Any, str], GrammarSpec | None]
_WITHOUT_MEANING = ("disable_fallback", "backend", "_backend", "_backend_was_auto")
_OF_STRUCTURED_OUTPUTS: Mapping[str, _Reader] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _lark,
    "json_object": _json_object,
}
_READERS: Mapping[str, _Reader] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _lark,
    "guided_json_object": _json_object,
    "guided_whitespace_pattern": _unsupported,
    "json_schema": _schema,
    "regex": _regex,
    "grammar": _unsupported,  # llama.cpp's GBNF
    "ebnf": _unsupported,
    "structural_tag": _unsupported,
}
