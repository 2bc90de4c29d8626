"""Prompts of a wanted length for a server whose tokenizer is elsewhere, and how it wants to be asked.

`/tokenize` (TGI's, vLLM's or llama.cpp's) shows ids that the server knows and words that are one token
each, so prompts of ids or words are exactly as long as wanted. Without it their length is an estimate.
No two prompts begin alike, except where a trace says so (`Arrival.blocks`).
"""

import json
import random
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal
from urllib.parse import urlsplit

from hanok.bench.arrivals import Arrival
from hanok.bench.traffic import Protocol, Target
from hanok.errors import OptionError, RequestError
from hanok.package import BUNDLED

SETUP_TIMEOUT_S = 60.0
TOKENS_PER_WORD = 1.3  # of English where nothing is known
SAMPLE_WORDS = (64, 192)  # two lengths: tokens per word, and the constant part
PROBE_WORDS = 8
FULL_LENGTH = {"ignore_eos": True}
"""Lets answers have the length that was asked for, where a server knows the field."""


class Site:
    """A server's plain routes, asked before the measurement begins."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        address = urlsplit(url)
        if address.scheme != "http" or not address.hostname:
            raise OptionError(
                f"{url!r} is not an address to measure: give http://HOST:PORT (without encryption)."
            )
        self.url = url.rstrip("/")
        self._api_key = api_key
        # What is measured is the server, not a proxy that the environment names.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
        """Return the status and the text of an answer.

        Raises OptionError where there is no server.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        if self._api_key is not None:
            headers["authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=SETUP_TIMEOUT_S) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(errors="replace")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise OptionError(
                f"{self.url} does not answer: {reason}. Is the server running there?"
            ) from None

    def ask_json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the object of an answer with status 200, None for any other."""
        status, text = self.ask(path, body)
        try:
            return json.loads(text) if status == 200 else None
        except ValueError:
            return None


def target_of(
    site: Site,
    protocol: Protocol | Literal["auto"],
    *,
    model: str | None = None,
    api_key: str | None = None,
) -> Target:
    """Return how to ask the server: OpenAI's protocol where it has it, which takes token ids.

    Raises OptionError where it speaks none, or not the one that was asked for.
    """
    models = site.ask_json("/v1/models") if protocol != "tgi" else None
    names = _model_names(models)
    if names:
        return Target(url=site.url, protocol="openai", model=model or names[0], api_key=api_key)
    info = site.ask_json("/info") if protocol != "openai" else None
    if isinstance(info, dict) and "model_id" in info:
        name = model or str(info["model_id"])
        return Target(url=site.url, protocol="tgi", model=name, api_key=api_key)
    if protocol == "openai" and model is not None:
        return Target(url=site.url, protocol="openai", model=model, api_key=api_key)
    asked = {"auto": "/v1/models and /info", "openai": "/v1/models", "tgi": "/info"}[protocol]
    raise OptionError(
        f"{site.url} answers {asked} as no server of "
        f"{'either protocol' if protocol == 'auto' else protocol.upper()} does. Give --protocol, and "
        "--model where it lists none; a server that is still loading has to be ready first."
    )


def _model_names(models: Any) -> list[str]:
    entries = models.get("data") if isinstance(models, dict) else None
    return [str(item["id"]) for item in entries or () if isinstance(item, dict) and "id" in item]


Tokens = list[tuple[int, tuple[int, int] | None]]
"""Ids, and where in the text they stand where the server says so."""


def tokenize(site: Site, target: Target, text: str) -> Tokens | None:
    """Return a text's tokens as the server sees them; None where it does not show them."""
    for body in ({"inputs": text}, {"model": target.model, "prompt": text}, {"content": text}):
        found = site.ask_json("/tokenize", body)
        if isinstance(found, dict):
            found = found.get("tokens")
        if isinstance(found, list) and found:
            try:
                return [_token(item) for item in found]
            except (KeyError, TypeError, ValueError):
                continue
    return None


def _token(item: Any) -> tuple[int, tuple[int, int] | None]:
    if not isinstance(item, dict):
        return int(item), None
    place = (int(item["start"]), int(item["stop"])) if "start" in item else None
    return int(item["id"]), place


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Makes prompts of pieces that count `tokens_per_piece`; `overhead` tokens are in every prompt."""

    pieces: Sequence[int] | Sequence[str]
    is_exact: bool
    overhead: int = 0
    tokens_per_piece: float = 1.0

    @property
    def kind(self) -> str:
        """Return what the prompts are, as words."""
        kind = "token ids" if isinstance(self.pieces[0], int) else "text"
        return f"{kind} of {'exact' if self.is_exact else 'estimated'} length"

    def of(self, arrival: Arrival, number: int, seed: int = 0) -> str | list[int]:
        """Return the prompt of a request, its `number` among all; the same has the same."""
        wanted = max(1, round((arrival.prompt_tokens - self.overhead) / self.tokens_per_piece))
        drawn = list(islice(self._drawn(arrival, f"{seed}-{number}"), wanted))
        if isinstance(self.pieces[0], int):
            return drawn
        return "".join(f" {word}" for word in drawn)

    def _drawn(self, arrival: Arrival, name: str) -> Iterator[Any]:
        pieces: Sequence[Any] = self.pieces
        for block in arrival.blocks:
            numbers = random.Random(f"block-{block}")
            size = max(1, round(arrival.block_tokens / self.tokens_per_piece))
            yield from numbers.choices(pieces, k=size)
        numbers = random.Random(f"prompt-{name}")
        while True:
            yield numbers.choice(pieces)


def words_of(text: str) -> list[str]:
    """Return the different words of letters alone."""
    return sorted({word for word in text.split() if word.isascii() and word.isalpha()})


def make_prompts(count: Callable[[str], Tokens | None], *, takes_ids: bool) -> Prompts:
    """Return what prompts are made of, given how the server counts the tokens of a text."""
    words = words_of((BUNDLED / "quality.txt").read_text(encoding="utf-8"))
    text = "".join(f" {word}" for word in words)
    tokens = count(text)
    if tokens is None:
        return Prompts(pieces=words, is_exact=False, tokens_per_piece=TOKENS_PER_WORD)
    if takes_ids:  # the first may begin every text, and no text has it inside
        ids = sorted({token for token, _ in tokens[1:]} - {tokens[0][0]})
        return Prompts(pieces=ids or [tokens[0][0]], is_exact=True)
    whole = _single_tokens(words, tokens) or words
    numbers = random.Random(0)
    samples = ["".join(f" {word}" for word in numbers.choices(whole, k=n)) for n in SAMPLE_WORDS]
    few, many = (len(count(sample) or ()) for sample in samples)
    per_word = (many - few) / (SAMPLE_WORDS[1] - SAMPLE_WORDS[0])
    if per_word == 1 and few >= SAMPLE_WORDS[0]:
        return Prompts(pieces=whole, is_exact=True, overhead=few - SAMPLE_WORDS[0])
    return Prompts(
        pieces=whole,
        is_exact=False,
        overhead=max(0, round(few - per_word * SAMPLE_WORDS[0])),
        tokens_per_piece=per_word or TOKENS_PER_WORD,
    )


def _single_tokens(words: Sequence[str], tokens: Tokens) -> list[str]:
    """Return the words of a text of words that are one token each, by where tokens stand."""
    stops = [place[1] for _, place in tokens if place is not None and place[1] > place[0]]
    found, end = [], 0
    for word in words:
        start, end = end, end + 1 + len(word)
        inside = [stop for stop in stops if start < stop <= end]
        # A token of the space alone would end where the word begins.
        if inside == [end]:
            found.append(word)
    return found


Send = Callable[[Target, str | list[int]], tuple[int, str]]
"""Sends one short request and returns its status, and what is wrong."""


def find_protocol(
    target: Target, count: Callable[[str], Tokens | None], send: Send
) -> tuple[Target, Prompts]:
    """Return how the server takes requests: with ids, and answers to their full length, where it can.

    Raises RequestError with its words where it takes none.
    """
    plain, reasons = replace(target, options={}), []
    full = replace(target, options=FULL_LENGTH)
    for takes_ids in (True, False) if target.protocol == "openai" else (False,):
        prompts = make_prompts(count, takes_ids=takes_ids)
        if takes_ids and not isinstance(prompts.pieces[0], int):
            continue  # no ids are known
        probe = Arrival(at_s=0.0, prompt_tokens=PROBE_WORDS + prompts.overhead, new_tokens=2)
        for asked in (full, plain):
            status, reason = send(asked, prompts.of(probe, -1))
            if status == 200:
                return asked, prompts
            reasons.append(f"{prompts.kind}: {status or 'no answer'} {reason}"[:300])
    raise RequestError(f"{target.url} takes no request. " + "; ".join(dict.fromkeys(reasons)))
