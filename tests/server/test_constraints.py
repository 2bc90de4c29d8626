"""Choices as a grammar: each of them, and nothing else."""

import re

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

import hanok
from hanok.checkpoint.tokenizer import open_tokenizer
from hanok.engine.grammar import GrammarCompiler
from hanok.server.constraints import constraint_of
from hanok.server.openai_models import CompletionRequest

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)


@given(st.lists(TEXTS, min_size=1, max_size=6), TEXTS)
@example(["a.b", "c"], "axb")
@example(["\\d", "[a-z]", "$", "x{2}"], "5")
def test_a_choice_is_an_alternation_of_its_texts(choices: list[str], other: str) -> None:
    """Python's regexes are the oracle for the escapes."""
    spec = constraint_of(CompletionRequest(prompt="", guided_choice=choices))
    assert spec is not None
    assert spec.kind == "regex"
    for text in choices:
        assert re.fullmatch(spec.value, text)
    assert bool(re.fullmatch(spec.value, other)) == (other in choices)


def test_llguidance_reads_the_escapes_as_they_are_meant() -> None:
    tokenizer = open_tokenizer(hanok.BUNDLED)
    texts = [
        "".join(map(chr, range(32, 127))),
        "\n\t\r",
        "김 é\u2028 ☺",
        "-a",
        "a-",
        "&&",
        "~~",
        "//",
    ]
    spec = constraint_of(CompletionRequest(prompt="", guided_choice=texts))
    assert spec is not None
    grammar = GrammarCompiler(tokenizer, tokenizer.vocab_size, [0]).compile(spec)
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        matcher = grammar.matcher()
        assert matcher.allowed_prefix(ids) == len(ids), text
        assert matcher.allowed_prefix([*ids, ids[0]]) == len(ids), text


@pytest.mark.parametrize("name", ["response_format", "guided_json", "structured_outputs"])
def test_null_says_nothing(name: str) -> None:
    assert constraint_of(CompletionRequest(prompt="", **{name: None})) is None
