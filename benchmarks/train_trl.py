"""peft + trl's SFTTrainer in one cold process of benchmarks/train.py, in an environment of its own.

`dtype` "documented": its defaults, that is automatic mixed precision in bfloat16, and activations
computed again. "float32": neither, which is faster on processors without bfloat16 instructions. All else
is as trl's documentation has it: conversations with a prompt and a completion, each batch padded to its
longest.
"""

import tempfile
from collections.abc import Mapping
from typing import Any

import train_worker
from train_trainer import counting, told

DOCUMENTED = "documented"


def train(asked: train_worker.Asked, log: train_worker.Log) -> Mapping[str, Any]:
    import datasets
    import peft
    import torch
    import trl

    assert asked.rows is not None
    torch.set_num_threads(asked.threads)
    rows = train_worker.read_rows(asked.rows)
    datasets.disable_progress_bars()
    chosen = {} if asked.dtype == DOCUMENTED else {"bf16": False, "gradient_checkpointing": False}
    batches: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as output:
        trainer = trl.SFTTrainer(
            model=asked.model,
            args=trl.SFTConfig(
                output_dir=output,
                per_device_train_batch_size=asked.batch_size,
                max_steps=asked.max_steps or -1,
                num_train_epochs=1,
                max_length=asked.pack_tokens,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **chosen,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            peft_config=peft.LoraConfig(
                r=asked.rank, lora_alpha=2 * asked.rank, target_modules="all-linear"
            ),
        )
        trainer.data_collator = counting(trainer.data_collator, batches)
        trainer.add_callback(told(log, batches))
        trainer.train()
    return {"version": f"trl {trl.__version__}, peft {peft.__version__}"}


if __name__ == "__main__":
    train_worker.run(train)
