"""From the options of a verb to loaded models: planned together, loaded with a progress bar."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hanok.checkpoint.adapter_files import AdapterFiles, open_adapter
from hanok.cli.options import Drafting, load_options, read_drafting
from hanok.cli.progress import bytes_bar
from hanok.cli.units import size
from hanok.memory.options import LoadOptions
from hanok.package import BUNDLED

if TYPE_CHECKING:
    from hanok.bench.profile import Profile
    from hanok.engine.generate import TokenStream
    from hanok.engine.model import Model
    from hanok.engine.speculate import Speculation
    from hanok.memory.account import Opened
    from hanok.memory.plan import LoadPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Subjects:
    """The checkpoints of a verb, each opened once: the model, and one that drafts for it."""

    model: "Opened"
    draft: "Opened | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans:
    """Of the model, and of its draft model."""

    model: "LoadPlan"
    draft: "LoadPlan | None"


def open_subjects(path: Path, drafting: Drafting) -> Subjects:
    """Open the checkpoints; OptionError where tokens are guessed for a model that generates none."""
    from hanok.memory.account import check_head
    from hanok.memory.planning import open_model

    model = open_model(path)
    if drafting.method != "off":
        check_head(path, has_head=model.understood.config.has_head)
    draft = open_model(drafting.draft) if drafting.draft is not None else None
    return Subjects(model=model, draft=draft)


def plan_subjects(
    subjects: Subjects,
    options: LoadOptions,
    *,
    drafted: int | None = None,
    adapters: Sequence[AdapterFiles] = (),
) -> Plans:
    """Plan the loads; the draft model guesses for `drafted` sequences at a time (default: `batch`)."""
    from hanok.memory.planning import plan_draft, plan_load

    draft = None
    if subjects.draft is not None:
        batch = options.batch if drafted is None else drafted
        own = options.updated(batch=batch).for_draft()
        draft = plan_draft(subjects.draft, **own.planned)
    model = plan_load(
        subjects.model, may_measure=False, draft=draft, adapters=adapters, **options.planned
    )
    return Plans(model=model, draft=draft)


def open_speculation(
    drafting: Drafting, options: LoadOptions, plan: "LoadPlan | None"
) -> "Speculation | None":
    """Return how tokens are guessed, the draft model of `plan` loaded; None where none are."""
    if drafting.method == "off":
        return None
    from hanok.engine.model import load
    from hanok.engine.speculate import Speculation

    model = None
    if plan is not None:
        model = load(
            plan=plan,
            attn_implementation=options.attn_implementation,
            graphs=options.graphs,
            threads=options.threads,
        )
        name = model.checkpoint.folder.name
        click.echo(f"Loaded {name} to draft in {model.report.seconds:.2f} s.", err=True)
    return Speculation(method=drafting.method, draft=model, max_tokens=drafting.max_tokens)


def open_model(path: Path | None, options: Mapping[str, Any]) -> "tuple[Model, Speculation | None]":
    """Load the model of a verb that generates with a progress bar; without a path the bundled one.

    `options` are those of `model_options`, `adapter_option` and `speculation_options`: both models are
    planned before one is loaded.
    """
    from hanok.engine.model import load
    from hanok.memory.account import check_head

    if path is None:
        click.echo("No model given: using the small one that ships with hanok.", err=True)
        path = BUNDLED
    asked, drafting = load_options(options), read_drafting(options)
    subjects = open_subjects(path, drafting)
    check_profile(options["profile"], subjects.model, asked.threads)
    check_head(path, has_head=subjects.model.understood.config.has_head)
    adapter = options["adapter"]
    plans = plan_subjects(subjects, asked, adapters=[open_adapter(adapter)] if adapter else [])
    speculation = open_speculation(drafting, asked, plans.draft)
    with bytes_bar(f"Loading {path.name}") as bar:
        bar.start(sum(tier.weight_bytes for tier in plans.model.tiers if tier.place.kind != "disk"))
        model = load(plan=plans.model, progress=bar.advance, **asked.unplanned)
    report = model.report
    planned = size(report.planned_bytes) if report.planned_bytes is not None else "nothing"
    click.echo(
        f"Loaded in {report.seconds:.2f} s: {size(report.mapped_bytes)} stay in their files; "
        f"at most {size(report.peak_bytes)} of other memory at once, planned {planned}.",
        err=True,
    )
    for note in model.notes:
        click.echo(note, err=True)
    if adapter:
        model.adapters.load(adapter.name, adapter)
        model.use_adapter(adapter.name)
    return model, speculation


def speculation_line(stream: "TokenStream", speculation: "Speculation | None") -> str:
    """Return what is said of guessed tokens at the end of an answer; nothing where none were."""
    if speculation is None:
        return ""
    counts = stream.speculation
    return f"; {counts.accepted} of {counts.proposed} guessed tokens right, {counts.passes} passes"


def check_profile(profile: "Profile | None", model: "Opened", threads: int | None) -> None:
    """Refuse a profile of another checkpoint than this, and note one made on another machine.

    `threads` is the option of that name: how many there are is a fact of the machine too.
    """
    if profile is None:
        return
    from hanok.bench.machine import machine_facts
    from hanok.bench.profile import check_checkpoint, machine_differences
    from hanok.memory.threads import set_threads

    set_threads(threads)
    check_checkpoint(profile, model.understood.checkpoint)
    for note in machine_differences(profile, machine_facts()):
        click.echo(f"Note: {note}. Run `hanok tune` here to be sure.", err=True)
