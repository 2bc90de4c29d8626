"""transformers' Trainer in one cold process of benchmarks/train.py: all weights learn, in float32.

As its documentation runs it: documents in batches, padded to the longest of each.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import train_worker


def counting(collate: Callable[..., Any], found: list[tuple[int, int]]) -> Callable[..., Any]:
    """Return a collator that also notes the tokens and the targets of each batch, without padding."""

    def counted(rows: Sequence[Any], *rest: Any, **named: Any) -> Any:
        batch = collate(rows, *rest, **named)
        targets = int((batch["labels"][:, 1:] != train_worker.NO_LOSS).sum())
        found.append((int(batch["attention_mask"].sum()), targets))
        return batch

    return counted


def told(log: train_worker.Log, batches: Sequence[tuple[int, int]]) -> Any:
    """Return a callback of a trainer that tells the log of each step."""
    from transformers import TrainerCallback

    class Told(TrainerCallback):  # type: ignore[misc]  # untyped
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            log.loaded()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            log.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            tokens, targets = batches[len(log.steps)]
            log.end(tokens=tokens, targets=targets, loss=0.0)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any
        ) -> None:
            if "loss" in logs:
                log.steps[-1]["loss"] = float(logs["loss"])

    return Told()


def train(asked: train_worker.Asked, log: train_worker.Log) -> Mapping[str, Any]:
    import torch
    import transformers

    assert asked.rows is not None
    torch.set_num_threads(asked.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        asked.model, dtype=getattr(torch, asked.dtype)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [
        tokenizer(row["text"] + tokenizer.eos_token, truncation=True, max_length=asked.pack_tokens)
        for row in train_worker.read_rows(asked.rows)
    ]
    batches: list[tuple[int, int]] = []
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with tempfile.TemporaryDirectory() as output:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=output,
                per_device_train_batch_size=asked.batch_size,
                max_steps=asked.max_steps or -1,
                num_train_epochs=1,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=rows,
            data_collator=counting(collate, batches),
            callbacks=[told(log, batches)],
        )
        trainer.train()
    return {"version": f"transformers {transformers.__version__}"}


if __name__ == "__main__":
    train_worker.run(train)
