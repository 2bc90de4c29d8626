"""hanok in one cold process of benchmarks/train.py, as its user would write it."""

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import train_worker


class RandomDocuments:
    """One document a pack, and a pack a step."""

    def __init__(self, asked: train_worker.Asked) -> None:
        self._documents = asked.documents()

    def packs(self, epoch: int) -> Sequence[Sequence[int]]:
        """See `hanok.training.loop.Documents`."""
        return [[number] for number in range(len(self._documents))]

    def document(self, number: int) -> tuple[Sequence[int], Sequence[bool]]:
        """See `hanok.training.loop.Documents`."""
        return self._documents[number]


def train(asked: train_worker.Asked, log: train_worker.Log) -> Mapping[str, Any]:
    import hanok
    from hanok.bench.machine import machine_facts
    from hanok.training.run import planned_bytes

    lora = hanok.LoraConfig(r=asked.rank, lora_alpha=2 * asked.rank, target_modules="all-linear")
    options = hanok.TrainOptions(
        lora=None if asked.is_full else lora,
        max_steps=asked.max_steps,
        pack_tokens=asked.pack_tokens,
        packs_per_step=1,
        learning_rate=1e-4,
        schedule="constant",
        warmup_ratio=0.0,
        save_steps=0,
        gradient_checkpointing=asked.gradient_checkpointing,
    )
    plan = hanok.plan_load(
        asked.model,
        training=options.learning,
        dtype=asked.dtype,
        quant=asked.quant,
        weights="copied",
        may_measure=False,
    )
    planned_gib = planned_bytes(plan) / 2**30
    model = hanok.load(plan=plan, threads=asked.threads)
    documents: Any = RandomDocuments(asked)
    if asked.rows is not None:
        assert model.tokenizer is not None
        documents = hanok.Dataset.open(
            [asked.rows],
            model.tokenizer,
            hanok.DataOptions(allow=("truncated", "no-end-token"), append_eos=True),
            pack_tokens=asked.pack_tokens,
        )

    def took(report: Any) -> None:
        log.end(
            tokens=report.num_tokens,
            targets=report.num_targets,
            loss=report.loss,
            seconds=report.seconds,
        )

    with tempfile.TemporaryDirectory() as output:
        trainer = hanok.Trainer(model, options, output)
        log.loaded()
        trainer.run(documents, on_step=took)
    return {"kernels": machine_facts()["hanok's kernels"], "planned_gib": planned_gib}


if __name__ == "__main__":
    train_worker.run(train)
