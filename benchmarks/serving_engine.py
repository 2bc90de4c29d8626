"""One cold process of benchmarks/serving.py: the engine without a server, given all requests at once."""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import hanok


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("spawned", type=float, help="time.time() when the process was started")
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = hanok.load(options.folder, quant=options.quant)
    numbers = random.Random(options.seed)

    def prompt(count: int) -> list[int]:
        return [numbers.randrange(3, model.config.vocab_size) for _ in range(count)]

    length = options.prompt_tokens + options.new_tokens
    tokens = options.sequences * (length + 64)
    with hanok.Engine(model, cache_tokens=tokens) as engine:
        engine.submit(prompt(options.prompt_tokens), max_new_tokens=4, ignore_eos=True).result()
        prompts = [prompt(options.prompt_tokens) for _ in range(options.sequences)]
        began = time.monotonic()
        tickets = [
            engine.submit(item, max_new_tokens=options.new_tokens, ignore_eos=True)
            for item in prompts
        ]
        count = sum(len(ticket.result()) for ticket in tickets)
        ended = time.monotonic()
    first = [ticket.times.first_token for ticket in tickets]
    row = {
        "tokens_per_s": count / (ended - began),
        "first_token_s": statistics.median(at - began for at in first if at is not None),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
