"""hanok in one cold process of benchmarks/generate.py, as its user would write it."""

import argparse
from collections.abc import Iterator

import worker


def load(asked: argparse.Namespace) -> worker.Stream:
    import hanok

    model = hanok.load(asked.folder, dtype=asked.dtype)

    def stream(token_ids: list[int], num_tokens: int) -> Iterator[int]:
        for event in model.stream(token_ids, max_new_tokens=num_tokens, ignore_eos=True):
            yield event.token_id

    return stream


if __name__ == "__main__":
    worker.run(load)
