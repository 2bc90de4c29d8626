"""One cold process of benchmarks/wiki_table.py: loads one model as one row has it and generates.

    python benchmarks/wiki_worker.py JOB.json [spawned]

Every prompt is generated once; before that a short one is, unmeasured, for what only a first call costs.
The clock of a prompt starts with the call and stops at the first token and at the last. "free_ids" are
tokens that the model chose itself, after the measurement, with the same settings: what must be the same
text with and without guesses, which a recited text is by its making.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine_worker import memory_gib

FREE_TOKENS = 48
WARM_TOKENS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one process does."""

    engine: str
    model: str
    prompts: list[list[int]]
    new_tokens: list[int]
    """Of each prompt."""
    recited: list[list[int]] | None = None
    """What each prompt is followed by, where the model does not choose."""
    schema: str | None = None
    """A JSON schema that answers follow; they end with it."""
    precision: str = "bf16"
    attention: str = "auto"
    use_cache: bool = True
    together: bool = False
    """All prompts at once; else one after another."""
    speculation: str | None = None
    draft: str | None = None
    draft_precision: str = "bf16"
    by_hand: bool = False
    """transformers: a loop of forward passes in place of generate()."""
    threads: int = 1


@dataclass(slots=True, kw_only=True)
class Result:
    """What came of it. Lists have an entry for each call: a prompt, or all together."""

    load_s: float
    first_s: list[float]
    whole_s: list[float]
    token_ids: list[list[int]]
    free_ids: list[int]
    proposed: int = 0
    accepted: int = 0
    passes: int = 0
    peak_gib: float = 0.0


def batches(job: Job) -> Iterator[list[int]]:
    """Yield which prompts are generated at once."""
    numbers = list(range(len(job.prompts)))
    yield from [numbers] if job.together else [[number] for number in numbers]


def run_hanok(job: Job) -> Result:
    """Generate with hanok."""
    import torch

    import hanok
    from hanok.engine.generate import generate

    torch.set_num_threads(job.threads)
    start = time.perf_counter()
    model = _load_hanok(job.model, job.precision, job.attention)
    draft = _load_hanok(job.draft, job.draft_precision, "auto") if job.draft else None
    result = Result(
        load_s=time.perf_counter() - start, first_s=[], whole_s=[], token_ids=[], free_ids=[]
    )
    speculation = (
        hanok.Speculation(method=job.speculation, draft=draft) if job.speculation else None
    )

    grammar = _grammar(model, job.schema) if job.schema is not None else None

    def call(numbers: Sequence[int], lengths: Sequence[int], *, recites: bool) -> tuple[Any, float]:
        """Return the sequences and when the last of their first tokens came."""
        from recital import Recital

        sequences = []
        for number, length in zip(numbers, lengths, strict=True):
            ends = grammar is not None
            options = {"max_new_tokens": length, "ignore_eos": not ends, "temperature": 0.0}
            sequence = model.sequence(job.prompts[number], options)
            sequence.text_stream = None  # text is nobody's concern here
            if grammar is not None:
                sequence.grammar = grammar.matcher()
            if recites and job.recited is not None:
                sequence.grammar = Recital(job.recited[number])
            sequences.append(sequence)
        more = {}
        if speculation is not None:
            from hanok.engine.speculate import Speculator

            longest = max(len(item.prompt_ids) + item.room for item in sequences)
            more["speculator"] = Speculator(
                speculation, model.decoder, num_sequences=len(sequences), max_tokens=longest
            )
        waiting, first = len(sequences), time.perf_counter()
        for _ in generate(model.decoder, sequences, use_cache=job.use_cache, **more):
            waiting -= 1
            if waiting == 0:
                first = time.perf_counter()
        return sequences, first

    for numbers in batches(job):
        if not result.token_ids:
            call(numbers, [WARM_TOKENS] * len(numbers) if job.use_cache else [1], recites=True)
        start = time.perf_counter()
        sequences, first = call(numbers, [job.new_tokens[n] for n in numbers], recites=True)
        result.whole_s.append(time.perf_counter() - start)
        result.first_s.append(first - start)
        result.token_ids += [sequence.generated_ids for sequence in sequences]
        if speculation is not None:
            for sequence in sequences:
                result.proposed += sequence.speculation.proposed
                result.accepted += sequence.speculation.accepted
                result.passes += sequence.speculation.passes
    if job.recited is not None:
        result.free_ids = call([0], [FREE_TOKENS], recites=False)[0][0].generated_ids
    else:
        result.free_ids = result.token_ids[0]
    return result


def _grammar(model: Any, schema: str) -> Any:
    from hanok.engine.grammar import GrammarCompiler
    from hanok.engine.grammar_spec import GrammarSpec

    compiler = GrammarCompiler(model.tokenizer, model.config.vocab_size, model.end_ids)
    return compiler.compile(GrammarSpec("json_schema", schema))


def _load_hanok(path: str | None, precision: str, attention: str) -> Any:
    import hanok

    assert path is not None
    quant = None if precision == "bf16" else precision
    # Weights in memory of the process, as they are soon after any start.
    weights = "copied" if quant is None else "auto"
    return hanok.load(
        path, dtype="bfloat16", quant=quant, weights=weights, attn_implementation=attention
    )


def run_transformers(job: Job) -> Result:
    """Generate with transformers: generate(), or a loop of forward passes."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    start = time.perf_counter()

    def load(path: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, attn_implementation=job.attention
        ).eval()

    model = load(job.model)
    assistant = load(job.draft) if job.draft else None
    result = Result(
        load_s=time.perf_counter() - start, first_s=[], whole_s=[], token_ids=[], free_ids=[]
    )
    more: dict[str, Any] = {}
    if job.speculation == "ngram":
        more["prompt_lookup_num_tokens"] = 10
    elif assistant is not None:
        more["assistant_model"] = assistant

    def call(
        numbers: Sequence[int], length: int, *, recites: bool
    ) -> tuple[list[list[int]], float]:
        inputs = torch.tensor([job.prompts[number] for number in numbers])
        if job.by_hand:
            return _by_hand(model, inputs, length)
        watch = _Watch()
        answer = job.recited[numbers[0]] if recites and job.recited is not None else None
        processors = [_forced(answer, inputs.shape[1])] if answer is not None else []
        with torch.inference_mode():
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=length,
                min_new_tokens=length,
                use_cache=job.use_cache,
                pad_token_id=0,
                stopping_criteria=[watch],
                logits_processor=processors,
                **more,
            )
        return output[:, inputs.shape[1] :].tolist(), watch.first

    for numbers in batches(job):
        length = job.new_tokens[numbers[0]]
        if not result.token_ids:
            call(numbers, WARM_TOKENS if job.use_cache else 1, recites=True)
        start = time.perf_counter()
        token_ids, first = call(numbers, length, recites=True)
        result.whole_s.append(time.perf_counter() - start)
        result.first_s.append(first - start)
        result.token_ids += token_ids
    result.free_ids = result.token_ids[0]
    return result


class _Watch:
    """A stopping criterion that never stops and knows when it was asked first."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        self.first = self.first or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def _forced(answer: list[int], prompt_length: int) -> Any:
    """Return a logits processor that lets the answer's token follow and no other."""
    import torch

    def forced(input_ids: Any, scores: Any) -> Any:
        place = input_ids.shape[1] - prompt_length
        if place >= len(answer):
            return scores
        only = torch.full_like(scores, float("-inf"))
        only[:, answer[place]] = scores[:, answer[place]]
        return only

    return forced


def _by_hand(model: Any, inputs: Any, length: int) -> tuple[list[list[int]], float]:
    import torch

    first, cache, found = 0.0, None, []
    with torch.inference_mode():
        for _ in range(length):
            output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            inputs = output.logits[:, -1].argmax(-1, keepdim=True)
            found.append(inputs[:, 0].tolist())
            first = first or time.perf_counter()
    return [list(row) for row in zip(*found, strict=True)], first


ENGINES = {"hanok": run_hanok, "transformers": run_transformers}


def run(job: Job) -> dict[str, Any]:
    """Return what the job's engine did."""
    result = ENGINES[job.engine](job)
    result.peak_gib = memory_gib("VmHWM")
    return asdict(result)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one row of wiki_table.py.")
    parser.add_argument("job", type=Path)
    parser.add_argument("spawned", nargs="?", help="ignored: when the process was started")
    options = parser.parse_args()
    print(json.dumps(run(Job(**json.loads(options.job.read_text())))))


if __name__ == "__main__":
    main()
