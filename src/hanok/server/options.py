"""Every option of a server, once: who may ask, how much, and how long it may take. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from hanok.checkpoint.pooling import Pooling
from hanok.errors import OptionError

COUNTS = (
    "max_concurrent_requests",
    "max_best_of",
    "max_choices",
    "max_client_batch_size",
    "max_embedding_inputs",
    "payload_limit",
    "max_json_depth",
    "validation_workers",
    "max_connections",
)
SECONDS = ("max_queue_s", "timeout_s", "keep_alive_s", "write_timeout_s", "arrival_s", "idle_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """The options of a server. Limits named as TGI's have TGI's meaning.

    Raises OptionError for a value that no server could have.
    """

    model_id: str
    """What clients call the model, and what answers call it."""
    other_names: tuple[str, ...] = ()
    """What clients may call it as well."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters over the model, NAME=FOLDER each; a request chooses one as its model, or as TGI's
    `adapter_id`. Repeatable."""
    adapters_below: tuple[str, ...] = ()
    """Folder below which adapters lie that may be loaded and unloaded while the server runs
    (POST /v1/load_lora_adapter). Repeatable; without one none may."""
    host: str = "127.0.0.1"
    """Where to listen."""
    port: int = 8080
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """Key that every request for tokens must bring as `Authorization: Bearer KEY`, or in the header that
    its protocol has for it. None: no key is asked for."""
    cors_allow_origins: tuple[str, ...] = ("*",)
    """Origins whose pages may ask. Repeatable; without one any origin may."""
    max_concurrent_requests: int = 128
    """Sequences that are waiting or running; beyond them requests get 429."""
    max_queue_s: float = 60.0
    """Expected seconds before a request begins, beyond which it gets 429."""
    max_best_of: int = 2
    """The largest `best_of` of TGI's routes."""
    max_choices: int = 16
    """The largest `n` of OpenAI's routes."""
    max_stop_sequences: int = 4
    """Stop texts of a request on TGI's routes."""
    max_top_n_tokens: int = 5
    """The largest `top_n_tokens` of TGI's routes."""
    max_client_batch_size: int = 32
    """Prompts of one request."""
    max_input_tokens: int | None = None
    """Tokens of a prompt. None: one less than `max_total_tokens`."""
    max_total_tokens: int | None = None
    """Tokens of one request, prompt and answer. None: what the engine holds."""
    max_embedding_inputs: int = 2048
    """Texts of one request for embeddings."""
    pooling: Pooling | None = None
    """What an embedding is made of: the hidden state of the last token, or the mean of all. None: as the
    checkpoint says, else last."""
    payload_limit: int = 2_000_000
    """Bytes of a request's body."""
    max_json_depth: int = 64
    """Levels of a request's JSON body."""
    has_grammars: bool = True
    """Answers may be asked to fit a grammar."""
    has_prompt_logprobs: bool = True
    """Log-probabilities of prompt tokens may be asked for."""
    watermark_gamma: float = 0.5
    """Share of the vocabulary that a watermark prefers at each step (arXiv 2301.10226)."""
    watermark_delta: float = 2.0
    """Added to the scores of preferred tokens where a request asks for a watermark."""
    validation_workers: int = 2
    """Threads that tokenize, fill templates and compile grammars."""
    timeout_s: float | None = None
    """Seconds of a request that names no timeout. None: no limit."""
    termination_s: float = 90.0
    """Seconds that requests may go on after SIGTERM."""
    keep_alive_s: float = 15.0
    """Seconds without an event after which a stream sends a comment."""
    write_timeout_s: float = 60.0
    """Seconds after which a client that reads nothing is disconnected."""
    arrival_s: float = 30.0
    """Seconds that a request's head may take to arrive, from connection or first byte, and its body."""
    idle_s: float = 75.0
    """Seconds that a connection may wait for its next request; proxies keep theirs for 60."""
    max_connections: int = 1000
    """Open connections; beyond them the longest idle one is closed, or the new one."""
    logs_json: bool = False
    """Write the log as JSON lines."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in SECONDS:
            value = getattr(self, name)
            self._check(name, value is None or value > 0, "above 0")
        names = [item.partition("=")[0] for item in self.adapters]
        for item, name in zip(self.adapters, names, strict=True):
            self._check("adapters", bool(name) and bool(item.partition("=")[2]), "NAME=FOLDER each")
            is_free = names.count(name) == 1 and name not in self.model_names
            self._check("adapters", is_free, f"under names of their own, and {name!r} is another's")
        for name in ("max_stop_sequences", "max_top_n_tokens", "termination_s", "port"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("port", self.port <= 65535, "0 to 65535")
        for name in ("max_input_tokens", "max_total_tokens"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "at least 1")

    def _check(self, name: str, is_right: bool, expected: str) -> None:
        if not is_right:
            raise OptionError(f"{name} is {getattr(self, name)}; it must be {expected}.")

    @property
    def adapter_folders(self) -> dict[str, Path]:
        """The folder of each adapter, by its name."""
        return {
            name: Path(path) for name, _, path in (item.partition("=") for item in self.adapters)
        }

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names that the model is served under, the one that answers have first."""
        return (self.model_id, *self.other_names)
