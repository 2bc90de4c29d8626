"""One loaded model in a separate process: `python -m hanok.bench.worker`, one JSON object per line.

A process for each load, so that a model that is killed takes none but its own rows with it, and so that
a peak of memory can be that of one row alone. Requests come on standard input, answers leave on
standard output; both ends know the methods of `Worker` and their arguments. `apart` is answered by a
copy of this process, made before it has loaded anything: it costs no start of Python and torch.
"""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch

from hanok.bench import speculation
from hanok.bench.machine import ForeignLoad, peak_bytes
from hanok.bench.quality import (
    bytes_per_token,
    compare_scores,
    count_scored,
    keep_scores,
    log_prob_file,
    weight_bytes,
)
from hanok.engine.generate import TokenStream
from hanok.engine.model import Model, load
from hanok.engine.params import SamplingOptions
from hanok.errors import HanokError
from hanok.memory.options import LoadOptions
from hanok.memory.planning import plan_draft, plan_load

Answer = dict[str, Any]


class Worker:
    """Answers requests about one model; each method is one kind of request."""

    def __init__(self) -> None:
        self._model: Model | None = None
        self._draft: Model | None = None

    @property
    def model(self) -> Model:
        """The model; `load` comes first."""
        if self._model is None:
            raise RuntimeError("nothing is loaded yet")
        return self._model

    def load(self, *, path: str, draft: str | None, options: dict[str, Any]) -> Answer:
        """Load the model, and a draft model if asked; `options` are the fields of `LoadOptions`."""
        start = time.perf_counter()
        asked = LoadOptions.of(options)
        draft_plan = None
        if draft is not None:
            draft_plan = plan_draft(draft, **asked.for_draft().planned)
        plan = plan_load(path, may_measure=False, draft=draft_plan, **asked.planned)
        if draft_plan is not None:
            self._draft = load(plan=draft_plan, threads=asked.threads)
        self._model = load(plan=plan, threads=asked.threads)
        seconds = time.perf_counter() - start
        decoder = self.model.decoder
        return {
            "load_s": seconds,
            "weight_bytes": weight_bytes(decoder),
            "token_bytes": bytes_per_token(decoder),
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "peak_bytes": peak_bytes(),
        }

    def use(self, *, attention: str, cache_dtype: str, graphs: bool) -> Answer:
        """Choose what can be chosen without loading again."""
        decoder = self.model.decoder
        decoder.use_attention(attention)
        kept = torch.int8 if cache_dtype == "int8" else None
        decoder.execution = replace(decoder.execution, records_passes=graphs, cache_dtype=kept)
        if self._draft is not None:
            decoder = self._draft.decoder
            decoder.execution = replace(decoder.execution, records_passes=graphs)
        return {}

    def answer(
        self, *, prompts: list[list[int]], new_tokens: int, use_cache: bool, method: str
    ) -> Answer:
        """Continue some prompts, and say how long it took."""
        foreign = ForeignLoad()
        start, first_s = time.perf_counter(), 0.0
        token_ids: list[list[int]] = [[] for _ in prompts]
        missing = len(prompts)
        events = self._events(prompts, new_tokens, use_cache, method)
        for event in events:
            mine = token_ids[event.sequence]
            mine.append(event.token_id)
            if len(mine) == 1:
                missing -= 1
                if not missing:
                    first_s = time.perf_counter() - start
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "first_token_s": first_s,
            "foreign": foreign.cores(),
            "token_ids": token_ids,
            **speculation.counts(method, events),
        }

    def peak(self) -> Answer:
        """Return the most memory that this process has held, and a GPU's for it."""
        device = self.model.device
        on_gpu = device.type == "cuda"
        return {
            "peak_bytes": peak_bytes(),
            "peak_device_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        }

    def _events(
        self, prompts: Sequence[list[int]], new_tokens: int, use_cache: bool, method: str
    ) -> TokenStream:
        options = SamplingOptions(max_new_tokens=new_tokens, ignore_eos=True, temperature=0.0)
        how = speculation.asked(method, self._draft)
        return self.model.stream(prompts, use_cache=use_cache, speculation=how, **options)

    def keep(self, *, windows: list[list[int]], file: str) -> Answer:
        """Score tokens as the reference, and keep the log-probabilities in a file."""
        losses = keep_scores(self.model.decoder, windows, self._kept(windows, file))
        return {
            "perplexity": _finite(math.exp(float(losses.double().mean()))),
            "kl_mean": 0.0,
            "kl_p99": 0.0,
            "same_top1": 1.0,
        }

    def compare(self, *, windows: list[list[int]], file: str) -> Answer:
        """Score tokens against the reference's log-probabilities in a file."""
        scores = compare_scores(self.model.decoder, windows, self._kept(windows, file))
        divergence = scores.divergence.double()
        return {
            "perplexity": _finite(math.exp(min(700.0, float(scores.losses.double().mean())))),
            "kl_mean": _finite(float(divergence.mean())),
            "kl_p99": _finite(float(divergence.quantile(0.99))),
            "same_top1": float(scores.is_same_top.double().mean()),
        }

    def _kept(self, windows: list[list[int]], file: str) -> torch.Tensor:
        return log_prob_file(Path(file), count_scored(windows), self.model.config.vocab_size)

    def gap(self, *, tokens: list[int], own: int, other: int) -> Answer:
        """Return by how much `own` scores above `other` after some tokens."""
        scores = self.model.logits(tokens)[-1]
        return {"gap": float(scores[own] - scores[other])}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def answered(worker: Worker, request: dict[str, Any]) -> Answer:
    """Return a worker's answer to a request; what hanok refuses is an answer too."""
    try:
        answer: Answer = getattr(worker, request.pop("do"))(**request)
    except HanokError as error:
        return {"error": str(error)}
    return answer


def apart(steps: list[dict[str, Any]], answers: TextIO) -> None:
    """Let a copy of this process answer some requests in turn; it writes the last answer, or a refusal.

    Forking is safe as long as no thread was started, and torch starts none before it computes.
    """
    answers.flush()
    child = os.fork()
    if child == 0:
        worker, answer = Worker(), Answer()
        for step in steps:
            answer = answered(worker, step)
            if "error" in answer:
                break
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        answers.write(json.dumps({"error": f"a process ended with status {status}"}) + "\n")


def main(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        if request["do"] == "apart":
            apart(request["steps"], answers)
        else:
            answers.write(json.dumps(answered(worker, request)) + "\n")
        answers.flush()


if __name__ == "__main__":
    # What any library prints goes to standard error; answers alone leave on the pipe.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main(sys.stdin, pipe)
    # At once: taking Python and torch down takes a third of a second, and the system frees all there is.
    os._exit(0)
