"""Options that several verbs share, and how they are read.

Those of loads and of sampling are made from the fields of `LoadOptions` and `SamplingParams`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from hanok.cli.fields import (
    Command,
    Option,
    add_options,
    field_options,
    field_texts,
    field_values,
)
from hanok.engine.params import GENERATION_CONFIG_FIELDS, SamplingOptions, SamplingParams
from hanok.errors import OptionError
from hanok.memory.options import DTYPES, PLANNED, DeviceMap, LoadOptions, read_device_map

if TYPE_CHECKING:
    from hanok.bench.profile import Profile

# Named otherwise on the command line, where one value is given at a time.
MULTIPLE = ("stop", "stop_token_ids", "spelled_token_ids", "logit_bias")


def _read_device_map(context: click.Context, parameter: click.Parameter, value: str) -> DeviceMap:
    return read_device_map(value)


LOAD_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "dtype": {"type": click.Choice(DTYPES)},
    "quant": {"metavar": "METHOD[:OPTION=VALUE,…]"},
    "device_map": {"callback": _read_device_map},
    "max_memory": {"metavar": "DEVICE=SIZE,…"},
    "attn_implementation": {"flag": "--attention"},
}
"""How fields of `LoadOptions` differ on the command line; the others need no line here."""


def model_options(*, without: Sequence[str] = ()) -> Callable[[Command], Command]:
    """Return what adds the options of loading a model, all but some."""
    # A generation is one sequence, and a folder of packed weights is a flag and the cache folder.
    unused = ("batch", "cache_packed", *without)
    options = [
        click.option(
            "--profile",
            type=click.Path(path_type=Path, dir_okay=False),
            is_eager=True,
            callback=use_profile,
            help="Options that `hanok tune` found; options given explicitly take precedence.",
        ),
        *field_options(LoadOptions, LOAD_OPTIONS, without=unused),
        click.option(
            "--cache-packed",
            is_flag=True,
            help="Keep the quantized weights in the cache folder, and read them from there next time.",
        ),
        cache_folder_option("packed weights are"),
    ]
    return lambda command: add_options(command, options)


def some_load_options(*names: str, **own: Mapping[str, Any]) -> Callable[[Command], Command]:
    """Return what adds some options of a load; `own` has what differs for a verb."""
    options = field_options(LoadOptions, {**LOAD_OPTIONS, **own}, only=names)
    return lambda command: add_options(command, options)


def adapter_option(command: Command) -> Command:
    """Add the option of an adapter for all that a verb generates."""
    return click.option(
        "--adapter",
        type=click.Path(path_type=Path, file_okay=False),
        help="Generate with this LoRA adapter over the model, a folder in PEFT's format.",
    )(command)


def plan_options(command: Command) -> Command:
    """Add the options that a load is planned with."""
    return some_load_options(*PLANNED)(command)


def cache_folder_option(what: str) -> Option:
    """Return the option of the folder for what hanok keeps between runs."""
    return click.option(
        "--cache-folder",
        type=click.Path(path_type=Path),
        envvar="HANOK_CACHE",
        default=Path.home() / ".cache" / "hanok",
        show_default="~/.cache/hanok",
        show_envvar=True,
        help=f"Where {what} kept.",
    )


def load_options(options: Mapping[str, Any]) -> LoadOptions:
    """Return what the options of `model_options` say."""
    found = field_values(LoadOptions, options)
    found["cache_packed"] = options["cache_folder"] / "packed" if options["cache_packed"] else None
    return LoadOptions(**found)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """How tokens are guessed, before a draft model is loaded; contradictions are an OptionError."""

    method: SpeculateOption = "off"
    draft: Path | None = None
    """The model that drafts."""
    max_tokens: int | None = None
    """Tokens guessed for one pass at the most; None: what suits the method."""

    def __post_init__(self) -> None:
        idle = []
        if self.method == "off":
            idle = [("--draft", self.draft), ("--max-draft", self.max_tokens)]
        elif self.method == "ngram":
            idle = [("--draft", self.draft)]
        names = ", ".join(name for name, value in idle if value is not None)
        if names:
            raise OptionError(
                f"{names} given, but --speculate is {self.method}. Leave one of them out."
            )
        if self.method == "draft" and self.draft is None:
            raise OptionError("--speculate draft needs a model that drafts: give --draft PATH.")


def read_drafting(options: Mapping[str, Any]) -> Drafting:
    """Return what the options of `speculation_options` say."""
    path: Path | None = options["draft"]
    method: SpeculateOption = options["speculate"] or ("draft" if path is not None else "off")
    return Drafting(method=method, draft=path, max_tokens=options["max_draft"])


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
    # A profile names options as the command line does.
    names = {
        flag.lstrip("-").replace("-", "_"): item.name
        for item in context.command.params
        for flag in (*item.opts, *item.secondary_opts)
    }
    unknown = sorted(set(profile.options) - set(names))
    if unknown:
        raise OptionError(
            f"{file} asks for {', '.join(unknown)}, which `hanok {context.info_name}` has no option "
            "for. Give its other options by hand."
        )
    chosen = {names[name]: value for name, value in profile.options.items()}
    context.default_map = {**(context.default_map or {}), **chosen}
    return profile


def given(options: Mapping[str, Any]) -> SamplingOptions:
    """Return the sampling options that were given on the command line."""
    chosen: Any = {
        name: value
        for name, value in field_values(SamplingParams, options).items()
        if value is not None and value not in ((), {})
    }
    return SamplingOptions(**chosen)  # type: ignore[typeddict-item]  # its keys are the fields
