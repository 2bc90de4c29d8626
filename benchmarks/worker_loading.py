"""One cold process of benchmarks/loading.py: loads a model as asked, uses it, and says what it took.

Memory is sampled by a thread of its own from /proc/self/status: what the kernel cannot take back
(RssAnon and RssShmem), beside the resident pages of the checkpoint's own files (from smaps). "steady" is
between two steps with a full context, "peak" the most at any moment since the process started.
"""

import argparse
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

SAMPLE_S = 0.002
STATUS, MAPS = Path("/proc/self/status"), Path("/proc/self/smaps")


def claimed_bytes() -> int:
    lines = STATUS.read_text().splitlines()
    found = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(found) * 1024


def mapped_bytes(folder: Path) -> int:
    """Return the resident pages of a folder's files."""
    total, is_ours = 0, False
    for line in MAPS.read_text().splitlines():
        if "-" in line.split(" ", 1)[0] and not line.endswith("kB"):
            is_ours = str(folder.resolve()) in line
        elif is_ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


class Sampler(threading.Thread):
    """Remembers the most that was claimed."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self.start()

    def run(self) -> None:
        """Look until the process ends."""
        while True:
            self.peak_bytes = max(self.peak_bytes, claimed_bytes())
            time.sleep(SAMPLE_S)


def prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    numbers = random.Random(length)
    return [[numbers.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)]


def with_hanok(asked: argparse.Namespace, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Load by a plan and generate; what is planned is compared with what is measured by the caller."""
    import torch

    import hanok
    from hanok.engine.model import load
    from hanok.engine.pipeline import Pipeline

    started = time.perf_counter()
    depth = options.pop("pipeline_depth", None)
    packed = options.pop("cache_packed", None)
    plan = hanok.plan_load(asked.folder, is_running=False, may_measure=False, **options)
    model = load(plan=plan, pipeline_depth=depth, cache_packed=packed)
    row: dict[str, Any] = {
        "ready_s": time.time() - asked.spawned,
        "load_s": time.perf_counter() - started,
        "planned_steady": sum(t.steady_bytes for t in plan.tiers if t.place.kind != "gpu"),
        "planned_peak": sum(t.peak_bytes for t in plan.tiers if t.place.kind != "gpu"),
        "threads": torch.get_num_threads(),
        "streamed_bytes": sum(
            item.unit.stream_bytes for item in plan.placements if item.device == "disk"
        ),
        "notes": list(model.notes),
    }
    if asked.new_tokens:
        length = asked.context - asked.new_tokens
        given = prompts(asked.batch, length, model.config.vocab_size)
        common: Any = {"max_new_tokens": asked.new_tokens, "ignore_eos": True}
        began, moments = time.perf_counter(), []
        if model.decoder.layout is not None:
            sequences = [model.sequence(item, common) for item in given]
            with Pipeline(model.decoder, depth) as pipeline:
                events = pipeline.generate(sequences)
                for _ in given:
                    next(events)
                row["prefill_s"] = time.perf_counter() - began
                busy, since = list(pipeline.busy_s), time.perf_counter()
                rest = list(events)
                row["decode_s"] = time.perf_counter() - since
                row["busy"] = [
                    (after - before) / row["decode_s"]
                    for before, after in zip(busy, pipeline.busy_s, strict=True)
                ]
            row["tokens"] = [item.generated_ids for item in sequences]
            row["decoded"] = len(rest)
        elif asked.batch == 1:
            tokens = []
            for event in model.stream(given[0], **common):
                moments.append(time.perf_counter())
                tokens.append(event.token_id)
            row["tokens"] = [tokens]
            row["first_token_s"] = moments[0] - began
            row["decode_s"], row["decoded"] = moments[-1] - moments[0], len(moments) - 1
        else:
            row["tokens"] = [item.token_ids for item in model.generate(given, **common)]
        if model._promotion is not None:
            model._promotion.finish()
        if asked.again:
            model.generate(prompts(asked.batch, length, model.config.vocab_size), **common)
    return row, model


def with_transformers(
    asked: argparse.Namespace, options: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """The same with transformers and accelerate; disk offload where `max_memory` is given."""
    import torch
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    if "max_memory" in options:
        options = {"device_map": "auto", **options}
    model = AutoModelForCausalLM.from_pretrained(
        asked.folder, dtype=torch.bfloat16, attn_implementation="sdpa", **options
    ).eval()
    row: dict[str, Any] = {
        "ready_s": time.time() - asked.spawned,
        "load_s": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
    }
    if asked.new_tokens:
        length = asked.context - asked.new_tokens
        inputs = torch.tensor(prompts(1, length, model.config.vocab_size))
        cache, tokens, moments = None, [], []
        with torch.inference_mode():
            for _ in range(asked.new_tokens):
                output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = output.past_key_values
                inputs = output.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(int(inputs))
                moments.append(time.perf_counter())
        row["tokens"] = [tokens]
        row["decode_s"], row["decoded"] = moments[-1] - moments[0], len(moments) - 1
    return row, model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=["hanok", "transformers"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("options", type=json.loads, help="of the load, as JSON")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="generate twice, as a server would")
    parser.add_argument("spawned", type=float)
    asked = parser.parse_args()
    sampler = Sampler()
    run = with_hanok if asked.engine == "hanok" else with_transformers
    row, model = run(asked, asked.options)
    mapped = mapped_bytes(asked.folder)
    row["steady_bytes"] = claimed_bytes() + mapped
    row["mapped_bytes"] = mapped
    row["peak_bytes"] = max(sampler.peak_bytes, row["steady_bytes"])
    del model
    print(json.dumps(row))


if __name__ == "__main__":
    main()
