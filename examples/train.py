"""Trains a LoRA adapter on a few conversations, and answers with it.

python examples/train.py [CHECKPOINT]
"""

import json
import sys
import tempfile
from pathlib import Path

import hanok

path = sys.argv[1] if len(sys.argv) > 1 else hanok.BUNDLED
PAIRS = [
    ("What did Lily see?", "Lily saw a small green frog."),
    ("Where did Tom go?", "Tom went to the big lake."),
    ("Who was sad?", "The little bear was sad."),
    ("What did Ben eat?", "Ben ate a red apple."),
]

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in PAIRS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    report = hanok.train(
        path,
        folder / "rows.jsonl",
        folder / "run",
        options=hanok.TrainOptions(
            lora=hanok.LoraConfig(r=8, target_modules="all-linear"),
            learning_rate=3e-3,
            epochs=40,
            pack_tokens=256,
            packs_per_step=1,
        ),
        load_options=hanok.LoadOptions(dtype="float32"),
        report_options=hanok.ReportOptions(samples=("What did Lily see?",)),
    )
    print(f"{report.num_parameters:,} numbers learnt in {report.num_steps} steps")
    print(f"loss {report.losses[0]:.2f} at first, {report.losses[-1]:.3f} in the end")
    print((folder / "run" / "samples.jsonl").read_text())

    served = hanok.load(path)
    served.adapters.load("tales", report.output)
    question = [{"role": "user", "content": "What did Lily see?"}]
    for adapter in (None, "tales"):
        served.use_adapter(adapter)
        print(f"{adapter}:", served.generate(question, max_new_tokens=16, temperature=0.0).text)
