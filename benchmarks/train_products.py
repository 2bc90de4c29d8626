"""Only the products of a step of benchmarks/train.py: what this machine can do at best on its shapes.

Each weight of the shape is multiplied forward by the activations and backward by the gradients, all
tokens at once, into memory that is there already. Projections of the same input are one product. No
gradient goes below the first layer's adapters, and only targets reach the head.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import train_worker


def train(asked: train_worker.Asked, log: train_worker.Log) -> Mapping[str, Any]:
    import torch

    torch.set_num_threads(asked.threads)
    dtype = getattr(torch, asked.dtype)
    config = json.loads((Path(asked.model) / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    qkv = (heads + 2 * config["num_key_value_heads"]) * size
    layer = {
        "qkv": (qkv, hidden),
        "o": (hidden, heads * size),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    documents = asked.documents()
    num_tokens, num_targets = len(documents[0][0]), sum(documents[0][1])

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype).uniform_(-0.02, 0.02)

    layers = [
        {name: random(*shape) for name, shape in layer.items()}
        for _ in range(config["num_hidden_layers"])
    ]
    head = random(config["vocab_size"], hidden)
    shapes = {*layer.values()}
    inputs = {shape: random(num_tokens, shape[1]) for shape in shapes}
    gradients = {shape: random(num_tokens, shape[0]) for shape in shapes}
    last, logits = random(num_targets, hidden), random(num_targets, config["vocab_size"])
    outputs = {shape: torch.empty(num_tokens, shape[0], dtype=dtype) for shape in shapes}
    backward = {shape: torch.empty(num_tokens, shape[1], dtype=dtype) for shape in shapes}
    scratch, last_backward = torch.empty_like(logits), torch.empty_like(last)
    flops = 0
    log.loaded()
    with torch.inference_mode():
        for _ in documents:
            log.begin()
            flops = 0
            for number, weights in enumerate(layers):
                for name, weight in weights.items():
                    shape = layer[name]
                    torch.mm(inputs[shape], weight.t(), out=outputs[shape])
                    flops += 2 * num_tokens * weight.numel()
                    if number or name != "qkv":
                        torch.mm(gradients[shape], weight, out=backward[shape])
                        flops += 2 * num_tokens * weight.numel()
            torch.mm(last, head.t(), out=scratch)
            torch.mm(logits, head, out=last_backward)
            flops += 4 * num_targets * head.numel()
            log.end(tokens=num_tokens, targets=num_targets, loss=0.0)
    return {"gflop_per_step": flops / 1e9}


if __name__ == "__main__":
    train_worker.run(train)
