"""transformers in one cold process of benchmarks/cpu_engines.py, in its fairest ordinary use.

See `worker_transformers.py`: fused attention, default cache, a loop of forward passes.
"""

import argparse
import time

import engine_worker


def load(asked: argparse.Namespace) -> tuple[engine_worker.Generate, engine_worker.Details]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(asked.threads)
    dtype = torch.float32 if asked.precision == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        asked.model, dtype=dtype, attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
        start = first = time.perf_counter()
        inputs, cache = torch.tensor(prompts), None
        for index in range(num_tokens):
            output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            inputs = output.logits[:, -1].argmax(-1, keepdim=True)
            inputs.tolist()
            if index == 0:
                first = time.perf_counter()
        return first - start, time.perf_counter() - first

    return generate, dict


if __name__ == "__main__":
    engine_worker.run(load)
