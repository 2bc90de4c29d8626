"""`hanok tgi`: text-generation-launcher's command line, so that an alias is enough."""

import ipaddress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from hanok.cli.fields import field_values
from hanok.cli.options import Drafting, SpeculateOption
from hanok.cli.progress import bytes_bar
from hanok.engine.options import MAX_RUNNING, EngineOptions
from hanok.memory.options import LoadOptions
from hanok.package import BUNDLED, __version__
from hanok.server.launcher import FLAGS, Flag, LaunchOptions, launch_options
from hanok.server.options import ServerOptions

PORTS = 65535


def serve(launch: LaunchOptions) -> int:
    """Fetch the model and serve it until SIGTERM or SIGINT; return the exit code."""
    from hanok.checkpoint.download import fetch
    from hanok.cli.serving import Asked, start

    folder = BUNDLED
    if launch.model is not None:
        with bytes_bar(f"Converting {launch.model}") as bar:
            folder = fetch(
                launch.model,
                revision=launch.revision,
                cache_folder=launch.hub_cache,
                progress=bar.advance,
                on_start=bar.start,
            ).folder
    users = None
    if launch.max_batch_total_tokens is not None and launch.max_total_tokens is not None:
        users = max(1, launch.max_batch_total_tokens // launch.max_total_tokens)
    return start(
        Asked(
            path=folder,
            server=server_options(launch, folder),
            engine=EngineOptions(users=users, max_running=launch.max_batch_size or MAX_RUNNING),
            load=load_options(launch),
            drafting=drafting_of(launch),
        )
    )


def server_options(launch: LaunchOptions, folder: Path) -> ServerOptions:
    """Return a start's options as the server's: those of the same names, the others by default."""
    given = field_values(ServerOptions, asdict(launch))
    given["cors_allow_origins"] = launch.cors_allow_origins or ("*",)
    return ServerOptions(model_id=launch.model or folder.name, **given)


def load_options(launch: LaunchOptions) -> LoadOptions:
    """Return a start's options as those of a load; what TGI has no flag for is as by default."""
    return LoadOptions(
        context=launch.max_total_tokens,
        quant=launch.quant,
        dtype=launch.dtype,
        cache_dtype=launch.cache_dtype,
    )


def drafting_of(launch: LaunchOptions) -> Drafting:
    """Return how a start's options let tokens be guessed: from the text, so many for a pass."""
    method: SpeculateOption = "ngram" if launch.speculate else "off"
    return Drafting(method=method, max_tokens=launch.speculate or None)


@click.group(
    "tgi",
    invoke_without_command=True,
    short_help="Serve a model with text-generation-launcher's flags.",
)
@click.version_option(__version__, "-V", "--version", prog_name="hanok tgi")
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Serve a model; every flag and variable of text-generation-launcher is accepted.

    alias text-generation-launcher='hanok tgi' text-generation-server='hanok tgi'

    A flag goes before the variable of the same name: --max-best-of before MAX_BEST_OF.
    """
    if context.invoked_subcommand is not None:
        return
    given = {name: value for name, value in options.items() if _was_given(value)}
    notes = []
    if _is_name_of_machine(context, given.get("hostname")):
        # Shells and containers set it to the name of the machine, never on purpose.
        notes.append(
            f"HOSTNAME={given.pop('hostname')} in the environment is not an address: using 0.0.0.0."
        )
    launch = launch_options(given)
    for note in (*notes, *launch.notes):
        click.echo(f"hanok: {note}", err=True)
    raise SystemExit(serve(launch))


def _was_given(value: Any) -> bool:
    return value is not None and value is not False and value != ()


def _is_name_of_machine(context: click.Context, hostname: str | None) -> bool:
    if hostname is None:
        return False
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return context.get_parameter_source("hostname") is ParameterSource.ENVIRONMENT
    return False


def _option(flag: Flag) -> click.Option:
    text = f"Ignored: {flag.ignored}." if flag.ignored is not None else flag.text
    if flag.default is not None:
        text += f"  [default: {flag.default}]"
    return click.Option(
        [flag.option, *([flag.short] if flag.short else []), flag.name],
        type=_type(flag),
        is_flag=flag.kind == "switch",
        multiple=flag.is_repeatable,
        default=None,
        envvar=flag.name.upper() if flag.has_variable else None,
        show_envvar=flag.has_variable,
        help=text,
    )


def _type(flag: Flag) -> click.ParamType[Any] | None:
    if flag.kind == "choice":
        return click.Choice(flag.choices)
    if flag.kind == "integer":
        return click.IntRange(flag.minimum, PORTS if flag.name.endswith("port") else None)
    if flag.kind == "number":
        return click.FLOAT
    if flag.kind == "numbers":
        return Numbers()
    return click.BOOL if flag.kind == "switch" else click.STRING


class Numbers(click.ParamType["tuple[int, ...]"]):
    """Whole numbers with commas between them."""

    name = "n,n,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the numbers; a usage error for anything else."""
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,2,4", param, ctx)


command.params.extend(_option(flag) for flag in FLAGS)


@command.command("download-weights", short_help="Download a model, and make it safetensors.")
@click.argument("model")
@click.option("--revision", envvar="REVISION", help="Branch, tag or commit.  [default: main]")
@click.option(
    "--extension",
    type=click.Choice([".safetensors"]),
    default=".safetensors",
    show_default=True,
    help="Format of the weights.",
)
@click.option(
    "--auto-convert/--no-auto-convert",
    default=True,
    show_default=True,
    help="Convert .bin and .pt weights.",
)
@click.option(
    "--huggingface-hub-cache",
    type=click.Path(path_type=Path),
    envvar="HUGGINGFACE_HUB_CACHE",
    help="Folder that downloads are kept in.",
)
@click.option("--trust-remote-code", is_flag=True, help="Ignored: no code of a model is run.")
@click.option("--merge-lora", is_flag=True, help="Refused: adapters are not merged yet.")
@click.option("--logger-level", default="INFO", help="Ignored.")
@click.option("--json-output", is_flag=True, help="Ignored.")
def download_weights(
    model: str, revision: str | None, auto_convert: bool, merge_lora: bool, **options: Any
) -> None:
    """Bring MODEL here, a folder or a name on the hub, with its weights as safetensors.

    Weights that are pickles are converted without running code in them; what was written is read back
    and compared. A second run finds the work done.
    """
    from hanok.checkpoint.download import fetch

    if merge_lora:
        raise click.UsageError(
            "--merge-lora: hanok does not merge adapters yet. Merge it elsewhere, and give the result."
        )
    with bytes_bar(f"Converting {model}") as bar:
        fetched = fetch(
            model,
            revision=revision,
            cache_folder=options["huggingface_hub_cache"],
            may_convert=auto_convert,
            progress=bar.advance,
            on_start=bar.start,
        )
    if fetched.was_present:
        click.echo("Files are already present on the host. Skipping download.")
    elif fetched.report is None:
        click.echo(f"Downloaded to {fetched.folder}.")
    else:
        names = ", ".join(str(file) for file in fetched.report.files)
        click.echo(
            f"Converted {fetched.report.num_tensors} tensors to {names}; read back and equal."
        )


COMMAND = command
