"""`hanok serve`: put a model on a port."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hanok.cli.fields import Command, add_options, field_options, field_values
from hanok.cli.options import load_options, model_options, read_drafting, speculation_options
from hanok.engine.options import EngineOptions
from hanok.errors import OptionError
from hanok.package import BUNDLED
from hanok.server.options import ServerOptions

SERVER_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "api_key": {"envvar": "HANOK_API_KEY", "show_envvar": True},
    "adapters": {"flag": "--adapter", "metavar": "NAME=FOLDER"},
    "adapters_below": {"metavar": "FOLDER"},
    "cors_allow_origins": {"flag": "--cors-allow-origin"},
    "timeout_s": {"flag": "--timeout"},
    "logs_json": {"flag": "--json-log"},
}
"""How fields of `ServerOptions` differ on the command line; the others need no line here."""
NAMES = ("model_id", "other_names")  # --model-name gives both


def server_options(command: Command) -> Command:
    """Add the options of a server and its engine."""
    options = [
        click.option(
            "--model-name",
            multiple=True,
            help="What clients call the model. Repeatable: answers have the first.  "
            "[default: the path's last name]",
        ),
        *field_options(EngineOptions, {}),
        *field_options(ServerOptions, SERVER_OPTIONS, without=NAMES),
    ]
    return add_options(command, options)


def _refuse_pipeline(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
    if value is not None:
        raise OptionError(
            f"--pipeline-depth {value}: a server has no groups of sequences under way. Its engine puts "
            "the tokens of all requests into one pass, which goes from device to device. Leave it out; "
            "`hanok generate` and hanok.load take it."
        )


@click.command("serve", short_help="Put a model on a port, over TGI's and OpenAI's protocols.")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@server_options
@speculation_options
@model_options(without=["pipeline_depth"])
@click.option(
    "--pipeline-depth", type=int, callback=_refuse_pipeline, expose_value=False, hidden=True
)
def command(path: Path | None, **options: Any) -> None:
    """Serve a model: hanok serve [PATH].

    Both protocols, metrics, health and a page to chat on are at one port; GET /docs lists the routes.
    The memory plan is printed before anything is loaded. SIGTERM lets requests finish, then exits.
    """
    from hanok.cli.serving import Asked, start

    if path is None:
        click.echo("No model given: using the small one that ships with hanok.", err=True)
        path = BUNDLED
    elif not path.exists():
        raise OptionError(f"{path}: no such file or folder. Check the path.")
    names = tuple(dict.fromkeys(options["model_name"])) or (path.resolve().name,)
    if not all(names):
        raise OptionError("--model-name is empty. Give the name that clients ask for.")
    given = field_values(ServerOptions, options)
    given["api_key"] = options["api_key"] or None
    given["cors_allow_origins"] = options["cors_allow_origins"] or ("*",)
    asked = Asked(
        path=path,
        server=ServerOptions(model_id=names[0], other_names=names[1:], **given),
        engine=EngineOptions(**field_values(EngineOptions, options)),
        load=load_options(options),
        drafting=read_drafting(options),
        profile=options["profile"],
    )
    raise SystemExit(start(asked))


COMMAND = command
