"""The options of a load: one list of them, the same in Python, on the command line and in benchmarks."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import hanok
from hanok.bench.settings import Axes, Load, Setting
from hanok.bench.workers import Capacity, Shared, options_of
from hanok.checkpoint import files
from hanok.cli.main import cli
from hanok.cli.options import load_options
from hanok.cli.serving import Asked, plan_for
from hanok.engine.options import EngineOptions
from hanok.errors import OptionError
from hanok.memory import account, planning
from hanok.memory.options import PLANNED, LoadArguments, LoadOptions, PlanArguments
from hanok.server.options import ServerOptions

NAMES = {item.name for item in fields(LoadOptions)}
OTHERS: dict[str, Any] = {
    "dtype": "float32",
    "quant": "int4",
    "weights": "copied",
    "cache_dtype": "int8",
    "device_map": "cpu",
    "max_memory": "cpu=1GiB",
    "context": 8,
    "batch": 2,
    "attn_implementation": "eager",
    "graphs": False,
    "pipeline_depth": 2,
    "cache_packed": Path("kept"),
    "threads": 1,
}


def options_of_verb(name: str) -> dict[str, Any]:
    command = cli.get_command(None, name)  # type: ignore[arg-type]  # needs no context
    assert command is not None
    return {item.name or "": item for item in command.params}


def test_python_takes_every_option_with_its_type() -> None:
    assert set(LoadArguments.__annotations__) == NAMES == set(OTHERS)
    assert set(PlanArguments.__annotations__) == set(PLANNED)
    options = LoadOptions(**OTHERS)
    assert {**options.planned, **options.unplanned} == OTHERS


@pytest.mark.parametrize("verb", ["generate", "chat", "serve"])
def test_the_command_line_has_every_option_of_a_load(verb: str) -> None:
    found = options_of_verb(verb)
    # Memory for several sequences: serve asks for users. It computes no pipeline.
    unused = {"batch"} | ({"pipeline_depth"} if verb == "serve" else set())
    shown = {name for name, item in found.items() if not getattr(item, "hidden", False)}
    assert shown >= NAMES - unused
    assert not unused & shown


def test_serve_has_every_option_of_a_server_and_its_engine() -> None:
    found = options_of_verb("serve")
    names = {item.name for owner in (ServerOptions, EngineOptions) for item in fields(owner)}
    assert set(found) >= names - {"model_id", "other_names"} | {"model_name"}


def refusal(*arguments: str) -> str:
    found = CliRunner().invoke(cli, arguments)
    assert isinstance(found.exception, OptionError)
    return str(found.exception)


def test_a_server_says_why_it_takes_no_pipeline_depth() -> None:
    said = refusal("serve", "--pipeline-depth", "2")
    assert "--pipeline-depth 2: a server has no groups of sequences under way" in said


def test_an_engine_refuses_a_model_that_was_loaded_with_a_pipeline_depth() -> None:
    model = hanok.load(hanok.BUNDLED, pipeline_depth=2)
    with pytest.raises(OptionError, match="loaded with pipeline_depth=2, which an engine does not"):
        hanok.Engine(model)


@pytest.mark.parametrize("verb", ["generate", "plan", "quality"])
def test_a_device_map_that_is_no_json_is_refused_by_every_verb(verb: str) -> None:
    assert """device_map '{"model"' is not a JSON object""" in refusal(
        verb, "--device-map", '{"model"'
    )


def test_a_grid_refuses_a_device_map_that_is_no_json() -> None:
    with pytest.raises(OptionError, match="is not a JSON object"):
        _ = Load(dtype="auto", quant="none", device_map="{1", has_draft=False).places


def test_a_draft_is_planned_with_the_options_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = planning.plan_draft
    seen: list[dict[str, Any]] = []

    def noted(path: Path, **options: Any) -> Any:
        seen.append(options)
        return planned(path, **options)

    monkeypatch.setattr(planning, "plan_draft", noted)
    options = ["--draft", str(hanok.BUNDLED), "--weights", "copied", "--cache-dtype", "int8"]
    assert CliRunner().invoke(cli, ["plan", *options, "--quant", "int8"]).exit_code == 0
    (given,) = seen
    assert (given["weights"], given["quant"], given["cache_dtype"]) == ("copied", "int8", "auto")


def test_a_plan_has_every_option_it_is_made_with() -> None:
    assert set(options_of_verb("plan")) >= set(PLANNED)


@pytest.mark.parametrize("name", sorted(NAMES - {"batch"}))
def test_what_a_verb_is_given_arrives(name: str) -> None:
    given = {item: getattr(LoadOptions(), item) for item in NAMES}
    given |= {name: OTHERS[name], "cache_folder": Path("folder")}
    given["cache_packed"] = name == "cache_packed"
    expected = Path("folder/packed") if name == "cache_packed" else OTHERS[name]
    assert load_options(given) == replace(LoadOptions(), **{name: expected})


def test_axes_of_a_benchmark_are_options_of_a_load_or_of_a_question() -> None:
    renamed = {"attention": "attn_implementation"}
    axes = {renamed.get(item.name, item.name) for item in fields(Axes)}
    asked = {"prompt_tokens", "new_tokens", "cache", "speculation"}
    assert axes - asked <= NAMES
    load = Load(dtype="float32", quant="int4", device_map="cpu", has_draft=False)
    shared = Shared(path=Path(), draft=None, threads=1, max_memory="cpu=1GiB")
    found = options_of(shared, load, Capacity(context=8, batch=2), "int8")
    chosen = ("attn_implementation", "graphs", "pipeline_depth", "cache_packed")  # without a load
    assert found == replace(
        LoadOptions(**OTHERS), **{name: getattr(LoadOptions(), name) for name in chosen}
    )
    assert Setting().load.recipe is None


@pytest.mark.parametrize(("name", "value"), [("quant", "int4"), ("dtype", "auto"), ("batch", 1)])
def test_an_option_that_a_plan_has_decided_is_refused_beside_it(name: str, value: Any) -> None:
    plan = hanok.plan_load(hanok.BUNDLED, may_measure=False)
    with pytest.raises(OptionError, match=f"{name} given with a plan"):
        hanok.load(plan=plan, **{name: value})


def test_options_that_no_load_could_have_are_refused_with_what_could_be_meant() -> None:
    with pytest.raises(OptionError, match="no option 'quantt'; did you mean 'quant'"):
        hanok.load(hanok.BUNDLED, quantt="int4")  # type: ignore[call-arg]
    with pytest.raises(OptionError, match=r"weights 'map' is unknown\. Choose one of: mapped"):
        LoadOptions(weights="map")  # type: ignore[arg-type]
    for name in ("context", "batch", "pipeline_depth", "threads"):
        with pytest.raises(OptionError, match=f"{name} is 0; it must be at least 1"):
            LoadOptions(**{name: 0})
    with pytest.raises(OptionError, match="max_running is 0"):
        EngineOptions(max_running=0)
    with pytest.raises(OptionError, match="max_queue_s is 0"):
        ServerOptions(model_id="a", max_queue_s=0)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is opened and read of checkpoints, in turn."""
    seen: list[str] = []
    for module, name in (
        (planning, "open_checkpoint"),
        (planning, "read_object"),
        (account, "read_config"),
        (files, "read_object"),
    ):
        original = getattr(module, name)

        def noted(*args: Any, name: str = name, original: Any = original) -> Any:
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(module, name, noted)
    return seen


def test_a_checkpoint_is_opened_and_its_config_read_once_for_a_load(opened: list[str]) -> None:
    hanok.load(hanok.BUNDLED)
    assert opened.count("open_checkpoint") == opened.count("read_config") == 1


def test_a_server_opens_each_of_its_checkpoints_once_for_all_its_plans(
    opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hanok.cli.options import Drafting

    plans: list[object] = []
    original = planning.plan_load
    monkeypatch.setattr(
        planning, "plan_load", lambda *args, **how: (plans.append(args), original(*args, **how))[1]
    )
    asked = Asked(
        path=hanok.BUNDLED,
        server=ServerOptions(model_id="a"),
        engine=EngineOptions(),
        load=LoadOptions(),
        drafting=Drafting(method="draft", draft=hanok.BUNDLED),
    )
    plan_for(asked)
    assert len(plans) > 2
    assert opened.count("open_checkpoint") == opened.count("read_config") == 2


def test_a_plan_with_a_gpu_leaves_the_host_room_for_its_libraries() -> None:
    device = ["memory=8GiB,bandwidth=1000GB/s"]
    host = hanok.plan_load(hanok.BUNDLED, may_measure=False).tiers[0].place
    plan = hanok.plan_load(hanok.BUNDLED, may_measure=False, devices=device)
    beside = next(tier.place for tier in plan.tiers if tier.place.kind == "cpu")
    assert beside.runtime_bytes - host.runtime_bytes == planning.GPU_LIBRARY_BYTES
