"""Prompts of a request, as routes of several protocols read them, and texts with a gap."""

from collections.abc import Sequence

from hanok.checkpoint.infill import Infill
from hanok.engine.params import SamplingOptions
from hanok.server.errors import ServerError, invalid
from hanok.server.openai_models import CompletionRequest
from hanok.server.service import Service
from hanok.server.submission import fitting


def prompts_of(service: Service, body: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts of a body, each a text or token ids."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("`prompt` cannot be empty", "prompt")
    if isinstance(given[0], int):
        return [list(given)]
    if len(given) > service.options.max_client_batch_size:
        raise batch_too_large(service)
    return list(given)


def batch_too_large(service: Service) -> ServerError:
    """Return the error of a request with too many prompts."""
    most = service.options.max_client_batch_size
    return ServerError(
        f"Number of prompts exceeds the maximum allowed batch size of {most}",
        kind="batch size exceeded",
    )


def end_with(sampling: SamplingOptions, infill: Infill) -> None:
    """End a text in a gap where the model writes a marker, which is not part of it."""
    sampling["stop_token_ids"] = [*sampling.get("stop_token_ids", ()), *infill.end_ids]
    sampling["stop"] = [*sampling.get("stop", ()), *infill.end_texts()]


async def gapped(
    service: Service,
    infill: Infill,
    prefix: str | list[int],
    suffix: str,
    *,
    most: int | None,
    files: Sequence[tuple[str, str]] = (),
    middle: str = "",
) -> list[int]:
    """Return the tokens of a text with a gap (see `Infill.encode`), in which `most` are to be generated.

    A text that cannot be served is refused before it is tokenized, as by `Service.encoded`.
    """

    def encode() -> list[int]:
        texts = [suffix, middle, *(part for file in files for part in file)]
        texts += [prefix] if isinstance(prefix, str) else []
        fitting(service, most, "prompt")(sum(map(service.needed_tokenizer.fewest_tokens, texts)))
        return infill.encode(prefix, suffix, files=files, middle=middle)

    return await service.aside(encode)
