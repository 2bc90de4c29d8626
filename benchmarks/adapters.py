"""Measures what adapters cost while a model is served: sequences with several against as many without.

    python benchmarks/adapters.py [--shape llama-1.1b] [--quant int8] [--output REPORT.md]

Two engines over one checkpoint with random weights take turns within a process: one without adapters,
and one whose sequences use `--adapters` different ones, each on all projections with rank `--rank`. A
round is a batch of sequences with short prompts, so that nearly all passes decode all of them. Before it
is measured, each sequence's tokens among the others are compared with those of the sequence alone.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import measure
import torch

import hanok
from hanok.bench.spread import Spread
from hanok.checkpoint.aside import folder_aside
from hanok.checkpoint.lora_config import LoraConfig
from hanok.engine.engine import Engine
from hanok.engine.model import Model
from hanok.memory.adapters import attach_new, write_adapter
from hanok.models.adapters import attached, detach
from hanok.models.family import family_of, usual_sources

ASKED = 0.85  # of the speed without adapters
BUNDLED = "bundled"
STANDARD_DEVIATION = 0.02  # of B


def make_adapters(model: Model, count: int, rank: int, folder: Path) -> list[Path]:
    """Write adapters that add something where they are not there; return their folders."""
    family = family_of(model.checkpoint.config, "config.json")
    table = usual_sources(family, model.decoder.config)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    found = []
    for number in range(count):
        path = folder / f"adapter{number}-r{rank}"
        found.append(path)
        if path.is_dir():
            continue
        generator = torch.Generator().manual_seed(number)
        attach_new(model.decoder, table, config, index=number, generator=generator)
        with torch.no_grad():
            for part in attached(model.decoder, table, number).parts.values():
                part.b.normal_(0.0, STANDARD_DEVIATION, generator=generator)
        with folder_aside(path) as unfinished:
            write_adapter(unfinished, model.decoder, table, config, index=number)
        detach(model.decoder, number)
    return found


def prompts_of(model: Model, options: argparse.Namespace) -> list[list[int]]:
    """Return prompts of random tokens, other ones in every sequence."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.sequences, options.prompt_tokens)
    found: list[list[int]] = torch.randint(
        3, model.config.vocab_size, shape, generator=generator
    ).tolist()
    return found


def generated(
    engine: Engine, prompts: list[list[int]], names: list[str | None], new_tokens: int
) -> list[list[int]]:
    """Return the tokens of all prompts, computed together."""
    options: Any = {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
    tickets = [
        engine.submit(prompt, adapter=name, **options)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    return [[event.token_id for event in ticket] for ticket in tickets]


def runner(
    engine: Engine, prompts: list[list[int]], names: list[str | None], new_tokens: int
) -> Callable[[], measure.Row]:
    """Return what measures one round."""

    def run() -> measure.Row:
        began = time.perf_counter()
        found = generated(engine, prompts, names, new_tokens)
        took = time.perf_counter() - began
        return {"tokens_per_s": sum(map(len, found)) / took}

    return run


def report(options: argparse.Namespace, rows: dict[str, list[measure.Row]], is_equal: bool) -> str:
    """Return the report."""
    rates = {name: [row["tokens_per_s"] for row in found] for name, found in rows.items()}
    plain, mixed = rates.values()
    ratio = Spread.of_ratio(mixed, plain)
    lines = [[name, str(Spread.of(found)), "", ""] for name, found in rates.items()]
    lines.append(
        ["with / without", str(ratio), f"≥ {ASKED}", "yes" if ratio.median >= ASKED else "no"]
    )
    said = "the same" if is_equal else "NOT the same"
    return "\n\n".join(
        [
            measure.heading("Adapters while serving", options.threads),
            f"{options.sequences} sequences of {options.prompt_tokens} + {options.new_tokens} tokens, "
            f"{options.shape} in {options.quant}, rank {options.rank} on all projections; medians of "
            f"{options.runs} rounds (smallest–largest), ratios within rounds; "
            f"{measure.count_disturbed(rows)} runs disturbed.",
            measure.table(("tokens/s", "measured", "asked", "reached"), lines),
            f"Tokens of each sequence among the others and alone: {said}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure sequences with adapters.")
    measure.add_common_options(parser, runs=7)
    parser.add_argument("--shape", default="llama-1.1b", help=f"of checkpoints.py, or {BUNDLED}")
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--folder", type=Path, default=checkpoints.DEFAULT_FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.shape == BUNDLED:
        folder = hanok.BUNDLED
    else:
        folder = checkpoints.make_checkpoint(checkpoints.SHAPES[options.shape], options.folder)
    plain, mixed = (hanok.load(folder, quant=options.quant) for _ in range(2))
    adapters = make_adapters(mixed, options.adapters, options.rank, options.folder / folder.name)
    for number, path in enumerate(adapters):
        mixed.adapters.load(str(number), path)
    prompts = prompts_of(plain, options)
    names: list[str | None] = [str(number % options.adapters) for number in range(len(prompts))]
    none: list[str | None] = [None] * len(prompts)
    tokens = options.sequences * (options.prompt_tokens + options.new_tokens) + 64 * len(prompts)
    with Engine(plain, cache_tokens=tokens) as without, Engine(mixed, cache_tokens=tokens) as with_:
        together = generated(with_, prompts, names, options.new_tokens)
        alone = [
            generated(with_, [prompt], [name], options.new_tokens)[0]
            for prompt, name in zip(prompts, names, strict=True)
        ]
        rows = measure.interleave(
            {
                f"{len(prompts)} without adapters": runner(
                    without, prompts, none, options.new_tokens
                ),
                f"{len(prompts)} with {options.adapters} adapters": runner(
                    with_, prompts, names, options.new_tokens
                ),
            },
            runs=options.runs,
            guard=measure.guard_of(options),
            log=measure.log_of(options),
        )
    measure.publish(report(options, rows, together == alone), options.output)


if __name__ == "__main__":
    main()
