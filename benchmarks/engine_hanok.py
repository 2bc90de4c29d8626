"""hanok in one cold process of benchmarks/cpu_engines.py, as its user would write it."""

import argparse
import statistics
import time
from math import prod

import engine_worker

PASSES = 9


def load(asked: argparse.Namespace) -> tuple[engine_worker.Generate, engine_worker.Details]:
    import torch

    import hanok
    from hanok.attention.base import ForwardBatch
    from hanok.bench.quality import bytes_per_token
    from hanok.engine.generate import generate as stream
    from hanok.engine.params import SamplingParams
    from hanok.engine.sequence import GenerationSequence

    quant = None if asked.precision == "bf16" else asked.precision
    resident = engine_worker.memory_gib("VmRSS")
    start = time.perf_counter()
    # Weights in memory of the process, as they are soon after any start.
    weights = "copied" if quant is None else "auto"
    model = hanok.load(
        asked.model, dtype="bfloat16", quant=quant, weights=weights, threads=asked.threads
    )
    load_s = time.perf_counter() - start
    load_gib = engine_worker.memory_gib("VmHWM") - resident

    def generate(prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
        sequences = [
            GenerationSequence(
                prompt_ids=prompt,
                params=SamplingParams(max_new_tokens=num_tokens, ignore_eos=True),
                end_ids=(),
                max_tokens=len(prompt) + num_tokens,
                text_stream=None,
            )
            for prompt in prompts
        ]
        start = time.perf_counter()
        waiting, first = len(prompts), start
        for _ in stream(model.decoder, sequences):
            waiting -= 1
            if waiting == 0:
                first = time.perf_counter()
        return first - start, time.perf_counter() - first

    @torch.inference_mode()
    def pass_seconds(num_tokens: int) -> float:
        cache = model.decoder.new_cache(1, asked.context + num_tokens)
        model.decoder(ForwardBatch.of([[5] * asked.context]), cache)
        times = []
        for _ in range(PASSES):
            start = time.perf_counter()
            batch = ForwardBatch.of([[7] * num_tokens], past=[asked.context])
            model.decoder.logits(model.decoder(batch, cache))
            times.append(time.perf_counter() - start)
            cache.truncate(0, asked.context)
        return statistics.median(times)

    def details() -> engine_worker.Row:
        report, tensors = model.report, model.checkpoint.tensors.values()
        return {
            "load_s": load_s,
            "load_gib": load_gib,
            "weights_gib": (report.quantized_bytes + report.copied_bytes) / 2**30,
            "largest_tensor_gib": 2 * max(prod(ref.shape) for ref in tensors) / 2**30,
            "bytes_per_token": bytes_per_token(model.decoder),
            **({"four_tokens": pass_seconds(4) / pass_seconds(1)} if asked.sequences else {}),
        }

    return generate, details


if __name__ == "__main__":
    engine_worker.run(load)
