"""transformers + peft in one cold process of benchmarks/train.py, in a plain loop of torch.

The fairest ordinary use: fused attention, no cache, the model's own loss, dropout 0, fused AdamW; no
trainer around it takes any time.
"""

from collections.abc import Mapping
from typing import Any

import train_worker


def train(asked: train_worker.Asked, log: train_worker.Log) -> Mapping[str, Any]:
    import peft
    import torch
    import transformers

    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        asked.model, dtype=getattr(torch, asked.dtype), attn_implementation="sdpa"
    )
    config = peft.LoraConfig(
        r=asked.rank, lora_alpha=2 * asked.rank, lora_dropout=0.0, target_modules="all-linear"
    )
    model = peft.get_peft_model(base, config)
    model.train()
    learnt = [item for item in model.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-4, weight_decay=0.0, fused=True)
    documents = asked.documents()
    log.loaded()
    for token_ids, is_target in documents:
        log.begin()
        ids = torch.tensor([token_ids])
        labels = ids.masked_fill(~torch.tensor([is_target]), train_worker.NO_LOSS)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.end(tokens=len(token_ids), targets=sum(is_target), loss=float(loss.detach()))
    return {"version": f"peft {peft.__version__}, transformers {transformers.__version__}"}


if __name__ == "__main__":
    train_worker.run(train)
