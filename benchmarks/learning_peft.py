"""transformers + peft in one process of benchmarks/learning.py: the same lesson, a plain loop of torch.

    python learning_peft.py LESSON.json START [TIME]     prints one JSON object

Another implementation on purpose: each document is a row of a padded batch, logits of all tokens are
computed, and the schedule and the division into decayed and other parameters are written out here. The
adapter begins as the files in START have it.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

NO_LOSS = -100
ROWS = 8


def padded(documents: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of rows: token ids and what is attended to, both (rows, longest)."""
    for start in range(0, len(documents), ROWS):
        part = documents[start : start + ROWS]
        longest = max(map(len, part))
        ids = torch.tensor([[*item, *[0] * (longest - len(item))] for item in part])
        mask = torch.tensor([[1] * len(item) + [0] * (longest - len(item)) for item in part])
        yield ids, mask


def loss_sum(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of -log p of all tokens but the first of each row."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, NO_LOSS)
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LOSS, reduction="sum"
    )


def targets_of(documents: Sequence[Sequence[int]]) -> int:
    """Return how many tokens have one before them."""
    return sum(len(item) - 1 for item in documents)


def held_out_loss(model: Any, documents: Sequence[Sequence[int]]) -> float:
    """Return the mean of -log p."""
    model.eval()
    with torch.no_grad():
        total = sum(float(loss_sum(model, ids, mask)) for ids, mask in padded(documents))
    model.train()
    return total / targets_of(documents)


def rate_of(asked: dict[str, Any], step: int, num_steps: int) -> float:
    """Return the learning rate of a step from 0 on: a line up, then half a cosine down to zero."""
    warmup = math.ceil(asked["warmup_ratio"] * num_steps)
    if step < warmup:
        return float(asked["learning_rate"] * (step + 1) / warmup)
    done = (step - warmup) / (num_steps - warmup)
    return float(asked["learning_rate"] * 0.5 * (1 + math.cos(math.pi * done)))


def main() -> None:
    lesson = json.loads(Path(sys.argv[1]).read_text())
    asked = lesson["options"]
    torch.set_num_threads(lesson["threads"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        lesson["model"], dtype=torch.float32
    )
    if not lesson["is_full"]:
        model = peft.PeftModel.from_pretrained(model, sys.argv[2], is_trainable=True)
    model.train()
    learnt = [item for item in model.parameters() if item.requires_grad]
    groups = [
        {
            "params": [item for item in learnt if item.dim() >= 2],
            "weight_decay": asked["weight_decay"],
        },
        {"params": [item for item in learnt if item.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(asked["adam_beta1"], asked["adam_beta2"]),
    )
    size = asked["packs_per_step"]
    steps = [
        [lesson["documents"][number] for pack in packs[start : start + size] for number in pack]
        for packs in lesson["epochs"]
        for start in range(0, len(packs), size)
    ]
    losses, rates = [], []
    points = [(0, held_out_loss(model, lesson["held_out"]))]
    for number, documents in enumerate(steps):
        count, total = targets_of(documents), 0.0
        for ids, mask in padded(documents):
            loss = loss_sum(model, ids, mask)
            (loss / count).backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(learnt, asked["max_grad_norm"])
        for group in optimizer.param_groups:
            group["lr"] = rate_of(asked, number, len(steps))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count)
        if (number + 1) % asked["eval_steps"] == 0 or number + 1 == len(steps):
            points.append((number + 1, held_out_loss(model, lesson["held_out"])))
    versions = f"peft {peft.__version__}, transformers {transformers.__version__}"
    print(json.dumps({"losses": losses, "rates": rates, "held_out": points, "version": versions}))


if __name__ == "__main__":
    main()
