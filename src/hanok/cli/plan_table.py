"""A load plan as people read it: one table, what is predicted, and what would help."""

from typing import TYPE_CHECKING, Any

import click

from hanok.cli.units import rate, size

if TYPE_CHECKING:
    from hanok.memory.cpus import CpuBudget
    from hanok.memory.plan import LoadPlan, Place

PIPED_WIDTH = 140
HEADER = ("place", "holds", "weights", "KV cache", "work", "peak", "budget", "free", "budget from")


def rows(plan: "LoadPlan") -> list[tuple[str, ...]]:
    """Return the table's rows as text, in the order of HEADER; places that hold nothing are left out."""
    found: list[tuple[str, ...]] = []
    for tier in plan.tiers:
        place, budget = tier.place, tier.place.budget
        if not tier.modules and not tier.stream_bytes and place.kind != "cpu":
            continue
        work = tier.work_bytes + tier.stream_bytes
        beside = tier.learning.total if plan.training is not None else tier.cache_bytes
        found.append(
            (
                place.title,
                holds(tier.modules),
                size(tier.weight_bytes),
                size(beside),
                size(work) if place.kind != "disk" else "–",
                size(tier.peak_bytes) if place.kind != "disk" else "–",
                size(budget.num_bytes) if budget else "–",
                size(budget.num_bytes - tier.peak_bytes) if budget else "–",
                budget.source if budget else place.rate_source,
            )
        )
    return found


def header(plan: "LoadPlan") -> tuple[str, ...]:
    """Return the table's head: a training has no keys and values."""
    return tuple(
        "training" if name == "KV cache" and plan.training is not None else name for name in HEADER
    )


def holds(modules: tuple[str, ...]) -> str:
    """Return module names with runs of blocks as one: "embed_tokens, layers 0–19"."""
    parts: list[str] = []
    first = last = -1
    for module in (*modules, ""):
        stem, _, number = module.rpartition(".")
        if number.isdigit() and stem and int(number) == last + 1 and last >= 0:
            last += 1
            continue
        if last >= 0:
            parts.append(f"layers {first}–{last}" if last > first else f"layer {first}")
            first = last = -1
        if number.isdigit() and stem:
            first = last = int(number)
        elif module:
            parts.append(module.removeprefix("model."))
    return ", ".join(parts) or "nothing"


def places(names: tuple[str, ...]) -> str:
    """Return places for people: "GPUs 0–3 and cpu"."""
    gpus = [name for name in names if name.isdigit()]
    parts = [name for name in names if not name.isdigit()]
    if len(gpus) == 1:
        parts.insert(0, f"GPU {gpus[0]}")
    elif gpus:
        parts.insert(0, f"GPUs {gpus[0]}–{gpus[-1]}")
    return " and ".join(parts)


def host_line(place: "Place", cpus: "CpuBudget") -> str:
    """Return what the host computes with, why not with more, and how fast it reads its memory."""
    count = f"{cpus.threads} thread{'s' * (cpus.threads > 1)}"
    return f"CPU: {count}, {cpus.reason}; memory is read at {place.rate_source}."


def print_plan(plan: "LoadPlan") -> None:
    """Print the table, what is predicted, and what would help where it does not fit."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1))
    for index, name in enumerate(header(plan)):
        table.add_column(name, justify="left" if index in (0, 1, len(HEADER) - 1) else "right")
    for row in rows(plan):
        table.add_row(*row)
    console = Console()
    console = console if console.is_terminal else Console(width=PIPED_WIDTH)
    console.print(table)
    click.echo()
    for line in training_lines(plan) or [prediction_line(plan)]:
        click.echo(line)
    for place in (tier.place for tier in plan.tiers):
        if place.is_host and place.cpus is not None:
            click.echo(host_line(place, place.cpus))
    for tier in plan.tiers:
        if tier.missing_bytes:
            click.echo(f"It does not fit: {tier.place.name} lacks {size(tier.missing_bytes)}.")
    for line in _beside_lines(plan):
        click.echo(line)
    mapped = sum(tier.mapped_bytes for tier in plan.tiers)
    if mapped:
        click.echo(f"{size(mapped)} of the weights stay in their files, shared between processes.")
    if plan.fits and plan.uses_disk:
        click.echo("What lies on disk is read again for every token.")
    for line in advice(plan):
        click.echo(line)


def _beside_lines(plan: "LoadPlan") -> list[str]:
    found = []
    for place in (tier.place for tier in plan.tiers):
        if place.draft_bytes:
            drafts = size(place.draft_bytes)
            found.append(f"The model that drafts holds {drafts} of {place.title}'s peak.")
        if place.adapter_bytes:
            found.append(f"Adapters hold {size(place.adapter_bytes)} of {place.title}'s peak.")
    return found


def training_lines(plan: "LoadPlan") -> list[str]:
    """Return what a training holds on each place, by what it is for."""
    found = []
    for tier in plan.tiers:
        learning = tier.learning
        if learning.total:
            found.append(
                f"Training on {tier.place.title}: {size(learning.learnt)} learn beside the weights, "
                f"{size(learning.gradients)} of gradients, {size(learning.optimizer)} of the optimizer, "
                f"{size(learning.activations)} of activations; work is a chunk of logits, or what a "
                "layer computes again."
            )
    return found


def prediction_line(plan: "LoadPlan") -> str:
    """Return how long things will take; a model without a head generates no tokens."""
    prediction = plan.prediction
    what = "prompts" if plan.needs.has_head else "texts"
    line = (
        f"{plan.needs.batch} x {plan.needs.context} tokens. Reading the files takes "
        f"{prediction.load_s:.1f} s, {what} that fill the context {prediction.first_token_s:.1f} s"
    )
    if not plan.needs.has_head:
        return f"{line}."
    speed = rate(prediction.tokens_per_s)
    return f"{line}; then at most {speed} tokens/s, limited by {prediction.limited_by}."


def advice(plan: "LoadPlan") -> list[str]:
    """Return what to know of the files, and what would help where something does not fit."""
    lines = [f"Note: {note}." for note in plan.notes]
    for remedy in plan.remedies:
        speed = f": {rate(remedy.tokens_per_s)} tokens/s" if plan.needs.has_head else ""
        lines.append(f"  {remedy.change} fits in {places(remedy.places)}{speed}")
    return lines


def plan_facts(plan: "LoadPlan") -> list[dict[str, Any]]:
    """Return the table's rows as numbers."""
    found = []
    for tier in plan.tiers:
        if not tier.modules:
            continue
        budget = tier.place.budget.num_bytes if tier.place.budget else None
        found.append(
            {
                "tier": tier.place.title,
                "holds": holds(tier.modules),
                "weights_bytes": tier.weight_bytes,
                "kv_bytes": tier.cache_bytes,
                "reserve_bytes": tier.work_bytes + tier.stream_bytes,
                "draft_bytes": tier.place.draft_bytes,
                "adapter_bytes": tier.place.adapter_bytes,
                "budget_bytes": budget,
                "free_bytes": None if budget is None else budget - tier.peak_bytes,
            }
        )
    return found
