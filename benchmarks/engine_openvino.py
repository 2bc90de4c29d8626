"""OpenVINO GenAI in one cold process of benchmarks/cpu_engines.py, in an environment of its own.

Its pipeline returns when all tokens are there, so the others' time is the difference of two runs.
"""

import argparse
import time

import engine_worker


def load(asked: argparse.Namespace) -> tuple[engine_worker.Generate, engine_worker.Details]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(str(asked.model), "CPU", INFERENCE_NUM_THREADS=asked.threads)

    def seconds(prompts: list[list[int]], num_tokens: int) -> float:
        ids = np.array(prompts, dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        start = time.perf_counter()
        pipeline.generate(inputs, max_new_tokens=num_tokens, ignore_eos=True, do_sample=False)
        return time.perf_counter() - start

    def generate(prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
        # Other tokens of the same length: a prompt that was seen would not be computed again.
        others = [[token % 1000 + 3 for token in reversed(prompt)] for prompt in prompts]
        first = seconds(others, 1)
        return first, (seconds(prompts, num_tokens) - first if num_tokens > 1 else 0.0)

    return generate, lambda: {"version": genai.__version__}


if __name__ == "__main__":
    engine_worker.run(load)
