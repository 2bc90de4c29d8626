"""Options that several verbs share, and what the verbs do with them.

Sampling options are made from the fields of `SamplingParams`: their names, types and the texts under
them, so that the command line, Python and the documentation cannot disagree.
"""

import ast
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from hanok import BUNDLED
from hanok.cli.progress import bytes_bar
from hanok.cli.units import size
from hanok.engine.params import GENERATION_CONFIG_FIELDS, SamplingOptions, SamplingParams
from hanok.errors import OptionError

if TYPE_CHECKING:
    from hanok.bench.profile import Profile
    from hanok.engine.generate import TokenStream
    from hanok.engine.model import Model
    from hanok.engine.speculate import Speculation
    from hanok.memory.plan import LoadPlan

Command = TypeVar("Command", bound=Callable[..., Any])

# Named otherwise on the command line, where one value is given at a time.
MULTIPLE = ("stop", "stop_token_ids", "spelled_token_ids", "logit_bias")


def field_texts(owner: type) -> dict[str, str]:
    """Return the text that stands under each field of a dataclass."""
    definition = ast.parse(inspect.getsource(owner)).body[0]
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    texts = {}
    for line, below in pairwise(body):
        if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
            text = ast.literal_eval(below.value)
            texts[ast.unparse(line.target)] = " ".join(str(text).split())
    return texts


def model_options(command: Command) -> Command:
    """Add the options of loading a model."""
    for option in (
        click.option(
            "--profile",
            type=click.Path(path_type=Path, dir_okay=False),
            is_eager=True,
            callback=use_profile,
            help="Options that `hanok tune` found; those given beside it go first.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            help="CPU threads to compute with.  [default: one for each core, within the CPU quota]",
        ),
        click.option(
            "--weights",
            type=click.Choice(["auto", "mapped", "copied"]),
            default="auto",
            show_default=True,
            help="mapped: stay in the file, shared between processes; copied: read into memory at "
            "once; auto: mapped, then copied behind the first answer where memory allows.",
        ),
        click.option(
            "--quant",
            metavar="METHOD[:OPTION=VALUE,…]",
            help="Make the weights smaller while they are read: int8, int4, nf4, fp8 or "
            "int8-outlier; for example int4:group_size=64,head=int8. `hanok info` lists them.",
        ),
        click.option(
            "--max-memory",
            metavar="DEVICE=SIZE,…",
            help="What may be used, for example 0=24GiB,cpu=4GiB; what does not fit stays on disk and "
            "is read for every token. See `hanok plan`.  [default: what is free]",
        ),
        click.option(
            "--cache-packed",
            is_flag=True,
            help="Keep the quantized weights in the cache folder, and read them from there next time.",
        ),
        click.option(
            "--cache-folder",
            type=click.Path(path_type=Path),
            envvar="HANOK_CACHE",
            default=Path.home() / ".cache" / "hanok",
            show_default="~/.cache/hanok",
            show_envvar=True,
            help="Where packed weights are kept.",
        ),
        click.option(
            "--cache-dtype",
            type=click.Choice(["auto", "int8"]),
            default="auto",
            show_default=True,
            help="What keys and values are kept in; auto: what is computed in.",
        ),
        click.option(
            "--attention",
            default="auto",
            show_default=True,
            help="Attention backend; `hanok info` lists them.",
        ),
        click.option(
            "--device-map",
            default="auto",
            show_default=True,
            callback=read_device_map,
            help="auto, balanced, balanced_low_0, sequential, a device (cpu, cuda:1), or a JSON object "
            "of modules and devices. See `hanok plan`.",
        ),
        click.option(
            "--context",
            type=int,
            help="Tokens that memory is planned for.  [default: 4096 or the model's]",
        ),
        click.option(
            "--pipeline-depth",
            type=int,
            help="Groups of sequences on their way where layers lie on several devices.  [default: one "
            "for each device]",
        ),
        click.option(
            "--graphs/--no-graphs",
            default=True,
            show_default=True,
            help="Record passes over a few tokens and make them again without Python in between: CUDA "
            "graphs, or calls of the CPU kernels. The text is the same.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            default="auto",
            show_default=True,
            help="What to compute in; auto: what the checkpoint declares.",
        ),
    ):
        command = option(command)
    return command


def speculation_options(command: Command) -> Command:
    """Add the options of guessing tokens ahead."""
    for option in (
        click.option(
            "--max-draft",
            type=click.IntRange(1, 255),
            help="Tokens guessed for one pass at the most.  [default: 15 from the text, 7 by a model]",
        ),
        click.option(
            "--draft",
            type=click.Path(path_type=Path),
            help="A smaller model with the same vocabulary that guesses; loaded with the same --quant "
            "and --dtype.",
        ),
        click.option(
            "--speculate",
            type=click.Choice(["off", "ngram", "draft"]),
            help="Guess tokens ahead and check several in one pass, where that is faster; the text is "
            "the same. ngram: from the text so far; draft: by the model of --draft.  [default: draft "
            "with --draft, else off]",
        ),
    ):
        command = option(command)
    return command


SpeculateOption = Literal["off", "ngram", "draft"]


def read_speculate(options: Mapping[str, Any]) -> SpeculateOption:
    """Return how `speculation_options` ask to guess; options that contradict it are refused."""
    path: Path | None = options["draft"]
    method: SpeculateOption = options["speculate"] or ("draft" if path is not None else "off")
    if method == "off" or (method == "ngram" and path is not None):
        idle = [name for name in ("draft", "max_draft") if options[name] is not None]
        idle = idle if method == "off" else ["draft"]
        if idle:
            names = ", ".join("--" + name.replace("_", "-") for name in idle)
            raise OptionError(f"{names} given, but --speculate is {method}. Leave one of them out.")
    if method == "draft" and path is None:
        raise OptionError("--speculate draft needs a model that drafts: give --draft PATH.")
    return method


def plan_drafting(options: Mapping[str, Any], *, batch: int = 1) -> "LoadPlan | None":
    """Return the plan of the model that drafts for up to `batch` sequences; None without one."""
    if read_speculate(options) != "draft":
        return None
    from hanok.memory.planning import plan_draft

    return plan_draft(
        options["draft"],
        max_memory=options["max_memory"],
        context=options["context"],
        batch=batch,
        quant=options["quant"],
        dtype=options["dtype"],
    )


def open_speculation(
    options: Mapping[str, Any], draft_plan: "LoadPlan | None"
) -> "Speculation | None":
    """Return what `speculation_options` ask for, its draft model loaded."""
    method = read_speculate(options)
    if method == "off":
        return None
    from hanok.engine.model import load
    from hanok.engine.speculate import Speculation

    model = None
    if draft_plan is not None:
        model = load(
            plan=draft_plan,
            attn_implementation=options["attention"],
            graphs=options["graphs"],
            threads=options["threads"],
        )
        name = model.checkpoint.folder.name
        click.echo(f"Loaded {name} to draft in {model.report.seconds:.2f} s.", err=True)
    return Speculation(method=method, draft=model, max_tokens=options["max_draft"])


def speculation_line(stream: "TokenStream", speculation: "Speculation | None") -> str:
    """Return what is said of guessed tokens at the end of an answer; nothing where none were."""
    if speculation is None:
        return ""
    counts = stream.speculation
    return f"; {counts.accepted} of {counts.proposed} guessed tokens right, {counts.passes} passes"


def sampling_options(command: Command) -> Command:
    """Add one option for each field of `SamplingParams`."""
    texts = field_texts(SamplingParams)
    for item in reversed(fields(SamplingParams)):
        command = _sampling_option(item, texts[item.name])(command)
    return command


def _sampling_option(item: "Field[Any]", text: str) -> Callable[[Command], Command]:
    name = "--" + item.name.replace("_", "-")
    default = None if item.default is MISSING else item.default
    is_shown = isinstance(default, int | float) and not isinstance(default, bool)
    whose = "the checkpoint's, else " if item.name in GENERATION_CONFIG_FIELDS else ""
    shown = f"  [default: {whose}{default}]" if is_shown else ""
    if item.name == "logit_bias":
        return click.option(
            name, multiple=True, metavar="ID=BIAS", callback=_read_bias, help=f"{text} Repeatable."
        )
    if item.name in MULTIPLE:
        is_ids = item.name.endswith("_ids")
        kind: type = int if is_ids else str
        singular = name.removesuffix("s") if is_ids else name
        return click.option(
            singular, item.name, type=kind, multiple=True, help=f"{text} Repeatable."
        )
    if isinstance(default, bool):
        return click.option(name, is_flag=True, default=None, help=text)
    kind = int if isinstance(default, int) or item.name == "seed" else float
    return click.option(name, type=kind, default=None, help=text + shown)


def _read_bias(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[int, float]:
    found = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not ID=BIAS, for example 42=-5.0") from None
    return found


def use_profile(
    context: click.Context, parameter: click.Parameter, file: Path | None
) -> "Profile | None":
    """Let the options of a profile be the defaults of a verb."""
    if file is None:
        return None
    from hanok.bench.profile import read_profile

    profile = read_profile(file)
    names = {item.name for item in context.command.params}
    unknown = sorted(set(profile.options) - names)
    if unknown:
        raise OptionError(
            f"{file} asks for {', '.join(unknown)}, which `hanok {context.info_name}` has no option "
            "for. Give its other options by hand."
        )
    context.default_map = {**(context.default_map or {}), **profile.options}
    return profile


def check_profile(profile: "Profile | None", path: Path, threads: int | None) -> None:
    """Refuse a profile of another checkpoint, and note one that was made on another machine.

    `threads` is the option of that name: how many there are is a fact of the machine too.
    """
    if profile is None:
        return
    from hanok.bench.machine import machine_facts
    from hanok.bench.profile import check_checkpoint, machine_differences
    from hanok.memory.threads import set_threads

    set_threads(threads)
    check_checkpoint(profile, path)
    for note in machine_differences(profile, machine_facts()):
        click.echo(f"Note: {note}. Run `hanok tune` here to be sure.", err=True)


def read_device_map(
    context: click.Context, parameter: click.Parameter, value: str
) -> str | dict[str, str | int]:
    """Return a device map that was given as a name or as a JSON object."""
    if not value.startswith("{"):
        return value
    try:
        found: dict[str, str | int] = json.loads(value)
    except ValueError as error:
        raise OptionError(f"--device-map {value!r} is not a JSON object: {error}") from error
    return found


def given(options: Mapping[str, Any]) -> SamplingOptions:
    """Return the sampling options that were given on the command line."""
    names = {item.name for item in fields(SamplingParams)}
    chosen: Any = {
        name: value
        for name, value in options.items()
        if name in names and value is not None and value not in ((), {})
    }
    return SamplingOptions(**chosen)  # type: ignore[typeddict-item]


def open_model(path: Path | None, options: Mapping[str, Any]) -> "tuple[Model, Speculation | None]":
    """Load the model of a verb that generates with a progress bar; without a path the bundled one.

    `options` are those of `model_options` and of `speculation_options`: both models are planned before
    one is loaded.
    """
    from hanok.engine.model import load
    from hanok.memory.account import check_head
    from hanok.memory.planning import plan_load

    if path is None:
        click.echo("No model given: using the small one that ships with hanok.", err=True)
        path = BUNDLED
    check_profile(options["profile"], path, options["threads"])
    draft_plan = plan_drafting(options)
    plan = plan_load(
        path,
        device_map=options["device_map"],
        max_memory=options["max_memory"],
        context=options["context"],
        quant=options["quant"],
        dtype=options["dtype"],
        cache_dtype=options["cache_dtype"],
        weights=options["weights"],
        may_measure=False,
        draft=draft_plan,
    )
    check_head(path, has_head=plan.needs.has_head)
    speculation = open_speculation(options, draft_plan)
    with bytes_bar(f"Loading {path.name}") as bar:
        bar.start(sum(tier.weight_bytes for tier in plan.tiers if tier.place.kind != "disk"))
        model = load(
            plan=plan,
            attn_implementation=options["attention"],
            pipeline_depth=options["pipeline_depth"],
            graphs=options["graphs"],
            cache_packed=options["cache_folder"] / "packed" if options["cache_packed"] else None,
            threads=options["threads"],
            progress=bar.advance,
        )
    report = model.report
    planned = size(report.planned_bytes) if report.planned_bytes is not None else "nothing"
    click.echo(
        f"Loaded in {report.seconds:.2f} s: {size(report.mapped_bytes)} stay in their files; beside "
        f"them at most {size(report.peak_bytes)} of memory at once, planned {planned}.",
        err=True,
    )
    for note in model.notes:
        click.echo(note, err=True)
    return model, speculation
