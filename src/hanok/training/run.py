"""A training from beginning to end: model, data, steps with their log, and what serving needs of it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from hanok.checkpoint.card import TRAINING, CardContent, Step, write_card
from hanok.checkpoint.formats import ADAPTER_CONFIG
from hanok.checkpoint.tokenizer import Tokenizer
from hanok.checkpoint.writer import write_bytes, write_json
from hanok.engine.model import Model, load
from hanok.errors import OptionError
from hanok.memory.options import LoadOptions
from hanok.memory.plan import LoadPlan
from hanok.memory.planning import open_model, plan_load
from hanok.memory.watch import resident_bytes
from hanok.package import __version__
from hanok.training.callback import TrainCallback
from hanok.training.config import TrainConfig
from hanok.training.data.dataset import DataReport, Dataset
from hanok.training.data.options import DataOptions, Source, read_source
from hanok.training.loop import Trainer, TrainReport
from hanok.training.options import TrainOptions
from hanok.training.report_options import ReportOptions
from hanok.training.reporting import Reporter
from hanok.training.samples import Sampler

OPTIONS = "options.json"
"""Every option of a training with its origin, and its data, in the output folder."""
KEPT = ("dtype", "quant", "chat_template", "append_eos", "max_length", "packing")
"""Options besides those of TrainOptions that a training keeps when it goes on."""


def train(
    model: str | Path | Model,
    data: str | Path | Source | Sequence[str | Path | Source],
    output: str | Path,
    *,
    options: TrainOptions | None = None,
    data_options: DataOptions | None = None,
    load_options: LoadOptions | None = None,
    report_options: ReportOptions | None = None,
    callback: TrainCallback | None = None,
    cache_folder: Path | None = None,
) -> TrainReport:
    """Train a model, or go on with the training in `output`, and return what it did.

    `model` is a checkpoint's folder, or a loaded model, which then has what it learnt. `data` are files
    and folders, each as `hanok train` takes it: a path, perhaps with settings after a colon, or a
    `Source`. Below `output` come checkpoints, log.jsonl, options.json, loss.html and the result, with
    tokenizer, chat template, generation config and a card. `callback` is told of the progress, and can
    stop it. With `cache_folder`, tokenized documents are kept there.

    Raises OptionError for options that cannot be, or that are not those of the training in `output`,
    DataError for data that looks wrong, CheckpointError where no checkpoint in `output` is complete, and
    GenerationError where the loss or a gradient is not a finite number; what was saved stays.
    """
    loaded = model if isinstance(model, Model) else None
    if loaded is not None and load_options is not None:
        raise OptionError(
            "load_options given with a model that is loaded already; give them to hanok.load."
        )
    given = [data] if isinstance(data, str | Path | Source) else data
    asked = LoadOptions() if load_options is None else load_options
    config = TrainConfig(
        model=Path(model) if not isinstance(model, Model) else model.checkpoint.folder,
        data=tuple(item if isinstance(item, Source) else read_source(str(item)) for item in given),
        output=Path(output),
        options=options or TrainOptions(),
        data_options=data_options or DataOptions(),
        load_options=asked.updated(weights="copied") if asked.weights == "auto" else asked,
        report_options=report_options or ReportOptions(),
        cache_folder=cache_folder,
    )
    return carry_out(config, callback or TrainCallback(), model=loaded)


def carry_out(
    config: TrainConfig,
    callback: TrainCallback,
    *,
    model: Model | None = None,
    step: Step | None = None,
) -> TrainReport:
    """Do what a config asks for; see `train`.

    `model` is that of the config where it is loaded already, `step` what the card says was done.
    """
    planned, options = None, config.options
    if model is None:
        plan = _planned(config)
        planned = planned_bytes(plan)
        assert plan.training is not None
        recomputes = plan.training.gradient_checkpointing
        options = replace(config.options, gradient_checkpointing=recomputes)
        callback.on_plan(plan)
        model = _loaded(config, plan, callback)
    dataset = _opened(config, model, callback)
    learnt, held_out = dataset, None
    if config.options.held_out:
        learnt, held_out = dataset.split(config.options.held_out)
    asked = {"options": config.resolved(), "data": _files(dataset.summary())}
    trainer = Trainer(model, options, config.output)
    _check_goes_on(trainer, asked)
    trainer.asked = asked
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(config.output / OPTIONS, asked)
    sampler = Sampler(
        model,
        config.report_options.samples,
        max_tokens=config.report_options.sample_tokens,
        is_chat=dataset.has_conversations,
        template=dataset.template,
    )
    title = (
        f"{config.model.resolve().name}: {', '.join(source.path.name for source in config.data)}"
    )
    callback.on_begin(trainer)
    with Reporter(trainer, config.report_options, callback, sampler, title) as reporter:
        reporter.begin(held_out)
        report = trainer.run(learnt, held_out, on_step=reporter.on_step)
    if report.is_finished:
        _complete(report.output, model, dataset)
        section = _section(asked, reporter.log.lines, trainer.parameter_line)
        is_adapter = (report.output / ADAPTER_CONFIG).is_file()
        inferred = {
            "library_name": "peft" if is_adapter else "transformers",
            "base_model_relation": "adapter" if is_adapter else "finetune",
        }
        content = CardContent(
            inferred=inferred, sections={TRAINING: section}, steps=(step or _python_step(config),)
        )
        write_card(report.output, content)
    return replace(report, planned_bytes=planned)


def _planned(config: TrainConfig) -> LoadPlan:
    """Return the plan; where it is left to it, layers are computed again if it fits only so."""
    opened = open_model(config.model)
    learning = config.options.learning
    options = config.load_options.planned
    plan = plan_load(opened, may_measure=False, training=learning, **options)
    if config.options.gradient_checkpointing is not None or (plan.fits and not plan.uses_disk):
        return plan
    learning = replace(learning, gradient_checkpointing=True)
    return plan_load(opened, may_measure=False, training=learning, **options)


def planned_bytes(plan: LoadPlan) -> int:
    """Return the memory that this process will have at the most: what it has, and what is planned."""
    hosts = [tier for tier in plan.tiers if tier.place.is_host]
    gpus = [tier for tier in plan.tiers if tier.place.kind == "gpu" and tier.modules]
    if gpus:
        return sum(tier.peak_bytes for tier in gpus)
    return resident_bytes() + sum(tier.peak_bytes for tier in hosts)


def _loaded(config: TrainConfig, plan: LoadPlan, callback: TrainCallback) -> Model:
    total = sum(tier.weight_bytes for tier in plan.tiers if tier.place.kind != "disk")
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        callback.on_progress(f"Loading {config.model.name}", done, total)

    return load(plan=plan, progress=advance, **config.load_options.unplanned)


def _opened(config: TrainConfig, model: Model, callback: TrainCallback) -> Dataset:
    if model.tokenizer is None:
        raise OptionError(f"{config.model} has no tokenizer, so no text can be learnt from.")
    dataset = Dataset.open(
        config.data,
        model.tokenizer,
        config.data_options,
        pack_tokens=config.options.pack_tokens,
        seed=config.options.seed,
        end_ids=model.end_ids,
        cache_folder=config.cache_folder,
        progress=partial(callback.on_progress, "Tokenizing"),
    )
    dataset.check()
    return dataset


def _files(report: DataReport) -> list[dict[str, Any]]:
    """Return what the data is: each file with its hash and its counts."""
    found = []
    for item in report.files:
        with item.file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found.append(
            {
                "file": item.file.name,
                "sha256": digest,
                "format": item.format,
                "times": item.times,
                "rows": item.num_rows,
                "bad_rows": item.num_bad_rows,
                "documents": item.num_documents,
                "tokens": item.num_tokens,
                "learnt": item.num_targets,
            }
        )
    return found


def _check_goes_on(trainer: Trainer, asked: Mapping[str, Any]) -> None:
    """Refuse to go on with other data, or with a base that computes otherwise."""
    before = trainer.asked_before
    if not before:
        return
    was, now = before["options"], asked["options"]
    for name in KEPT:
        old, new = was.get(name, now[name])["value"], now[name]["value"]
        if old != new:
            raise OptionError(
                f"the checkpoint was made with {name} {old!r}, and {new!r} is asked for: it would be "
                "another training. Give the same, or start in another folder."
            )
    if before["data"] != asked["data"]:
        old_files = [f"{item['file']} ({item['sha256'][:8]})" for item in before["data"]]
        new_files = [f"{item['file']} ({item['sha256'][:8]})" for item in asked["data"]]
        raise OptionError(
            f"the checkpoint was made with {', '.join(old_files)}, and the data is now "
            f"{', '.join(new_files)}: it would be another training. Give the same files with the same "
            "contents and settings, or start in another folder."
        )


def _complete(folder: Path, model: Model, dataset: Dataset) -> None:
    """Write what serving needs besides weights: tokenizer, chat template, generation config."""
    tokenizer = dataset.tokenizer
    tokenizer.save(folder)
    template = _template_text(tokenizer, dataset.template)
    if template is not None:
        write_bytes(folder / "chat_template.jinja", template.encode())
    if model.checkpoint.generation_config:
        write_json(folder / "generation_config.json", dict(model.checkpoint.generation_config))


def _template_text(tokenizer: Tokenizer, template: str | None) -> str | None:
    """Return the text of the template that was rendered with; None: the tokenizer's own."""
    if template is None or "{" in template:
        return template
    return dict(zip(tokenizer.chat_template_names, tokenizer.chat_template_texts, strict=True))[
        template
    ]


def _section(
    asked: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], parameter_line: str
) -> str:
    """Return what the card says of the training: data, options, losses."""
    columns = ("file", "sha256", "format", "times", "rows", "documents", "tokens", "learnt")
    rows = [columns, ["---"] * len(columns)]
    rows += [[_cell(item[name]) for name in columns] for item in asked["data"]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    left_out = ("model", "data", "output")
    said = ", ".join(
        f"{name} {_cell(_without_folder(item['value']))}"
        for name, item in asked["options"].items()
        if name not in left_out and item["value"] not in (None, [], {})
    )
    steps = [line for line in lines if "loss" in line]
    losses = []
    if steps:
        losses.append(
            f"{steps[0]['loss']:.4f} in the first step, {steps[-1]['loss']:.4f} in the last of "
            f"{steps[-1]['step']:,}"
        )
    held = [line for line in lines if line.get("held_out_loss") is not None]
    if held:
        losses.append(
            f"of held-out documents {held[0]['held_out_loss']:.4f} after step {held[0]['step']:,} and "
            f"{held[-1]['held_out_loss']:.4f} after step {held[-1]['step']:,}"
        )
    seed = asked["options"]["seed"]["value"]
    return (
        f"{parameter_line}\n\nData:\n\n{table}\n\nMean loss of a token, in nats: {'; '.join(losses)}."
        f"\n\nSeed: {seed}. Options: {said}."
    )


def _without_folder(value: Any) -> Any:
    """Return an option's value; of a file, such as that of a template, its name."""
    is_file = isinstance(value, str) and "\n" not in value and Path(value).is_file()
    return Path(value).name if is_file else value


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _python_step(config: TrainConfig) -> Step:
    names = [source.path.name for source in config.data]
    return Step(
        command=f"hanok.train({config.model.resolve().name!r}, {names})",
        version=__version__,
        date=datetime.now(UTC).date().isoformat(),
        text="trains it",
    )
