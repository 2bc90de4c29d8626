"""Bodies within the limits that are made to cost much, and how long everybody else waits meanwhile.

    python benchmarks/hostile.py [--url http://HOST:PORT] [--most 0.25] [--only WORD] [--rounds 2]
        [--output FILE.md]

Another process asks for /health all the time. For each body: its status, how long it took, and the
longest that /health took meanwhile, in each of the rounds. Without --url a server of the bundled
model is started. A body is given up after 30 seconds, so the whole takes a few minutes at the most.
Exit status 1 where /health took longer than --most; the first row, in which nothing is sent, says
what the machine itself adds.
"""

import argparse
import http.client
import json
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import measure

GIVEN_UP_S = 30.0
IDLE_S = 2.0
BYTES = 1_900_000
"""Of a body: the server's limit is 2,000,000."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hello"}


def listed(start: str, item: str, end: str) -> bytes:
    """Return a text with an item as often as there is room for."""
    count = (BYTES - len(start) - len(end)) // len(item)
    return f"{start}{item * count}{end}".encode()


def body(**fields: Any) -> bytes:
    """Return a body as JSON."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def chat(**fields: Any) -> bytes:
    """Return a chat's body."""
    return body(**({"messages": [USER], "max_tokens": 1} | fields))


def lists() -> Iterator[tuple[str, str, bytes]]:
    """Yield bodies with very many items, right ones and wrong ones."""
    prompt, tokens = '{"max_tokens":1,"prompt":[', '{"prompt":"a","max_tokens":1,"stop_token_ids":['
    yield "prompt of mixed items", COMPLETIONS, listed(prompt, '1,"a",', "[]]}")
    yield "prompt of empty lists", COMPLETIONS, listed(prompt, "[],", "[]]}")
    yield "prompt of short lists", COMPLETIONS, listed(prompt, "[1],", "[1]]}")
    yield "prompt of ids", COMPLETIONS, listed(prompt, "1,", "1]}")
    yield "prompt of wrong ids", COMPLETIONS, listed(prompt, "-1,", "1]}")
    yield "prompt of texts", COMPLETIONS, listed(prompt, '"a",', '"a"]}')
    yield "32 long lists of ids", COMPLETIONS, body(prompt=[[1] * 29_000] * 32, max_tokens=1)
    yield "wrong stop_token_ids", COMPLETIONS, listed(tokens, "-1,", "1]}")
    yield "stop_token_ids", COMPLETIONS, listed(tokens, "1,", "1]}")
    yield "stop texts", COMPLETIONS, listed('{"prompt":"a","stop":[', '"a",', '"a"]}')
    yield (
        "wrong stop texts",
        "/generate",
        listed('{"inputs":"a","parameters":{"stop":[', "1,", "1]}}"),
    )
    yield "messages", CHAT, listed('{"max_tokens":1,"messages":[', "{},", "{}]}")
    yield "wrong messages", CHAT, listed('{"messages":[', "1,", "1]}")
    yield "10,000 messages", CHAT, chat(messages=[USER] * 10_000)
    yield (
        "parts of content",
        CHAT,
        chat(messages=[USER | {"content": [{"type": "text", "text": "a"}] * 45_000}]),
    )
    yield "wrong parts of content", CHAT, chat(messages=[USER | {"content": [1] * 900_000}])
    yield "50,000 tools", CHAT, chat(tools=[{"function": {"name": f"f{i}"}} for i in range(50_000)])
    yield "instances", "/vertex", listed('{"instances":[', "{},", "{}]}")
    yield "a list of nothing known", "/generate", listed('{"inputs":"a","x":[', '"",', '""]}')


def tables() -> Iterator[tuple[str, str, bytes]]:
    """Yield bodies with very many names."""
    names = {f"{number}": number for number in range(120_000)}
    nested: Any = 1
    for _ in range(60):
        nested = {"a": nested}
    yield "logit_bias", COMPLETIONS, body(prompt="a", max_tokens=1, logit_bias=names)
    yield (
        "wrong logit_bias",
        COMPLETIONS,
        body(prompt="a", logit_bias=dict.fromkeys((f"a{name}" for name in range(9_000)), "b")),
    )
    yield "unknown fields", COMPLETIONS, body(prompt="a", max_tokens=1, **names)
    yield "variables of the template", CHAT, chat(chat_template_kwargs=names)
    yield "fields of a message", CHAT, chat(messages=[USER | names])
    yield "nested objects", CHAT, chat(chat_template_kwargs={"a": [nested] * 800})
    yield "brackets in a text", "/generate", body(inputs="[" * BYTES)
    yield "a text that does not end", "/generate", ('{"inputs":"' + '\\"[' * 600_000).encode()


def texts() -> Iterator[tuple[str, str, bytes]]:
    """Yield bodies with one very long text."""
    kinds = {
        "words": "a b c " * (BYTES // 6),
        "one letter": "a" * BYTES,
        "spaces": " " * BYTES,
        "Hangul": "\uac00" * (BYTES // 3),
        "digits": "7" * BYTES,
    }
    for name, text in kinds.items():
        yield f"{name} to generate", "/generate", body(inputs=text)
        yield (
            f"{name} to cut short",
            "/generate",
            body(inputs=text, parameters={"truncate": 4, "max_new_tokens": 1}),
        )
        yield f"{name} to complete", COMPLETIONS, body(prompt=text, max_tokens=1)
        yield f"{name} in a chat", CHAT, chat(messages=[USER | {"content": text}])
        yield f"{name} to tokenize", "/tokenize", body(inputs=text)
    words = kinds["words"]
    talk = {"messages": [USER | {"content": words}]}
    yield "words, /tokenize as in vLLM", "/tokenize", body(prompt=words, return_token_strs=True)
    yield "ids, /detokenize", "/detokenize", listed('{"tokens":[', "9,", "9]}")
    yield "words, /chat_tokenize", "/chat_tokenize", body(**talk)
    yield "words, /explain", "/explain", body(route=CHAT, body=talk)
    yield (
        "words, /explain of 32",
        "/explain",
        body(route=COMPLETIONS, body={"prompt": [words[:55_000]] * 32}),
    )
    yield "words, /vertex", "/vertex", body(instances=[{"inputs": words[:55_000]}] * 32)
    yield "words, /invocations", "/invocations", body(inputs=words)
    yield "the model's name", COMPLETIONS, body(prompt="a", model=words)
    yield "a role", CHAT, chat(messages=[{"role": words, "content": "a"}])
    yield "long stop texts", COMPLETIONS, body(prompt="a", max_tokens=64, stop=["a" * 1000] * 64)


def constraints() -> Iterator[tuple[str, str, bytes]]:
    """Yield bodies with schemas, expressions and tools that are large."""
    properties = {f"p{number}": {"type": "string"} for number in range(20_000)}
    schema = {"type": "object", "properties": properties}
    tools = [
        {"type": "function", "function": {"name": f"f{number}", "parameters": {"type": "object"}}}
        for number in range(1000)
    ]
    calls = [{"function": {"name": "f", "arguments": "[" + "[]," * 600_000 + "[]]"}}]

    def shaped(value: Any) -> bytes:
        return body(inputs="a", parameters={"max_new_tokens": 1, "grammar": value})

    yield "a schema of 20,000 names", "/generate", shaped({"type": "json", "value": schema})
    few = dict(list(properties.items())[:4_000])
    chain: dict[str, Any] = {
        f"{n}": {"minLength": 1, "$ref": f"#/$defs/{n + 1}"} for n in range(1500)
    }
    each = [
        {"properties": {f"a{n}": {"type": "string"}}, "required": [f"a{n}"]} for n in range(900)
    ]
    for name, value in {
        "4,000 names": {"type": "object", "properties": few},
        "10,000 choices": {"enum": [f"v{number}" for number in range(10_000)]},
        "1,500 references": {"$defs": chain | {"1500": {"type": "null"}}, "$ref": "#/$defs/0"},
        "900 choices of objects": {"anyOf": each},
    }.items():
        yield f"a schema of {name}", "/generate", shaped({"type": "json", "value": value})
    yield (
        "an expression of 2,500 parts",
        "/generate",
        shaped({"type": "regex", "value": "(a|b)" * 800}),
    )
    yield (
        "a schema of 40,000 choices",
        "/generate",
        shaped({"type": "json", "value": {"enum": [f"v{number}" for number in range(40_000)]}}),
    )
    yield "a schema as text", "/generate", shaped({"type": "json", "value": json.dumps(schema)})
    yield "a long expression", "/generate", shaped({"type": "regex", "value": "(a|b)" * 300_000})
    yield (
        "an exploding expression",
        "/generate",
        shaped({"type": "regex", "value": r"(\w?){300}(\w{1,300}){1,300}"}),
    )
    yield "1,000 tools, one wanted", CHAT, chat(tools=tools, tool_choice="required")
    yield "1,000 tools", CHAT, chat(tools=tools)
    yield (
        "arguments of empty lists",
        CHAT,
        chat(messages=[USER, {"role": "assistant", "tool_calls": calls}, USER]),
    )
    yield (
        "arguments nested deeply",
        CHAT,
        chat(
            messages=[
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "[" * 900 + "]" * 900}}],
                },
            ]
        ),
    )


def answers() -> Iterator[tuple[str, str, bytes]]:
    """Yield bodies with long answers; 1,000 tokens are what the bundled model takes."""
    prompt = [[5] * 1000] * 32
    yield (
        "scores of 32 prompts",
        COMPLETIONS,
        body(prompt=prompt, max_tokens=1, echo=True, logprobs=20),
    )
    yield (
        "scores of 32 prompts, streamed",
        COMPLETIONS,
        body(prompt=prompt, max_tokens=1, echo=True, logprobs=20, stream=True),
    )
    yield (
        "a prompt with its scores",
        "/generate",
        body(inputs="a " * 400, parameters={"decoder_input_details": True, "max_new_tokens": 1}),
    )
    yield (
        "16 answers with 20 scores",
        CHAT,
        chat(n=16, max_tokens=300, logprobs=True, top_logprobs=20, ignore_eos=True),
    )


def probe(url: str, results: Connection) -> None:
    """Ask for /health, and send the longest wait since it was last asked for; end when told to."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(
        address.hostname or "127.0.0.1", address.port, timeout=300
    )
    longest = 0.0
    while True:
        began = time.monotonic()
        connection.request("GET", "/health")
        connection.getresponse().read()
        longest = max(longest, time.monotonic() - began)
        if results.poll():  # what was asked meanwhile is answered with the wait that it caused
            if not results.recv():
                return
            results.send(longest)
            longest = 0.0
        time.sleep(0.005)


def longest_wait(prober: Connection) -> float:
    """Return the longest that /health took since this was last called, in seconds."""
    prober.send(True)
    found: float = prober.recv()
    return found


def ask(url: str, path: str, data: bytes) -> str:
    """Send a body; return its status, or what came instead."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(
        address.hostname or "127.0.0.1", address.port, timeout=GIVEN_UP_S
    )
    try:
        connection.request("POST", path, data, {"content-type": "application/json"})
        response = connection.getresponse()
        size = 0
        while part := response.read(1 << 20):
            size += len(part)
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()
    return f"{response.status}, {size:,} B"


@contextmanager
def served(url: str | None) -> Iterator[str]:
    """Give the address of a server that is ready, one of our own where none is named."""
    if url is not None:
        yield url
        return
    command = [sys.executable, "-m", "hanok", "serve", "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        for line in process.stdout or ():
            if found := re.search(r"Listening on (http://\S+)", line):
                break
        else:
            raise SystemExit("the server did not start")
        while not ask(found[1], "/tokenize", b'{"inputs":"a"}').startswith("200"):
            time.sleep(0.2)
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url")
    parser.add_argument("--most", type=float, default=0.25, help="seconds that /health may take")
    parser.add_argument("--only", default="", help="bodies with this in their name")
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    heading = measure.heading("What the worst bodies cost others", measure.num_cores())
    table = [
        "| body | route | bytes | answer | s | worst /health in each round, s |",
        "|---|---|---:|---|---:|---:|",
    ]
    lines = [heading, "", *table]
    print("\n".join(lines), flush=True)
    worst = 0.0
    with served(options.url) as url:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        prober = multiprocessing.get_context("spawn").Process(target=probe, args=(url, theirs))
        prober.start()
        longest_wait(ours)
        cases = [*lists(), *tables(), *texts(), *constraints(), *answers()]
        for name, path, data in [("nothing", "", b""), *cases]:
            if path and options.only not in name:
                continue
            waits, seconds, answer = [], 0.0, ""
            for _ in range(options.rounds):
                began = time.monotonic()
                if path:
                    answer = ask(url, path, data)
                else:
                    time.sleep(IDLE_S)
                seconds = max(seconds, time.monotonic() - began)
                waits.append(longest_wait(ours))
            worst = max(worst, *waits)
            shown = ", ".join(f"{wait:.3f}" for wait in waits)
            line = f"| {name} | {path} | {len(data):,} | {answer} | {seconds:.2f} | {shown} |"
            lines.append(line)
            print(line, flush=True)
        ours.send(False)
        prober.join()
    lines += ["", f"The worst: {worst:.3f} s."]
    print(f"\n{lines[-1]}", flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(worst > options.most)


if __name__ == "__main__":
    sys.exit(main())
