"""Structured output: which tokens may come next so that a text fits a schema, regex or grammar.

llguidance compiles the grammar and follows the text; it is imported when the first grammar is asked
for. One `GrammarCompiler` for each model, one `Grammar` for each request, one `Matcher` for each
sequence. It sees tokens as the bytes that they add in the middle of a text.

Objects have the properties that their schema names and no others, unless it says something of others
(`engine/closed_schema.py`). JSON is written with at most one space at each place where JSON allows any,
and a character has one spelling in a string: what names a property cannot be spelled in a way that the
schema does not see.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hanok.checkpoint.tokenizer import Tokenizer
from hanok.engine.closed_schema import closed
from hanok.engine.grammar_spec import (
    GrammarError,
    GrammarSpec,
    check_size,
    find_culprit,
    read_schema,
)
from hanok.engine.json_schema import Schema

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from llguidance._lib import JsonCompileOptions

COMPILE_SECONDS = 3.0
"""A grammar that takes longer is refused. Most take milliseconds."""

SEARCH_SECONDS = 0.5
"""How long the keyword is looked for that makes a schema fail."""

CACHED_GRAMMARS = 32

STACK_BYTES = 256 * 1024 * 1024
"""Of the thread that compiles. llguidance recurses along chains of references, and a stack that is
too small ends the process; a page of it costs memory only when it is reached."""

COMPILING_AT_ONCE = 2
"""A grammar that was given up is compiled to its end; so many may take up processors."""

PROBED_TOKENS = 2
"""Steps that are tried before a grammar counts as compiled: some only fail when they are followed."""

_LIMIT = re.compile(r"fuel|limit|max is|too large|too many (items|expressions)")
"""In what llguidance says when a grammar is too much for it; no single keyword is to blame then."""

_ANY_OBJECT = json.dumps({"type": "object"})

_stack_size = threading.Lock()  # the size for new threads belongs to the whole process


class Matcher:
    """The position of one sequence in its grammar. For one thread at a time."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher
        self._num_behind = 0
        """End tokens after a text that was complete without them, which llguidance does not count."""

    def mask(self, scores: Tensor) -> Tensor:
        """Return the scores, (vocab,), with -inf for every token that may not come next.

        An end token is allowed where the text is complete. GrammarError where following the grammar
        exceeds its limits or nothing may come next.
        """
        # One byte for each token: 0 where it may not come.
        allowed = bytearray(self._matcher.compute_logit_bias())
        self._check()
        excluded = torch.frombuffer(allowed, dtype=torch.uint8)[: len(scores)] == 0
        return scores.masked_fill(excluded.to(scores.device), float("-inf"))

    def accept(self, token_id: int) -> None:
        """Go on by one token. GrammarError if it may not come next; the matcher is then unusable."""
        was_over = self._matcher.is_stopped()
        self._matcher.consume_token(token_id)
        self._check()
        self._num_behind += was_over

    def allowed_prefix(self, token_ids: Sequence[int]) -> int:
        """Return how many of these tokens may come, one after another. Nothing is accepted."""
        number = self._matcher.validate_tokens(list(token_ids))
        self._check()
        return number

    def forced(self) -> list[int]:
        """Return the tokens of what has to follow, as the tokenizer cuts it; none where it is open.

        Nothing is accepted, and a text may be cut into other tokens.
        """
        tokens = self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    def rollback(self, num_tokens: int) -> None:
        """Take back the last `num_tokens` that were accepted."""
        behind = min(num_tokens, self._num_behind)
        self._num_behind -= behind
        self._matcher.rollback(num_tokens - behind)
        self._check()

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end token may follow, or one came.

        A grammar that allows no text but the empty one is finished once an end token came.
        """
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(
                f"the grammar could not be followed any further: {_reason(self._matcher)}. "
                "A simpler one may be, such as one with fewer optional or repeated parts"
            )


class Grammar:
    """A compiled grammar. Threads may share it."""

    def __init__(self, start: "LLMatcher") -> None:
        self._start = start

    def matcher(self) -> Matcher:
        """A matcher at the beginning of a text, independent of all others."""
        return Matcher(self._start.deep_copy())


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Threads may share it.

    `vocab_size` is the length of a row of scores; ids without a token are never allowed. `end_ids` end
    a text. What the vocabulary spells is read when the first grammar is compiled.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int]) -> None:
        self._vocabulary = _VocabularyBytes(tokenizer, vocab_size, frozenset(end_ids))
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(COMPILING_AT_ONCE)
        self._cache: OrderedDict[GrammarSpec, Grammar] = OrderedDict()

    def compile(self, spec: GrammarSpec) -> Grammar:
        """The grammar of a spec, from the cache where it was compiled lately.

        Returns or raises GrammarError within a few seconds, whatever the spec; the time to read the
        vocabulary, once, comes on top. Call it outside of an event loop.
        """
        with self._lock:
            cached = self._cache.get(spec)
            if cached is not None:
                self._cache.move_to_end(spec)
                return cached
            tokenizer = self._tokenizer or self._vocabulary.open()
            self._tokenizer = tokenizer
        check_size(spec)
        grammar = self._in_bounds(lambda: _compile(spec, tokenizer))
        with self._lock:
            self._cache[spec] = grammar
            while len(self._cache) > CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        return grammar

    def _in_bounds(self, work: Callable[[], Grammar]) -> Grammar:
        """Run `work` in a thread with a deep stack, and stop waiting when it takes too long."""
        deadline = monotonic() + COMPILE_SECONDS
        result: Future[Grammar] = Future()

        def run() -> None:
            try:
                result.set_result(work())
            except Exception as error:
                result.set_exception(error)
            except BaseException as error:
                # A llguidance panic is not an `Exception` subclass; uncaught it would kill the server.
                result.set_exception(GrammarError(f"llguidance gave the grammar up: {error}"))
            finally:
                self._slots.release()

        if self._slots.acquire(timeout=COMPILE_SECONDS):
            thread = threading.Thread(target=run, name="hanok-grammar", daemon=True)
            with _stack_size:
                before = threading.stack_size(STACK_BYTES)
                try:
                    thread.start()
                finally:
                    threading.stack_size(before)
            try:
                return result.result(timeout=max(0.0, deadline - monotonic()))
            except TimeoutError:
                pass
        raise GrammarError(
            f"the grammar was not compiled within {COMPILE_SECONDS:g} s; a simpler one is, such as one "
            "with smaller bounds and fewer alternatives"
        )


class _VocabularyBytes:
    """The bytes of every token, as llguidance wants to see a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        # Where no token ends a text, one beyond the vocabulary does, which no row of scores has.
        self._end_ids = sorted(end_ids) or [vocab_size]
        self.eos_token_id = self._end_ids[0]
        self.bos_token_id = None
        self._special = tokenizer.special_token_ids | set(self._end_ids)
        self.special_token_ids = sorted(self._special)
        self.tokens: list[bytes] = []

    def open(self) -> "LLTokenizer":
        from llguidance import LLTokenizer, TokenizerWrapper

        count = max(self._vocab_size, self._tokenizer.vocab_size, *(i + 1 for i in self._end_ids))
        self.tokens = [self._tokenizer.token_bytes(token_id) for token_id in range(count)]
        self._ids = {data: token_id for token_id, data in reversed([*enumerate(self.tokens)])}
        for token_id in self.special_token_ids:
            self._ids.pop(self.tokens[token_id], None)
        self._longest = max(map(len, self._ids))
        return LLTokenizer(TokenizerWrapper(self), eos_token=self._end_ids)

    def __call__(self, text: str) -> list[int]:
        """Ids that spell `text` in the middle of a text: how what a grammar leaves open but once is cut.

        A SentencePiece vocabulary begins a text with a space; after a character that joins no other
        it does not. The spelling of a special token is text like any other: that token would not write
        it, but end the text or begin a turn.
        """
        data = text.encode()
        for before in ("", "\x02"):
            skipped = len(self._tokenizer.encode(before, add_special_tokens=False))
            ids = self._tokenizer.encode(before + text, add_special_tokens=False)[skipped:]
            spelled = b"".join(self.tokens[token_id] for token_id in ids)
            if spelled == data and self._special.isdisjoint(ids):
                return ids
        return self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        ids: list[int] = []
        begin = 0
        while begin < len(data):
            ends = range(min(begin + self._longest, len(data)), begin, -1)
            end = next((end for end in ends if data[begin:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[data[begin:end]])
            begin = end
        return ids


def _compile(spec: GrammarSpec, tokenizer: "LLTokenizer") -> Grammar:
    from llguidance import LLMatcher

    if spec.kind == "regex":
        return Grammar(_started(LLMatcher.grammar_from_regex(spec.value), tokenizer, "regex"))
    if spec.kind == "lark":
        if "%json" in spec.value:
            raise GrammarError(
                "the Lark grammar has a JSON schema in it (%json), where it is not checked: send the "
                "schema as the whole grammar, or write the rules out"
            )
        return Grammar(_started(LLMatcher.grammar_from_lark(spec.value), tokenizer, "Lark grammar"))
    schema = read_schema(_ANY_OBJECT if spec.kind == "json_object" else spec.value)
    try:
        return Grammar(_started(_schema_grammar(schema), tokenizer, "JSON schema"))
    except _CompileError as error:
        raise _schema_error(schema, error.reason, tokenizer) from error


class _CompileError(GrammarError):
    """What llguidance said against a grammar."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"the {what} cannot be followed: {reason}. Correct or simplify it")
        self.reason = reason


def _schema_grammar(schema: Schema) -> str:
    from llguidance import LLMatcher

    try:
        text = json.dumps(closed(schema))
        return LLMatcher.grammar_from_json_schema(text, overrides=_json_options())
    except ValueError as error:
        raise _CompileError("JSON schema", str(error)) from error


def _json_options() -> "JsonCompileOptions":
    """How JSON is written: every option, so that a schema's own "x-guidance" changes none."""
    return {
        "item_separator": ",",
        "key_separator": ":",
        "whitespace_flexible": True,
        "whitespace_pattern": " ",
        "coerce_one_of": False,
        "lenient": False,
        # Without "u": a name spelled "\\u0061" passes for one other than "a".
        "json_allowed_escapes": 'nrbtf\\"',
        "json_allow_general_unicode_escapes": False,
    }


def _started(grammar: str, tokenizer: "LLTokenizer", what: str) -> "LLMatcher":
    """A matcher of a grammar of which the first steps were tried."""
    from llguidance import LLMatcher

    start = LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
    probe = start.deep_copy()
    for _ in range(PROBED_TOKENS):
        allowed = probe.compute_logit_bias()
        if probe.is_error():
            raise _CompileError(what, _reason(probe))
        token_id = next((i for i, bias in enumerate(allowed) if bias), None)
        if token_id is None or token_id in tokenizer.eos_tokens:
            break
        probe.consume_token(token_id)
    return start


def _schema_error(schema: Schema, reason: str, tokenizer: "LLTokenizer") -> GrammarError:
    """`reason` with the pointer of the keyword it is about."""
    deadline = monotonic() + SEARCH_SECONDS

    def compile_error(changed: Schema) -> str | None:
        if monotonic() > deadline:
            raise TimeoutError
        try:
            _started(_schema_grammar(changed), tokenizer, "JSON schema")
        except _CompileError as error:
            return error.reason
        return None

    pointer = None if _LIMIT.search(reason) else find_culprit(schema, reason, compile_error)
    where = f"{pointer} of the JSON schema" if pointer else "the JSON schema"
    unknown = re.match(r"Unimplemented keys: \[(.+)\]", reason)
    if unknown:
        why = f"is not supported: no grammar is made of {unknown[1]}. Leave it out and check the answer"
    elif reason.startswith("oneOf"):
        why = "is not supported: two of its schemas may fit one text. Use anyOf"
    else:
        why = f"cannot be followed: {reason}. Correct or simplify it"
    return GrammarError(f"{where} {why}", pointer)


def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    # Errors of the parser would quote the text and its grammar; a state of the lexer is 1 to 2 kB.
    return LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def _reason(matcher: "LLMatcher") -> str:
    """What a matcher says against its grammar, in one line."""
    text = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
    if "NoExtension" in text:
        return "no text can fit it"
    # Around it a regex is quoted twice, in a generated grammar.
    text = text.rpartition("(in regex): ")[2].partition(" 1 | start: ")[0]
    return text if len(text) <= 300 else f"{text[:150]} … {text[-150:]}"
