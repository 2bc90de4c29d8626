"""Quantizes a model while it is loaded, and measures what that costs.

python examples/quantize.py [CHECKPOINT]
"""

import sys

import hanok

path = sys.argv[1] if len(sys.argv) > 1 else hanok.BUNDLED

plan = hanok.plan_load(path, quant="int4")  # reads headers only
print("int4 fits:", plan.fits)

model = hanok.load(path, quant="int4")
print(model.generate("Once upon a time", max_new_tokens=16).text)

text = (hanok.BUNDLED / "quality.txt").read_text()
report = hanok.measure_quality(path, ["int8", "int4"], text, max_tokens=512)
for row in report.rows:
    print(f"{row.name}: {row.weight_bytes / 1e6:.1f} MB, perplexity {row.perplexity:.2f}")
