"""Tool calls reach the prompt, whatever form of them a template wants and a client sends."""

import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok.checkpoint.calls import forms_of, spelled_calls
from hanok.checkpoint.chat import ChatTemplates
from hanok.errors import RequestError

EACH = "{% for m in messages %}"
END = "{% endfor %}"
CALLS = "{% for c in m.tool_calls %}"
OTHERWISE = "[{{ m.role }}]{{ m.content }}"
TEMPLATES = {
    "objects": f"{EACH}{{% if m.tool_calls %}}{CALLS}<{{{{ c.function.name }}}} "
    f"{{{{ c.function.arguments|tojson }}}}>{END}{{% else %}}{OTHERWISE}{{% endif %}}{END}",
    "iterated": f"{EACH}{{% if m.tool_calls %}}{CALLS}<{{{{ c.function.name }}}}"
    "{% for k, v in c.function.arguments|items %} {{ k }}={{ v|tojson }}{% endfor %}>"
    f"{END}{{% else %}}{OTHERWISE}{{% endif %}}{END}",
    "joined": f"{EACH}{{% if m.tool_calls %}}{CALLS}"
    "{{ '<' + c.function.name + ' ' + c.function.arguments + '>' }}"
    f"{END}{{% else %}}{OTHERWISE}{{% endif %}}{END}",
    "shown": f"{EACH}{{% if m.tool_calls %}}{CALLS}<{{{{ c.function.name }}}} "
    f"{{{{ c.function.arguments }}}}>{END}{{% else %}}{OTHERWISE}{{% endif %}}{END}",
    "null": f"{EACH}{{% if m.content is none %}}{CALLS}<{{{{ c.function.name }}}} "
    f"{{{{ c.function.arguments|tojson }}}}>{END}{{% else %}}{OTHERWISE}{{% endif %}}{END}",
    "absent": f"{EACH}{{% if 'content' not in m %}}{CALLS}<{{{{ c.function.name }}}} "
    f"{{{{ c.function.arguments|tojson }}}}>{END}{{% else %}}{OTHERWISE}{{% endif %}}{END}",
    "content too": f"{EACH}[{{{{ m.role }}}}]{{{{ m.content }}}}{{% if m.tool_calls is defined %}}"
    f"{CALLS}<{{{{ c.function.name }}}} {{{{ c.function.arguments|tojson }}}}>{END}{{% endif %}}{END}",
    "single": f"{EACH}{{% if m.tool_calls is defined %}}{{% if m.tool_calls|length != 1 %}}"
    "{{ raise_exception('one call at a time') }}{% endif %}"
    f"{CALLS}<{{{{ c.function.name }}}} {{{{ c.function.arguments|tojson }}}}>{END}"
    f"{{% else %}}{OTHERWISE}{{% endif %}}{END}",
    "first": f"{EACH}{{% if m.tool_calls %}}{{% set c = m.tool_calls[0] %}}<{{{{ c.function.name }}}} "
    f"{{{{ c.function.arguments|tojson }}}}>{{% else %}}{OTHERWISE}{{% endif %}}{END}",
    "short ids": f"{EACH}{{% if m.tool_calls %}}{CALLS}{{% if c.id|length != 9 %}}"
    "{{ raise_exception('ids have nine characters') }}{% endif %}<{{ c.function.name }} "
    f"{{{{ c.function.arguments|tojson }}}}>{END}{{% else %}}{OTHERWISE}{{% endif %}}{END}",
    "parts": f"{EACH}{{% if m.tool_calls %}}{CALLS}<{{{{ c.function.name }}}} "
    f"{{{{ c.function.arguments|tojson }}}}>{END}{{% else %}}[{{{{ m.role }}}}]"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    f"{{% endif %}}{END}",
    "knows none": f"{EACH}{OTHERWISE}{END}",
    "two roles": f"{EACH}{{% if m.role not in ('user', 'assistant') or m.role == before|default('') %}}"
    "{{ raise_exception('roles alternate') }}{% endif %}" + OTHERWISE + END,
}
WORDS = ({"city": "Köln", "n": [1, None]}, {"city": '서울 "it\'s"'})


def conversation(*, content: Any, as_text: bool, several: bool) -> list[dict[str, Any]]:
    arguments: list[Any] = list(WORDS[: 1 + several])
    if as_text:
        arguments = [json.dumps(item, ensure_ascii=False) for item in arguments]
    calls = [
        {
            "id": f"call_{n}abcdefghijk",
            "type": "function",
            "function": {"name": name, "arguments": a},
        }
        for n, (name, a) in enumerate(zip(("weather", "clock"), arguments, strict=False))
    ]
    message = {"role": "assistant", "tool_calls": calls}
    if content != "absent":
        message["content"] = content
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": f"result {n}"}
        for n, call in enumerate(calls)
    ]
    return [{"role": "user", "content": "What is it?"}, message, *results]


def rendered(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplates({"default": TEMPLATES[name]}, variables={}).render(messages, **options)


SENT = list(itertools.product((None, "", "absent", "Let me see."), (False, True), (False, True)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_call_is_written_in_every_form_that_clients_send(name: str) -> None:
    texts: dict[tuple[bool, bool], set[str]] = {}
    for content, as_text, several in SENT:
        sent = conversation(content=content, as_text=as_text, several=several)
        before = json.dumps(sent)
        text = rendered(name, sent)
        assert json.dumps(sent) == before
        texts.setdefault((several, bool(content) and content != "absent"), set()).add(text)
        for place in range(1 + several):
            assert ("weather", "clock")[place] in text
            assert f"result {place}" in text
            for value in WORDS[place].values():
                # As JSON writes it: neither Python's spelling nor JSON within JSON.
                assert json.dumps(value, ensure_ascii=False) in text
        assert "None" not in text
        assert ("Let me see." in text) == (content == "Let me see.")
    # How the client spells "no content" and the arguments does not change the prompt.
    assert [len(found) for found in texts.values()] == [1, 1, 1, 1]


def test_the_first_form_that_holds_is_the_widest_known() -> None:
    sent = conversation(content=None, as_text=True, several=False)
    first = next(forms_of(sent)).messages[1]
    assert (first["content"], first["tool_calls"][0]["function"]["arguments"]) == (None, WORDS[0])
    assert rendered("joined", sent).endswith(
        '<weather {"city": "Köln", "n": [1, null]}>[tool]result 0'
    )


def test_calls_one_by_one_are_followed_by_their_own_answers() -> None:
    sent = conversation(content=None, as_text=False, several=True)
    sent[2], sent[3] = sent[3], sent[2]
    text = rendered("single", sent)
    assert re.sub("{.*?}", "", text) == (
        "[user]What is it?<weather >[tool]result 0<clock >[tool]result 1"
    )


def test_calls_stay_calls_where_the_template_has_no_place_for_what_was_said_beside_them() -> None:
    template = (
        f"{EACH}{{% if m.tool_calls %}}{CALLS}<{{{{ c.function.name }}}}>"
        f"{{{{ c.function.arguments|tojson }}}}{END}{{% else %}}"
        "{% if loop.previtem is defined and m.role == loop.previtem.role == 'assistant' %}"
        "{{ raise_exception('roles alternate') }}{% endif %}"
        "{% if m.role == 'assistant' and loop.nextitem is defined %}"
        "{{ raise_exception('the last alone') }}{% endif %}"
        f"{OTHERWISE}{{% endif %}}{END}"
    )
    sent = conversation(content="Let me see.", as_text=True, several=False)
    text = ChatTemplates({"default": template}, variables={}).render(sent)
    assert text.startswith("[user]What is it?<weather>{")


def test_arguments_that_are_no_object_go_to_templates_that_want_text() -> None:
    sent = conversation(content=None, as_text=True, several=False)
    sent[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "K'
    assert '<weather {"city": "K>' in rendered("joined", sent)


def test_arguments_that_are_empty_need_not_be_written() -> None:
    """A call is there as soon as its name is, in the form that the template was written for."""
    template = f"{EACH}{{% if m.content is none %}}calls {{{{ m.tool_calls[0].function.name }}}};"
    template += f"{{% else %}}{{{{ m.content }}}};{{% endif %}}{END}"
    for arguments, calls in (("{}", "calls weather;"), ('{"city": "K"}', '"city": "K"')):
        sent = conversation(content=None, as_text=True, several=False)
        sent[1]["tool_calls"][0]["function"]["arguments"] = arguments
        assert calls in ChatTemplates({"default": template}, variables={}).render(sent)


def test_a_template_that_writes_no_message_is_refused() -> None:
    sent = conversation(content=None, as_text=True, several=False)
    with pytest.raises(RequestError, match="leaves tool calls of this conversation out"):
        ChatTemplates({"default": "{{ messages[0].content }}"}, variables={}).render(sent)


def test_what_the_template_says_of_the_first_form_is_what_is_said() -> None:
    sent = [
        {"role": "ghost", "content": "x"},
        *conversation(content="", as_text=True, several=True),
    ]
    with pytest.raises(RequestError, match="roles alternate"):
        rendered("two roles", sent)


def test_empty_lists_and_nulls_are_as_if_they_were_not_there() -> None:
    plain = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    empty = [{**message, "tool_calls": [], "name": None, "annotations": []} for message in plain]
    for name in ("content too", "single"):
        assert rendered(name, empty) == rendered(name, plain) == "[user]hi[assistant]ho"


def test_a_developer_is_the_system_of_templates_that_know_no_developer() -> None:
    sent = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert rendered("knows none", sent) == "[system]Be brief.[user]hi"
    own = "{% if messages[0].role == 'developer' %}D{% endif %}"
    assert ChatTemplates({"default": own}, variables={}).render(sent) == "D"


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}[system]{{ messages[0].content }}{% endif %}"
        "{% for m in messages if m.role == 'user' %}[user]{{ m.content }}{% endfor %}",
        "{% set ns = namespace(said='') %}{% for m in messages if m.role == 'system' %}"
        "{% set ns.said = m.content %}{% endfor %}[system]{{ ns.said }}"
        "{% for m in messages if m.role == 'user' %}[user]{{ m.content }}{% endfor %}",
        "{# for every developer #}{% for m in messages if m.role in ('system', 'user') %}"
        "{% if m.role == 'system' and not loop.first %}{{ raise_exception('too late') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}",
    ],
    ids=["the first", "the last", "no other"],
)
@pytest.mark.parametrize("roles", [("system", "developer"), ("system", "system")])
def test_nothing_that_a_system_or_developer_says_is_lost(
    template: str, roles: tuple[str, str]
) -> None:
    """By templates that write one such message, and have the word "developer" elsewhere."""
    sent = [
        {"role": roles[0], "content": "Be brief."},
        {"role": roles[1], "content": "Be kind."},
        {"role": "user", "content": "hi"},
    ]
    text = ChatTemplates({"default": template}, variables={}).render(sent)
    assert text == "[system]Be brief.\n\nBe kind.[user]hi"


def test_a_developer_is_the_system_where_the_template_has_the_word_for_something_else() -> None:
    template = "{# developers #}{% for m in messages if m.role != 'developer' %}" + OTHERWISE + END
    sent = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    text = ChatTemplates({"default": template}, variables={}).render(sent)
    assert text == "[system]Be brief.[user]hi"


def test_a_template_that_goes_over_parts_gets_parts() -> None:
    assert rendered("parts", [{"role": "user", "content": "hi"}]) == "[user]hi"
    listed = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert rendered("parts", listed) == "[user]hi"


@given(
    st.lists(
        st.tuples(st.sampled_from(["f", "g h", "é"]), st.dictionaries(st.text(), st.text())),
        min_size=1,
        max_size=3,
    )
)
def test_spelled_calls_can_be_read_again(calls: list[tuple[str, dict[str, str]]]) -> None:
    given = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    read = [json.loads(line) for line in spelled_calls(given).split("\n")]
    assert [(item["name"], item["arguments"]) for item in read] == calls
