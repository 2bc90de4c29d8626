"""Loads a model, generates a continuation, then streams one with the probability of each token.

python examples/generate.py [CHECKPOINT]
"""

import math
import sys

import hanok

model = hanok.load(sys.argv[1] if len(sys.argv) > 1 else hanok.BUNDLED)
print(f"{model.num_parameters():,} parameters in {model.dtype}")

answer = model.generate("Once upon a time", max_new_tokens=24)
print(answer.text, f"({len(answer.token_ids)} tokens, ended by {answer.finish_reason})")

stream = model.stream("One day, Lily", max_new_tokens=8, temperature=0.7, top_p=0.9, seed=1)
for event in stream:
    print(f"{event.text!r}: {math.exp(event.logprob):.3f}")

print("perplexity:", round(model.score("Once upon a time, there was a cat.").perplexity, 2))
