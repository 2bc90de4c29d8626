"""`hanok info`: what this machine has, which implementations fit and why, what a checkpoint is."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hanok.models.config import ModelConfig


@click.command("info", short_help="Show the machine, the backends that fit, and a checkpoint.")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(path: Path | None, as_json: bool) -> None:
    """Show this machine, each attention backend with the reason when it does not fit, and PATH.

    PATH is a checkpoint, of which only the headers and JSON files are read, or a config.json's folder.
    """
    found: dict[str, dict[str, Any]] = {"machine": _machine()}
    config = None
    if path is not None:
        found["checkpoint"], config = _checkpoint(path)
    found["attention"] = _attention(config)
    found["quantization"] = _quantization()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, rows in found.items():
        table = Table(
            title=title, title_justify="left", show_header=False, box=None, padding=(0, 2)
        )
        for name, value in rows.items():
            table.add_row(name, value if isinstance(value, str) else f"{value:,}")
        console.print(table)
        console.print()


def _machine() -> dict[str, str]:
    from hanok.bench.machine import machine_facts, versions
    from hanok.kernels.native import has_wrong_tiles, native
    from hanok.kernels.processor import CAP, instruction_set_cap
    from hanok.memory.threads import set_threads

    threads = set_threads()  # as a load does: the facts name their number
    facts = machine_facts()
    cap = instruction_set_cap()
    if cap is not None and native() is not None:
        facts["hanok's kernels"] += f", capped by {CAP}={cap}"
    if has_wrong_tiles():
        facts["hanok's kernels"] += "; AMX is not used, for its products differ here from AVX-512's"
    return {**versions(), **facts, "threads": str(threads)}


def _attention(config: "ModelConfig | None") -> dict[str, str]:
    """Return each backend's summary or reason, for the layers of `config` or for ordinary ones."""
    import torch

    from hanok.attention.base import backends, why_not_table
    from hanok.models.config import SoftmaxAttention
    from hanok.models.mixers.base import attention_spec

    ordinary = SoftmaxAttention(num_heads=32, num_kv_heads=8, head_dim=128, rope=None)
    attentions = [ordinary] if config is None else config.attentions
    if not attentions:
        return {}
    spec = replace(attention_spec(attentions[0]), window=None)
    device = torch.device("cpu")
    reasons = why_not_table(spec, device, torch.bfloat16)
    return {
        name: f"fits: {backends()[name].summary}" if reason is None else f"does not fit: {reason}"
        for name, reason in reasons.items()
    }


def _quantization() -> dict[str, str]:
    """Return for each method where its weights lie, what multiplies them, and why not elsewhere."""
    import torch

    from hanok.quant.base import choose_layout, methods, why_not_table

    device = torch.device("cpu")
    rows = {}
    for name, kind in methods().items():
        method = kind()
        layout = choose_layout(method.format, device)
        stored = layout.empty(method.format, (16, 128), device, method)
        kernels = {tokens: stored.kernel(tokens, torch.bfloat16) for tokens in (1, 512)}
        used = kernels[1]
        if kernels[512] != kernels[1]:
            used += f"; many tokens: {kernels[512]}"
        reasons = why_not_table(method.format, device).items()
        others = "".join(f"; not {other}: {reason}" for other, reason in reasons if reason)
        bits = method.bits_per_weight(4096)
        rows[name] = f"{kind.summary}, {bits:.2f} bits. {layout.name}: {used}{others}"
    return rows


def _checkpoint(path: Path) -> "tuple[dict[str, Any], ModelConfig]":
    from hanok.checkpoint.tokenizer import open_tokenizer
    from hanok.checkpoint.tokenizer_files import has_tokenizer
    from hanok.errors import CheckpointError
    from hanok.memory.planning import describe
    from hanok.models.config import Experts

    found = describe(path)
    checkpoint, config = found.checkpoint, found.config
    sizes: dict[str, int] = {}
    for ref in checkpoint.tensors.values():
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.size_bytes
    attentions = config.attentions
    windows = sorted({item.window for item in attentions if item.window is not None})
    try:
        tokenizer = open_tokenizer(checkpoint.folder)
        vocabulary = f"{tokenizer.vocab_size:,} tokens"
        templates = ", ".join(tokenizer.chat_template_names) or "none"
    except CheckpointError as error:
        templates = "none"
        vocabulary = f"cannot be read: {error}" if has_tokenizer(checkpoint.folder) else "none"
    mlps = dict.fromkeys(layer.mlp for layer in config.layers)
    rows: dict[str, Any] = {
        "folder": str(checkpoint.folder),
        "files": ", ".join(file.name for file in checkpoint.files) or "none",
        "family": config.model_type,
        "parameters": config.num_parameters(),
        "parameters per token": config.num_active_parameters(),
        "bytes by dtype": ", ".join(f"{name} {size:,}" for name, size in sizes.items()) or "none",
        "dtype declared": config.dtype or "none",
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "heads": _listed(
            f"{item.num_heads} query, {item.num_kv_heads} KV, {item.head_dim} wide"
            for item in attentions
        ),
        "mlp": _listed(f"{mlp.intermediate_size:,} {mlp.activation}" for mlp in mlps),
        "experts": _listed(
            f"{mlp.num_experts}, {mlp.num_experts_per_token} per token"
            for mlp in mlps
            if isinstance(mlp, Experts)
        ),
        "windows": ", ".join(map(str, windows)) or "none",
        "vocabulary": config.vocab_size,
        "context": f"{config.max_context_tokens:,} tokens",
        "kv cache": _cache(config),
        "tied head": _tied_head(config),
        "tokenizer": vocabulary,
        "chat templates": templates,
        "notes": "; ".join(found.notes) or "none",
    }
    return rows, config


def _cache(config: "ModelConfig") -> str:
    per_sequence = config.kv_cache_bytes(0, "bfloat16")
    per_token = config.kv_cache_bytes(1, "bfloat16") - per_sequence
    fixed = f", and {per_sequence:,} per sequence" if per_sequence else ""
    return f"{per_token:,} bytes per token in bfloat16{fixed}"


def _tied_head(config: "ModelConfig") -> str:
    if not config.has_head:
        return "no head at all: it makes embeddings and generates nothing"
    return "yes" if config.tie_embeddings else "no"


COMMAND = command


def _listed(texts: Iterable[str]) -> str:
    """Return the distinct texts, "none" if there are none."""
    return "; ".join(dict.fromkeys(texts)) or "none"
