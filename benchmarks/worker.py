"""One cold process of benchmarks/generate.py, whichever engine it runs: what is asked and measured.

An engine gives a function that loads the model and returns how it streams greedy tokens; everything
else, clocks included, is here and the same for all. Only the standard library is imported, so that
an engine's time to the first token holds its own imports and nobody else's. The phases:

1. model ready, then the first token after a short prompt, both in seconds since the parent process
   started this one (wall clock, so that the interpreter's start counts);
2. prefill: the time to the first token of a long prompt, once unmeasured, then the median of some;
3. decode: the tokens after the first, with that prompt's keys and values in the cache.

Peak memory is the kernel's high-water mark of resident pages (VmHWM), mapped files included, after
phase 1 and at the end; `private_gib` is what of it belongs to no file (RssAnon) at the end.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Stream = Callable[[list[int], int], Iterator[int]]
"""(prompt, number of tokens) -> the tokens, greedily, end tokens ignored."""
Load = Callable[[argparse.Namespace], Stream]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("spawned", type=float, help="time.time() when the process was started")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--short", type=int, default=8, help="tokens of the first prompt")
    parser.add_argument("--context", type=int, default=512, help="tokens of the long prompt")
    parser.add_argument("--repeats", type=int, default=3, help="prefills measured")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens decoded")
    return parser.parse_args()


def prompt(num_tokens: int, vocab_size: int) -> list[int]:
    """Return the same random token ids in every process."""
    numbers = random.Random(num_tokens)
    return [numbers.randrange(3, vocab_size) for _ in range(num_tokens)]


def memory_gib(field: str) -> float:
    """Return a field of /proc/self/status, which is in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**20


def run(load: Load) -> None:
    """Measure an engine and print the row."""
    asked = options()
    stream = load(asked)
    ready_s = time.time() - asked.spawned
    list(stream(prompt(asked.short, asked.vocab), 1))
    first_token_s = time.time() - asked.spawned
    first_peak_gib = memory_gib("VmHWM")
    long_prompt = prompt(asked.context, asked.vocab)
    first_prefill, *prefills = (
        prefill_seconds(stream, long_prompt) for _ in range(asked.repeats + 1)
    )
    decode_s, tokens = decode(stream, long_prompt, asked.new_tokens)
    row = {
        "ready_s": ready_s,
        "first_token_s": first_token_s,
        "prefill_per_s": asked.context / statistics.median(prefills or [first_prefill]),
        "decode_per_s": asked.new_tokens / decode_s,
        "first_peak_gib": first_peak_gib,
        "peak_gib": memory_gib("VmHWM"),
        "private_gib": memory_gib("RssAnon"),
        "threads": num_threads(),
        "tokens": tokens,
    }
    print(json.dumps(row))


def num_threads() -> int:
    """Return the threads that torch computes with; every engine here has imported it by now."""
    import torch

    return torch.get_num_threads()


def prefill_seconds(stream: Stream, token_ids: list[int]) -> float:
    start = time.perf_counter()
    list(stream(token_ids, 1))
    return time.perf_counter() - start


def decode(stream: Stream, token_ids: list[int], num_tokens: int) -> tuple[float, list[int]]:
    """Return the seconds of the tokens after the first, and all tokens."""
    tokens = stream(token_ids, num_tokens + 1)
    first = next(tokens)
    start = time.perf_counter()
    rest = list(tokens)
    return time.perf_counter() - start, [first, *rest]
