"""The page at `/` in a real browser, before a stand-in that streams what each test wants, and before
the server itself.

Needs Chromium with its driver and selenium: `apt-get install chromium chromium-driver`, `pip install
selenium`. Without them these tests are skipped.
"""

# ruff: noqa: E402  (what may not be installed is imported after it was looked for)

import asyncio
import json
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import hanok

pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
uvicorn = pytest.importorskip("uvicorn")

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tests.server.conftest import LocalServer, Server

PAGE = Path(hanok.__file__).parent / "server" / "page.html"
TIMEOUT_S = 20
GIB = 2**30
INFO: dict[str, Any] = {
    "model_id": "org/small-chat",
    "model_sha": None,
    "model_pipeline_tag": "text-generation",
    "model_dtype": "bfloat16",
    "model_device_type": "cpu",
    "max_concurrent_requests": 128,
    "max_best_of": 2,
    "max_stop_sequences": 4,
    "max_input_tokens": 4095,
    "max_total_tokens": 4096,
    "validation_workers": 2,
    "max_client_batch_size": 4,
    "router": "text-generation-router",
    "version": "9.9.9",
    "sha": None,
    "docker_label": None,
    "memory_plan": [
        {
            "tier": "GPU 0",
            "holds": "embed_tokens, layers 0–19",
            "weights_bytes": 12 * GIB,
            "kv_bytes": 6 * GIB,
            "reserve_bytes": 2 * GIB,
            "budget_bytes": 22 * GIB,
            "free_bytes": 2 * GIB,
        },
        {
            "tier": "cpu",
            "holds": "layers 20–31, norm, lm_head",
            "weights_bytes": 7 * GIB,
            "kv_bytes": 3 * GIB,
            "reserve_bytes": GIB // 2,
            "draft_bytes": 3 * GIB // 4,
            "budget_bytes": 28 * GIB,
            "free_bytes": 35 * GIB // 2,
        },
    ],
    "cache_tokens": 98304,
    "concurrent_users": 24,
}


@dataclass
class Stub:
    """A server that answers as told, and remembers what it was asked."""

    pieces: list[str] = field(default_factory=lambda: ["Hel", "lo", " there."])
    finish_reason: str = "stop"
    refusal: Response | None = None
    """The answer to chats instead of a stream."""
    last_event: dict[str, Any] | None = None
    """Ends a stream in the place of its usage."""
    stays_open: bool = False
    """Streams its pieces, and then nothing until the client leaves."""
    was_left: threading.Event = field(default_factory=threading.Event)
    is_ready: threading.Event = field(default_factory=threading.Event)
    progress: float | None = 0.25
    asked: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self.page),
                Route("/health", self.health),
                Route("/info", self.info),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ]
        )

    async def page(self, request: Request) -> Response:
        return FileResponse(PAGE)

    async def health(self, request: Request) -> Response:
        if self.is_ready.is_set():
            return Response()
        return JSONResponse({"error": "loading", "progress": self.progress}, 503)

    async def info(self, request: Request) -> Response:
        return JSONResponse(INFO)

    async def chat(self, request: Request) -> Response:
        await self.remember(request)
        if self.refusal is not None:
            return self.refusal
        return self.stream(lambda piece: {"delta": {"role": "assistant", "content": piece}})

    async def completions(self, request: Request) -> Response:
        await self.remember(request)
        return self.stream(lambda piece: {"text": piece})

    async def remember(self, request: Request) -> None:
        self.asked.append((request.url.path, await request.json(), dict(request.headers)))

    def stream(self, choice: Callable[[str], dict[str, Any]]) -> Response:
        return StreamingResponse(self.events(choice), media_type="text/event-stream")

    async def events(self, choice: Callable[[str], dict[str, Any]]) -> AsyncIterator[bytes]:
        def event(body: dict[str, Any]) -> bytes:
            return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()

        try:
            yield b": a comment, to be passed over\n\n"
            for index, piece in enumerate(self.pieces):
                is_last = index == len(self.pieces) - 1 and not self.stays_open
                finish = self.finish_reason if is_last else None
                whole = event({"choices": [{**choice(piece), "index": 0, "finish_reason": finish}]})
                # In two parts: what arrives at once need not be whole, even within a letter.
                yield whole[:-9]
                await asyncio.sleep(0)
                yield whole[-9:]
            if self.stays_open:
                await asyncio.Event().wait()
            if self.last_event is not None:
                yield event(self.last_event)
            else:
                yield event({"choices": [], "usage": {"completion_tokens": 41}})
            yield b"data: [DONE]\n\n"
        finally:
            self.was_left.set()


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    made.is_ready.set()
    listener = socket.create_server(("127.0.0.1", 0))
    made.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    config = uvicorn.Config(
        made.app(), log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield made
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip(
            "there is no Chromium with its driver: apt-get install chromium chromium-driver"
        )
    options = ChromeOptions()
    options.binary_location = program
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,860"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    options.add_argument("--disable-background-networking")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options=options, service=Service(executable_path=driver)) as found:
        yield found


class Page:
    """The page in the browser, as a person uses it."""

    def __init__(self, browser: Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)

    def __getitem__(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition: Callable[["Page"], object]) -> None:
        WebDriverWait(self, TIMEOUT_S, poll_frequency=0.02).until(condition)  # type: ignore[type-var]

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def fill(self, selector: str, text: str) -> None:
        self[selector].clear()
        self[selector].send_keys(text)

    def say(self, text: str) -> None:
        self.wait(lambda page: page["#send"].is_displayed() and page["#send"].is_enabled())
        self["#prompt"].send_keys(text + Keys.ENTER)

    def answers(self) -> list[str]:
        """Return the texts of the answers that are complete."""
        return [
            str(item.get_property("textContent"))
            for item in self.all(".turn.assistant[aria-busy=false] .text")
        ]

    def ask(self, text: str) -> str:
        before = len(self.answers())
        self.say(text)
        self.wait(lambda page: len(page.answers()) > before)
        return self.answers()[-1]


@pytest.fixture
def page(browser: Chrome, stub: Stub) -> Page:
    return Page(browser, stub.url)


def test_an_answer_is_streamed_and_timed(page: Page, stub: Stub) -> None:
    assert page.ask("Good morning") == "Hello there."
    path, body, headers = stub.asked[0]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "org/small-chat",
        "messages": [{"role": "user", "content": "Good morning"}],
        "max_tokens": 512,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert "authorization" not in headers
    figures = page[".turn.assistant .figures"].text
    assert "41 tokens" in figures  # as the server counts, not the events
    assert "tokens/s" in figures
    assert "first after " in figures
    assert page[".turn.user .text"].text == "Good morning"
    assert page["#prompt"].get_property("value") == ""


def test_letters_that_arrive_in_halves_are_whole(page: Page, stub: Stub) -> None:
    stub.pieces = ["한옥", " 🏠é", "\n\nnext"]
    page.ask("?")
    assert [item.text for item in page.all(".turn.assistant p")] == ["한옥 🏠é", "next"]
    page.ask("again")
    assert stub.asked[1][1]["messages"][1]["content"] == "한옥 🏠é\n\nnext"


MARKDOWN = """## Three *ways*

1. **one**
2. `two`
   - [three](https://a.example/b)

| a | b |
|---|--:|
| 1 | 2 |

```python
if a < b:
    print("<b>")
```
"""


def test_an_answer_is_shown_as_markdown(page: Page, stub: Stub) -> None:
    stub.pieces = [MARKDOWN[at : at + 3] for at in range(0, len(MARKDOWN), 3)]
    page.ask("?")
    text = ".turn.assistant .text"
    assert page[f"{text} > h2"].text == "Three ways"
    assert page[f"{text} > h2 > em"].text == "ways"
    assert len(page.all(f"{text} > ol > li")) == 2
    assert page[f"{text} li strong"].text == "one"
    assert page[f"{text} li > code"].text == "two"
    link = page[f"{text} li li a"]
    assert link.get_attribute("href") == "https://a.example/b"
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert [cell.text for cell in page.all(f"{text} td")] == ["1", "2"]
    assert page[f"{text} pre code"].text == 'if a < b:\n    print("<b>")'
    assert page[f"{text} .code-head span"].text == "python"


HOSTILE = """<img src=x onerror="window.hit=1"> <script>window.hit=1</script>

[a](javascript:window.hit=1) [b](JaVaScRiPt&#58;alert(1)) [c](data:text/html,x) [d](/metrics)
[e](\tjavascript:window.hit=1) <javascript:window.hit=1> ![f](javascript:window.hit=1)
[g](https://a.example/"onclick="window.hit=1) ![h](https://a.example/h.png)

```"><img src=x onerror="window.hit=1">
</code></pre><img src=x onerror="window.hit=1">
```

| <img src=x onerror="window.hit=1"> |
|---|
| <svg onload="window.hit=1"> |
"""


def test_no_text_of_a_model_becomes_markup(page: Page, stub: Stub) -> None:
    stub.pieces = [HOSTILE]
    text = ".turn.assistant .text"
    page.ask("?")
    shown = page[text].text
    for written in ('<img src=x onerror="window.hit=1">', "<script>window.hit=1</script>"):
        assert written in shown
    assert "[a](javascript:window.hit=1)" in shown
    assert page.all(f"{text} :is(img, script, svg, iframe, style, link, object)") == []
    schemes = "return [...document.querySelectorAll('.text a')].map((a) => a.protocol)"
    assert set(page.run(schemes)) == {"https:"}
    attributes = (
        "return [...document.querySelectorAll('.text *')]"
        ".flatMap((e) => e.getAttributeNames()).filter((name) => name.startsWith('on'))"
    )
    assert page.run(attributes) == []
    for link in page.all(f"{text} a"):
        page.run("document.addEventListener('click', (event) => event.preventDefault())")
        link.click()
    assert page.run("return window.hit === undefined")


def test_code_can_be_copied(page: Page, stub: Stub) -> None:
    stub.pieces = ["```\na\n  b\n```"]
    page.ask("?")
    page.run(
        "Object.defineProperty(navigator, 'clipboard', {configurable: true,"
        " value: {writeText: async (text) => { window.copied = text; }}})"
    )
    page[".code button"].click()
    page.wait(lambda page: page[".code button"].text == "Copied")
    assert page.run("return window.copied") == "a\n  b\n"
    page.run("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page[".code button"].click()
    page.wait(lambda page: page[".code button"].text == "Selected")
    assert page.run("return getSelection().toString()").rstrip("\n") == "a\n  b"


def test_the_next_turn_brings_the_conversation_and_a_new_one_does_not(
    page: Page, stub: Stub
) -> None:
    page.fill("#system", "Be brief.")
    page.ask("one")
    page.ask("two")
    system = {"role": "system", "content": "Be brief."}
    assert stub.asked[1][1]["messages"] == [
        system,
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Hello there."},
        {"role": "user", "content": "two"},
    ]
    page["#reset"].click()
    assert page.all(".turn") == []
    assert page["#empty"].is_displayed()
    page.ask("three")
    assert stub.asked[2][1]["messages"] == [system, {"role": "user", "content": "three"}]


def test_parameters_are_sent(page: Page, stub: Stub) -> None:
    chosen = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 7, "seed": 3}
    for name, value in chosen.items():
        page.fill(f"#{name}", str(value))
    page.fill("#stop_texts", "END\n###")
    page.fill("#key", "Secret-1")
    page.ask("hi")
    _, body, headers = stub.asked[0]
    assert {name: body[name] for name in chosen} == chosen
    assert body["stop"] == ["END", "###"]
    assert headers["authorization"] == "Bearer Secret-1"
    assert (
        page.run("return localStorage.length + sessionStorage.length + document.cookie.length") == 0
    )


def test_a_parameter_out_of_range_is_not_sent(page: Page, stub: Stub) -> None:
    page.fill("#top_p", "3")
    page.say("hi")
    page.wait(lambda page: page.run("return document.activeElement.id") == "top_p")
    assert stub.asked == []
    assert page["#prompt"].get_property("value") == "hi"


@pytest.mark.parametrize("way", ["button", "escape"])
def test_an_answer_can_be_stopped(page: Page, stub: Stub, way: str) -> None:
    stub.stays_open = True
    page.say("Tell me everything")
    page.wait(lambda page: page[".turn.assistant .text"].text == "Hello there.")
    assert page.answers() == []
    assert not page["#send"].is_displayed()
    assert not stub.was_left.is_set()
    if way == "button":
        page["#stop"].click()
    else:
        page["body"].send_keys(Keys.ESCAPE)
    assert stub.was_left.wait(TIMEOUT_S)
    page.wait(lambda page: page.answers() == ["Hello there."])
    assert "stopped by you" in page[".turn.assistant .figures"].text
    assert not page["#stop"].is_displayed()
    assert page.all(".problem") == []
    stub.stays_open = False
    page.ask("Go on")
    assert stub.asked[1][1]["messages"][1] == {"role": "assistant", "content": "Hello there."}


def test_a_new_conversation_stops_the_answer_and_forgets_it(page: Page, stub: Stub) -> None:
    stub.stays_open = True
    page.say("one")
    page.wait(lambda page: page[".turn.assistant .text"].text == "Hello there.")
    page["#reset"].click()
    assert stub.was_left.wait(TIMEOUT_S)
    stub.stays_open = False
    page.ask("two")
    assert stub.asked[1][1]["messages"] == [{"role": "user", "content": "two"}]


def test_markup_is_shown_as_text(page: Page, stub: Stub) -> None:
    markup = "<img src=x onerror='window.was_run=1'><b>bold</b><script>window.was_run=1</script>"
    stub.pieces = [markup[:20], markup[20:]]
    assert page.ask(markup) == markup
    assert page[".turn.user .text"].get_property("textContent") == markup
    assert page.all("#log img, #log b, #log script") == []
    assert page.run("return window.was_run") is None


@pytest.mark.parametrize(
    ("status", "body", "headers", "shown"),
    [
        (
            429,
            {"error": {"message": "Model is overloaded"}, "error_type": "overloaded"},
            {"Retry-After": "3"},
            "Model is overloaded (429). Try again in 3 s.",
        ),
        (401, None, {}, "Unauthorized (401). Give the API key in the settings."),
        (
            422,
            {"error": "`inputs` cannot be empty", "error_type": "validation"},
            {},
            "`inputs` cannot be empty (422).",
        ),
    ],
)
def test_a_refusal_is_shown_and_the_text_given_back(
    page: Page, stub: Stub, status: int, body: object, headers: dict[str, str], shown: str
) -> None:
    content = b"" if body is None else json.dumps(body).encode()
    stub.refusal = Response(content, status, headers)
    page.say("hello")
    page.wait(lambda page: page.all(".problem"))
    assert page[".problem"].text == shown
    assert page[".problem"].get_attribute("role") == "alert"
    assert page["#prompt"].get_property("value") == "hello"
    assert page.all(".turn") == []
    stub.refusal = None
    page["#prompt"].send_keys(Keys.ENTER)
    page.wait(lambda page: page.answers() == ["Hello there."])
    assert page.all(".problem") == []
    assert stub.asked[-1][1]["messages"] == [{"role": "user", "content": "hello"}]


def test_an_error_within_a_stream_keeps_what_came(page: Page, stub: Stub) -> None:
    stub.last_event = {"error": {"message": "Request failed during generation: <b>NaN</b>"}}
    assert page.ask("hello") == "Hello there."
    assert page[".problem"].text == "Request failed during generation: <b>NaN</b>"


def test_a_stream_that_breaks_off_says_so(page: Page, stub: Stub) -> None:
    stub.finish_reason = ""
    page.ask("hello")
    assert "broke off" in page[".problem"].text


def test_an_answer_at_the_limit_says_so(page: Page, stub: Stub) -> None:
    stub.finish_reason = "length"
    page.ask("hello")
    assert "ended at the token limit" in page[".turn.assistant .figures"].text


def test_without_a_chat_template_the_text_is_continued(page: Page, stub: Stub) -> None:
    told = {"error": "Template error: template not found", "error_type": "template_error"}
    stub.refusal = JSONResponse(told, 422)
    assert page.ask("Once upon") == "Hello there."
    assert [path for path, _, _ in stub.asked] == ["/v1/chat/completions", "/v1/completions"]
    assert stub.asked[1][1]["prompt"] == "Once upon"
    assert "no chat template" in page["#hint"].text
    page.ask("a time")
    assert [path for path, _, _ in stub.asked][2:] == ["/v1/completions"]
    assert stub.asked[2][1]["prompt"] == "Once upon\n\nHello there.\n\na time"


def test_loading_is_shown_until_the_server_is_ready(browser: Chrome, stub: Stub) -> None:
    stub.is_ready.clear()
    page = Page(browser, stub.url)
    page.wait(lambda page: "25 %" in page["#loading"].text)
    assert page["#loading-bar"].get_property("value") == 0.25
    assert not page["#send"].is_enabled()
    stub.progress = 0.75
    page.wait(lambda page: "75 %" in page["#loading"].text)
    stub.progress = None
    page.wait(lambda page: page["#loading"].text.startswith("The server is not ready: loading"))
    stub.is_ready.set()
    page.wait(lambda page: page["#send"].is_enabled())
    assert not page["#loading"].is_displayed()
    assert page["#state"].text == "ready"


def test_facts_and_the_memory_plan_are_shown(page: Page) -> None:
    page.wait(lambda page: page.all("#facts dt"))
    assert page["#model"].text == "org/small-chat"
    facts = page["#facts"].text.split("\n")
    assert facts[facts.index("Longest prompt") + 1] == "4,095 tokens"
    plan = page["#plan"].text
    for shown in ("98,304", "24", "GPU 0", "of 22.00 GiB", "layers 20–31, norm, lm_head"):
        assert shown in plan
    sizes = ("weights 12.00 GiB", "KV cache 3.00 GiB", "reserve 512.00 MiB")
    for shown in (*sizes, "draft model 768.00 MiB", "free 17.50 GiB"):
        assert shown in plan
    widths = page.run(
        "return [...document.querySelector('.bar').children].map(part => part.style.width)"
    )
    assert [round(float(width.rstrip("%")), 1) for width in widths] == [54.5, 27.3, 9.1]


def test_nothing_is_asked_of_anyone_else_and_nothing_is_complained_of(
    page: Page, stub: Stub
) -> None:
    page.ask("hello")
    names = page.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names
    assert [name for name in names if not name.startswith((stub.url, "data:"))] == []
    assert complaints(page, stub.url) == []


def complaints(page: Page, url: str) -> list[str]:
    log = page.browser.get_log("browser")  # type: ignore[no-untyped-call]
    found = [entry["message"] for entry in log if entry["level"] != "DEBUG"]
    return [message for message in found if url in message]


def test_every_control_has_a_name(page: Page) -> None:
    controls = page.all("button, input, textarea, progress, summary, a")
    assert len(controls) > 12
    unnamed = [
        item.get_attribute("outerHTML")
        for item in controls
        if item.is_displayed() and not item.accessible_name
    ]
    assert unnamed == []


@contextmanager
def scheme(browser: Chrome, name: str) -> Iterator[None]:
    """Let the browser prefer light or dark."""
    feature = {"name": "prefers-color-scheme", "value": name}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    yield
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


CONTRASTS = """
const seen = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const style = getComputedStyle(document.documentElement);
function luminance(name) {
  seen.fillStyle = style.getPropertyValue(name).trim();
  seen.fillRect(0, 0, 1, 1);
  const [red, green, blue] = [...seen.getImageData(0, 0, 1, 1).data].map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}
return %s.map(([ink, ground]) => {
  const [darker, lighter] = [luminance(ink), luminance(ground)].sort((a, b) => a - b);
  return (lighter + 0.05) / (darker + 0.05);
});
"""
PAIRS = [
    ("--ink", "--ground"),
    ("--ink", "--surface"),
    ("--ink", "--mine"),
    ("--quiet", "--ground"),
    ("--quiet", "--surface"),
    ("--on-accent", "--accent"),
    ("--accent", "--surface"),
    ("--bad", "--bad-ground"),
]


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_stands_out_from_its_ground(page: Page, name: str) -> None:
    with scheme(page.browser, name):
        grounds = page.run("return getComputedStyle(document.body).backgroundColor")
        ratios = page.run(CONTRASTS % json.dumps(PAIRS))
    assert grounds == {"light": "rgb(246, 243, 238)", "dark": "rgb(25, 23, 21)"}[name]
    assert [pair for pair, ratio in zip(PAIRS, ratios, strict=True) if ratio < 4.5] == []


def test_a_real_server_answers_and_shows_its_plan(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.url)
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "40")
    answer = page.ask("Tell me of a dog.")
    body = {
        "messages": [{"role": "user", "content": "Tell me of a dog."}],
        "max_tokens": 40,
        "temperature": 0,
    }
    with server.client() as client:
        expected = client.post("/v1/chat/completions", json=body).json()
        info = client.get("/info").json()
    assert answer == expected["choices"][0]["message"]["content"]
    figures = page[".turn.assistant .figures"].text
    assert f"{expected['usage']['completion_tokens']} tokens" in figures
    assert "tokens/s" in figures
    assert page["#model"].text == info["model_id"]
    plan = page["#plan"].text
    row = info["memory_plan"][0]
    for shown in (row["tier"], row["holds"], f"{info['cache_tokens']:,}"):
        assert shown in plan
    for name, part in (("weights", "weights_bytes"), ("KV cache", "kv_bytes")):
        assert f"{name} {row[part] / 2**20:.2f} MiB" in plan
    # The next turn goes on with the conversation, which the server still has computed.
    assert page.ask("And then?")
    assert complaints(page, server.url) == []


def test_a_real_servers_tokens_are_shown_as_they_come_and_can_be_stopped(
    browser: Chrome, local: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some passes the engine waits until the page shows what came of them."""
    forward, passes, go_on = local.engine._runner._hidden_states, iter(range(8)), threading.Event()

    def held(batch: Any) -> Any:
        if next(passes, None) is None:
            assert go_on.wait(TIMEOUT_S)
        return forward(batch)

    monkeypatch.setattr(local.engine._runner, "_hidden_states", held)
    page = Page(browser, local.url)
    try:
        page.say("Tell me of a dog.")
        page.wait(lambda page: [turn for turn in page.all(".turn.assistant .text") if turn.text])
        assert page.answers() == []
        page["#stop"].click()
        page.wait(lambda page: page.answers())
    finally:
        go_on.set()
    page.wait(lambda page: local.engine.stats().cancelled == 1)
    assert "stopped by you" in page[".turn.assistant .figures"].text
    assert page.ask("Go on.")
