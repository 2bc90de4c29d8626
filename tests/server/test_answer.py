"""A model's text as reasoning, content and calls, in pieces as in one."""

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok.server.answer import (
    Answer,
    AnswerReader,
    Content,
    Event,
    Reads,
    Reasoning,
)
from hanok.server.calls import CallArguments, CallBegun, CallEnded

FUNCTIONS: Any = {
    "weather": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string"},
                "n": {"type": "array"},
                "at": {"$ref": "#/$defs/At"},
            },
            "$defs": {"At": {"anyOf": [{"type": "integer"}, {"type": "null"}]}},
        },
    },
    "weather_now": {"name": "weather_now"},
    "time": {"name": "time", "parameters": {}},
}
READS = Reads(functions=FUNCTIONS)
ARGUMENTS = {"place": 'Köln 가 "x" {', "n": [1, 2.5, None, {"a": "]}"}]}
SHORT = json.dumps(ARGUMENTS, ensure_ascii=False)
CALL = json.dumps({"name": "weather", "arguments": ARGUMENTS}, ensure_ascii=False)
PYTHON = f"weather(place={ARGUMENTS['place']!r}, n={ARGUMENTS['n']!r})"
TAGGED = (
    '<function=weather>\n<parameter=place>\nKöln 가 "x" {\n</parameter>\n'
    f"<parameter=n>\n{json.dumps(ARGUMENTS['n'])}\n</parameter>\n</function>"
)
PAIRS = (
    'weather\n<arg_key>place</arg_key>\n<arg_value>Köln 가 "x" {</arg_value>\n'
    f"<arg_key>n</arg_key><arg_value>{json.dumps(ARGUMENTS['n'])}</arg_value>\n"
)
DEEPSEEK = (
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    + SHORT
    + "\n```<｜tool▁call▁end｜>"
)
NAMED = json.dumps({"tool_call_id": "0", "tool_name": "weather", "parameters": ARGUMENTS})
NESTED = json.dumps({"type": "function", "function": {"name": "weather", "arguments": SHORT}})
DEEPSEEK_31 = "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>" + SHORT + "<｜tool▁call▁end｜>"
ONE, TWO, BOTH = ["weather"], ["weather", "weather"], ["weather", "time"]
WRITTEN: dict[str, tuple[str, str, list[str]]] = {
    "hermes": (f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>", "Let me see.", ONE),
    "hermes, two": (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", TWO),
    "then words": (f"<tool_call>{CALL}</tool_call>\nThat is all.", "That is all.", ONE),
    "mistral": (f"[TOOL_CALLS] [{CALL}, {CALL}]", "", TWO),
    "mistral, named": (f"[TOOL_CALLS]weather[ARGS]{SHORT}[TOOL_CALLS]weather{SHORT}", "", TWO),
    "mistral, with ids": (f"[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{SHORT}", "", ONE),
    "llama": (json.dumps({"name": "weather", "parameters": ARGUMENTS}), "", ONE),
    "llama, two": (f"{CALL}; {CALL}", "", TWO),
    "llama, tagged": (f"<|python_tag|>{CALL}", "", ONE),
    "llama, list": (f"[{CALL}, {CALL}]", "", TWO),
    "llama, python": (f"[{PYTHON}, weather_now()]", "", ["weather", "weather_now"]),
    "llama, function": (f"<function=weather>{SHORT}</function>", "", ONE),
    "granite": (f"<|tool_call|>[{CALL}]", "", ONE),
    "phi": (f"<|tool_call|>[{CALL}]<|/tool_call|>", "", ONE),
    "functools": (f"functools[{CALL}, {CALL}]", "", TWO),
    "qwen coder": (f"Yes.\n<tool_call>\n{TAGGED}\n</tool_call>\n<tool_call>{TAGGED}", "Yes.", TWO),
    "seed": (f"<seed:tool_call>\n{TAGGED}\n</seed:tool_call>", "", ONE),
    "glm": (f"weather\n{SHORT}", "", ONE),
    "glm, pairs": (f"<tool_call>{PAIRS}</tool_call><tool_call>time</tool_call>", "", BOTH),
    "command": (f"<|START_ACTION|>[\n    {NAMED}\n]<|END_ACTION|>", "", ONE),
    "command-r": (f"Action: ```json\n[{NAMED}]```", "", ONE),
    "olmo": (f"<function_calls>\n{PYTHON}\ntime()\n</function_calls>", "", BOTH),
    "lfm": (f"<|tool_call_start|>[{PYTHON}]<|tool_call_end|>Checking.", "Checking.", ONE),
    "gemma": (f"```tool_code\nprint({PYTHON})\n```", "", ONE),
    "fenced": (f"```json\n{CALL}\n```", "", ONE),
    "deepseek": (f"<｜tool▁calls▁begin｜>{DEEPSEEK}\n{DEEPSEEK}<｜tool▁calls▁end｜>", "", TWO),
    "deepseek 3.1": (f"<｜tool▁calls▁begin｜>{DEEPSEEK_31}<｜tool▁calls▁end｜>", "", ONE),
    "openai's own": (NESTED, "", ONE),
    "arguments first": (json.dumps({"arguments": ARGUMENTS, "name": "weather"}), "", ONE),
    "words around": (f"Yes. <tool_call>{CALL}</tool_call>\nDone.", "Yes. Done.", ONE),
    "words between": (
        f"One, <tool_call>{CALL}</tool_call> two,\n\n<tool_call>{CALL}</tool_call>three.",
        "One, two,\n\nthree.", TWO,
    ),
    "names in a list": ('[{"name": "time"}, {"name": "lunch"}]',) * 2 + ([],),
    "a name with an id": ('{"id": 5, "name": "time"}', '{"id": 5, "name": "time"}', []),
    "none": ("A <tool is a [TOOL of {braces}. ", "A <tool is a [TOOL of {braces}. ", []),
    "object": ('{"answer": 42} is it', '{"answer": 42} is it', []),
    "a name": ('{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', []),
    "a name that is a tool's": ('{"name": "time", "age": 36}', '{"name": "time", "age": 36}', []),
    "nobody's": ('<tool_call>{"name": "lunch", "arguments": {}}</tool_call>',) * 2 + ([],),
    "nobody's in a list": (f'[TOOL_CALLS] [{CALL}, {{"name": "lunch"}}]', ', {"name": "lunch"}]', ONE),
    "list": ("[1, 2]\n", "[1, 2]\n", []),
    "prose that begins as a name": ("time flies\n{…}", "time flies\n{…}", []),
    "broken": ("<tool_call>{nothing", "<tool_call>{nothing", []),
    "no object": ('{"name": "time", "arguments": 7}', '{"name": "time", "arguments": 7}', []),
}  # fmt: skip


def events_of(text: str, cuts: list[int], reads: Reads = READS) -> list[Event]:
    reader = AnswerReader(reads)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    found = [event for a, b in pairwise(places) for event in reader.push(text[a:b])]
    return found + reader.finish()


def put_together(events: list[Event]) -> tuple[str, str, list[tuple[str, str, bool]]]:
    reasoning = content = ""
    calls: list[list[Any]] = []
    for event in events:
        if isinstance(event, Reasoning):
            reasoning += event.text
        elif isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallBegun):
            assert event.index == len(calls)
            calls.append([event.name, "", None])
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1
            assert calls[-1][2] is None
            calls[-1][1] += event.text
        else:
            calls[-1][2] = event.is_whole
    return reasoning, content, [tuple(call) for call in calls]


def read_answer(reads: Reads, text: str) -> Answer:
    reader = AnswerReader(reads, is_whole=True)
    return Answer.of(reader.push(text) + reader.finish())


def told(answer: Answer) -> tuple[str, list[tuple[str, str]]]:
    return answer.content, [(call.name, call.arguments) for call in answer.calls]


@pytest.mark.parametrize("name", WRITTEN)
@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_any_pieces_give_the_same_answer(name: str, cuts: list[int]) -> None:
    text, content, names = WRITTEN[name]
    reasoning, said, calls = put_together(events_of(text, cuts))
    assert (reasoning, said) == ("", content)
    assert [call[0] for call in calls] == names
    assert told(read_answer(READS, text)) == (said, [call[:2] for call in calls])
    for function, arguments, is_whole in calls:
        assert is_whole
        assert json.loads(arguments) == (ARGUMENTS if function == "weather" else {})


@pytest.mark.parametrize("name", WRITTEN)
def test_a_character_at_a_time_gives_the_same_answer(name: str) -> None:
    text = WRITTEN[name][0]
    each = put_together(events_of(text, list(range(len(text)))))
    assert each == put_together(events_of(text, []))


def test_arguments_come_while_they_are_written() -> None:
    reader = AnswerReader(READS)
    assert reader.push('<tool_call>\n{"name": "wea') == []
    begun = reader.push('ther", "arguments": {"pla')
    assert isinstance(begun[0], CallBegun)
    assert begun[1:] == [CallArguments(0, '{"pla')]
    assert reader.push('ce": "Kö') == [CallArguments(0, 'ce": "Kö')]
    assert reader.push('ln"}}') == [CallArguments(0, 'ln"}'), CallEnded(0, True)]
    assert reader.push("\n</tool_call>") + reader.finish() == []


def test_json_that_is_no_call_is_passed_on_as_soon_as_that_is_certain() -> None:
    reader = AnswerReader(READS)
    assert reader.push('{"na') == []
    assert reader.push('me": "Ad') == []
    assert reader.push('a", ') == [Content('{"name": "Ada",')]
    assert reader.push('"age": 3') == [Content(' "age": 3')]


def test_every_call_has_an_id_of_its_own() -> None:
    """Of nine letters or digits: the templates of some models refuse a conversation with others."""
    found = [read_answer(READS, WRITTEN["hermes, two"][0]) for _ in range(2)]
    ids = [call.id for answer in found for call in answer.calls]
    assert len(set(ids)) == len(ids) == 4
    assert all(re.fullmatch("[0-9a-zA-Z]{9}", item) for item in ids)


def test_without_functions_nothing_is_held_and_nothing_read() -> None:
    text = WRITTEN["hermes"][0] + " \n"
    reader = AnswerReader(Reads())
    assert reader.push("Let <tool_ca ") == [Content("Let <tool_ca ")]
    assert told(read_answer(Reads(), text)) == (text, [])


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('{"a": NaN, "b": [Infinity, -Infinity]}', {"a": None, "b": [None, None]}),
        ('{"a": True, "b": None}', {"a": True, "b": None}),
        ('{"a": "two\nlines\tand \\u00e9 it\\\'s"}', {"a": "two\nlines\tand é it's"}),
        ('{"a": 1e3, "b": -0.5, "c": {}, "d": [ ] }', {"a": 1e3, "b": -0.5, "c": {}, "d": []}),
        ("null", {}),
        ('"{\\"a\\": 1}"', {"a": 1}),
    ],
)
def test_what_models_write_nearly_as_json_becomes_json(written: str, read: Any) -> None:
    text = f'{{"name": "time", "arguments": {written}}}'
    (call,) = read_answer(READS, text).calls
    assert json.loads(call.arguments, parse_constant=pytest.fail) == read
    assert put_together(events_of(text, [20, 30, 31]))[2][0][1] == call.arguments


def test_escapes_that_python_does_not_know_are_no_warnings() -> None:
    (call,) = read_answer(READS, r"[weather(place='\d')]").calls
    assert json.loads(call.arguments) == {"place": "\\d"}


HALF = "\\ud83d"
PAIR = "\\ud83d\\ude00"
HALVES = {
    "object": '{"name": "weather", "arguments": {"x": "%s"}}',
    "text": '{"name": "weather", "arguments": "{\\"x\\": \\"%s\\"}"}',
    "text in text": '{"name": "weather", "arguments": "{\\"x\\": \\"\\%s\\"}"}',
    "python": '[weather(x="%s")]',
    "tagged": '<function=weather><parameter=x>"%s"</parameter></function>',
    "pairs": "<tool_call>weather<arg_key>x</arg_key><arg_value>%s</arg_value></tool_call>",
}


@pytest.mark.parametrize("name", HALVES)
def test_half_a_surrogate_pair_becomes_a_character(name: str) -> None:
    """Arguments with one could neither be written nor be sent back as part of a conversation."""
    quoted = '"%s"' if name == "pairs" else "%s"
    for written, read in ((HALF, "�"), (f"{HALF}a", "�a"), (HALF * 2, "��"), (PAIR, "😀")):
        if name == "text in text":
            written = written.replace("\\u", "\\\\u")[1:]
        text = HALVES[name] % (quoted % written)
        (call,) = read_answer(READS, text).calls
        assert json.loads(call.arguments) == {"x": read}
        assert put_together(events_of(text, list(range(len(text)))))[2][0][1] == call.arguments
    (call,) = read_answer(READS, HALVES["object"] % "\\ude00").calls
    assert json.loads(call.arguments) == {"x": "�"}


def test_objects_within_objects_without_end_are_content() -> None:
    text = '{"function": ' * 5000
    for reads in (READS, Reads(functions=FUNCTIONS, is_forced=True)):
        assert told(read_answer(reads, text)) == (text, [])


ODD_NAMES = ("print", "functions.get", "get", "get_it", "f", "a.b", "my tool", "날씨", "name", "1")
SPELLINGS = (
    "[TOOL_CALLS]%s[ARGS]{}",
    "<function=%s>{}</function>",
    "<tool_call>%s</tool_call>",
    "%s\n{}",
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n{}\n```<｜tool▁call▁end｜>",
    "<｜tool▁call▁begin｜>%s<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
    "```tool_code\n%s()\n```",
    "```tool_code\nprint(%s())\n```",
    "[%s()]",
)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_function_may_have_any_name(spelling: str) -> None:
    """One that begins as another one does, or as what stands before names."""
    reads = Reads(functions={name: {"name": name} for name in ODD_NAMES})
    for name in ODD_NAMES:
        text = spelling % name
        assert told(read_answer(reads, text)) == ("", [(name, "{}")]), name
        assert put_together(events_of(text, [2, 9, 13, 17], reads))[2] == [(name, "{}", True)]
    reads = Reads(functions={"get": {}, "f": {}})
    assert told(read_answer(reads, "[TOOL_CALLS]functions.get{}")) == ("", [("get", "{}")])


@pytest.mark.parametrize(
    "wrong",
    ["{'a': 1}", '{"a": 01}', '{"a": 1,}', '{"a" 1}', '{"a": nope}', '{"a": %s}' % ("9" * 4301)],
    ids=range(6),
)
def test_a_call_that_is_not_json_is_content_and_ends_in_a_stream(wrong: str) -> None:
    text = f'<tool_call>{{"name": "time", "arguments": {wrong}}}</tool_call>'
    assert told(read_answer(READS, text)) == (text, [])
    _, content, calls = put_together(events_of(text, []))
    assert [call[2] for call in calls] == [False]
    begun = calls[0][1]
    assert text.startswith('<tool_call>{"name": "time", "arguments": ' + begun)
    assert text.endswith(begun + content)


def test_an_answer_that_is_cut_off_in_a_call_has_half_the_call() -> None:
    for text in ('<tool_call>{"name": "time", "arguments": {"a": "b', 'time\n{"a": "b'):
        (call,) = read_answer(READS, text).calls
        assert (call.name, call.arguments) == ("time", '{"a": "b')
        assert put_together(events_of(text, [7]))[2] == [("time", '{"a": "b', False)]


def test_a_demanded_call_is_one_whatever_it_says() -> None:
    reads = Reads(functions=FUNCTIONS, is_forced=True)
    assert read_answer(reads, CALL).calls[0].name == "weather"
    assert read_answer(reads, CALL[:50]).calls[0].arguments == SHORT[:17]


def test_more_calls_than_the_request_allows_are_left_out() -> None:
    reads = Reads(functions=FUNCTIONS, allows_several=False)
    for name in ("hermes, two", "mistral"):
        text = WRITTEN[name][0]
        assert [call.name for call in read_answer(reads, text).calls] == ["weather"]
        assert len(put_together(events_of(text, [3, 9], reads))[2]) == 1


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("12", "place", "12"),
        ("12", "at", 12),
        ("None", "at", None),
        ("soon", "at", "soon"),
        ("true", "at", "true"),
        ("[1]", "n", [1]),
        ("12", "other", 12),
        ("twelve", "other", "twelve"),
        ("NaN", "other", "NaN"),
    ],
)
def test_tagged_arguments_have_the_types_that_the_schema_gives(
    written: str, key: str, value: Any
) -> None:
    text = f"<function=weather><parameter={key}>{written}</parameter></function>"
    (call,) = read_answer(READS, text).calls
    assert json.loads(call.arguments) == {key: value}


REASONED = [
    ("<think>\nHm.\n\n</think>\n\nYes.", "", "Hm.", "Yes."),
    ("Hm. \n</think>\nYes.", "<think>", "Hm.", "Yes."),
    ("[THINK]Hm.[/THINK]Yes. ", "", "Hm.", "Yes. "),
    ("<seed:think>Hm.</seed:think>Yes.", "", "Hm.", "Yes."),
    ("<think>Hm", "", "Hm", ""),
    ("<think></think>Yes.", "", "", "Yes."),
    ("So <think>Hm.</think>", "", "", "So <think>Hm.</think>"),
    (" Yes", "", "", " Yes"),
]


@pytest.mark.parametrize(("text", "opening", "reasoning", "content"), REASONED)
@pytest.mark.parametrize("functions", [{}, FUNCTIONS])
def test_reasoning_is_told_apart(
    text: str, opening: str, reasoning: str, content: str, functions: Any
) -> None:
    reads = Reads(functions=functions, opening=opening)
    whole = put_together(events_of(text, [], reads))
    assert whole == put_together(events_of(text, list(range(len(text))), reads))
    assert whole == (reasoning, content, [])
    answer = read_answer(reads, text)
    assert (answer.reasoning, answer.content) == (reasoning, content)


def test_reasoning_may_talk_of_calls_and_precede_them() -> None:
    text = f"<think>I could <tool_call>{CALL}</tool_call>.</think>\n{CALL}"
    answer = read_answer(READS, text)
    assert answer.reasoning == f"I could <tool_call>{CALL}</tool_call>."
    assert told(answer) == ("", [("weather", SHORT)])


def test_nothing_that_is_not_read_as_reasoning_counts_as_such() -> None:
    for reads in (
        Reads(reasoning=False, opening="<think>"),
        Reads(functions=FUNCTIONS, is_forced=True, opening="<think>"),
    ):
        assert not AnswerReader(reads).is_reasoning
    assert AnswerReader(Reads(opening="<think>")).is_reasoning


def test_reasoning_stays_where_the_request_wants_it() -> None:
    text = REASONED[0][0]
    assert read_answer(Reads(reasoning=False), text).content == text


PIECES = (
    *("<tool_call>", "</tool_call>", '{"name": "time"', ', "arguments": {', '"a": 1', "}", "}"),
    *(
        "[",
        "]",
        "time",
        "\n",
        "(",
        ")",
        "a",
        " ",
        "<think>",
        "</think>",
        ",",
        '"',
        "<function=time>",
    ),
    *("<parameter=a>", "</function>", "```json", "[TOOL_CALLS]", "[ARGS]"),
)


@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=14),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
def test_markers_in_any_order_are_read_to_the_end(pieces: list[str], cuts: list[int]) -> None:
    text = "".join(pieces)
    found = put_together(events_of(text, cuts))
    assert found == put_together(events_of(text, []))
    assert found == put_together(events_of(text, list(range(len(text)))))
    for _, arguments, is_whole in found[2]:
        assert not is_whole or isinstance(json.loads(arguments), dict)
    answer = read_answer(READS, text)
    assert all(call.name in FUNCTIONS for call in answer.calls)
