"""Several prompts in one call, then requests that join an engine's running batch as they come.

python examples/batch.py [CHECKPOINT]
"""

import sys

import hanok

model = hanok.load(sys.argv[1] if len(sys.argv) > 1 else hanok.BUNDLED)
prompts = ["Once upon a time", "The cat", "One day, Lily and her mom"]

together = model.generate(prompts, max_new_tokens=12)
for prompt, answer in zip(prompts, together, strict=True):
    print(prompt + answer.text)

# The engine gives each request the tokens that it would get alone.
with hanok.Engine(model) as engine:
    tickets = [engine.submit(prompt, max_new_tokens=12) for prompt in prompts]
    for ticket, answer in zip(tickets, together, strict=True):
        tokens = [event.token_id for event in ticket.result()]
        print("the same tokens:", tokens == answer.token_ids)
