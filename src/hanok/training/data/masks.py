"""Renders records to token ids and says which of them are to be predicted.

Conversations are rendered by the function that serves (`checkpoint/chat.py`) and tokenized as a whole.
An answer is found in one of three ways, the first that is possible:

- *marks*: the template encloses it in `{% generation %}`;
- *prefix*: the ids of the conversation before it, with the generation prompt, are those that the whole
  begins with, so the answer is the difference;
- *offsets*: the same conversation with a marker in place of the answer has the same text on both sides
  of it. So are answers found that a template writes differently in a longer conversation.

An answer that is found in none of these ways is dropped with a reason. The end-of-turn token is a
target, since a model that never learns it never stops; what a template writes after it is not.

Cost: a rendering for each way that is tried; with *prefix*, the beginnings are tokenized as well, which
is quadratic in the number of answers.
"""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hanok.checkpoint.tokenizer import Tokenizer, check_encodable
from hanok.checkpoint.vocabulary import Located
from hanok.errors import HanokError, RequestError
from hanok.training.data.formats import Completion, Conversation, Record, Text

Way = Literal["marks", "prefix", "offsets"]
WAYS: tuple[Way, ...] = ("marks", "prefix", "offsets")
_MARKER, _QUESTION = "answermark0x", "questionmark0x"
_EXCHANGE = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _MARKER}]


@dataclass(slots=True, kw_only=True)
class Encoded:
    """One document."""

    ids: list[int]
    targets: bytearray
    """For each token, whether it is to be predicted; never the first."""
    ways: list[Way] = field(default_factory=list)
    """How each answer was found."""
    dropped: list[str] = field(default_factory=list)
    """Why, for each answer or turn that is not learnt although it was to be."""
    is_text: bool = False
    """Whether all of it is learnt, by what it is."""
    is_open: bool = False
    """Whether the text goes on in the next document: no end is expected."""
    has_end: bool = False
    """Whether the last answer ends with a token that ends answers."""


@dataclass(slots=True, kw_only=True)
class _Answer:
    """Where an answer is in the rendered text, in characters."""

    start: int
    core_end: int
    """Where it ends, without what may be an end token."""
    end: int
    """Where it ends as the template has it."""
    way: Way
    before: str | None = None
    """The conversation before it, whose ids the whole must begin with."""


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A record as text, before it is tokenized."""

    text: str
    record: Record
    answers: list[_Answer] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def texts(self) -> Iterator[str]:
        """What has to be tokenized for it."""
        yield self.text
        yield from (answer.before for answer in self.answers if answer.before is not None)


class Renderer:
    """Renders with one tokenizer and one template.

    `template` is None for the checkpoint's own, a name of one of its templates, or the text of one.
    `end_ids` are the tokens that end an answer when the model serves. With `appends_eos`, a last answer
    after which the template writes no end token gets the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: str | None = None,
        end_ids: Collection[int] = (),
        appends_eos: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self.template = template
        self.has_template = template is not None or bool(tokenizer.chat_template_names)
        self._special = tokenizer.special_token_ids
        spelled = [tokenizer.spelling(token_id) for token_id in sorted(self._special)]
        self._spelled = tuple(sorted((text for text in spelled if text), key=len, reverse=True))
        self._tail = re.compile(
            "|".join([r"\s", *map(re.escape, self._spelled)]).join(("(?:", ")*"))
        )
        self._eos = tokenizer.eos_token_id
        self._ends = set(end_ids) | ({self._eos} if self._eos is not None else set())
        probed = self._probed_ends()
        self._ends |= probed
        self.unserved_ends = frozenset(probed.difference(end_ids) if end_ids else ())
        """Tokens that the template ends answers with, and at which the model does not stop."""
        self.appends_eos = appends_eos
        self._has_marks = self._probed_marks()
        framed = tokenizer.encode("")
        self._front = framed[:-1] if len(framed) > 1 and framed[-1] == self._eos else framed
        if framed == [self._eos] and self._eos != tokenizer.bos_token_id:
            self._front = []

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the given ones, and what the template ends answers with."""
        return frozenset(self._ends)

    def encode(self, records: Sequence[Record]) -> list[Encoded | HanokError]:
        """Return each record as a document, or why it cannot be rendered, in their order."""
        drafts = [self._drafted(record) for record in records]
        texts = [text for draft in drafts if isinstance(draft, _Draft) for text in draft.texts]
        located = iter(self._tokenizer.encode_rendered(texts))
        found: list[Encoded | HanokError] = []
        for draft in drafts:
            if isinstance(draft, _Draft):
                whole, *befores = [next(located) for _ in draft.texts]
                found.append(self._finished(draft, whole, [before.ids for before in befores]))
            else:
                found.append(draft)
        return found

    def _drafted(self, record: Record) -> _Draft | HanokError:
        try:
            if isinstance(record, Conversation):
                draft = self._conversation(record)
            elif isinstance(record, Completion):
                draft = self._completion(record)
            else:
                draft = _Draft(text=record.text, record=record)
            check_encodable(draft.text)
        except HanokError as error:
            return error
        return draft

    def _completion(self, record: Completion) -> _Draft:
        text = record.prompt + record.completion
        answer = _Answer(
            start=len(record.prompt),
            core_end=len(text),
            end=len(text),
            way="prefix",
            before=record.prompt,
        )
        return _Draft(text=text, record=record, answers=[answer])

    def _conversation(self, record: Conversation) -> _Draft:
        asked = [i for i, is_learnt in enumerate(record.learnt) if is_learnt]
        if self._has_marks and (marked := self._marked(record)) is not None:
            return marked
        draft = _Draft(text=self._rendered(record), record=record, dropped=[*record.left_out])
        for index in asked:
            answer = self._by_prefix(record, draft.text, index)
            answer = answer or self._by_marker(record, draft.text, index)
            if answer is not None:
                draft.answers.append(answer)
            else:
                draft.dropped.append("the template writes it differently in this conversation")
        return draft

    def _rendered(
        self,
        record: Conversation,
        messages: list[dict[str, object]] | None = None,
        *,
        opens: bool = False,
    ) -> str:
        return self._tokenizer.render_chat(
            record.messages if messages is None else messages,
            template=self.template,
            tools=record.tools,
            add_generation_prompt=opens,
            template_variables=record.variables,
        )

    def _marked(self, record: Conversation) -> _Draft | None:
        """Return the answers as the template marks them; None where it does not mark each."""
        try:
            rendered = self._tokenizer.render_chat_with_spans(
                record.messages,
                template=self.template,
                tools=record.tools,
                template_variables=record.variables,
            )
        except RequestError:
            return None  # what is wrong is wrong without marks as well, or the marks are
        spans = rendered.generation_spans
        places = [i for i, m in enumerate(record.messages) if m["role"] == "assistant"]
        if not spans:
            return None
        if len(spans) != len(places):
            if not all(record.learnt[i] for i in places):
                return None  # which of them is not to be learnt is not known
            learnt = list(spans)
        else:
            learnt = [span for span, i in zip(spans, places, strict=True) if record.learnt[i]]
        draft = _Draft(text=rendered.text, record=record, dropped=[*record.left_out])
        for start, end in learnt:
            core = start + len(self._without_tail(rendered.text[start:end]))
            draft.answers.append(_Answer(start=start, core_end=core, end=end, way="marks"))
        return draft

    def _by_prefix(self, record: Conversation, text: str, index: int) -> _Answer | None:
        try:
            before = self._rendered(record, record.messages[:index], opens=True)
            is_last = index == len(record.messages) - 1
            until = text if is_last else self._rendered(record, record.messages[: index + 1])
        except RequestError:
            return None  # no conversation for this template
        core = len(before) + len(self._without_tail(until[len(before) :]))
        if not until.startswith(before) or text[:core] != until[:core]:
            return None
        end = core + _num_equal(until[core:], text[core:])
        return _Answer(start=len(before), core_end=core, end=end, way="prefix", before=before)

    def _by_marker(self, record: Conversation, text: str, index: int) -> _Answer | None:
        """Find an answer as what differs when a marker is in its place."""
        messages = [*record.messages]
        messages[index] = {"role": "assistant", "content": _MARKER}
        try:
            before, found, after = self._rendered(record, messages).partition(_MARKER)
        except RequestError:
            return None
        end = len(text) - len(after)
        if not found or not text.startswith(before) or not text.endswith(after):
            return None
        if end <= len(before):
            return None
        core = len(before) + len(self._without_tail(text[len(before) : end]))
        return _Answer(start=len(before), core_end=core, end=end, way="offsets")

    def _without_tail(self, text: str) -> str:
        """Return a text without the special tokens and spaces that it ends with."""
        while True:
            text = text.rstrip()
            if not text.endswith(self._spelled):
                return text
            text = text.removesuffix(next(s for s in self._spelled if text.endswith(s)))

    def _finished(self, draft: _Draft, whole: Located, befores: list[list[int]]) -> Encoded:
        record = draft.record
        if isinstance(record, Text):
            return self._text(record, whole.ids)
        front = self._front_of(whole.ids) if isinstance(record, Completion) else []
        encoded = Encoded(
            ids=[*front, *whole.ids],
            targets=bytearray(len(front) + len(whole.ids)),
            dropped=draft.dropped,
        )
        remaining = iter(befores)
        for answer in draft.answers:
            ids = next(remaining) if answer.before is not None else None
            first, last = self._range(answer, whole, ids)
            is_prefix = ids is None or whole.ids[: len(ids)] == ids
            encoded.ways.append(answer.way if is_prefix else "offsets")
            ended = self._end_after(answer, draft.text, whole, last)
            encoded.has_end = ended is not None
            last = last if ended is None else ended + 1
            begin = len(front) + first
            encoded.targets[begin : len(front) + last] = b"\1" * max(0, last - first)
        self._close(encoded, isinstance(record, Completion))
        encoded.targets[:1] = bytes(len(encoded.targets[:1]))
        return encoded

    def _close(self, encoded: Encoded, is_completion: bool) -> None:
        """Add the end token where no template is to write it, or where it is asked for."""
        if encoded.has_end or self._eos is None or 1 not in encoded.targets:
            return
        if is_completion and encoded.ids[-1] in self._ends:
            encoded.has_end = True
        elif is_completion or self.appends_eos:
            end = encoded.targets.rindex(1) + 1
            encoded.ids[end:] = [self._eos]
            encoded.targets[end:] = b"\1"
            encoded.has_end = True

    def _range(self, answer: _Answer, whole: Located, before: list[int] | None) -> tuple[int, int]:
        """Return the first token of an answer, and the first after it, without an end token."""
        starts = [start for start, _ in whole.spans]
        last = bisect_left(starts, answer.core_end)
        if before is not None and whole.ids[: len(before)] == before:
            return len(before), max(last, len(before))
        # A token that begins before the answer and ends in it belongs to it.
        ends = [end for _, end in whole.spans]
        first = next((i for i, end in enumerate(ends) if end > answer.start), len(ends))
        return first, max(last, first)

    def _end_after(self, answer: _Answer, text: str, whole: Located, place: int) -> int | None:
        """Return which token after an answer ends it; None where none does."""
        special = None
        for index in range(place, len(whole.ids)):
            token_id, (start, end) = whole.ids[index], whole.spans[index]
            if token_id in self._ends:
                return index
            if token_id in self._special:
                if special is None and end <= answer.end:
                    special = index
            elif text[start:end].strip():
                break
        return special

    def _text(self, record: Text, ids: list[int]) -> Encoded:
        front = self._front_of(ids) if record.begins else []
        has_end = record.ends and self._eos is not None
        ids = [*front, *ids]
        if has_end and self._eos is not None and ids[-1:] != [self._eos]:
            ids.append(self._eos)
        targets = bytearray(b"\1" * len(ids))
        targets[:1] = bytes(len(targets[:1]))
        return Encoded(
            ids=ids, targets=targets, is_text=True, is_open=not record.ends, has_end=has_end
        )

    def _front_of(self, ids: list[int]) -> list[int]:
        """Return what the tokenizer puts before a plain text, unless the text has it already."""
        return [] if self._front and ids[: len(self._front)] == self._front else self._front

    def _probed_ends(self) -> set[int]:
        """Return the tokens after which the template ends an answer, last in a conversation or not."""
        found = set()
        # Between two turns one special token alone may be how the next one begins.
        for messages, least in ((_EXCHANGE, 1), ([*_EXCHANGE, *_EXCHANGE], 2)):
            try:
                text = self._rendered(Conversation(messages=messages, learnt=[]))
            except RequestError:
                continue
            match = self._tail.match(text.partition(_MARKER)[2])
            ids = self._tokenizer.encode(match[0] if match else "", add_special_tokens=False)
            ids = [token_id for token_id in ids if token_id in self._special]
            if len(ids) >= least:
                found.add(ids[0])
        return found

    def _probed_marks(self) -> bool:
        """Return whether the template marks answers."""
        try:
            rendered = self._tokenizer.render_chat_with_spans(_EXCHANGE, template=self.template)
        except RequestError:
            return False
        return bool(rendered.generation_spans)


def _num_equal(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
