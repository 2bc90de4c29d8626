"""`hanok plan`: where every byte would live, how fast it would be, and what to do if it does not fit."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hanok.cli.fields import add_options, field_options, field_values
from hanok.cli.learnt import learnt_options, read_learnt
from hanok.cli.options import cache_folder_option, plan_options
from hanok.cli.plan_table import print_plan
from hanok.errors import BudgetError
from hanok.memory.learning import NOTHING, Learning
from hanok.memory.options import LoadOptions
from hanok.package import BUNDLED
from hanok.training.options import TrainOptions

if TYPE_CHECKING:
    from hanok.memory.plan import LoadPlan

TRAINING = ("pack_tokens", "gradient_checkpointing")
"""The options of a training that its memory depends on, besides what learns."""


@click.command("plan", short_help="Say where every byte would live, before one is read.")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@plan_options
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="name=…,memory=…,bandwidth=…",
    help="A GPU that may not be here, for example name=h100. Repeatable.",
)
@cache_folder_option("measured rates of memory and disk are")
@click.option(
    "--draft",
    type=click.Path(path_type=Path),
    help="A draft model, with the same options but for --device-map and --cache-dtype.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="A LoRA adapter that will be served. Repeatable.",
)
@click.option(
    "--train",
    is_flag=True,
    help="Plan a training, with the options below; without it a generation or a server.",
)
@learnt_options
@lambda plan: add_options(plan, field_options(TrainOptions, {}, only=TRAINING))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/plan.md).")
def command(
    path: Path | None,
    draft: Path | None,
    devices: tuple[str, ...],
    adapters: tuple[Path, ...],
    cache_folder: Path,
    train: bool,
    lora: str,
    full: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan the load of PATH, a checkpoint or a folder with a config.json alone.

    Only headers are read. Ends with status 6 when it does not fit.
    """
    # Imported here: `hanok --help` reads no checkpoint.
    from hanok.checkpoint.adapter_files import open_adapter
    from hanok.memory.planning import plan_draft, plan_load

    asked, draft_plan = LoadOptions(**field_values(LoadOptions, options)), None
    training = _training(options, read_learnt(lora, full=full)) if train else None
    if draft is not None:
        own = asked.for_draft().planned
        draft_plan = plan_draft(draft, devices=devices, is_running=False, **own)
    plan = plan_load(
        path or BUNDLED,
        devices=devices,
        rates_file=cache_folder / "rates.json",
        is_running=False,
        draft=draft_plan,
        training=training,
        adapters=[open_adapter(folder) for folder in adapters],
        **asked.planned,
    )
    if as_json:
        click.echo(json.dumps(plan_object(plan), indent=2))
    else:
        print_plan(plan)
    if not plan.fits:
        sys.exit(BudgetError.exit_code)


def _training(options: Mapping[str, Any], learnt: Mapping[str, Any]) -> Learning:
    from hanok.training.config import lora_of

    values = field_values(TrainOptions, options)
    values |= {name: value and lora_of(value) for name, value in learnt.items()}
    return TrainOptions(**values).learning


def plan_object(plan: "LoadPlan") -> dict[str, Any]:
    """Return the plan as plain data, as docs/plan.md describes it."""
    generates = plan.needs.has_head
    return {
        "fits": plan.fits,
        "uses_disk": plan.uses_disk,
        "device_map": plan.device_map,
        "context": plan.needs.context,
        "batch": plan.needs.batch,
        "places": [
            {
                "name": tier.place.name,
                "kind": tier.place.kind,
                "modules": list(tier.modules),
                "weight_bytes": tier.weight_bytes,
                "mapped_bytes": tier.mapped_bytes,
                "cache_bytes": tier.cache_bytes,
                "stream_bytes": tier.stream_bytes,
                "work_bytes": tier.work_bytes,
                "runtime_bytes": tier.place.runtime_bytes,
                "draft_bytes": tier.place.draft_bytes,
                "adapter_bytes": tier.place.adapter_bytes,
                "load_bytes": tier.load_bytes,
                "steady_bytes": tier.steady_bytes,
                "peak_bytes": tier.peak_bytes,
                "missing_bytes": tier.missing_bytes,
                "bytes_per_s": tier.place.bytes_per_s,
                "threads": tier.place.cpus.threads if tier.place.cpus else None,
                "threads_reason": tier.place.cpus.reason if tier.place.cpus else None,
                "budget_bytes": tier.place.budget.num_bytes if tier.place.budget else None,
                "limits": [
                    {"bytes": limit.num_bytes, "source": limit.source}
                    for limit in (tier.place.budget.limits if tier.place.budget else ())
                ],
            }
            for tier in plan.tiers
        ],
        "hf_device_map": plan.hf_device_map,
        "reasons": {item.unit.modules[0]: item.reason for item in plan.placements},
        "training": _training_object(plan),
        "load_s": plan.prediction.load_s,
        "first_token_s": plan.prediction.first_token_s,
        "tokens_per_s": plan.prediction.tokens_per_s if generates else None,
        "limited_by": plan.prediction.limited_by if generates else None,
        "notes": list(plan.notes),
        "remedies": [
            {
                "change": remedy.change,
                "places": list(remedy.places),
                "tokens_per_s": remedy.tokens_per_s if generates else None,
            }
            for remedy in plan.remedies
        ],
    }


def _training_object(plan: "LoadPlan") -> dict[str, Any] | None:
    if plan.training is None:
        return None
    used = [tier for tier in plan.tiers if tier.place.kind != "disk"]
    total = sum((tier.learning for tier in used), NOTHING)
    return {
        "peak_bytes": sum(tier.peak_bytes for tier in used if tier.modules),
        "learnt_bytes": total.learnt,
        "gradient_bytes": total.gradients,
        "optimizer_bytes": total.optimizer,
        "activation_bytes": total.activations,
        "pack_tokens": plan.training.pack_tokens,
        "gradient_checkpointing": plan.training.gradient_checkpointing,
    }


COMMAND = command
