"""Trains the model that ships in `hanok/bundled`: tokenizer, weights, model card, all from one text.

    python scripts/train_bundled.py STORIES.txt [--out src/hanok/bundled] [--epochs 10]

STORIES.txt holds stories separated by lines of <|endoftext|> (TinyStories, CDLA-Sharing-1.0). The last
twentieth of the stories is held out; the weights of the epoch with the lowest loss on it are kept.
Every third story is also told as a conversation, so that the chat template means something.
"""

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy, dropout

from hanok.attention.base import ForwardBatch
from hanok.checkpoint.writer import write_bytes, write_json
from hanok.memory.save import save_weights
from hanok.models.decoder import Attention, Decoder
from hanok.models.family import read_config, sources
from hanok.models.layers import MlpLayer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
{%- if message.role not in ['user', 'assistant'] %}
{{- raise_exception('This model knows the roles user and assistant, not ' ~ message.role) }}
{%- endif %}
{{- '<|' ~ message.role ~ '|>\\n' ~ message.content ~ '\\n' }}
{%- if message.role == 'assistant' %}{{- eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
"""
SEQUENCE_TOKENS = 256
SEQUENCES_PER_STEP = 6
DROPOUT = 0.1


def read_stories(path: Path) -> list[str]:
    stories = [story.strip() for story in path.read_text().split("<|endoftext|>")]
    return [story for story in stories[:-1] if len(story) > 100]  # the last one is cut off


def as_conversation(story: str) -> str | None:
    """Render "Tell me a story about Lily." and the story, if it has somebody with a name."""
    names = re.findall(r"(?<=named )[A-Z][a-z]+", story)
    if not names:
        return None
    return f"<s><|user|>\nTell me a story about {names[0]}.\n<|assistant|>\n{story}\n</s>"


def train_tokenizer(stories: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, stories: list[str], rng: random.Random) -> torch.Tensor:
    """Return all stories as one stream of tokens, (tokens,)."""
    documents = [f"<s>{story}</s>" for story in stories]
    talks = [talk for story in stories[::3] if (talk := as_conversation(story))]
    documents += talks
    rng.shuffle(documents)
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    return torch.tensor([token for item in encoded for token in item.ids])


def drop_outputs(decoder: Decoder) -> None:
    """Let dropout act on what attention and MLPs add to the residual, while `decoder` trains.

    The decoder itself has none: half a million tokens seen a dozen times are few for these parameters.
    """
    for module in decoder.modules():
        if isinstance(module, Attention | MlpLayer):
            module.register_forward_hook(
                lambda module, _, output: dropout(output, DROPOUT, training=module.training)
            )


def loss_of(decoder: Decoder, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of rows (sequences, time + 1)."""
    batch = ForwardBatch.of(rows[:, :-1].tolist())
    logits = decoder.logits(decoder(batch))
    return cross_entropy(logits, rows[:, 1:].flatten())


def cut(stream: torch.Tensor, offset: int) -> torch.Tensor:
    """Return the stream as rows of SEQUENCE_TOKENS + 1 that overlap by one token."""
    return stream[offset:].unfold(0, SEQUENCE_TOKENS + 1, SEQUENCE_TOKENS)


@torch.no_grad()
def evaluate(decoder: Decoder, stream: torch.Tensor) -> float:
    decoder.eval()
    parts = cut(stream, 0).split(SEQUENCES_PER_STEP)
    total = sum(loss_of(decoder, rows).item() * len(rows) for rows in parts)
    decoder.train()
    return total / sum(map(len, parts))


def train(
    decoder: Decoder, stream: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace
) -> tuple[float, float, int]:
    """Train in place; returns the losses on training and held-out text and the epoch kept."""
    matrices = [p for p in decoder.parameters() if p.dim() == 2]
    vectors = [p for p in decoder.parameters() if p.dim() != 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    generator = torch.Generator().manual_seed(args.seed)
    steps_per_epoch = len(cut(stream, 0)) // SEQUENCES_PER_STEP
    total, step = args.epochs * steps_per_epoch, 0
    best, best_state, started = (math.inf, math.inf, 0), {}, time.monotonic()
    for epoch in range(1, args.epochs + 1):
        # Another offset each epoch, so that the cuts fall elsewhere.
        offset = int(torch.randint(SEQUENCE_TOKENS, (), generator=generator))
        rows = cut(stream, offset)
        order = torch.randperm(len(rows), generator=generator)
        running = []
        for chosen in order.split(SEQUENCES_PER_STEP):
            if len(chosen) < SEQUENCES_PER_STEP:
                continue
            warm, progress = min(1.0, (step + 1) / 100), min(1.0, step / total)
            rate = args.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(decoder, rows[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            running.append(loss.item())
            step += 1
        seen, unseen = sum(running) / len(running), evaluate(decoder, held_out)
        print(
            f"epoch {epoch}: loss {seen:.4f}, held out {unseen:.4f}, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
        if unseen < best[1]:
            best = (seen, unseen, epoch)
            best_state = {name: value.clone() for name, value in decoder.state_dict().items()}
    decoder.load_state_dict(best_state)
    return best


def write_card(folder: Path, results: dict[str, object]) -> None:
    card = (Path(__file__).parent / "bundled_card.md").read_text()
    for name, value in results.items():
        card = card.replace("{" + name + "}", str(value))
    write_bytes(folder / "README.md", card.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--out", type=Path, default=Path("src/hanok/bundled"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    stories = read_stories(args.stories)
    num_held_out = len(stories) // 20
    tokenizer = train_tokenizer(stories[:-num_held_out])
    stream = encode(tokenizer, stories[:-num_held_out], rng)
    held_out = encode(tokenizer, stories[-num_held_out:], rng)
    print(f"{len(stories)} stories, {len(stream)} tokens, {len(held_out)} held out", flush=True)

    family, config = read_config(CONFIG, "CONFIG")
    decoder = Decoder(config)
    decoder.use_attention("auto")
    decoder.initialise(0.02, torch.Generator().manual_seed(args.seed))
    drop_outputs(decoder)
    seen, unseen, epoch = train(decoder, stream, held_out, args)

    args.out.mkdir(parents=True, exist_ok=True)
    decoder.to(torch.bfloat16)
    save_weights(args.out, decoder, sources(family, config, ()))
    write_json(args.out / "config.json", CONFIG)
    write_json(args.out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [1]})
    write_bytes(args.out / "tokenizer.json", tokenizer.to_str().encode())
    write_json(
        args.out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    )
    write_bytes(args.out / "chat_template.jinja", CHAT_TEMPLATE.encode())
    results = {
        "parameters": f"{config.num_parameters():,}",
        "tokens": f"{len(stream):,}",
        "held_out_tokens": f"{len(held_out):,}",
        "epoch": epoch,
        "epochs": args.epochs,
        "loss": f"{seen:.3f}",
        "held_out_loss": f"{unseen:.3f}",
        "perplexity": f"{math.exp(unseen):.2f}",
    }
    write_card(args.out, results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
