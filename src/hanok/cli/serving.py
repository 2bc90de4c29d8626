"""From a command line to a running server: the plan, printed before loading, then the load."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hanok.checkpoint.adapter_files import open_adapter
from hanok.cli.opening import (
    Plans,
    check_profile,
    open_speculation,
    open_subjects,
    plan_subjects,
)
from hanok.cli.options import Drafting
from hanok.cli.plan_table import plan_facts, print_plan
from hanok.cli.units import size
from hanok.engine.options import EngineOptions
from hanok.errors import OptionError
from hanok.memory.options import LoadOptions
from hanok.memory.plan import LoadPlan

if TYPE_CHECKING:
    from hanok.bench.profile import Profile
    from hanok.engine.engine import Engine
    from hanok.engine.model import Model
    from hanok.server.options import ServerOptions
    from hanok.server.service import Service

MOST_USERS = 64
SHARE_FOR_CACHE = 0.8  # of what is left of the memory: other programs live here too


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is served, and how; every part was checked when it was read."""

    path: Path
    server: "ServerOptions"
    engine: EngineOptions
    load: LoadOptions
    drafting: Drafting
    profile: "Profile | None" = None


def start(asked: Asked) -> int:
    """Plan, print, listen, load and serve; return the exit code."""
    # Imported here: `hanok serve --help` starts without torch.
    from hanok.server.run import listen, serve

    server = asked.server
    plans, users = plan_for(asked)
    try:
        listener = listen(server)
    except OSError as error:
        raise OptionError(
            f"cannot listen on {server.host}:{server.port}: {error.strerror}. Choose another --port "
            "or --host."
        ) from error
    port = listener.getsockname()[1]
    _log_to_stderr(as_json=server.logs_json)
    print_plan(plans.model)
    context = plans.model.needs.context
    click.echo(
        f"Memory for {users * context:,} tokens of keys and values: {users} requests of {context:,} "
        "tokens at a time, more where they are shorter."
    )

    def open_model(service: "Service") -> "tuple[Model, Engine]":
        return _open(service, plans, asked)

    host = f"[{server.host}]" if ":" in server.host else server.host

    def announce() -> None:
        click.echo(f"Listening on http://{host}:{port} as {server.model_id!r}; loading.")
        sys.stdout.flush()

    return serve(server, open_model, listener, announce)


def plan_for(asked: Asked) -> tuple[Plans, int]:
    """Return the plans of a load, and how many requests of the full context they have memory for."""
    subjects = open_subjects(asked.path, asked.drafting)
    check_profile(asked.profile, subjects.model, asked.load.threads)

    adapters = [open_adapter(folder) for folder in asked.server.adapter_folders.values()]

    def planned(users: int) -> Plans:
        options = asked.load.updated(batch=users)
        drafted = min(users, asked.engine.max_running)
        return plan_subjects(subjects, options, drafted=drafted, adapters=adapters)

    users = asked.engine.users or 1
    plans = planned(users)
    if asked.engine.users is None and _is_in_memory(plans.model):
        users = min(MOST_USERS, 1 + _more_users(plans.model))
        plans = planned(users)
        while users > 1 and not _is_in_memory(plans.model):
            users //= 2
            plans = planned(users)
    return plans, users


def _is_in_memory(plan: LoadPlan) -> bool:
    return plan.fits and not plan.uses_disk


def _more_users(plan: LoadPlan) -> int:
    """Return how many more requests fit where keys and values are."""
    counts = []
    for tier in plan.tiers:
        if tier.cache_bytes and tier.place.budget is not None:
            free = tier.place.budget.num_bytes - tier.peak_bytes
            counts.append(int(SHARE_FOR_CACHE * max(0, free) / tier.cache_bytes))
    return min(counts, default=0)


def _open(service: "Service", plans: Plans, asked: Asked) -> "tuple[Model, Engine]":
    from hanok.engine.engine import Engine
    from hanok.engine.model import load

    plan = plans.model
    total = sum(tier.weight_bytes for tier in plan.tiers if tier.place.kind != "disk")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        service.progress = min(1.0, done / max(1, total))

    service.facts["memory_plan"] = plan_facts(plan)
    speculation = open_speculation(asked.drafting, asked.load, plans.draft)
    model = load(plan=plan, progress=advance, **asked.load.unplanned)
    for note in model.notes:
        logging.getLogger("hanok.server").warning("%s", note)
    for name, folder in asked.server.adapter_folders.items():
        model.adapters.load(name, folder)
    made = Engine(
        model,
        max_running=asked.engine.max_running,
        max_step_s=asked.engine.max_step_s,
        speculation=speculation,
    )
    peak = size(model.report.peak_bytes)
    logging.getLogger("hanok.server").info(
        "ready: loaded in %.2f s, at most %s of memory at once", model.report.seconds, peak
    )
    return model, made


def _log_to_stderr(*, as_json: bool) -> None:
    from hanok.server.log import LineFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    requests = logging.getLogger("hanok.requests")
    if as_json:
        lines = logging.StreamHandler()
        lines.setFormatter(logging.Formatter("%(message)s"))
        requests.addHandler(lines)
        requests.propagate = False
    log = logging.getLogger("hanok")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
