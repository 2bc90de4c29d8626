"""The processes of a benchmark, one for each load: started when needed, ended when memory is short."""

import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hanok.bench.settings import Load, Setting
from hanok.errors import BudgetError, DeadlineError, GenerationError, RequestError
from hanok.memory.options import CacheDtype, LoadOptions
from hanok.memory.plan import LoadPlan
from hanok.memory.planning import plan_draft, plan_load

Request = dict[str, Any]
LAST_LINES = 1500  # characters of what a process said before it ended
EXIT_WAIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all loads of a run share."""

    path: Path
    draft: Path | None
    threads: int | None
    max_memory: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a load must have memory for."""

    context: int
    batch: int


class Process:
    """A process that answers requests (`bench.worker`)."""

    def __init__(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hanok.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
        )

    @property
    def has_ended(self) -> bool:
        """Whether it can answer nothing more."""
        return self._process.poll() is not None

    def ask(self, kind: str, *, limit_s: float | None = None, **request: Any) -> dict[str, Any]:
        """Return the answer to a request; RequestError with its reason where it was refused.

        A process that has not answered within `limit_s` is ended: DeadlineError.
        """
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process has no pipes")
        try:
            process.stdin.write(json.dumps({"do": kind, **request}) + "\n")
            process.stdin.flush()
            # Nothing is left of an earlier answer: each is one line, and was read whole.
            if limit_s is not None and not select.select([process.stdout], [], [], limit_s)[0]:
                process.kill()
                process.wait()
                raise DeadlineError(f"had not answered after {limit_s:.2g} s")
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = process.wait()
            self._said.seek(0)
            said = self._said.read().decode(errors="replace")[-LAST_LINES:].strip()
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            raise GenerationError(f"the process that measures {how}. {said}".strip())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RequestError(str(answer["error"]))
        return answer

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


class LoadedProcess(Process):
    """A process with a model, and what it reported about loading it."""

    def __init__(self, request: Request, limit_s: float | None = None) -> None:
        start = time.perf_counter()
        super().__init__()
        self._settings: dict[str, Any] | None = None
        try:
            self.told = self.ask("load", limit_s=limit_s, **request)
        except BaseException:
            self.close()
            raise
        self.seconds = time.perf_counter() - start

    def use(self, setting: Setting) -> None:
        """Choose what is chosen without loading again."""
        chosen = chosen_settings(setting)
        if self._settings != chosen:
            self.ask("use", **chosen)
            self._settings = chosen


def chosen_settings(setting: Setting) -> dict[str, Any]:
    """Return the parts of a setting that a loaded model can switch."""
    names = ("attention", "cache_dtype", "graphs")
    return {name: getattr(setting, name) for name in names}


class Workers:
    """The processes that are alive; those asked for least recently end when another needs memory."""

    def __init__(self, options: Shared, rooms: Mapping[Load, Capacity]) -> None:
        self._options = options
        self._rooms = rooms
        self._alive: dict[Load, LoadedProcess] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close_all()

    def get(self, load: Load, limit_s: float | None = None) -> LoadedProcess:
        """Return the process of a load, started if it is not there, or has ended.

        DeadlineError where the model is not there within `limit_s`.
        """
        if load in self._alive and self._alive[load].has_ended:
            self.close(load)
        if load in self._alive:
            worker = self._alive.pop(load)
        else:
            while self._alive and not self._fits(load):
                self.close(next(iter(self._alive)))
            worker = LoadedProcess(self.load_request(load), limit_s)
        self._alive[load] = worker  # the last of the dictionary is the one used most recently
        return worker

    def load_request(self, load: Load) -> Request:
        """Return the load request for a process."""
        options = self._options
        return {
            "path": str(options.path),
            "draft": str(options.draft) if load.has_draft else None,
            "options": asdict(options_of(options, load, self._rooms[load])),
        }

    def close(self, load: Load) -> None:
        """End the process of a load, if it is there."""
        worker = self._alive.pop(load, None)
        if worker is not None:
            worker.close()

    def close_all(self) -> None:
        """End all processes."""
        for load in list(self._alive):
            self.close(load)

    def _fits(self, load: Load) -> bool:
        """Return whether there is memory for one more process besides the running ones."""
        room = self._rooms[load]
        try:
            plan = planned(self._options, load, room)
        except BudgetError:  # of a draft model
            return False
        return plan.fits and not plan.uses_disk


def options_of(
    shared: Shared, load: Load, room: Capacity, cache_dtype: CacheDtype = "auto"
) -> LoadOptions:
    """Return how a process loads: copied, or what moves after the first answer would be measured."""
    return LoadOptions(
        dtype=load.dtype,
        quant=load.recipe,
        weights="copied",
        cache_dtype=cache_dtype,
        device_map=load.places,
        max_memory=shared.max_memory,
        context=room.context,
        batch=room.batch,
        threads=shared.threads,
    )


def planned(
    shared: Shared, load: Load, room: Capacity, cache_dtype: CacheDtype = "auto"
) -> LoadPlan:
    """Return the plan of a load in a separate process, with its draft model if it has one."""
    options = options_of(shared, load, room, cache_dtype)
    draft = None
    if load.has_draft and shared.draft is not None:
        draft = plan_draft(shared.draft, is_running=False, **options.for_draft().planned)
    return plan_load(
        shared.path, may_measure=False, is_running=False, draft=draft, **options.planned
    )
