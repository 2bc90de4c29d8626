"""Adapters over HTTP: chosen by OpenAI's `model` and TGI's `adapter_id`, in one batch with others."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tests.engine.test_adapters import written
from tests.server.conftest import Server, start_server, stop, wait_until_ready

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
    found = start_server("--model-name", "tales", *adapters)
    try:
        wait_until_ready(found)
        yield found
    finally:
        status = stop(found)
    assert status == 0


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
