"""Chat templates: the text of transformers' own renderer, and refusals that say why."""

import json
from collections import UserDict
from datetime import datetime
from enum import IntEnum, StrEnum
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from hanok.checkpoint import chat
from hanok.checkpoint.chat import ChatTemplates
from hanok.checkpoint.tokenizer import Tokenizer, open_tokenizer
from hanok.errors import CheckpointError, RequestError

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MOMENT = datetime(2025, 10, 3, 9, 5, 7)

PLAIN = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
[{{ message.role }}]{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}

    {% else %}
[{{ message.role }}]{{ message.content | trim }}
    {% endif %}
{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}
"""

TOOLS = """\
{%- macro show(tool, indent=none) -%}
    {{ tool.function | tojson(indent=indent) }}
{%- endmacro %}
{%- set state = namespace(count=0, last='') %}
{%- if tools %}
Tools:
    {% for tool in tools %}
{{ loop.index }}/{{ loop.length }}{{ ' end' if loop.last }} {{ show(tool) }}
{{ show(tool, indent=2) }}
    {% endfor %}
{% endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- set state.count = state.count + 1 %}
<call {{ state.count }}>{{ call.function.name }}
{{- call.function.arguments | tojson(sort_keys=true, separators=(',', ':')) }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
<result>{{ message.content }}
    {%- else %}
<{{ message.role }}>{{ message.content }}
    {%- endif %}
{%- endfor %}
<calls={{ state.count }}>
{%- if add_generation_prompt %}<assistant>{% endif %}
"""

DOCUMENTS = """\
{% for document in documents or [] -%}
{{ document.title }}: {{ document.text }}
{% endfor -%}
{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% if loop.index > 3 %}{% break %}{% endif %}
{{ loop.previtem.role if loop.previtem is defined else 'first' }}>{{ message.content }}
{% endfor %}
"""

REASONING = """\
{% for message in messages %}
{% if message.reasoning_content is defined %}<think>{{ message.reasoning_content }}</think>{% endif %}
{% if message.thinking is defined %}({{ message.thinking }}){% endif %}
{{ message.role }}:{{ message.content if 'content' in message else 'absent' }}
{% endfor %}
{{ 'thinking on' if enable_thinking is not defined or enable_thinking else 'thinking off' }}
"""

CLOCK = "{{ strftime_now('%d %b %Y %H:%M') }} {{ messages[0]['content'] }}"

PARTS = """\
{% for message in messages %}
{{ message.role }}:
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
    {{- part.text if part.type == 'text' else '<' + part.type + '>' }}{% endfor %}
{%- endif %}
;
{% endfor %}
"""

SYSTEM = {"role": "system", "content": 'Answer in <b>one</b> word & "quote" it.'}
USER = {"role": "user", "content": "  어떤 나무? \n"}
ASSISTANT = {"role": "assistant", "content": "소나무. "}
AGAIN = {"role": "user", "content": "Why?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "type": "function",
            "function": {"name": "find", "arguments": {"이름": "솔", "a": [1, None]}},
        }
    ],
}
RESULT = {"role": "tool", "name": "find", "content": '{"n": 3}'}
THOUGHT = {"role": "assistant", "content": "Pine.", "reasoning": "it is straight"}
IN_PARTS = {
    "role": "assistant",
    "content": [
        {"type": "text", "text": "one"},
        {"type": "image"},
        {"type": "text", "text": "two "},
    ],
}
TOOL = {
    "type": "function",
    "function": {"name": "find", "description": "Find <a> tree & 'more'", "parameters": {"n": 1}},
}

TEMPLATES = {
    "plain": PLAIN,
    "tools": TOOLS,
    "documents": DOCUMENTS,
    "reasoning": REASONING,
    "clock": CLOCK,
    "parts": PARTS,
}
CONVERSATIONS = {
    "user": ([USER], {}),
    "system": ([SYSTEM, USER], {}),
    "turns": ([SYSTEM, USER, ASSISTANT, AGAIN], {}),
    "answered": ([USER, ASSISTANT], {}),
    "five": ([USER, ASSISTANT, AGAIN, ASSISTANT, AGAIN], {}),
    "tools": ([SYSTEM, USER, CALL, RESULT], {"tools": [TOOL, TOOL]}),
    "no tools": ([USER], {"tools": []}),
    "documents": (
        [USER],
        {"documents": [{"title": "A", "text": "<x>"}, {"title": "B", "text": ""}]},
    ),
    "thought": ([USER, THOUGHT], {"enable_thinking": False}),
    "in parts": ([USER, IN_PARTS], {}),
    "strange role": ([{"role": "ghost", "content": "boo"}], {}),
}


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    library = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=library, **NAMES)


@pytest.fixture
def still_clock(monkeypatch):
    class Still(datetime):
        @classmethod
        def now(cls, tz=None):
            return MOMENT

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Still)


def templates(text: str) -> ChatTemplates:
    return ChatTemplates({"default": text}, variables=NAMES, now=lambda: MOMENT)


@pytest.mark.usefixtures("still_clock")
@pytest.mark.parametrize("ending", ["prompt", "bare", "continued"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_text_of_transformers(oracle, template, conversation, ending):
    if conversation == "tools" and template != "tools":
        pytest.skip("transformers leaves the calls out; see test_calls.py")
    text = TEMPLATES[template]
    messages, extra = CONVERSATIONS[conversation]
    mode = {
        "add_generation_prompt": ending == "prompt",
        "continue_final_message": ending == "continued",
    }
    before = json.dumps(messages)
    ours = theirs = None
    refusal = None
    try:
        theirs = oracle.apply_chat_template(
            messages, chat_template=text, tokenize=False, **mode, **extra
        )
    except Exception as error:
        refusal = error
    named = {name: extra.get(name) for name in ("tools", "documents")}
    others = {name: value for name, value in extra.items() if name not in named}
    if refusal is None:
        ours = templates(text).render(messages, template_variables=others, **named, **mode)
        assert ours == theirs
    else:
        with pytest.raises(RequestError):
            templates(text).render(messages, template_variables=others, **named, **mode)
    assert json.dumps(messages) == before


def test_generation_spans(oracle):
    messages = [USER, ASSISTANT, AGAIN, {"role": "assistant", "content": "It is near."}]
    rendered = templates(PLAIN).render_with_spans(messages)
    parts = [rendered.text[start:end] for start, end in rendered.generation_spans]
    assert parts == ["소나무. </s>", "It is near.</s>"]
    assert rendered.text == templates(PLAIN).render(messages, add_generation_prompt=False)
    nothing = templates("{{ messages|length }}").render_with_spans(messages)
    assert (nothing.text, nothing.generation_spans) == ("4", ())


def test_spans_inside_a_macro_and_what_is_set_inside():
    text = (
        "{% macro say(m) %}{% generation %}{% set seen = 'yes' %}{{ m.content }}"
        "{% generation %}!{% endgeneration %}{% endgeneration %}{{ seen }}{% endmacro %}"
        "abc{% for m in messages %}{{ say(m) }}{% endfor %}"
    )
    rendered = templates(text).render_with_spans([{"content": "x"}, {"content": "yy"}])
    assert rendered.text == "abcx!yy!"
    assert rendered.generation_spans == ((3, 5), (4, 5), (5, 8), (7, 8))


def test_spans_that_cannot_be_placed_are_refused():
    trimmed = (
        "{% set x %}{% generation %} {{ messages[0].content }} {% endgeneration %}{% endset %}"
        "{{ x|trim }}"
    )
    with pytest.raises(RequestError, match="changed after the tag ends"):
        templates(trimmed).render_with_spans([{"content": "x"}])
    with pytest.raises(RequestError, match=r"U\+FDD0"):
        templates(PLAIN).render_with_spans([{"role": "user", "content": "\ufdd0"}])


def test_a_refusal_carries_the_templates_words():
    with pytest.raises(RequestError, match=r"'default' refuses this conversation: no role ghost$"):
        templates(PLAIN).render([{"role": "ghost"}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages[0].content.missing.name }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(1000000) %}{% endfor %}", "OverflowError"),
        (
            "{% for i in range(2000) %}{% for j in range(2000) %}{% endfor %}{% endfor %}",
            "1,000,000",
        ),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{% for i in 3 %}{% endfor %}", "TypeError"),
    ],
)
def test_errors_inside_a_template(text, message):
    with pytest.raises(RequestError, match=message):
        templates("").render([USER], template=text)


def test_templates_that_do_not_parse():
    with pytest.raises(RequestError, match="given in the request, line 2: not a valid template"):
        templates("").render([USER], template="\n{% if %}")
    broken = ChatTemplates(
        {"default": "{% for %}"}, variables={}, origins={"default": "chat_template.jinja"}
    )
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja, line 1: not a valid"):
        broken.render([USER])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"messages": []}, "conversation is empty"),
        ({"messages": ["hello"]}, "message 0 is str"),
        ({"messages": [USER], "tools": ["f"]}, "a tool is str"),
        ({"messages": [USER], "documents": [1]}, "a document is int"),
        ({"messages": [USER], "continue_final_message": True}, "are both set"),
        (
            {"messages": [USER], "template": "nmae"},
            "no chat template named 'nmae'; it has: default",
        ),
    ],
)
def test_requests_that_cannot_be_rendered(arguments, message):
    with pytest.raises(RequestError, match=message):
        templates(PLAIN).render(**arguments)


def test_continuing():
    def go_on(text, content):
        message = {"role": "assistant", "content": content}
        return templates(text).render(
            [USER, message], add_generation_prompt=False, continue_final_message=True
        )

    each = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert go_on(each, "so ").endswith("<so ")
    assert go_on(each.replace("m.content", "m.content|trim"), "so ").endswith("<so")
    assert go_on(PARTS, IN_PARTS["content"]).endswith("one<image>two ")
    with pytest.raises(RequestError, match="does not write the last message"):
        go_on("{{ messages[0].content }}", "so")
    for content in (None, [{"type": "image"}], 3):
        with pytest.raises(RequestError, match="no text content"):
            go_on(each, content)


def test_what_a_template_sees_is_plain():
    class Role(StrEnum):
        USER = "user"

    class Level(IntEnum):
        HIGH = 2

    class Weight(float):
        pass

    message = UserDict(role=Role.USER, content=(Level.HIGH, Weight(0.5), object(), True))
    text = "{% for m in messages %}{{ m.role }} {{ m.content|tojson }}{% endfor %}"
    assert templates(text).render([message]) == 'user [2, 0.5, "<object>", true]'


def test_a_template_is_compiled_once(monkeypatch):
    compiled = []
    original = chat._Environment.from_string

    def count(self, text):
        compiled.append(text)
        return original(self, text)

    monkeypatch.setattr(chat._Environment, "from_string", count)
    one = templates(PLAIN)
    for _ in range(3):
        one.render([USER])
        one.render([USER], template="{{ 1 }}")
    assert len(compiled) == 2
    for number in range(chat.MAX_COMPILED):
        assert one.render([USER], template=f"{{{{ {number} }}}}") == str(number)
    assert len(one._compiled) <= chat.MAX_COMPILED


# Where templates come from


@pytest.fixture
def folder(tmp_path) -> Path:
    library = tokenizers.Tokenizer(
        models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "go": 3}, "<unk>")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def configured(folder: Path, template: object) -> Tokenizer:
    config = json.dumps({**NAMES, "chat_template": template})
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    return open_tokenizer(folder, now=lambda: MOMENT)


def test_sources_in_order(folder):
    hi = [{"role": "user", "content": "hi"}]
    with pytest.raises(RequestError, match=r"no chat template \(no chat_template\.jinja"):
        configured(folder, None).render_chat(hi)
    with pytest.raises(RequestError, match="named 'x'; it has: none"):
        configured(folder, None).render_chat(hi, template="x")
    (folder / "chat_template.json").write_text('{"chat_template": "json"}', encoding="utf-8")
    assert configured(folder, None).render_chat(hi) == "json"
    assert configured(folder, "config").render_chat(hi) == "config"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag", encoding="utf-8")
    (folder / "chat_template.jinja").write_text("jinja", encoding="utf-8")
    tokenizer = configured(folder, [{"name": "default", "template": "list"}])
    assert tokenizer.chat_template_names == ("default", "rag")
    assert tokenizer.render_chat(hi) == "jinja"
    assert tokenizer.render_chat(hi, template="rag") == "rag"


def test_names(folder):
    hi = [{"role": "user", "content": "hi"}]
    both = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    tokenizer = configured(folder, both)
    assert tokenizer.render_chat(hi) == "D"
    assert tokenizer.render_chat(hi, tools=[]) == "T"
    assert tokenizer.render_chat(hi, template="default", tools=[TOOL]) == "D"
    assert tokenizer.render_chat(hi, template="{{ bos_token }}!") == "<s>!"
    assert configured(folder, {"only": "O"}).render_chat(hi) == "O"
    with pytest.raises(RequestError, match="named 'default'; it has: a, b"):
        configured(folder, {"a": "A", "b": "B"}).render_chat(hi)
    assert configured(folder, CLOCK).render_chat(hi) == "03 Oct 2025 09:05 hi"


def test_encode_chat_leaves_the_beginning_to_the_template(folder):
    go = [{"role": "user", "content": "go"}]
    body = "{% for m in messages %}{{ m.content }} {% endfor %}"
    assert configured(folder, body).encode_chat(go) == [3]
    for start in ("<s>", "<s> ", "{{ bos_token }}<s> "):
        assert configured(folder, start + body).encode_chat(go) == [1, 3]
    tokenizer = configured(folder, body + "{% generation %}go{% endgeneration %}")
    assert tokenizer.render_chat_with_spans(go).generation_spans == ((3, 5),)
    assert tokenizer.encode_chat(
        [{"role": "user", "content": "go go"}],
        template=body,
        add_generation_prompt=False,
        continue_final_message=True,
    ) == [3, 3]
