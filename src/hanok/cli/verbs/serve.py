"""`hanok serve`: put a model on a port."""

from pathlib import Path
from typing import Any

import click

from hanok import BUNDLED
from hanok.cli.options import model_options, speculation_options
from hanok.errors import OptionError


@click.command("serve", short_help="Put a model on a port, over TGI's and OpenAI's protocols.")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", default=8080, show_default=True, help="0 takes a free one.")
@click.option(
    "--model-name",
    multiple=True,
    help="What clients call the model. Repeatable: answers have the first.  "
    "[default: the path's last name]",
)
@click.option(
    "--api-key",
    envvar="HANOK_API_KEY",
    help="Key that requests for tokens must bring, as `Authorization: Bearer KEY`.  "
    "[default: HANOK_API_KEY, else none]",
)
@click.option(
    "--users",
    type=click.IntRange(1),
    help="Requests of the full context to have memory for.  [default: what fits, at most 64]",
)
@click.option(
    "--max-running",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Requests computed at a time.",
)
@click.option(
    "--max-concurrent-requests",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Requests waiting or running; beyond them clients get 429.",
)
@click.option(
    "--max-queue-seconds",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Expected time before a request begins, beyond which clients get 429.",
)
@click.option(
    "--max-step-seconds",
    type=click.FloatRange(0, min_open=True),
    default=0.25,
    show_default=True,
    help="What a step with a part of a prompt should take, while others wait for their next token.",
)
@click.option("--max-best-of", type=click.IntRange(1), default=2, show_default=True)
@click.option("--max-stop-sequences", type=click.IntRange(0), default=4, show_default=True)
@click.option("--max-client-batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option(
    "--pooling",
    type=click.Choice(["last", "mean"]),
    help="What an embedding is made of: the hidden state of the last token, or the mean of all.  "
    "[default: as the checkpoint says, else last]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    help="Seconds of a request that names no timeout.  [default: none]",
)
@click.option(
    "--termination-seconds",
    type=click.FloatRange(0),
    default=90.0,
    show_default=True,
    help="How long requests may go on after SIGTERM.",
)
@click.option("--cors-allow-origin", multiple=True, help="Repeatable.  [default: any origin]")
@click.option("--json-log", is_flag=True, help="Write the log as JSON lines.")
@speculation_options
@model_options
def command(path: Path | None, **options: Any) -> None:
    """Serve a model: hanok serve [PATH].

    Both protocols, metrics, health and a page to chat on are at one port; GET /docs lists the routes.
    The memory plan is printed before anything is loaded. SIGTERM lets requests finish, then exits.
    """
    from hanok.cli.serving import EngineOptions, start
    from hanok.server.options import ServerOptions

    if path is None:
        click.echo("No model given: using the small one that ships with hanok.", err=True)
        path = BUNDLED
    elif not path.exists():
        raise OptionError(f"{path}: no such file or folder. Check the path.")
    names = tuple(dict.fromkeys(options["model_name"])) or (path.resolve().name,)
    if not all(names):
        raise OptionError("--model-name is empty. Give the name that clients ask for.")
    server = ServerOptions(
        model_id=names[0],
        other_names=names[1:],
        host=options["host"],
        port=options["port"],
        api_key=options["api_key"] or None,
        cors_allow_origins=options["cors_allow_origin"] or ("*",),
        max_concurrent_requests=options["max_concurrent_requests"],
        max_queue_s=options["max_queue_seconds"],
        max_best_of=options["max_best_of"],
        max_stop_sequences=options["max_stop_sequences"],
        max_client_batch_size=options["max_client_batch_size"],
        pooling=options["pooling"],
        timeout_s=options["timeout"],
        termination_s=options["termination_seconds"],
        logs_json=options["json_log"],
    )
    engine = EngineOptions(
        users=options["users"],
        max_running=options["max_running"],
        max_step_s=options["max_step_seconds"],
    )
    raise SystemExit(start(path, server, engine, options))


COMMAND = command
