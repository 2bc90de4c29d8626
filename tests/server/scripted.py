"""A tiny checkpoint whose weights make it say what a test wants, so that real answers can be tested.

Its next token depends on the last one alone: a cue that a prompt ends with begins an answer, each piece
of it leads to the next, and what leads nowhere ends the answer. Under a grammar it writes the shortest
JSON that is allowed: everything is closed as soon as it may be. Where a grammar leaves no choice, tokens
are single bytes, and the script is left.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.server.conftest import LocalServer, local_server
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

import hanok

TEMPLATE = """\
{% if tools %}{{ tools | tojson }}
{% endif %}{% for message in messages %}{{ message.content or '' }}\
{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{% endfor %}"""
END = "</s>"
SHORTEST = '"}],0'
"""What is written where a grammar allows it, the first of these first; behind a bracket its own end."""
HEAD_DIM = 32


def write_checkpoint(
    folder: Path,
    answers: Mapping[str, Sequence[str]],
    *,
    special: Sequence[str] = (),
    template: str = TEMPLATE,
    tokenizer: Tokenizer | None = None,
    **config: Any,
) -> Path:
    """Write a Llama that answers each prompt which ends in a cue with the pieces given for it.

    Each piece, and each cue, is one token, and stands in one place only, for what follows a token is
    always the same. `special`: pieces that are special tokens. `tokenizer`: a vocabulary other than the
    256 bytes; pieces are added to it. `config`: further keys of config.json.
    """
    tokenizer = tokenizer or byte_level()
    chains = [[cue, *pieces, END] for cue, pieces in answers.items()]
    tokenizer.add_special_tokens([END, *special])
    for piece in (piece for chain in chains for piece in chain):
        if tokenizer.token_to_id(piece) is None:
            tokenizer.add_tokens([AddedToken(piece, normalized=False)])
    links: dict[int, int] = {}
    for chain in chains:
        for one, other in pairwise(tokenizer.token_to_id(piece) for piece in chain):
            if links.setdefault(one, other) != other:
                raise AssertionError(f"{tokenizer.id_to_token(one)!r} stands in two places")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {"eos_token": END, "chat_template": template})
    size = tokenizer.get_vocab_size()
    size += -size % HEAD_DIM
    end = tokenizer.token_to_id(END)
    keys = {
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": size,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": size // HEAD_DIM,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "float32",
        "eos_token_id": end,
    }
    _write_json(folder / "config.json", keys | config)
    head = torch.zeros(size, size)
    for rank, letter in enumerate(reversed(SHORTEST), start=1):
        head[tokenizer.token_to_id(letter)] = rank / 10
    for opening, closing in ("{}", "[]"):
        head[tokenizer.token_to_id(closing), tokenizer.token_to_id(opening)] = 0.9
    head[end] = 1
    for one, other in links.items():
        head[other, one] = 2
    save_file(_weights(size, head), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextmanager
def scripted_server(
    answers: Mapping[str, Sequence[str]],
    *,
    options: Mapping[str, Any] | None = None,
    context: int | None = None,
    **checkpoint: Any,
) -> Iterator[LocalServer]:
    """Serve such a checkpoint in this process; `options` are the server's, others the checkpoint's."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder), answers, **checkpoint)
        model = hanok.load(path, weights="copied", context=context, batch=4)
        with local_server(model, **{"model_id": "scripted"} | dict(options or {})) as found:
            yield found


def byte_level() -> Tokenizer:
    """Return a tokenizer whose tokens are the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace(words: Sequence[str]) -> Tokenizer:
    """Return a tokenizer as SentencePiece's: a space is part of the token after it, written "▁"."""
    letters = [*map(chr, range(33, 127)), "▁", *words]
    vocabulary = {letter: number for number, letter in enumerate(dict.fromkeys(letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _weights(size: int, head: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a layer that adds nothing between rows of the identity and the head."""
    shapes = {
        "self_attn.q_proj": (size, size),
        "self_attn.k_proj": (HEAD_DIM, size),
        "self_attn.v_proj": (HEAD_DIM, size),
        "self_attn.o_proj": (size, size),
        "mlp.gate_proj": (32, size),
        "mlp.up_proj": (32, size),
        "mlp.down_proj": (size, 32),
    }
    layer = {name: torch.zeros(shape) for name, shape in shapes.items()}
    layer |= {name: torch.ones(size) for name in ("input_layernorm", "post_attention_layernorm")}
    return {
        "model.embed_tokens.weight": torch.eye(size),
        "model.norm.weight": torch.ones(size),
        "lm_head.weight": head,
        **{f"model.layers.0.{name}.weight": tensor for name, tensor in layer.items()},
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
