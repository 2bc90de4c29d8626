"""Renders conversations to text with a checkpoint's chat template.

A template is an untrusted program: it runs in jinja2's immutable sandbox, on plain copies of the data,
and with a bound on its loops. It sees the names that published templates use: messages, tools,
documents, functions (the tools as text), add_generation_prompt, the special tokens, `raise_exception`,
`strftime_now`, datetime, `tojson`, loop controls and the `{% generation %}` tag.

Invariants: the text is the one that the transformers library renders, given tool calls in the form
that the template writes out (`checkpoint/calls.py`); the caller's messages are never changed; whatever
goes wrong inside a template is a RequestError for that one conversation.

Cost: a template is compiled once per `ChatTemplates`; a rendering is linear in its output. The
bound is on loop steps, not on memory: a template can still build a very large string.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from hanok.checkpoint.calls import form_of, has_calls, joined_content
from hanok.errors import CheckpointError, RequestError

DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"
"""The name that published folders give to their template for conversations with tools."""

MAX_LOOP_STEPS = 1_000_000
"""Steps of all the loops of one rendering. A conversation of 1,000 messages needs some thousands."""

MAX_COMPILED = 64
"""Compiled templates that are kept at the most, since each request may bring a new one."""

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""The names under which a message carries its reasoning; templates read the first two."""

# Unicode noncharacters: valid in a string, never in a text.
_SPAN_START, _SPAN_END = "\ufdd0", "\ufdd1"
# Variables that begin with a digit: no template can spell them, so none can read or replace them.
_SPAN_START_NAME, _SPAN_END_NAME, _COUNT_STEPS = "0span_start", "0span_end", "0count_steps"
_END_OF_CONTENT = "HANOK_END_OF_FINAL_MESSAGE "
_DEVELOPER = "developer"
_NO_FINAL_TEXT = (
    "continue_final_message is set, but the last message has no text content to go on with; "
    "give it one, or set continue_final_message=False"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedChat:
    """A conversation as text, and which parts of it the model is to write."""

    text: str

    generation_spans: tuple[tuple[int, int], ...]
    """(start, end) of each part inside `{% generation %}`, in characters of `text`, in order."""


class ChatTemplates:
    """The templates of one checkpoint by name, with what they need to run.

    `texts` is name → template; `variables` are the special tokens by name; `now` is the clock of
    `strftime_now`. `origins` says which file a template was read from, for messages.
    """

    def __init__(
        self,
        texts: Mapping[str, str],
        *,
        variables: Mapping[str, object],
        now: Callable[[], datetime] = datetime.now,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        self._texts = dict(texts)
        self._variables = dict(variables)
        self._now = now
        self._origins = dict(origins or {})
        self._environment = _environment()
        self._compiled: dict[str, jinja2.Template] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the templates, in the order in which they were found."""
        return tuple(self._texts)

    @property
    def texts(self) -> tuple[str, ...]:
        """The templates, in the order of their names."""
        return tuple(self._texts.values())

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, object] | None = None,
    ) -> str:
        """The conversation as text; RequestError where the template refuses it.

        `template` is a name from `names` or the text of a template. With `continue_final_message`
        the text ends where the content of the last message ends, so that the model goes on with it.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt are both set: one goes on with the "
                "last message, the other opens a new one. Set add_generation_prompt=False to go on "
                "with the last message."
            )
        text, origin = self._choose(template, has_tools=tools is not None)
        variables = self._template_variables(
            tools, documents, add_generation_prompt, template_variables
        )
        conversation = self._written(messages, text, origin, variables)
        final = ""
        if continue_final_message:
            if messages[-1].get("content") is None:
                raise RequestError(_NO_FINAL_TEXT)
            final = _mark_final_message(conversation)
        rendered = self._run(text, origin, conversation, variables, self._now)
        return _cut_after_final(rendered, final) if continue_final_message else rendered

    def render_with_spans(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = False,
        template_variables: Mapping[str, object] | None = None,
    ) -> RenderedChat:
        """The conversation as text with the character ranges inside `{% generation %}` tags.

        No range where the template has no such tag. Renders twice: once plainly, once with marks
        around the ranges, and refuses a template whose text the marks would change.
        """
        text, origin = self._choose(template, has_tools=tools is not None)
        variables = self._template_variables(
            tools, documents, add_generation_prompt, template_variables
        )
        conversation = self._written(messages, text, origin, variables)
        # Both renderings must see the same moment.
        moment = self._now()
        plain = self._run(text, origin, conversation, variables, lambda: moment)
        if _SPAN_START in plain or _SPAN_END in plain:
            raise RequestError(
                "the conversation contains U+FDD0 or U+FDD1, which are not characters and mark the "
                "generated parts here; remove them from the messages"
            )
        marks = {_SPAN_START_NAME: _SPAN_START, _SPAN_END_NAME: _SPAN_END}
        marked = self._run(text, origin, conversation, {**variables, **marks}, lambda: moment)
        rendered = _read_spans(marked)
        if rendered.text != plain:
            raise RequestError(
                f"chat template {origin}: the text inside {{% generation %}} is changed after the "
                "tag ends (a trim or replace around it?), so its place in the text is not known; "
                "move the filter inside the tag"
            )
        return rendered

    def _written(
        self,
        messages: Sequence[Mapping[str, object]],
        text: str,
        origin: str,
        variables: Mapping[str, object],
    ) -> list[dict[str, Any]]:
        """A plain copy of the messages, in a form in which the template writes all of them."""
        moment = self._now()

        def render(form: list[dict[str, Any]]) -> str:
            return self._run(text, origin, form, variables, lambda: moment)

        def written(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
            in_parts = "text" in text and _reads_parts_only(conversation, render)
            if has_calls(conversation):
                shape = _with_parts if in_parts else list
                conversation = form_of(conversation, lambda form: render(shape(form)))
            return _with_parts(conversation) if in_parts else conversation

        forms = _instructed(_plain_messages(messages), knows_developer=_DEVELOPER in text)
        for form in forms if len(forms) > 1 else ():
            marked, marks = _with_marked_instructions(form)
            try:
                found = render(written(marked))
            except RequestError:
                continue
            if all(mark in found for mark in marks):
                return written(form)
        return written(forms[0])

    def _choose(self, template: str | None, *, has_tools: bool) -> tuple[str, str]:
        """The text of the template to use, and what to call it in a message."""
        if template is None:
            name = TOOL_TEMPLATE if has_tools and TOOL_TEMPLATE in self._texts else DEFAULT_TEMPLATE
            if name not in self._texts and len(self._texts) == 1:
                name = next(iter(self._texts))
        else:
            name = template
        if name in self._texts:
            return self._texts[name], self._origins.get(name, repr(name))
        if template is not None and "{" in template:
            return template, "given in the request"
        known = ", ".join(self._texts) or "none"
        if template is None and not self._texts:
            raise RequestError(
                "this checkpoint has no chat template (no chat_template.jinja, no chat_template in "
                "tokenizer_config.json, no chat_template.json): pass the text of one as `template`, "
                "or send a plain prompt instead of messages"
            )
        raise RequestError(
            f"this checkpoint has no chat template named {name!r}; it has: {known}. Pass one of these "
            "names, or the text of a template, as `template`"
        )

    def _template_variables(
        self,
        tools: Sequence[Mapping[str, object]] | None,
        documents: Sequence[Mapping[str, object]] | None,
        add_generation_prompt: bool,
        template_variables: Mapping[str, object] | None,
    ) -> dict[str, object]:
        for what, items in (("tool", tools), ("document", documents)):
            for item in items or ():
                if not isinstance(item, Mapping):
                    raise RequestError(
                        f"a {what} is {type(item).__name__}, not an object: pass each {what} as the "
                        "mapping that the template is to see"
                    )
        return {
            **self._variables,
            "tools": _plain(tools),
            "functions": _to_json(_plain(tools), indent=4),
            "documents": _plain(documents),
            "add_generation_prompt": add_generation_prompt,
            **{name: _plain(value) for name, value in (template_variables or {}).items()},
        }

    def _compile(self, text: str, origin: str) -> jinja2.Template:
        compiled = self._compiled.get(text)
        if compiled is None:
            try:
                compiled = self._environment.from_string(text)
            except (jinja2.TemplateError, RecursionError) as error:
                kind = RequestError if text not in self._texts.values() else CheckpointError
                line = f", line {error.lineno}" if isinstance(error, _SYNTAX_ERROR) else ""
                raise kind(
                    f"chat template {origin}{line}: not a valid template: {error}; correct it, or "
                    "pass another one as `template`"
                ) from error
            if len(self._compiled) >= MAX_COMPILED:
                self._compiled.clear()
            self._compiled[text] = compiled
        return compiled

    def _run(
        self,
        text: str,
        origin: str,
        conversation: list[dict[str, Any]],
        variables: Mapping[str, object],
        now: Callable[[], datetime],
    ) -> str:
        compiled = self._compile(text, origin)
        try:
            return compiled.render(
                {
                    "strftime_now": lambda pattern: now().strftime(pattern),
                    "datetime": now().strftime("%Y-%m-%d %H:%M:%S"),
                    _COUNT_STEPS: _StepCounter(),
                    **variables,
                    "messages": conversation,
                }
            )
        except _Refusal as error:
            raise RequestError(
                f"chat template {origin} refuses this conversation: {error.message}"
            ) from error
        except Exception as error:
            # A template is somebody else's program; whatever it raises concerns this
            # conversation alone.
            raise RequestError(
                f"chat template {origin} failed on this conversation: {type(error).__name__}: "
                f"{error}; check that roles and fields are those the template knows"
            ) from error


_SYNTAX_ERROR = jinja2.TemplateSyntaxError


class _Refusal(jinja2.TemplateError):
    """What `raise_exception` in a template raises."""


class _StepCounter:
    """Counts the items of all loops of one rendering, and stops at MAX_LOOP_STEPS."""

    def __init__(self) -> None:
        self._left = MAX_LOOP_STEPS

    def __call__(self, items: Iterable[object]) -> Iterator[object]:
        for item in items:
            self._left -= 1
            if self._left < 0:
                raise _Refusal(f"its loops take more than {MAX_LOOP_STEPS:,} steps")
            yield item


class _CountedLoops(NodeTransformer):
    """Wraps the iterable of each `for` in the rendering's step counter."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        counter = nodes.Name(_COUNT_STEPS, "load")
        node.iter = nodes.Call(counter, [node.iter], [], None, None).set_lineno(node.lineno)
        return node


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with loops that count their steps."""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        counted: nodes.Template = _CountedLoops().visit(template)
        counted.set_environment(self)
        return counted


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` around what the model is to write."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """The body between two variables, undefined (hence empty) unless spans are requested."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start = nodes.Output([nodes.Name(_SPAN_START_NAME, "load")])
        end = nodes.Output([nodes.Name(_SPAN_END_NAME, "load")])
        # A scope of its own: what is set inside is not seen outside, as in the published tag.
        return nodes.Scope([start, *body, end]).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


def _refuse(message: object) -> None:
    raise _Refusal(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on; jinja2's own filter escapes it for HTML."""
    return json.dumps(
        list(value) if isinstance(value, Iterator) else value,  # of `map` and its like
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _plain(value: Any) -> Any:
    """A copy of `value` made of plain types only, so that a template has no methods to call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    # Members of subclasses (enumerations among them) become the plain value they extend.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    # Images and similar values: templates only test whether they are present.
    return f"<{type(value).__name__}>"


def _plain_messages(messages: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
    if not messages:
        raise RequestError("the conversation is empty: pass at least one message")
    conversation: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(
                f"message {number} is {type(message).__name__}, not an object with a role and a "
                "content: pass a list of such objects"
            )
        # Clients send null or empty lists for absent fields; templates test for the key.
        fields = {
            _plain(key): _plain(value) for key, value in message.items() if not _says_nothing(value)
        }
        if message.get("content", "") is None and message.get("role") == "assistant":
            fields["content"] = None if fields.get("tool_calls") else ""
        reasoning = next((fields[name] for name in REASONING_FIELDS if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        conversation.append(fields)
    return conversation


def _instructed(
    conversation: list[dict[str, Any]], *, knows_developer: bool
) -> list[list[dict[str, Any]]]:
    """Return forms of the developer and system messages, the form that was sent first.

    "developer" is OpenAI's newer name for "system", which few templates support, although some contain
    the word elsewhere; and many templates write only one such message, the first or the last.
    """
    as_system = [
        {**message, "role": "system"} if message.get("role") == _DEVELOPER else message
        for message in conversation
    ]
    forms = [as_system]
    if knows_developer and any(message.get("role") == _DEVELOPER for message in conversation):
        forms.insert(0, conversation)
    said = [message.get("content") for message in as_system if message.get("role") == "system"]
    texts = [content for content in said if isinstance(content, str)]
    if len(texts) == len(said) > 1:
        others = [message for message in as_system if message.get("role") != "system"]
        forms.append([{"role": "system", "content": "\n\n".join(texts)}, *others])
    return forms


def _with_marked_instructions(
    conversation: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the conversation with a unique marker in each message of `_instructed`, and the markers."""
    found: list[dict[str, Any]] = []
    marks: list[str] = []
    for message in conversation:
        if message.get("role") in ("system", _DEVELOPER):
            marks.append(f"instructionmark{len(marks)}x")
            message = {**message, "content": joined_content(message.get("content"), marks[-1])}
        found.append(message)
    return found, marks


def _reads_parts_only(
    conversation: list[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str]
) -> bool:
    """Whether the template writes a user's content only if it is a list of parts.

    Templates of vision models iterate over the parts, and find none in a plain string.
    """
    first = next((n for n, m in enumerate(conversation) if m.get("role") == "user"), None)
    if first is None:
        return False
    begun, words = conversation[: first + 1], conversation[first].get("content")
    if not isinstance(words, str) or not words.strip():
        return False
    for form in (begun, _with_parts(begun)):
        try:
            if words.strip() in render(form):
                return form is not begun
        except RequestError:
            continue
    return False


def _with_parts(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in conversation
    ]


def _says_nothing(value: object) -> bool:
    return value is None or (isinstance(value, list | tuple | Mapping) and not value)


def _mark_final_message(conversation: list[dict[str, Any]]) -> str:
    """Append a marker to the last message's text; return that text without the marker."""
    message = conversation[-1]
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END_OF_CONTENT
        return content
    if isinstance(content, list | tuple):
        for part in reversed(content):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                final: str = part["text"]
                part["text"] = final + _END_OF_CONTENT
                return final
    raise RequestError(_NO_FINAL_TEXT)


def _cut_after_final(rendered: str, final: str) -> str:
    place = rendered.rfind(_END_OF_CONTENT.strip())
    if place < 0 or final.strip() not in rendered:
        raise RequestError(
            "continue_final_message is set, but the template does not write the last message's "
            f"content as it is: {final.strip()!r} is not in the rendered text; shorten the message "
            "to what the template keeps, or set continue_final_message=False"
        )
    if rendered.startswith(_END_OF_CONTENT, place):
        return rendered[:place]
    # The marker's trailing space is gone, so the template trims contents and we do as well.
    return rendered[:place].rstrip()


def _read_spans(marked: str) -> RenderedChat:
    """Remove the markers from a text and return their positions."""
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    open_at: list[int] = []
    length = begin = 0
    for place, character in enumerate(marked):
        if character not in (_SPAN_START, _SPAN_END):
            continue
        parts.append(marked[begin:place])
        length += place - begin
        begin = place + 1
        if character == _SPAN_START:
            open_at.append(length)
        elif open_at:
            spans.append((open_at.pop(), length))
    parts.append(marked[begin:])
    return RenderedChat(text="".join(parts), generation_spans=tuple(sorted(spans)))
