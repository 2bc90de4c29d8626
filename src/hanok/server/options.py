"""What a server may be told: who may ask, how much, and how long things may take. Imports no torch."""

from dataclasses import dataclass

from hanok.checkpoint.pooling import Pooling


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """The options of a server. Limits named as TGI's have TGI's meaning."""

    model_id: str
    """What clients call the model, and what answers call it."""
    other_names: tuple[str, ...] = ()
    """What clients may call it as well."""
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    """What every request for tokens has to bring as `Authorization: Bearer KEY`, or in the
    header that its protocol has for it; None: nothing."""
    cors_allow_origins: tuple[str, ...] = ("*",)
    max_concurrent_requests: int = 128
    """Sequences that are waiting or running; beyond them requests get 429."""
    max_queue_s: float = 60.0
    """How long a request may be expected to wait before it begins; beyond it requests get 429."""
    max_best_of: int = 2
    max_choices: int = 16
    """The largest `n` of OpenAI's routes."""
    max_stop_sequences: int = 4
    """Of TGI's routes; see also `openai_sampling.MOST_STOPS`."""
    max_top_n_tokens: int = 5
    max_client_batch_size: int = 32
    """Prompts of one request."""
    max_input_tokens: int | None = None
    """None: one less than `max_total_tokens`."""
    max_total_tokens: int | None = None
    """Of one request, prompt and answer; None: what the engine holds."""
    max_embedding_inputs: int = 2048
    """Texts of one request for embeddings."""
    pooling: Pooling | None = None
    """How a text's hidden states become its embedding; None: as the checkpoint says, else "last"."""
    payload_limit: int = 2_000_000
    """Bytes of a request's body."""
    max_json_depth: int = 64
    has_grammars: bool = True
    has_prompt_logprobs: bool = True
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0
    validation_workers: int = 2
    """Threads that tokenize, fill templates and compile grammars."""
    timeout_s: float | None = None
    """Of a request that names none; None: as long as it takes."""
    termination_s: float = 90.0
    """How long requests may go on after SIGTERM."""
    keep_alive_s: float = 15.0
    """Without an event a stream sends a comment."""
    write_timeout_s: float = 60.0
    """A client that reads nothing for so long is given up."""
    arrival_s: float = 30.0
    """How long a request's head may take to come, from its connection or first byte on, and its body."""
    idle_s: float = 75.0
    """How long a connection may wait for its next request. Proxies keep theirs for 60 s."""
    max_connections: int = 1000
    """Beyond them the one is closed that has waited longest for a request, or the new one."""
    logs_json: bool = False

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names that the model is served under, the one that answers have first."""
        return (self.model_id, *self.other_names)
