"""Prompts of exact length, with servers that count tokens in different ways."""

import http.server
import json
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.bench.arrivals import Arrival
from hanok.bench.prompts import (
    FULL_LENGTH,
    Prompts,
    Site,
    Tokens,
    find_protocol,
    make_prompts,
    target_of,
    tokenize,
)
from hanok.bench.traffic import Target
from hanok.errors import OptionError, RequestError

BEGIN = 1


def arrival(prompt_tokens: int, **more: Any) -> Arrival:
    return Arrival(at_s=0.0, prompt_tokens=prompt_tokens, new_tokens=1, **more)


def pairs_of_letters(text: str) -> Tokens:
    """A tokenizer of which words of up to three letters are one token, longer ones more; it begins
    every text with a special token."""
    tokens: Tokens = [(BEGIN, (0, 0))]
    place = 0
    for word in text.split():
        start, place = place, place + 1 + len(word)
        cuts = [start, *range(start + 4, place, 3), place]
        tokens += [(hash_of(text[a:b]), (a, b)) for a, b in pairwise(cuts)]
    return tokens


def hash_of(text: str) -> int:
    return 2 + sum(ord(letter) * 31**index for index, letter in enumerate(text)) % 10_000


@settings(max_examples=30)
@given(length=st.integers(2, 400), number=st.integers(0, 50))
def test_text_is_as_long_as_wanted(length: int, number: int) -> None:
    prompts = make_prompts(pairs_of_letters, takes_ids=False)
    assert prompts.kind == "text of exact length"
    text = prompts.of(arrival(length), number)
    assert isinstance(text, str)
    assert len(pairs_of_letters(text)) == length
    assert text == prompts.of(arrival(length), number)


def test_ids_are_those_that_the_server_knows() -> None:
    prompts = make_prompts(pairs_of_letters, takes_ids=True)
    ids = prompts.of(arrival(500), 0)
    assert prompts.kind == "token ids of exact length"
    assert len(ids) == 500
    assert BEGIN not in ids
    known = {token for token, _ in pairs_of_letters("".join(f" {word}" for word in _words()))}
    assert set(ids) <= known
    assert prompts.of(arrival(500), 1)[:20] != ids[:20]
    assert prompts.of(arrival(500), 0, seed=1)[:20] != ids[:20]


def _words() -> list[str]:
    from hanok import BUNDLED
    from hanok.bench.prompts import words_of

    return words_of((BUNDLED / "quality.txt").read_text())


@pytest.mark.parametrize("length", [500, 512, 1000, 1300])
def test_equal_blocks_are_equal_tokens(length: int) -> None:
    prompts = Prompts(pieces=range(100), is_exact=True)
    first = prompts.of(arrival(length, blocks=(7, 8)), 0)
    second = prompts.of(arrival(length, blocks=(7, 9)), 1)
    assert len(first) == len(second) == length
    assert first[:512] == second[:512]
    assert first[512:1024] != second[512:1024] or length <= 512
    # What no block covers is each request's own.
    third = prompts.of(arrival(length, blocks=(7, 8)), 2)
    assert third[:1024] == first[:1024]
    assert third[1024:] != first[1024:] or length <= 1024
    scaled = prompts.of(arrival(40, blocks=(7, 8), block_tokens=16), 3)
    assert scaled[:16] == first[:16]


def test_without_a_tokenizer_lengths_are_estimates() -> None:
    prompts = make_prompts(lambda text: None, takes_ids=True)
    assert prompts.kind == "text of estimated length"
    assert len(str(prompts.of(arrival(130), 0)).split()) == 100


def test_words_that_merge_are_estimates() -> None:
    """A tokenizer that takes two words as one token: half a token for each word, and no more claimed."""

    def halves(text: str) -> Tokens:
        return [(index, None) for index in range(len(text.split()) // 2 + 3)]

    prompts = make_prompts(halves, takes_ids=False)
    assert not prompts.is_exact
    assert prompts.tokens_per_piece == 0.5
    assert len(halves(str(prompts.of(arrival(203), 0)))) == 203


def settled(answers: dict[tuple[str, bool], int]) -> tuple[Target, Prompts]:
    """Settle with a server that takes what is listed: kinds of prompts, and whether with more fields."""

    def send(target: Target, prompt: str | list[int]) -> tuple[int, str]:
        kind = "text" if isinstance(prompt, str) else "ids"
        return answers.get((kind, bool(target.options)), 422), "no"

    return find_protocol(Target(url="http://x"), pairs_of_letters, send)


def test_what_a_server_takes_is_tried() -> None:
    target, prompts = settled({("ids", True): 200})
    assert target.options == FULL_LENGTH
    assert prompts.kind.startswith("token ids")
    target, prompts = settled({("ids", False): 200, ("text", True): 200})
    assert target.options == {}
    assert prompts.kind.startswith("token ids")
    target, prompts = settled({("text", True): 200})
    assert target.options == FULL_LENGTH
    assert prompts.kind.startswith("text")
    with pytest.raises(RequestError, match=r"takes no request. token ids of exact length: 422 no"):
        settled({})


class Routes(http.server.BaseHTTPRequestHandler):
    routes: dict[str, Any]

    def do_GET(self) -> None:
        self.answer(self.server.routes.get(self.path))  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        found = self.server.routes.get(self.path)  # type: ignore[attr-defined]
        self.answer(found(body) if found else None)

    def answer(self, found: Any) -> None:
        data = json.dumps(found).encode()
        self.send_response(404 if found is None else 200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def routes() -> Iterator[tuple[dict[str, Any], str]]:
    found: dict[str, Any] = {}
    with http.server.HTTPServer(("127.0.0.1", 0), Routes) as server:
        server.routes = found  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_protocol_is_found_by_asking(routes: tuple[dict[str, Any], str]) -> None:
    found, url = routes
    site = Site(url)
    with pytest.raises(OptionError, match=r"answers /v1/models and /info as no server"):
        target_of(site, "auto")
    found["/info"] = {"model_id": "some/model"}
    assert target_of(site, "auto").protocol == "tgi"
    with pytest.raises(OptionError, match="/v1/models as no server of OPENAI"):
        target_of(site, "openai")
    assert target_of(site, "openai", model="m") == Target(url=url, protocol="openai", model="m")
    found["/v1/models"] = {"data": [{"id": "served"}]}
    assert target_of(site, "auto") == Target(url=url, protocol="openai", model="served")
    assert target_of(site, "tgi").model == "some/model"


@pytest.mark.parametrize(
    ("key", "answer", "expected"),
    [
        ("inputs", [{"id": 5, "text": "a", "start": 0, "stop": 1}], [(5, (0, 1))]),
        ("prompt", {"count": 2, "tokens": [5, 6]}, [(5, None), (6, None)]),
        ("content", {"tokens": [{"id": 5, "piece": "a"}]}, [(5, None)]),
    ],
)
def test_tokens_are_read_from_three_servers(
    routes: tuple[dict[str, Any], str], key: str, answer: Any, expected: Tokens
) -> None:
    found, url = routes
    site, target = Site(url), Target(url=url)
    assert tokenize(site, target, "a") is None
    found["/tokenize"] = lambda body: answer if key in body else None
    assert tokenize(site, target, "a") == expected


def test_addresses_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(OptionError, match="without encryption"):
        Site("https://host")
    with pytest.raises(OptionError, match="give http://HOST:PORT"):
        Site("localhost:8080")
    with pytest.raises(OptionError, match=r"does not answer.*Is the server running"):
        Site("http://127.0.0.1:1").ask("/info")
