"""The tokenizer against the embedding, special token ids, the chat template, and where generation ends.

Reads the tokenizer's files and headers, and no weight. Imports no torch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hanok.check.finding import Finding, Skipped, shown
from hanok.check.generation import FILE, generation_findings
from hanok.check.weights import read_json
from hanok.checkpoint.formats import CONFIG
from hanok.checkpoint.tokenizer import Tokenizer, open_tokenizer
from hanok.checkpoint.tokenizer_files import has_tokenizer
from hanok.engine.params import is_token
from hanok.errors import CheckpointError, RequestError

SETTINGS = "tokenizer_config.json"
NAMES = ("bos", "eos", "pad")
ANSWER = "Paris is the capital of France"
QUESTION = {"role": "user", "content": "What is the capital of France?"}
RULE = {"role": "system", "content": "Answer briefly."}
CONVERSATIONS: Mapping[str, tuple[Mapping[str, str], ...]] = {
    "user": (QUESTION,),
    "system": (RULE, QUESTION),
    "assistant": (QUESTION, {"role": "assistant", "content": ANSWER}, QUESTION),
}
"""What a template is asked to render, by the role that it is about."""
SAID = {"user": QUESTION["content"], "system": RULE["content"], "assistant": ANSWER}
"""What of it must be there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What the files say about tokens, read once."""

    folder: Path
    rows: int | None
    """Of the embedding; None if it is not known."""
    config: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    @property
    def end_ids(self) -> dict[int, str]:
        """Return the ids at which generation ends, with the file that says so, as a load reads them."""
        inner = self.config.get("text_config")
        places = {FILE: self.generation_config, CONFIG: self.config}
        if isinstance(inner, Mapping):
            places[f"{CONFIG}'s text_config"] = inner
        for name, values in places.items():
            listed = ids_in(values.get("eos_token_id"))
            if found := [item for item in listed if self.rows is None or item < self.rows]:
                return dict.fromkeys(found, name)
        return {}


def read_tokens(folder: Path, rows: int | None) -> tuple[Tokens, list[Finding], list[Skipped]]:
    """Return what a folder says about tokens, and what is wrong with it.

    `rows` are those of the embedding; None if the weights do not say, then config.json's vocab_size
    counts.
    """
    config, generation_config = read_json(folder, CONFIG), read_json(folder, FILE)
    if rows is None:
        inner = config.get("text_config")
        sizes = [
            config.get("vocab_size"),
            inner.get("vocab_size") if isinstance(inner, dict) else None,
        ]
        rows = next((size for size in sizes if type(size) is int), None)
    tokens = Tokens(folder=folder, rows=rows, config=config, generation_config=generation_config)
    findings = [*generation_findings(generation_config), *_range_findings(tokens)]
    if not has_tokenizer(folder):
        reason = "there is no tokenizer in the folder"
        return tokens, findings, [Skipped(check="tokenizer and chat template", reason=reason)]
    try:
        tokenizer = open_tokenizer(folder)
    except CheckpointError as error:
        broken = Finding(
            level="error",
            kind="tokenizer",
            where="folder",
            what=str(error).removeprefix(f"{folder}/").removeprefix(f"{folder} "),
            advice="get the tokenizer's files of the published model",
        )
        reason = "the tokenizer cannot be opened"
        return tokens, [*findings, broken], [Skipped(check="chat template", reason=reason)]
    tokens = Tokens(
        folder=folder,
        rows=rows,
        config=config,
        generation_config=generation_config,
        tokenizer=tokenizer,
    )
    findings += token_findings(tokens, tokenizer)
    return tokens, findings, [] if tokenizer.chat_template_names else [_no_template()]


def token_findings(tokens: Tokens, tokenizer: Tokenizer) -> Iterator[Finding]:
    """Yield what is wrong between a tokenizer, the embedding and the configs."""
    yield from _row_findings(tokens, tokenizer)
    yield from _name_findings(tokens, tokenizer)
    yield from _end_findings(tokens, tokenizer)
    yield from _settings_findings(tokens)
    if tokenizer.chat_template_names:
        yield from _template_findings(tokens, tokenizer)


def _row_findings(tokens: Tokens, tokenizer: Tokenizer) -> Iterator[Finding]:
    if tokens.rows is None or tokenizer.vocab_size <= tokens.rows:
        return
    beyond = [
        f"{token_id} {tokenizer.spelling(token_id)!r}"
        for token_id in range(tokens.rows, min(tokenizer.vocab_size, tokens.rows + 10))
        if tokenizer.spelling(token_id) is not None
    ]
    yield Finding(
        level="error",
        kind="tokens-beyond-rows",
        where="embedding",
        what=f"has {tokens.rows:,} rows, and the tokenizer has ids up to {tokenizer.vocab_size - 1:,}: "
        f"{shown(beyond)}",
        advice="add the rows (hanok tokens), or get the tokenizer of this model",
    )


def _range_findings(tokens: Tokens) -> Iterator[Finding]:
    """Yield ids of the configs that are no rows of the embedding."""
    for file, values in ((CONFIG, tokens.config), (FILE, tokens.generation_config)):
        for name in NAMES:
            key = f"{name}_token_id"
            value = values.get(key)
            for item in value if isinstance(value, list) else [value]:
                if item is None or (tokens.rows is None and type(item) is int and item >= 0):
                    continue
                if is_token(item, tokens.rows or 0):
                    continue
                is_unset = name == "pad" and item == -1
                yield Finding(
                    level="warning" if is_unset else "error",
                    kind="id-beyond-rows",
                    where=file,
                    what=f"{key} is {item!r}"
                    + (", which some readers take for no token" if is_unset else "")
                    + (f"; tokens are 0 to {tokens.rows - 1:,}" if tokens.rows else ""),
                    advice="write null, or the id of the padding token"
                    if is_unset
                    else "write the id that the tokenizer gives the token",
                )


def _name_findings(tokens: Tokens, tokenizer: Tokenizer) -> Iterator[Finding]:
    """Yield where configs and tokenizer disagree about the first, last and padding token."""
    # Readers take the first file that names one.
    places = {FILE: tokens.generation_config, CONFIG: tokens.config}
    for name, ours in (("bos", tokenizer.bos_token_id), ("pad", tokenizer.pad_token_id)):
        key = f"{name}_token_id"
        file = next((file for file, values in places.items() if values.get(key) is not None), None)
        theirs = places[file][key] if file else None
        if file is None or ours is None or type(theirs) is not int or theirs in (ours, -1):
            continue
        yield Finding(
            level="warning" if name == "bos" else "note",
            kind=f"{name}-token",
            where=file,
            what=f"{key} is {_token(tokenizer, theirs)}, and the tokenizer's {name}_token is "
            f"{_token(tokenizer, ours)}",
            advice="write the same token in both",
        )
    says_pad = any(
        values.get("pad_token_id") is not None
        for values in (tokens.config, tokens.generation_config)
    )
    if tokenizer.pad_token_id is not None and not says_pad and tokens.generation_config:
        yield Finding(
            level="note",
            kind="no-pad",
            where=FILE,
            what="has no pad_token_id, and the tokenizer pads with "
            f"{_token(tokenizer, tokenizer.pad_token_id)}; transformers pads with the end token then",
            advice=f"write {tokenizer.pad_token_id}",
            is_mendable=True,
        )


def _end_findings(tokens: Tokens, tokenizer: Tokenizer) -> Iterator[Finding]:
    ends, own = tokens.end_ids, tokenizer.eos_token_id
    if own is None and not ends:
        if tokens.config:
            yield Finding(
                level="warning",
                kind="no-end",
                where=FILE,
                what="no file names a token that ends a text, so generation goes on to its limit",
                advice="write eos_token_id, or eos_token into tokenizer_config.json",
            )
    elif not ends and tokens.config:
        yield Finding(
            level="warning",
            kind="no-end",
            where=FILE,
            what=f"neither it nor {CONFIG} has eos_token_id, and the tokenizer ends a text with "
            f"{_token(tokenizer, own)}: readers that look for the id there go on to their limit",
            advice=f"write {own}",
            is_mendable=True,
        )
    elif own is not None and ends and own not in ends:
        yield Finding(
            level="warning",
            kind="end-token",
            where=next(iter(ends.values())),
            what=f"ends generation at {_tokens(tokenizer, ends)}, and not at the tokenizer's eos_token "
            f"{_token(tokenizer, own)}",
            advice=f"add {own} to eos_token_id of {FILE}",
            is_mendable=True,
        )


def _settings_findings(tokens: Tokens) -> Iterator[Finding]:
    """Yield where two files of the tokenizer say different things, and readers read one or the other."""
    settings = read_json(tokens.folder, SETTINGS)
    older = read_json(tokens.folder, "special_tokens_map.json")
    for key in sorted(settings.keys() & older.keys()):
        ours, theirs = _content(settings[key]), _content(older[key])
        if key.endswith("_token") and ours and theirs and ours != theirs:
            yield Finding(
                level="warning",
                kind="special-tokens",
                where="special_tokens_map.json",
                what=f"{key} is {theirs!r}, and {ours!r} in {SETTINGS}; older readers take the first",
                advice="write the same in both",
            )
    path = tokens.folder / "chat_template.jinja"
    inline = settings.get("chat_template")
    if path.is_file() and isinstance(inline, str):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        if text.strip() != inline.strip():
            yield Finding(
                level="warning",
                kind="two-templates",
                where=path.name,
                what=f"differs from the chat_template of {SETTINGS}, which older readers take",
                advice="write the same in both, or remove the one in the JSON file",
            )


def template_roles(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the roles whose messages the folder's chat template writes out."""
    rendered = {role: _rendered(tokenizer, role) for role in CONVERSATIONS}
    return tuple(
        role for role, text in rendered.items() if isinstance(text, str) and SAID[role] in text
    )


def _template_findings(tokens: Tokens, tokenizer: Tokenizer) -> Iterator[Finding]:
    for role in ("user", "assistant"):
        rendered = _rendered(tokenizer, role)
        if isinstance(rendered, Exception):
            yield Finding(
                level="error",
                kind="template",
                where="chat template",
                what=f"does not render a conversation with {role} messages: {rendered}",
                advice="correct it; roles must alternate between user and assistant",
            )
            return
        if SAID[role] not in rendered:
            yield Finding(
                level="error",
                kind="template",
                where="chat template",
                what=f"leaves out what the {role} says",
                advice="correct it: the model would not see the message",
            )
            return
    run = end_of_turn(tokenizer)
    ends = tokens.end_ids or dict.fromkeys(ids_in(tokenizer.eos_token_id), SETTINGS)
    is_said = tokenizer.eos_token_id in run  # the end that no config has is a finding of its own
    if run and ends and not is_said and not ends.keys() & set(run):
        yield Finding(
            level="warning",
            kind="end-of-turn",
            where=next(iter(ends.values())),
            what=f"ends generation at {_tokens(tokenizer, ends)}, and the chat template ends an answer "
            f"with {_tokens(tokenizer, run)}: answers in a chat do not end there",
            advice=f"add the token to eos_token_id of {FILE}",
            is_mendable=len(run) == 1,
        )


def end_of_turn(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the special tokens that the chat template writes right after an answer; none if it is text.

    Several where it writes several, one after another.
    """
    for messages in (CONVERSATIONS["assistant"][:2], CONVERSATIONS["assistant"]):
        try:
            text = tokenizer.render_chat(messages, add_generation_prompt=False)
        except (RequestError, CheckpointError):
            continue
        run = []
        after = text.partition(ANSWER)[2].lstrip()
        for token_id in tokenizer.encode(after, add_special_tokens=False):
            if token_id in tokenizer.special_token_ids:
                run.append(token_id)
            elif not tokenizer.token_text(token_id).isspace():
                break
        if after:
            return tuple(run)
    return ()


def _rendered(tokenizer: Tokenizer, role: str) -> str | Exception:
    try:
        return tokenizer.render_chat(CONVERSATIONS[role])
    except (RequestError, CheckpointError) as error:
        return error


def ids_in(value: Any) -> list[int]:
    """Return the token ids of a config's value: one, a list, or none."""
    listed: Sequence[Any] = value if isinstance(value, list) else [value]
    return [item for item in listed if type(item) is int and item >= 0]


def facts_of(tokens: Tokens) -> dict[str, str]:
    """Return what the report says about tokens."""
    if tokens.tokenizer is None:
        return {}
    tokenizer = tokens.tokenizer
    size = f"{tokenizer.vocab_size:,} tokens"
    if tokens.rows is not None:
        spare = max(0, tokens.rows - tokenizer.vocab_size)
        size += f", {tokens.rows:,} rows ({spare:,} spare)"
    ends = tokens.end_ids or dict.fromkeys(ids_in(tokenizer.eos_token_id), SETTINGS)
    facts = {"vocabulary": size, "ends at": _tokens(tokenizer, ends) if ends else "nothing"}
    if tokenizer.chat_template_names:
        names = ", ".join(tokenizer.chat_template_names)
        facts["chat template"] = f"{names}; roles {', '.join(template_roles(tokenizer)) or 'none'}"
    return facts


def _no_template() -> Skipped:
    return Skipped(check="chat template", reason="the folder has none")


def _token(tokenizer: Tokenizer, token_id: int | None) -> str:
    if token_id is None:
        return "no token"
    spelled = tokenizer.spelling(token_id)
    return f"{token_id} {spelled!r}" if spelled is not None else f"{token_id}, which is no token"


def _tokens(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    return shown(_token(tokenizer, token_id) for token_id in ids)


def _content(value: Any) -> str | None:
    inner = value.get("content") if isinstance(value, Mapping) else value
    return inner if isinstance(inner, str) else None
