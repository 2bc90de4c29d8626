"""transformers in one cold process of benchmarks/generate.py, in its fairest ordinary use.

The model comes from `from_pretrained` with its default cache and torch's fused attention, under
`torch.inference_mode`. The loop is written out and not `model.generate`: it makes the same forward
passes without that function's preparations, processors and stopping criteria, which favours
transformers, and only the last position's logits are computed, which `generate` does as well.
"""

import argparse
from collections.abc import Iterator

import worker


def load(asked: argparse.Namespace) -> worker.Stream:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        asked.folder, dtype=getattr(torch, asked.dtype), attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def stream(token_ids: list[int], num_tokens: int) -> Iterator[int]:
        inputs, cache = torch.tensor([token_ids]), None
        for _ in range(num_tokens):
            output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            inputs = output.logits[:, -1].argmax(-1, keepdim=True)
            yield int(inputs)

    return stream


if __name__ == "__main__":
    worker.run(load)
