"""Adapters over HTTP: chosen by OpenAI's `model` and TGI's `adapter_id`, in one batch with others."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from tests.engine.test_adapters import written
from tests.server.conftest import LocalServer, Server, local_server, running

import hanok
from hanok.errors import OptionError
from hanok.server.launcher import launch_options
from hanok.server.options import ServerOptions

PROMPT = "Once upon a time"
NAMES = ("tales", "one", "two")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": written(folder / "one", 1, ("q_proj", "v_proj")),
        "two": written(folder / "two", 2, ("o_proj", "down_proj", "up_proj")),
    }


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[Server]:
    adapters = [f"--adapter={name}={folder}" for name, folder in folders.items()]
    with running("--model-name", "tales", *adapters) as found:
        yield found


@pytest.fixture
def client(served: Server) -> Iterator[httpx.Client]:
    with served.client() as found:
        yield found


@pytest.fixture(scope="module")
def texts(folders: dict[str, Path]) -> dict[str, str]:
    """What each adapter says, without a server."""
    model = hanok.load(hanok.BUNDLED, dtype="float32", threads=1)
    for name, folder in folders.items():
        model.adapters.load(name, folder)
    found = {}
    for name in NAMES:
        model.use_adapter(None if name == "tales" else name)
        found[name] = model.generate(PROMPT, max_new_tokens=12, temperature=0.0).text
    assert len(set(found.values())) == 3
    return found


def complete(client: httpx.Client, name: str) -> str:
    body = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    answer = client.post("/v1/completions", json=body).raise_for_status().json()
    assert answer["model"] == name
    text: str = answer["choices"][0]["text"]
    return text


def test_a_model_name_chooses_an_adapter(client: httpx.Client, texts: dict[str, str]) -> None:
    assert {name: complete(client, name) for name in NAMES} == texts
    with ThreadPoolExecutor(max_workers=6) as pool:  # together as alone
        names = NAMES * 4
        assert list(pool.map(lambda name: complete(client, name), names)) == [
            texts[name] for name in names
        ]


def test_conversations_choose_one_too(client: httpx.Client) -> None:
    body = {
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": 12,
        "temperature": 0,
    }
    found = {}
    for name in NAMES:
        answer = client.post("/v1/chat/completions", json=body | {"model": name}).json()
        assert answer["model"] == name
        found[name] = answer["choices"][0]["message"]["content"]
    assert len(set(found.values())) == 3
    asked = {"model": "two", "input": "Tell me a story.", "max_output_tokens": 12, "temperature": 0}
    response = client.post("/v1/responses", json=asked).json()
    assert response["model"] == "two"


def test_tgis_parameter_chooses_an_adapter(client: httpx.Client, texts: dict[str, str]) -> None:
    for name in NAMES:
        parameters = {"max_new_tokens": 12, "adapter_id": name}
        answer = client.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
        assert answer.raise_for_status().json()["generated_text"] == texts[name]
    unknown = client.post("/generate", json={"inputs": "a", "parameters": {"adapter_id": "tow"}})
    assert (unknown.status_code, unknown.json()["error_type"]) == (404, "adapter_not_found")


def test_models_list_them_with_their_base(client: httpx.Client) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [(card["id"], card.get("parent")) for card in cards] == [
        ("tales", None),
        ("one", "tales"),
        ("two", "tales"),
    ]
    assert client.get("/v1/models/two").json()["id"] == "two"
    wrong = client.post("/v1/completions", json={"model": "three", "prompt": "a"})
    assert wrong.status_code == 404
    assert "'tales', 'one', 'two'" in wrong.json()["error"]["message"]


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (("one",), "NAME=FOLDER each"),
        (("one=a", "one=b"), "'one' is another's"),
        (("base=a",), "'base' is another's"),
    ],
)
def test_names_that_cannot_be(adapters: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ServerOptions(model_id="base", adapters=adapters)


def test_the_launchers_flag_names_them() -> None:
    launch = launch_options({"lora_adapters": "mine=folder, other/one"})
    assert launch.adapters == ("mine=folder", "other/one=other/one")


LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@contextmanager
def changing(folder: Path, **options: Any) -> Iterator[tuple[LocalServer, httpx.Client]]:
    """A server that loads adapters from below a folder while it runs."""
    model = hanok.load(hanok.BUNDLED, dtype="float32", context=1024, batch=8)
    options = {"adapters_below": (str(folder),)} | options
    with local_server(model, **options) as found, found.client() as client:
        yield found, client


def names_of(client: httpx.Client) -> list[str]:
    return [card["id"] for card in client.get("/v1/models").json()["data"]]


def error_of(client: httpx.Client, path: str, **body: str) -> tuple[int, dict[str, Any]]:
    answer = client.post(path, json=body)
    error: dict[str, Any] = answer.json()["error"]
    return answer.status_code, error


def test_adapters_come_and_go_while_requests_run(
    folders: dict[str, Path], texts: dict[str, str]
) -> None:
    """A text that is being written is not disturbed, and one with an adapter is finished without it."""
    body = {"prompt": PROMPT, "max_tokens": 300, "temperature": 0, "ignore_eos": True}
    with changing(folders["one"].parent) as (local, client), ThreadPoolExecutor() as pool:
        expected = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        steps = local.engine.stats().steps
        running_one = pool.submit(client.post, "/v1/completions", json=body)
        while local.engine.stats().steps == steps:
            pass
        hits = local.engine.stats().prefix_query_tokens
        for name, folder in folders.items():
            loaded = client.post(LOAD, json={"lora_name": name, "lora_path": folder.name})
            assert (loaded.status_code, name in loaded.text) == (200, True)
        assert local.engine.stats().prefix_query_tokens == hits  # nothing was begun again
        assert names_of(client) == ["bundled", "one", "two"]
        assert running_one.result().json()["choices"][0]["text"] == expected
        for name in ("one", "two"):
            assert complete(client, name) == texts[name]
        steps = local.engine.stats().steps
        with_one = pool.submit(client.post, "/v1/completions", json=body | {"model": "one"})
        while local.engine.stats().steps == steps:
            pass
        client.post(UNLOAD, json={"lora_name": "one"}).raise_for_status()
        assert names_of(client) == ["bundled", "two"]
        refused = client.post("/v1/completions", json=body | {"model": "one"})
        assert refused.status_code == 404
        answer = with_one.result().raise_for_status().json()
        assert answer["model"] == "one"
        assert answer["choices"][0]["text"].startswith(texts["one"])
        # Another adapter of that name: nothing that the first has computed is used.
        moved = {"lora_name": "one", "lora_path": str(folders["two"])}
        client.post(LOAD, json=moved).raise_for_status()
        assert complete(client, "one") == texts["two"]
        for name in ("one", "two"):
            client.post(UNLOAD, json={"lora_name": name}).raise_for_status()
        assert complete_base(client) == texts["tales"]
        decoder = local.service.needed_model.decoder
        assert not any(".lora" in name for name, _ in decoder.named_parameters())


def complete_base(client: httpx.Client) -> str:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    text: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    return text


def test_what_cannot_be_loaded_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    allowed.mkdir()
    shutil.copytree(folders["one"], outside)
    (allowed / "link").symlink_to(outside)
    linked, wrong = allowed / "linked", allowed / "wrong"
    linked.mkdir()
    for file in outside.iterdir():
        (linked / file.name).symlink_to(file)
    write_of_another_base(wrong)
    (allowed / "empty").mkdir()
    with changing(allowed) as (_, client):
        for path in ("absent", "link", "linked", str(outside), "../outside", ".\0", "/etc"):
            status, error = error_of(client, LOAD, lora_name="new", lora_path=path)
            assert (status, error["param"]) == (422, "lora_path"), path
            assert "is no folder below one that this server loads adapters from" in error["message"]
        status, error = error_of(client, LOAD, lora_name="new", lora_path="wrong")
        assert (status, error["param"]) == (422, "lora_path")
        assert "lora_A of model.layers.0.self_attn.q_proj is [4, 32]" in error["message"]
        status, error = error_of(client, LOAD, lora_name="new", lora_path="empty")
        assert status == 422
        shutil.copytree(outside, allowed / "one")
        client.post(LOAD, json={"lora_name": "new", "lora_path": "one"}).raise_for_status()
        for name, said in (("new", "there is an adapter 'new' already"), ("bundled", "itself")):
            status, error = error_of(client, LOAD, lora_name=name, lora_path="one")
            assert (status, error["param"]) == (422, "lora_name")
            assert said in error["message"]
        status, error = error_of(client, UNLOAD, lora_name="nwe")
        assert (status, error["code"]) == (404, "not_found")
        assert "there is no adapter 'nwe'. Known: new." in error["message"]
        assert names_of(client) == ["bundled", "new"]


def write_of_another_base(folder: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.zeros(4, 32), name.format("B"): torch.zeros(32, 4)}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


def test_only_who_has_the_key_loads_and_only_where_it_is_allowed(
    folders: dict[str, Path], local: LocalServer
) -> None:
    with local.client() as client:
        for path in (LOAD, UNLOAD):
            status, error = error_of(client, path, lora_name="a", lora_path=str(folders["one"]))
            assert status == 404
            assert "--adapters-below FOLDER" in error["message"]
    with changing(folders["one"].parent, api_key="secret") as (_, client):
        for path in (LOAD, UNLOAD):
            status, error = error_of(client, path, lora_name="a", lora_path="one")
            assert (status, error["type"]) == (401, "authentication_error")
        answer = client.post(
            LOAD,
            json={"lora_name": "a", "lora_path": "one"},
            headers={"Authorization": "Bearer secret"},
        )
        assert answer.status_code == 200
