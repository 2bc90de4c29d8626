"""What text-generation-launcher's flags mean here: one table of them, and what they become.

A flag that changes what is answered is obeyed or refused; one that only says how TGI should do its work
is accepted, and a note says why it has no effect. Imports neither torch nor click.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hanok.errors import OptionError
from hanok.memory.options import CacheDtype

Kind = Literal["text", "integer", "number", "switch", "choice", "numbers"]

TERMINATION_TIMEOUT_S = 90
PAYLOAD_LIMIT_BYTES = 2_000_000

# What TGI quantizes while it loads; the rest needs a checkpoint that was quantized beforehand.
QUANT = {
    "bitsandbytes": "int8",
    "bitsandbytes-nf4": "nf4",
    "bitsandbytes-fp4": "nf4",
    "eetq": "int8",
    "fp8": "fp8",
}
PREQUANTIZED = ("awq", "compressed-tensors", "exl2", "gptq", "marlin")

ONE_PROCESS = (
    "hanok is one process; layers are spread over the devices by a plan (see `hanok plan`)"
)
CONTINUOUS = "a waiting request may join the running batch at any step"
NO_TUNNEL = "hanok opens no tunnel; put one in front of its port"
NO_TRACES = "hanok sends no traces; it has /metrics and one log line for each request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag of text-generation-launcher: `--max-best-of`, or MAX_BEST_OF in the environment."""

    name: str
    """As a Python name: "max_best_of"."""
    kind: Kind = "text"
    text: str = ""
    default: str | int | float | None = None
    """What holds where it is not given; only shown."""
    short: str | None = None
    choices: Sequence[str] = ()
    minimum: int = 0
    is_repeatable: bool = False
    has_variable: bool = True
    """Whether the environment may give it."""
    ignored: str | None = None
    """Why it has no effect here; None: it has one."""

    @property
    def option(self) -> str:
        """The flag as it is typed."""
        return "--" + self.name.replace("_", "-")


FLAGS: tuple[Flag, ...] = (
    Flag(
        name="model_id",
        text="A folder in the Hugging Face layout, or a model on the hub, which is downloaded.",
        default="the small one that ships with hanok",
    ),
    Flag(name="revision", text="Branch, tag or commit of a model on the hub.", default="main"),
    Flag(
        name="validation_workers",
        kind="integer",
        minimum=1,
        ignored="hanok chooses how many threads read requests",
    ),
    Flag(name="sharded", kind="choice", choices=("true", "false"), ignored=ONE_PROCESS),
    Flag(name="num_shard", kind="integer", minimum=1, ignored=ONE_PROCESS),
    Flag(
        name="quantize",
        kind="choice",
        choices=tuple(sorted((*QUANT, *PREQUANTIZED))),
        text="bitsandbytes, eetq: int8; bitsandbytes-nf4, bitsandbytes-fp4: nf4; fp8: fp8. The others "
        "need a checkpoint that was quantized beforehand, and are refused.",
    ),
    Flag(
        name="speculate",
        kind="integer",
        text="Tokens to guess ahead from the text so far, at the most; 0: none.",
        default="0",
    ),
    Flag(
        name="dtype",
        kind="choice",
        choices=("float16", "bfloat16"),
        text="What to compute in; not together with --quantize.",
        default="what the checkpoint declares",
    ),
    Flag(
        name="kv_cache_dtype",
        kind="choice",
        choices=("fp8_e4m3fn", "fp8_e5m2"),
        text="Keep keys and values in 8 bits: here int8, which every device has.",
    ),
    Flag(
        name="trust_remote_code",
        kind="switch",
        ignored="hanok never runs code that comes with a checkpoint",
    ),
    Flag(
        name="max_concurrent_requests",
        kind="integer",
        minimum=1,
        default=128,
        text="Requests at once; more are answered 429.",
    ),
    Flag(name="max_best_of", kind="integer", minimum=1, default=2, text="Largest `best_of`."),
    Flag(
        name="max_stop_sequences",
        kind="integer",
        default=4,
        text="Most stop texts of a request.",
    ),
    Flag(name="max_top_n_tokens", kind="integer", default=5, text="Largest `top_n_tokens`."),
    Flag(
        name="max_input_tokens",
        kind="integer",
        minimum=1,
        text="Longest prompt.",
        default="max-total-tokens - 1",
    ),
    Flag(
        name="max_input_length",
        kind="integer",
        minimum=1,
        text="The old name of --max-input-tokens.",
    ),
    Flag(
        name="max_total_tokens",
        kind="integer",
        minimum=2,
        text="Prompt and answer together.",
        default="what the model and memory allow",
    ),
    Flag(name="waiting_served_ratio", kind="number", ignored=CONTINUOUS),
    Flag(
        name="max_batch_prefill_tokens",
        kind="integer",
        ignored="prompts are cut so that a step takes a set time, as measured",
    ),
    Flag(
        name="max_batch_total_tokens",
        kind="integer",
        minimum=1,
        text="Tokens that the cache has room for.",
        default="what memory allows",
    ),
    Flag(name="max_waiting_tokens", kind="integer", ignored=CONTINUOUS),
    Flag(
        name="max_batch_size",
        kind="integer",
        minimum=1,
        text="Sequences in a batch.",
        default="what the cache has room for",
    ),
    Flag(
        name="cuda_graphs",
        kind="numbers",
        ignored="hanok records graphs for the batch sizes that it meets",
    ),
    Flag(name="hostname", text="Address to listen on.", default="0.0.0.0"),
    Flag(name="port", kind="integer", short="-p", default=3000, text="Port to listen on."),
    Flag(
        name="prometheus_port",
        kind="integer",
        ignored="metrics are at /metrics of the server's own port",
    ),
    Flag(name="shard_uds_path", ignored=ONE_PROCESS),
    Flag(name="master_addr", ignored=ONE_PROCESS),
    Flag(name="master_port", kind="integer", ignored=ONE_PROCESS),
    Flag(name="huggingface_hub_cache", text="Folder that downloads are kept in."),
    Flag(
        name="weights_cache_override",
        ignored="hanok reads weights where their config.json lies; give that folder as --model-id",
    ),
    Flag(
        name="disable_custom_kernels",
        kind="switch",
        ignored="kernels are chosen by what the device can do; `hanok info` shows them",
    ),
    Flag(
        name="cuda_memory_fraction",
        kind="number",
        ignored="hanok plans with the memory that is free; see --max-memory of `hanok serve`",
    ),
    Flag(
        name="rope_scaling",
        kind="choice",
        choices=("linear", "dynamic"),
        text="Refused: it belongs into config.json.",
    ),
    Flag(name="rope_factor", kind="number", text="Refused: it belongs into config.json."),
    Flag(name="json_output", kind="switch", text="Log in JSON, one object a line."),
    Flag(name="otlp_endpoint", ignored=NO_TRACES),
    Flag(name="otlp_service_name", ignored=NO_TRACES),
    Flag(
        name="cors_allow_origin",
        is_repeatable=True,
        text="Origin of pages that may ask. Repeatable.",
        default="any",
    ),
    Flag(name="api_key", text="Key that every request must bring.", default="none is asked for"),
    Flag(
        name="watermark_gamma",
        kind="number",
        default=0.5,
        text="Share of the vocabulary that a watermark favours.",
    ),
    Flag(
        name="watermark_delta",
        kind="number",
        default=2.0,
        text="What a watermark adds to the logits of that share.",
    ),
    Flag(name="ngrok", kind="switch", ignored=NO_TUNNEL),
    Flag(name="ngrok_authtoken", ignored=NO_TUNNEL),
    Flag(name="ngrok_edge", ignored=NO_TUNNEL),
    Flag(name="tokenizer_config_path", text="Refused: the chat template is the checkpoint's."),
    Flag(name="disable_grammar_support", kind="switch", text="Refuse requests with a grammar."),
    Flag(
        name="env",
        kind="switch",
        short="-e",
        has_variable=False,
        ignored="`hanok info` shows what this machine has",
    ),
    Flag(
        name="max_client_batch_size",
        kind="integer",
        minimum=1,
        default=4,
        text="Most prompts of a request.",
    ),
    Flag(
        name="lora_adapters", text="Adapters: NAME=FOLDER, or a folder alone, with commas between."
    ),
    Flag(
        name="usage_stats",
        kind="choice",
        choices=("on", "off", "no-stack"),
        ignored="hanok sends no usage reports",
    ),
    Flag(
        name="payload_limit",
        kind="integer",
        minimum=1,
        default=PAYLOAD_LIMIT_BYTES,
        text="Largest body of a request, in bytes.",
    ),
    Flag(
        name="enable_prefill_logprobs",
        kind="switch",
        text="Allow log-probabilities of the prompt (`decoder_input_details`).",
    ),
    Flag(
        name="graceful_termination_timeout",
        kind="integer",
        short="-g",
        default=TERMINATION_TIMEOUT_S,
        text="Seconds that running requests get to end after SIGTERM.",
    ),
    Flag(name="max_image_fetch_size", kind="integer", ignored="hanok serves no images"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """What the flags of one start amount to; None where the server is to choose."""

    model: str | None = None
    """A folder or a name on the hub; None: the model that ships with hanok."""
    revision: str | None = None
    hub_cache: Path | None = None
    host: str = "0.0.0.0"
    port: int = 3000
    quant: str | None = None
    """As `hanok.load(quant=…)`."""
    dtype: str = "auto"
    cache_dtype: CacheDtype = "auto"
    speculate: int = 0
    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_batch_size: int | None = None
    max_client_batch_size: int = 4
    payload_limit: int = PAYLOAD_LIMIT_BYTES
    cors_allow_origins: tuple[str, ...] = ()
    """Empty: any."""
    api_key: str | None = field(default=None, repr=False)
    adapters: tuple[str, ...] = ()
    """NAME=FOLDER each."""
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0
    has_grammars: bool = True
    has_prompt_logprobs: bool = False
    logs_json: bool = False
    termination_s: int = TERMINATION_TIMEOUT_S
    notes: tuple[str, ...] = ()
    """For the user: what was accepted and has no effect, or another one than with TGI."""


# Flags that are fields under another name; the other fields have their flags' names.
RENAMED = {
    "model_id": "model",
    "hostname": "host",
    "huggingface_hub_cache": "hub_cache",
    "kv_cache_dtype": "cache_dtype",
    "quantize": "quant",
    "max_input_length": "max_input_tokens",
    "cors_allow_origin": "cors_allow_origins",
    "disable_grammar_support": "has_grammars",
    "enable_prefill_logprobs": "has_prompt_logprobs",
    "graceful_termination_timeout": "termination_s",
    "json_output": "logs_json",
    "lora_adapters": "adapters",
}
PATHS = ("huggingface_hub_cache",)


def launch_options(given: Mapping[str, Any]) -> LaunchOptions:
    """Return what flags mean: `given` holds, by `Flag.name`, those that were given.

    Raises OptionError for a value or a combination that TGI refuses, or that hanok cannot obey.
    """
    _refuse_what_is_missing_here(given)
    _check_limits(given)
    notes = [
        f"accepted and ignored: {flag.option}, because {flag.ignored}."
        for flag in FLAGS
        if flag.ignored is not None and flag.name in given
    ]
    if "model_id" not in given:
        notes.append("no --model-id given: using the small model that ships with hanok.")
    if given.get("quantize") == "bitsandbytes-fp4":
        notes.append("--quantize bitsandbytes-fp4 becomes nf4: as many bits, and more exact.")
    if "kv_cache_dtype" in given:
        notes.append(f"--kv-cache-dtype {given['kv_cache_dtype']} becomes int8: as many bits.")
    fields = {
        RENAMED.get(flag.name, flag.name): _meaning(flag.name, given[flag.name])
        for flag in FLAGS
        if flag.ignored is None and flag.name in given
    }
    return LaunchOptions(**fields, notes=tuple(notes))


def _meaning(name: str, value: Any) -> Any:
    if name == "quantize":
        return QUANT[value]
    if name == "kv_cache_dtype":
        return "int8"
    if name == "disable_grammar_support":
        return not value
    if name == "lora_adapters":
        items = [item.strip() for item in str(value).split(",") if item.strip()]
        return tuple(item if "=" in item else f"{item}={item}" for item in items)
    if name in PATHS:
        return Path(value)
    return tuple(value) if name == "cors_allow_origin" else value


def _refuse_what_is_missing_here(given: Mapping[str, Any]) -> None:
    method = given.get("quantize")
    if method is not None and method not in QUANT:
        bits = "8" if method == "compressed-tensors" else "4"
        use = "bitsandbytes (8 bits), eetq (8), fp8 (8) or bitsandbytes-nf4 (4)"
        raise OptionError(
            f"--quantize {method} needs weights that were quantized beforehand, often to {bits} bits; "
            f"hanok does not read those. Give the original checkpoint, which hanok quantizes while it "
            f"reads it, with --quantize {use}."
        )
    if "tokenizer_config_path" in given:
        raise OptionError(
            f"--tokenizer-config-path {given['tokenizer_config_path']}: hanok takes the chat template "
            "from the checkpoint. Put the file into its folder as tokenizer_config.json."
        )
    for name in ("rope_scaling", "rope_factor"):
        if name in given:
            raise OptionError(
                f"--{name.replace('_', '-')} {given[name]} would change what the model answers; hanok "
                "takes it from the checkpoint alone. Write it into config.json, for example "
                '"rope_scaling": {"rope_type": "linear", "factor": 2.0}.'
            )


def _check_limits(given: Mapping[str, Any]) -> None:
    if "dtype" in given and "quantize" in given:
        raise OptionError(
            f"--dtype {given['dtype']} cannot be used with --quantize {given['quantize']}; leave one "
            "of them out."
        )
    if "max_input_tokens" in given and "max_input_length" in given:
        raise OptionError(
            f"both `max_input_tokens` ({given['max_input_tokens']}) and `max_input_length` "
            f"({given['max_input_length']}) are set. Give --max-input-tokens alone: the other is its "
            "old name."
        )
    max_input = given.get("max_input_tokens", given.get("max_input_length"))
    max_total = given.get("max_total_tokens")
    max_batch = given.get("max_batch_total_tokens")
    if max_input is not None and max_total is not None and max_input >= max_total:
        raise OptionError(
            f"`max_input_tokens` ({max_input}) must be < `max_total_tokens` ({max_total}): the answer "
            "needs at least one token of it."
        )
    if max_total is not None and max_batch is not None and max_total > max_batch:
        raise OptionError(
            f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {max_total} and "
            f"{max_batch}: one request must fit into the cache."
        )
    if given.get("sharded") == "true" and given.get("num_shard") == 1:
        raise OptionError("`sharded` is true but `num_shard` is 1; leave one of them out.")
