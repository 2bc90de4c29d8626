"""Parses a model's text into an answer: reasoning, content and tool calls.

The text is parsed as it arrives, into events that every chat protocol writes in its own form. A whole
answer is these events joined, so it equals the stream, with one exception: a call whose arguments turn
out not to be JSON becomes content of a whole answer; a stream has already begun the call, and ends it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hanok.server.calls import (
    CLOSINGS,
    FIRST_OF_CALL,
    INNER,
    OPENINGS,
    CallArguments,
    CallBegun,
    CallEnded,
    CallEvent,
    CallReader,
    NotACallError,
)
from hanok.server.incoming import Incoming, Reading

if TYPE_CHECKING:
    from hanok.engine.sequence import TokenEvent

REASONING: Mapping[str, str] = {
    "<think>": "</think>",  # DeepSeek-R1, Qwen3, SmolLM3, EXAONE 4, GLM, Granite 3.3, Nemotron
    "<thought>": "</thought>",  # EXAONE Deep
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "[THINK]": "[/THINK]",  # Magistral, Ministral 3
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command-A Reasoning
}
"""The markers that models write around their reasoning, at the beginning of an answer."""

REASONING_MARKERS = frozenset((*REASONING, *REASONING.values()))
CALL_MARKERS = frozenset((*OPENINGS, *CLOSINGS, *INNER))
"""All markers that are parsed; special tokens that spell one must be part of the decoded text."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the model's content."""

    text: str


Event = Reasoning | Content | CallEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call; `arguments` is JSON text, incomplete if the answer was cut off within it."""

    id: str
    name: str
    arguments: str

    def body(self) -> dict[str, Any]:
        """Return it in OpenAI's shape."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer."""

    reasoning: str
    content: str
    calls: list[ToolCall]

    @classmethod
    def of(cls, events: Iterable["Event"]) -> "Answer":
        """Join the events of a reader of a whole answer."""
        begun: list[CallBegun] = []
        arguments: list[str] = []
        reasoning = content = ""
        for event in events:
            if isinstance(event, CallBegun):
                begun.append(event)
                arguments.append("")
            elif isinstance(event, CallArguments):
                arguments[-1] += event.text
            elif isinstance(event, Reasoning):
                reasoning += event.text
            elif isinstance(event, Content):
                content += event.text
        calls = [
            ToolCall(id=call.id, name=call.name, arguments=text)
            for call, text in zip(begun, arguments, strict=True)
        ]
        return cls(reasoning=reasoning, content=content, calls=calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What to parse in an answer."""

    functions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The functions that may be called, by name, as the request declares them."""
    is_forced: bool = False
    """A grammar forces the answer to be one call: `{"name": …, "arguments": …}`."""
    allows_several: bool = True
    """Whether more than one call may be made; if not, calls after the first are dropped."""
    reasoning: bool = True
    """Whether reasoning is separated from the content."""
    opening: str = ""
    """The reasoning marker that the prompt already opened."""


class AnswerReader:
    """Reads a model's text in pieces, of any size; the events depend on the text alone."""

    def __init__(self, reads: Reads, *, is_whole: bool = False) -> None:
        self._reads = reads
        self._is_whole = is_whole
        self._reads_reasoning = reads.reasoning and not reads.is_forced
        self.is_reasoning = self._reads_reasoning and bool(reads.opening)
        """Whether the last text belongs to the model's reasoning, or to a marker around it."""
        self.num_reasoning_tokens = 0
        self._source = Incoming()
        self._events: list[Event] = []
        self._held: list[CallEvent] = []
        """Events of a call that may still turn out to be content."""
        self._has_content = False
        self._gap = ""
        """The whitespace between the content before a call and the content after it."""
        self._calls = CallReader(self._source, reads.functions, self._call_event)
        self._reading = self._answer()

    def read(self, tokens: Iterable["TokenEvent"]) -> list[Event]:
        """Return the events of some tokens; after the last token, also what was held back."""
        found: list[Event] = []
        for token in tokens:
            found += self.push(token.text)
            self.num_reasoning_tokens += self.is_reasoning
            if token.finish_reason is not None:
                found += self.finish()
        return found

    def push(self, text: str) -> list[Event]:
        """Return the events that became certain."""
        self._source.push(text)
        return self._run()

    def finish(self) -> list[Event]:
        """Return what was held back; no more text follows."""
        self._source.is_ended = True
        return self._run()

    def _run(self) -> list[Event]:
        next(self._reading, None)
        found, self._events = self._events, []
        return _joined(found)

    def _call_event(self, event: CallEvent) -> None:
        if event.index and not self._reads.allows_several:
            return
        if not self._is_whole:
            self._events.append(event)
            return
        self._held.append(event)
        if isinstance(event, CallEnded):
            self._events += self._held
            self._held.clear()

    def _answer(self) -> Reading[None]:
        source, reads = self._source, self._reads
        if self._reads_reasoning:
            yield from self._reasoning()
        if not reads.functions:
            yield from self._everything()
            return
        may_call, is_marked = True, reads.is_forced
        while (yield from source.peek()):
            source.forget()
            if may_call:
                may_call = yield from self._unmarked(is_marked=is_marked)
            if not may_call:
                may_call = yield from self._content()
                is_marked = may_call
            if may_call and (yield from self._is_closed()):
                is_marked = False

    def _everything(self) -> Reading[None]:
        source = self._source
        while (yield from source.peek()):
            self._events.append(Content(source.rest))
            source.at = len(source.text)
            source.forget()

    # Reasoning

    def _reasoning(self) -> Reading[None]:
        source, opening = self._source, self._reads.opening
        if not opening:
            yield from source.skip_space()
            opening = yield from self._one_of(REASONING)
            if not opening:
                source.at = 0
                return
        self.is_reasoning = True
        yield from source.skip_space()
        closing = REASONING[opening]
        while True:
            rest = source.rest
            at = rest.find(closing)
            cut = len(rest[:at].rstrip()) if at >= 0 else _certain(rest, (closing,), source)
            if cut:
                self._events.append(Reasoning(rest[:cut]))
            source.at += at + len(closing) if at >= 0 else cut
            source.forget()
            if at >= 0 or source.is_ended:
                break
            yield
        self.is_reasoning = False
        yield from source.skip_space()

    def _one_of(self, words: Iterable[str]) -> Reading[str]:
        """Read the first of some words that the text continues with; "" if it is none of them."""
        for word in words:
            if (yield from self._source.takes(word)):
                return word
        return ""

    # Content and calls

    def _content(self) -> Reading[bool]:
        """Pass text on up to the next call, or to the end; return whether there is one."""
        source = self._source
        while True:
            rest = source.rest
            starts = [(at, word) for word in OPENINGS if (at := rest.find(word)) >= 0]
            cut = min(starts)[0] if starts else _certain(rest, OPENINGS, source)
            words = rest[:cut] if source.is_ended and not starts else rest[:cut].rstrip()
            if words:
                self._say(words)
                source.at += len(words)
            source.forget()
            if starts:
                word = min(starts)[1]
                space = rest[len(words) : cut]
                source.at += len(space) + len(word) - len(FIRST_OF_CALL.get(word, ""))
                if (yield from self._calls_here(0, is_marked=True)):
                    if self._has_content:
                        self._gap = space or "\n"
                    return True
                self._say(space + word)
                source.at += len(space) + len(word)
            elif source.is_ended:
                return False
            else:
                yield

    def _say(self, text: str) -> None:
        self._events.append(Content(self._gap + text))
        self._has_content, self._gap = True, ""

    def _unmarked(self, *, is_marked: bool) -> Reading[bool]:
        """Read a call where no marker announces it; return whether there was one."""
        source = self._source
        start = source.at
        if self._calls.num_begun:
            yield from source.skip_space()
            yield from self._one_of(";,")
        return (yield from self._calls_here(start, is_marked=is_marked))

    def _calls_here(self, start: int, *, is_marked: bool) -> Reading[bool]:
        """Read calls; return whether there was one. If not, the source is back at `start`."""
        source, calls = self._source, self._calls
        count = calls.num_begun
        try:
            yield from source.skip_space()
            if is_marked:  # of families that mark a call and the list of calls
                yield from self._one_of(("<tool_call>", "<｜tool▁call▁begin｜>"))
            yield from calls.read(is_marked=is_marked)
        except NotACallError:
            is_cut = source.is_ended and source.at >= len(source.text)
            if calls.is_open and (is_cut or not self._is_whole):
                calls.end(is_whole=False)
            elif calls.is_open:
                calls.take_back()
                self._held.clear()
            source.at = calls.restart if calls.num_begun > count else start
        return calls.num_begun > count

    def _is_closed(self) -> Reading[bool]:
        """Read the markers after calls; return whether there was one."""
        found = False
        while True:
            yield from self._source.skip_space()
            if not (yield from self._one_of(CLOSINGS)):
                return found
            found = True


def _certain(text: str, words: Iterable[str], source: Incoming) -> int:
    """Return how many characters of a text cannot be part of a marker, whatever follows.

    Whitespace before a marker is dropped, so trailing whitespace is held until more text arrives.
    """
    if source.is_ended:
        return len(text)
    overlap = max(
        next((n for n in range(len(w) - 1, 0, -1) if text.endswith(w[:n])), 0) for w in words
    )
    return len(text[: len(text) - overlap].rstrip())


def _joined(events: list[Event]) -> list[Event]:
    """Return events with consecutive ones of the same kind merged."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(last, Reasoning) and isinstance(event, Reasoning):
            found[-1] = Reasoning(last.text + event.text)
        elif isinstance(last, Content) and isinstance(event, Content):
            found[-1] = Content(last.text + event.text)
        elif (
            isinstance(last, CallArguments)
            and isinstance(event, CallArguments)
            and last.index == event.index
        ):
            found[-1] = CallArguments(event.index, last.text + event.text)
        else:
            found.append(event)
    return found
