"""The rows of a user's own table, measured: attention, cache, quantization, speculation on a CPU.

    python benchmarks/wiki_table.py [--parts attention …] [--engines hanok transformers] [--runs 3]
        [--tokenizer FOLDER] [--output FILE.md]

Parts: `attention` (eager and fused, with a cache and without, short and long prompt), `loop`
(generate() and a loop by hand), `quant` (int8 and int4, one sequence and eight), `ngram` (guesses from
the text, on texts that repeat their prompt and on texts that do not), `draft` (guesses of a small
model) and `schema` (both, on JSON that follows a schema). Each row is a cold process, rows of a part
take turns (`measure.py`). Models have the 1.1B shape: random weights, which recite texts where these
matter (`recital.py`), and for drafts and JSON one that says what the bundled model says (`grown.py`).
Without a cache each token computes everything again; a few are measured, and what 64 would take is
computed from them. `--quick` shows in a few minutes, on a tiny shape, whether everything is there; no
figure of it counts.
"""

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import measure
from grown import make_grown
from recital import Piece, pieces
from wiki_worker import Job

import hanok
from hanok.bench.spread import Spread
from hanok.checkpoint.tokenizer import open_tokenizer

HERE = Path(__file__).parent
HANOK, TRANSFORMERS = "hanok", "transformers"
NEW_TOKENS = 64  # the figure for cache against no cache is asked for so many
SCHEMA = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 12},
        "favourite_animal": {"enum": ["dog", "cat", "bird", "rabbit"]},
        "lives_in": {
            "type": "object",
            "properties": {
                "street_name": {"type": "string", "maxLength": 16},
                "house_number": {"type": "integer", "minimum": 1, "maximum": 99},
            },
            "required": ["street_name", "house_number"],
            "additionalProperties": False,
        },
        "is_happy": {"type": "boolean"},
    },
    "required": ["first_name", "favourite_animal", "lives_in", "is_happy"],
    "additionalProperties": False,
}
OPENINGS = (
    "Once upon a time",
    "One day, a little dog",
    "Lily and Ben were",
    "Tom had a red ball",
    "There was a big tree",
    "The old man sat",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is asked: what the report is about, or a quick look."""

    shape: checkpoints.Shape
    long_prompt: int = 2794
    short_prompt: int = 76
    new_tokens: int = NEW_TOKENS
    uncached_tokens: int = 2
    loop_tokens: int = 146
    batch: int = 8
    pairs: int = 12
    slow_pairs: int = 3
    """Of the engine that is several times slower."""
    stories: int = 6
    slow_stories: int = 2
    story_tokens: int = 160
    json_tokens: int = 200
    """At the most: the schema ends the text before."""


FULL = Scale(shape=checkpoints.SHAPES["llama-1.1b"])
QUICK = Scale(
    shape=dataclasses.replace(
        FULL.shape,
        name="wiki-tiny",
        hidden_size=256,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=768,
        vocab_size=2048,
    ),
    long_prompt=60,
    short_prompt=9,
    new_tokens=6,
    loop_tokens=8,
    batch=2,
    pairs=1,
    slow_pairs=1,
    stories=1,
    slow_stories=1,
    story_tokens=12,
    json_tokens=30,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    job: Job
    against: str | None = None
    """The row that its gain refers to."""
    peer: str | None = None
    """The row of transformers that does the same."""

    @property
    def has_cache(self) -> bool:
        """Whether tokens after the first are computed alone."""
        return self.job.use_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """What rows are made of."""

    scale: Scale
    model: Path
    grown: Path
    repeating: list[Piece]
    new: list[Piece]
    stories: list[list[int]]
    threads: int

    def random_prompt(self, length: int, seed: int = 0) -> list[int]:
        """Return random token ids."""
        numbers = random.Random(seed)
        return [numbers.randrange(3, self.scale.shape.vocab_size) for _ in range(length)]


def materials_of(scale: Scale, folder: Path, tokenizer: Path, threads: int) -> Materials:
    """Make the checkpoints that are not there and read the texts."""
    bundled = open_tokenizer(hanok.BUNDLED)
    found = Materials(
        scale=scale,
        model=checkpoints.make_checkpoint(scale.shape, folder),
        grown=make_grown(scale.shape, folder),
        repeating=pieces("repeating", tokenizer)[: scale.pairs],
        new=pieces("new", tokenizer)[: scale.pairs],
        stories=[bundled.encode(text) for text in OPENINGS[: scale.stories]],
        threads=threads,
    )
    highest = max(max(piece.prompt + piece.answer) for piece in found.repeating + found.new)
    if highest >= scale.shape.vocab_size:
        raise SystemExit(
            f"{tokenizer} has token {highest}, the shape's vocabulary {scale.shape.vocab_size} tokens"
        )
    return found


def job_of(
    found: Materials, prompts: list[list[int]], new_tokens: int | list[int], **more: Any
) -> Job:
    """Return a job of the random model with hanok, unless said otherwise."""
    lengths = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    base: dict[str, Any] = {"engine": HANOK, "model": str(found.model), "threads": found.threads}
    return Job(**{**base, "prompts": prompts, "new_tokens": lengths, **more})


def attention_rows(found: Materials) -> list[Row]:
    """Eager and fused attention, with a cache and without, on both prompts."""
    scale, rows = found.scale, []
    for engine, kernels in (
        (HANOK, ("eager", "sdpa", "native")),
        (TRANSFORMERS, ("eager", "sdpa")),
    ):
        for length in (scale.long_prompt, scale.short_prompt):
            for use_cache in (False, True):
                for kernel in kernels:
                    count = scale.new_tokens if use_cache else scale.uncached_tokens
                    cached = "cache" if use_cache else "no cache"
                    where = f"{cached}, {length} tokens"
                    job = job_of(
                        found,
                        [found.random_prompt(length)],
                        count,
                        engine=engine,
                        attention=kernel,
                        use_cache=use_cache,
                    )
                    fused = "eager" if kernel == "eager" else "sdpa"
                    rows.append(
                        Row(
                            name=f"{engine}, {kernel}, {where}",
                            job=job,
                            against=f"{engine}, eager, {where}",
                            peer=f"{TRANSFORMERS}, {fused}, {where}" if engine == HANOK else None,
                        )
                    )
    return rows


def loop_rows(found: Materials) -> list[Row]:
    """generate() and loops by hand."""
    prompt, count = [found.random_prompt(found.scale.short_prompt)], found.scale.loop_tokens
    theirs = partial(job_of, found, prompt, count, engine=TRANSFORMERS, attention="sdpa")
    first = "transformers, generate()"
    return [
        Row(name=first, job=theirs(), against=first),
        Row(name="transformers, a loop by hand", job=theirs(by_hand=True), against=first),
        Row(name="hanok", job=job_of(found, prompt, count), against=first, peer=first),
    ]


def quant_rows(found: Materials) -> list[Row]:
    """Fewer bits, for one sequence and for several."""
    scale, rows = found.scale, []
    for size in (1, scale.batch):
        prompts = [found.random_prompt(scale.short_prompt, seed) for seed in range(size)]
        where = f"{size} sequences" if size > 1 else "1 sequence"
        first, peer = f"hanok bf16, {where}", f"transformers bf16, {where}"
        for bits in ("bf16", "int8", "int4"):
            job = job_of(found, prompts, scale.new_tokens, precision=bits, together=True)
            rows.append(Row(name=f"hanok {bits}, {where}", job=job, against=first, peer=peer))
        job = job_of(
            found,
            prompts,
            scale.new_tokens,
            engine=TRANSFORMERS,
            attention="sdpa",
            together=True,
            by_hand=True,
        )
        rows.append(Row(name=peer, job=job, against=first))
    return rows


def ngram_rows(found: Materials) -> list[Row]:
    """Guesses from the text, on both kinds of texts."""
    rows = []
    for kind, texts in (("repeating", found.repeating), ("new", found.new)):
        for engine in (HANOK, TRANSFORMERS):
            some = texts if engine == HANOK else texts[: found.scale.slow_pairs]
            how = {"precision": "int8"} if engine == HANOK else {"attention": "sdpa"}
            label = f"{engine} {'int8' if engine == HANOK else 'bf16'}"
            for speculation in (None, "ngram"):
                job = job_of(
                    found,
                    [piece.prompt for piece in some],
                    [len(piece.answer) for piece in some],
                    recited=[piece.answer for piece in some],
                    engine=engine,
                    speculation=speculation,
                    **how,
                )
                what = f"{kind} text, {speculation or 'off'}"
                rows.append(
                    Row(
                        name=f"{label}, {what}",
                        job=job,
                        against=f"{label}, {kind} text, off",
                        peer=f"transformers bf16, {what}" if engine == HANOK else None,
                    )
                )
    return rows


def draft_rows(found: Materials) -> list[Row]:
    """Guesses of the bundled model for the one that was grown from it."""
    scale, rows = found.scale, []
    label = "hanok int8, stories"
    drafts: tuple[tuple[str, dict[str, Any]], ...] = (
        ("off", {}),
        *(
            (
                f"draft in {bits}",
                {"speculation": "draft", "draft": str(hanok.BUNDLED), "draft_precision": bits},
            )
            for bits in ("int8", "int4")
        ),
    )
    for name, how in drafts:
        job = job_of(
            found,
            found.stories,
            scale.story_tokens,
            model=str(found.grown),
            precision="int8",
            **how,
        )
        theirs = "draft in bf16" if how else "off"
        rows.append(
            Row(
                name=f"{label}, {name}",
                job=job,
                against=f"{label}, off",
                peer=f"transformers bf16, stories, {theirs}",
            )
        )
    label = "transformers bf16, stories"
    for name, how in (("off", {}), ("draft in bf16", {"draft": str(hanok.BUNDLED)})):
        job = job_of(
            found,
            found.stories[: scale.slow_stories],
            scale.story_tokens,
            model=str(found.grown),
            engine=TRANSFORMERS,
            attention="sdpa",
            **how,
        )
        rows.append(Row(name=f"{label}, {name}", job=job, against=f"{label}, off"))
    return rows


def schema_rows(found: Materials) -> list[Row]:
    """Both kinds of guesses on JSON: what the schema leaves no choice about can be guessed."""
    label = "hanok int8, JSON"
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        ("off", {}),
        ("ngram", {"speculation": "ngram"}),
        (
            "draft in int8",
            {"speculation": "draft", "draft": str(hanok.BUNDLED), "draft_precision": "int8"},
        ),
    )
    return [
        Row(
            name=f"{label}, {name}",
            job=job_of(
                found,
                found.stories,
                found.scale.json_tokens,
                model=str(found.grown),
                precision="int8",
                schema=json.dumps(SCHEMA),
                **how,
            ),
            against=f"{label}, off",
        )
        for name, how in kinds
    ]


PARTS: dict[str, Callable[[Materials], list[Row]]] = {
    "attention": attention_rows,
    "loop": loop_rows,
    "quant": quant_rows,
    "ngram": ngram_rows,
    "draft": draft_rows,
    "schema": schema_rows,
}
Results = Mapping[str, Sequence[measure.Row]]


def run_row(job: Job) -> measure.Row:
    """Run a job in a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(dataclasses.asdict(job), file)
        file.flush()
        command = [sys.executable, str(HERE / "wiki_worker.py"), file.name]
        return measure.run_cold(command, threads=job.threads)


# What a row's numbers say


def num_tokens(result: measure.Row) -> int:
    """Return how many tokens were generated in all."""
    return sum(map(len, result["token_ids"]))


def seconds(result: measure.Row) -> float:
    """Return how long all prompts took, one after another or together."""
    return float(sum(result["whole_s"]))


def first_seconds(result: measure.Row) -> float:
    """Return how long it took to the first token, on average over the calls."""
    return float(sum(result["first_s"])) / len(result["first_s"])


def next_seconds(result: measure.Row) -> float:
    """Return the seconds of a token after the first ones; together, each counts."""
    after = num_tokens(result) - len(result["token_ids"])
    return (seconds(result) - float(sum(result["first_s"]))) / max(1, after)


def seconds_of(count: int, result: measure.Row) -> float:
    """Return what `count` tokens of one prompt take, from those that were measured."""
    return first_seconds(result) + (count - 1) * next_seconds(result)


def seconds_of_calls(count: int, result: measure.Row) -> float:
    """Return how long the first `count` calls took."""
    return float(sum(result["whole_s"][:count]))


def spread_of(found: Sequence[measure.Row], figure: Callable[[measure.Row], float]) -> Spread:
    return Spread.of(map(figure, found))


def ratio_of(
    better: Sequence[measure.Row],
    worse: Sequence[measure.Row],
    figure: Callable[[measure.Row], float],
) -> Spread:
    """Return how many times as long `worse` takes."""
    return Spread.of_ratio([figure(row) for row in worse], [figure(row) for row in better])


def acceptance(result: measure.Row) -> float | None:
    """Return the share of guesses that were right; None where none were made."""
    return result["accepted"] / result["proposed"] if result["proposed"] else None


def same_text(found: Sequence[measure.Row], against: Sequence[measure.Row]) -> str:
    """Say whether two rows chose the same tokens, those that both have."""
    pairs = list(zip(found[0]["token_ids"], against[0]["token_ids"], strict=False))
    pairs.append((found[0]["free_ids"], against[0]["free_ids"]))
    places = [
        place
        for ours, theirs in pairs
        for place, (a, b) in enumerate(zip(ours, theirs, strict=False))
        if a != b
    ]
    return f"differs at token {min(places)}" if places else "identical"


def part_table(rows: Sequence[Row], results: Results, scale: Scale) -> str:
    """Return a part's table."""
    lines: list[tuple[object, ...]] = []
    for row in rows:
        if not results.get(row.name):
            continue
        found = results[row.name]
        base = results.get(row.against or "")
        count = scale.new_tokens

        def whole(result: measure.Row, row: Row = row, count: int = count) -> float:
            return seconds(result) if row.has_cache else seconds_of(count, result)

        against_peer: object = "–"
        if peer := results.get(row.peer or ""):
            # An engine that is slower was given fewer of the texts: those that both have count.
            calls = partial(seconds_of_calls, len(peer[0]["whole_s"]))
            against_peer = ratio_of(found, peer, calls if row.has_cache else whole)
        shares = [share for item in found if (share := acceptance(item)) is not None]
        lines.append(
            (
                row.name,
                sum(map(len, row.job.prompts)),
                num_tokens(found[0]) if row.has_cache else f"{count} (computed)",
                spread_of(found, whole),
                spread_of(found, first_seconds),
                spread_of(found, next_seconds),
                ratio_of(found, base, whole) if base else "–",
                against_peer,
                Spread.of(shares) if shares else "–",
                same_text(found, base) if base else "–",
                spread_of(found, lambda result: result["peak_gib"]),
            )
        )
    header = ("row", "prompt", "new", "s", "s to first", "s/token after it")
    gains = ("gain", "over transformers")
    return measure.table((*header, *gains, "accepted", "text", "peak GiB"), lines)


# What is asked


def demands(results: Results, scale: Scale) -> list[tuple[object, ...]]:
    """Return what was asked, what was measured, and whether that is enough."""
    where = f"cache, {scale.long_prompt} tokens"
    total = partial(seconds_of, NEW_TOKENS)
    lines: list[tuple[object, ...]] = []

    def line(
        what: str,
        limit: str,
        names: tuple[str, str],
        figure: Callable[[measure.Row], float],
        is_met: Callable[[float], bool],
        *,
        needs_text: bool = False,
        least_accepted: float | None = None,
    ) -> None:
        better, worse = (results.get(name) for name in names)
        if not better or not worse:
            lines.append((what, limit, "not measured", "–"))
            return
        found = Spread.of_ratio([figure(row) for row in worse], [figure(row) for row in better])
        said, good = str(found), is_met(found.median)
        if least_accepted is not None:
            share = Spread.of(acceptance(row) or 0.0 for row in better)
            said, good = f"{said}, accepted {share}", good and share.median >= least_accepted
        if needs_text:
            text = same_text(better, worse)
            said, good = f"{said}, {text}", good and text == "identical"
        lines.append((what, limit, said, "yes" if good else "no"))

    # Named so that the ratio is what is asked: the second over the first.
    line(
        f"sdpa / eager, prefill of {scale.long_prompt} tokens",
        "≤ 0.6",
        (f"hanok, eager, {where}", f"hanok, sdpa, {where}"),
        first_seconds,
        lambda value: value <= 0.6,
    )
    line(
        f"no cache / cache, {scale.long_prompt} tokens and {NEW_TOKENS} new ones",
        "≥ 15",
        (f"hanok, sdpa, {where}", f"hanok, sdpa, no {where}"),
        total,
        lambda value: value >= 15,
    )
    for kind, limit in (("repeating", 1.6), ("new", 0.97)):
        line(
            f"off / n-gram, {kind} text, int8",
            f"≥ {limit:g}, identical",
            (f"hanok int8, {kind} text, ngram", f"hanok int8, {kind} text, off"),
            seconds,
            lambda value, limit=limit: value >= limit,
            needs_text=True,
        )
    for bits in ("int8", "int4"):
        line(
            f"off / draft in {bits}, int8",
            "≥ 1.3, identical, accepted ≥ 0.6",
            (f"hanok int8, stories, draft in {bits}", "hanok int8, stories, off"),
            seconds,
            lambda value: value >= 1.3,
            needs_text=True,
            least_accepted=0.6,
        )
    return lines


def method(scale: Scale, runs: int, tokenizer: Path, found: Materials) -> str:
    """Say how to read the tables."""
    shape = scale.shape
    name = "the bundled model's" if tokenizer == hanok.BUNDLED else f"{tokenizer.name}'s"
    vocabulary = open_tokenizer(tokenizer).vocab_size
    lengths = [len(piece.answer) for piece in found.repeating]
    prompts = [len(piece.prompt) for piece in found.repeating]
    return (
        f"Median (smallest–largest) of up to {runs} interleaved cold processes, each warm; a figure "
        "without a spread is of one. Loading is not in it. "
        f"Shape {shape.name}: {shape.num_layers} layers of {shape.hidden_size}, {shape.num_heads} "
        f"heads, {shape.num_kv_heads} KV heads, random weights. Gain: seconds of the "
        "first row of its kind over its own. Over transformers: the same of the row of "
        "transformers that does the same in bfloat16. "
        f"Without a cache {scale.uncached_tokens} tokens were computed, and {scale.new_tokens} are "
        "what the time of those gives, longer texts not counted. Recited texts are our own "
        f"(benchmarks/corpus) in {name} {vocabulary:,} tokens: {len(prompts)} prompts of "
        f"{min(prompts)} to {max(prompts)} tokens whose answers of {min(lengths)} to {max(lengths)} "
        f"repeat them, and {len(found.new)} whose answers do not (a small vocabulary cuts words into "
        "more tokens, which are easier to guess). Text: recited tokens, and tokens that the model "
        "chose itself with the same settings; with random weights the best two tokens are nearly "
        "equal, so another order of sums soon chooses another. Stories: a model of the shape that "
        "says what the bundled model says, with its vocabulary of "
        f"{open_tokenizer(hanok.BUNDLED).vocab_size:,} tokens, and the bundled model as its draft, "
        "so guesses are as good as its quantization. JSON: the same model behind the same openings, by "
        "a schema with four properties; transformers has none. transformers was given "
        f"{scale.slow_pairs} of the texts and {scale.slow_stories} of the stories, and its gains are "
        "within those; where it guesses, its first tokens are those of the first round. Its "
        "quantization needs other packages and was not run. How often `hanok bench "
        "compare` reports a false change is measured by benchmarks/bench_repeats.py."
    )


def logged(output: Path | None) -> dict[str, list[measure.Row]]:
    """Return the rows of the log beside a report."""
    file = output.with_suffix(".jsonl") if output is not None else None
    if file is None or not file.is_file():
        return {}
    rows: dict[str, list[measure.Row]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name, _ = row.pop("name"), row.pop("round")
        rows.setdefault(name, []).append(row)
    return rows


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the rows of a user's own table.")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--engines", nargs="+", choices=[HANOK, TRANSFORMERS], default=[HANOK, TRANSFORMERS]
    )
    parser.add_argument("--folder", type=Path, default=checkpoints.DEFAULT_FOLDER)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=hanok.BUNDLED,
        help="folder (default: the bundled model's)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny shape and few tokens; no figure counts"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows that the log beside the report has, of all parts, and measure what lacks "
        "to --runs",
    )
    measure.add_common_options(parser, runs=3)
    if "--quick" in sys.argv[1:]:
        parser.set_defaults(runs=1, patience=0.0, foreign=float(measure.num_cores()))
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    scale = QUICK if options.quick else FULL
    kept = logged(options.output) if options.resume else {}
    log = measure.log_of(options)
    for name, known in kept.items():
        for number, row in enumerate(known):
            log({"name": name, "round": number, **row})
    found = materials_of(scale, options.folder, options.tokenizer, options.threads)
    parts = [
        measure.heading("A user's own table", options.threads),
        "",
    ]
    results: dict[str, list[measure.Row]] = {}
    for part, rows_of in PARTS.items():
        rows = [row for row in rows_of(found) if row.job.engine in options.engines]
        results |= {row.name: list(kept.get(row.name, [])) for row in rows}
        for number in range(options.runs if part in options.parts else 0):
            first = number % len(rows)  # a round begins one further on
            lacking = [
                row for row in rows[first:] + rows[:first] if len(results[row.name]) <= number
            ]
            if not lacking:
                continue
            new = measure.interleave(
                {row.name: partial(run_row, row.job) for row in lacking},
                runs=1,
                guard=measure.guard_of(options),
                log=lambda row, number=number: log(row | {"round": number}),
            )
            for name, found_rows in new.items():
                results[name] += found_rows
        if any(results[row.name] for row in rows):
            parts += [f"## {part}", part_table(rows, results, scale)]
    rounds = max(map(len, results.values()), default=0)
    parts[1] = method(scale, rounds, options.tokenizer, found)
    asked = measure.table(("", "asked", "measured", "met"), demands(results, scale))
    disturbed = measure.count_disturbed(results)
    parts += ["## What was asked", asked]
    parts.append(
        f"{disturbed} of {sum(map(len, results.values()))} runs were disturbed by other programs."
    )
    measure.publish("\n\n".join(parts), options.output)


if __name__ == "__main__":
    main()
