"""Texts as vectors of length 1, and the cosine similarity of each pair.

python examples/embeddings.py [CHECKPOINT]
"""

import sys

import hanok

model = hanok.load(sys.argv[1] if len(sys.argv) > 1 else hanok.BUNDLED)
texts = ["The cat sat on the mat.", "A cat was on a mat.", "Tom went to the park with his dad."]

vectors = model.embed(texts, pooling="mean")  # (texts, hidden) float32
similarities = vectors @ vectors.T
for text, row in zip(texts, similarities.tolist(), strict=True):
    print(" ".join(f"{value:5.2f}" for value in row), text)
