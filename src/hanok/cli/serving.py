"""From a command line to a running server: the plan, printed before loading, then the load."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hanok.cli.options import check_profile, open_speculation, plan_drafting, read_speculate
from hanok.cli.plan_table import plan_facts, print_plan
from hanok.cli.units import size
from hanok.errors import OptionError
from hanok.memory.plan import LoadPlan

if TYPE_CHECKING:
    from hanok.engine.engine import Engine
    from hanok.engine.model import Model
    from hanok.server.options import ServerOptions
    from hanok.server.service import Service

MOST_USERS = 64
SHARE_FOR_CACHE = 0.8  # of what is left of the memory: other programs live here too


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How the engine of a server is made."""

    users: int | None
    """Requests of the full context to have memory for; None: what fits."""
    max_running: int
    max_step_s: float


def start(
    path: Path, server: "ServerOptions", engine: EngineOptions, load: Mapping[str, Any]
) -> int:
    """Plan, print, listen, load and serve; return the exit code.

    `load` are the options of a verb that loads (`model_options`) and guesses (`speculation_options`).
    """
    # Imported here: `hanok serve --help` starts without torch.
    from hanok.memory.account import check_head
    from hanok.server.run import listen, serve

    check_profile(load["profile"], path, load["threads"])
    plans, users = plan_for(path, engine, load)
    if read_speculate(load) != "off":
        check_head(path, has_head=plans.model.needs.has_head)
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
        return _open(service, plans, engine, load)

    host = f"[{server.host}]" if ":" in server.host else server.host

    def announce() -> None:
        click.echo(f"Listening on http://{host}:{port} as {server.model_id!r}; loading.")
        sys.stdout.flush()

    return serve(server, open_model, listener, announce)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans:
    """Of the model, and of one that drafts beside it."""

    model: LoadPlan
    draft: LoadPlan | None


def plan_for(path: Path, engine: EngineOptions, load: Mapping[str, Any]) -> tuple[Plans, int]:
    """Return the plans of a load, and how many requests of the full context they have memory for."""
    users = engine.users or 1
    plans = _planned(path, users, engine, load)
    if engine.users is None and _is_in_memory(plans.model):
        users = min(MOST_USERS, 1 + _more_users(plans.model))
        plans = _planned(path, users, engine, load)
        while users > 1 and not _is_in_memory(plans.model):
            users //= 2
            plans = _planned(path, users, engine, load)
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


def _planned(path: Path, users: int, engine: EngineOptions, load: Mapping[str, Any]) -> Plans:
    from hanok.memory.planning import plan_load

    draft = plan_drafting(load, batch=min(users, engine.max_running))
    model = plan_load(
        path,
        device_map=load["device_map"],
        max_memory=load["max_memory"],
        context=load["context"],
        batch=users,
        quant=load["quant"],
        dtype=load["dtype"],
        cache_dtype=load["cache_dtype"],
        weights=load["weights"],
        may_measure=False,
        draft=draft,
    )
    return Plans(model=model, draft=draft)


def _open(
    service: "Service", plans: Plans, engine: EngineOptions, load: Mapping[str, Any]
) -> "tuple[Model, Engine]":
    import hanok

    plan = plans.model
    total = sum(tier.weight_bytes for tier in plan.tiers if tier.place.kind != "disk")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        service.progress = min(1.0, done / max(1, total))

    service.facts["memory_plan"] = plan_facts(plan)
    speculation = open_speculation(load, plans.draft)
    model = hanok.load(
        plan=plan,
        attn_implementation=load["attention"],
        graphs=load["graphs"],
        cache_packed=load["cache_folder"] / "packed" if load["cache_packed"] else None,
        threads=load["threads"],
        progress=advance,
    )
    for note in model.notes:
        logging.getLogger("hanok.server").warning("%s", note)
    made = hanok.Engine(
        model,
        max_running=engine.max_running,
        max_step_s=engine.max_step_s,
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
