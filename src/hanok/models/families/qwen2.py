"""Qwen2 and Qwen2.5: biases on query, key and value; a window on the upper layers when asked for."""

from dataclasses import replace

from hanok.errors import CheckpointError
from hanok.models.config import ModelConfig
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config, windows_above


def read_config(keys: Keys) -> ModelConfig:
    """Read a Qwen2 config.json."""
    config = llama_config(keys)
    keys.ignore("use_mrope")
    config = replace(config, layers=windows_above(keys, config.layers))
    return replace(
        config.with_attention(has_qkv_bias=True),
        max_positions=min(config.max_positions, _plain_positions(keys, config.max_positions)),
    )


def _plain_positions(keys: Keys, max_positions: int) -> int:
    """Return how many positions attention computes plainly, which is all that hanok does.

    Qwen2.5-1M parts longer sequences into chunks (arXiv 2402.17463); the first is plain attention.
    """
    name = "dual_chunk_attention_config"
    if not keys.object(name):
        return max_positions
    chunks = keys.inside(name, {}, model_type=keys.model_type)
    positions = chunks.whole("chunk_size") - chunks.whole("local_size", 0, least=0)
    chunks.ignore("original_max_position_embeddings")
    chunks.refuse_unread()
    if positions < 1:
        raise CheckpointError(
            f"{chunks.where}: local_size takes all of chunk_size; {positions} positions are left."
        )
    return positions


FAMILY = Family(
    model_types={
        "qwen2": "Qwen2, Qwen2.5, Qwen2.5-Coder, QwQ 32B, DeepSeek-R1-Distill-Qwen, A.X 4.0",
    },
    read_config=read_config,
)
