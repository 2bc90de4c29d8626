"""One cold process of benchmarks/cpu_engines.py, whichever engine it runs: what is asked and measured.

An engine gives a function that loads the model and returns how it continues prompts greedily, all at
once, and when. Only the standard library is imported, so that every engine can run in an environment
of its own. The phases: the model loaded; prefill of one long prompt, once unmeasured; decode behind it;
decode of several sequences at once behind short prompts. Each time another prompt: nothing can be
remembered.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

Generate = Callable[[list[list[int]], int], tuple[float, float]]
"""(prompts, tokens of each) -> seconds to the first tokens, seconds of all others."""
Row = Mapping[str, float | str]
Details = Callable[[], Row]
Load = Callable[[argparse.Namespace], tuple[Generate, Details]]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("spawned", type=float, help="time.time() when the process was started")
    parser.add_argument("--precision", required=True)
    parser.add_argument("--threads", type=int, help="default: what the engine takes by itself")
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--context", type=int, default=512, help="tokens of the long prompt")
    parser.add_argument(
        "--prefills", type=int, default=2, help="measured prompts beside the decoded one; 0: none"
    )
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens decoded behind it")
    parser.add_argument(
        "--decode-context", type=int, help="tokens of the prompt that is decoded behind, if another"
    )
    parser.add_argument("--sequences", type=int, default=8, help="0: leave them out")
    parser.add_argument("--batch-context", type=int, default=64, help="tokens of their prompts")
    parser.add_argument("--batch-new-tokens", type=int, default=32)
    return parser.parse_args()


def memory_gib(field: str) -> float:
    """Return a field of /proc/self/status, which is in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**20


def run(load: Load) -> None:
    """Measure an engine and print the row."""
    asked = options()
    generate, details = load(asked)
    numbers = random.Random(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[numbers.randrange(3, asked.vocab) for _ in range(length)] for _ in range(count)]

    decoded = asked.decode_context or asked.context
    generate(prompts(1, asked.context if asked.prefills else decoded), 2)
    prefill = [generate(prompts(1, asked.context), 1)[0] for _ in range(asked.prefills)]
    first, rest = generate(prompts(1, decoded), asked.new_tokens + 1)
    if decoded == asked.context:
        prefill.append(first)
    row: dict[str, float | str] = {
        "decode_per_s": asked.new_tokens / rest,
        "peak_gib": memory_gib("VmHWM"),
    }
    if prefill:
        row["prefill_per_s"] = asked.context / statistics.median(prefill)
    if asked.sequences:
        _, together = generate(
            prompts(asked.sequences, asked.batch_context), asked.batch_new_tokens + 1
        )
        row["together_per_s"] = asked.sequences * asked.batch_new_tokens / together
        row["peak_gib"] = memory_gib("VmHWM")
    row.update(details())
    print(json.dumps(row))
