"""One line for each request: what it took, how long, and what came of it. Never the prompt."""

import json
import logging
import time
from typing import Any

from hanok.server.web import Exchange

LOG = logging.getLogger("hanok.requests")


def log_request(exchange: Exchange, *, as_json: bool) -> None:
    """Write the line of a request that has ended."""
    fields = described(exchange)
    if as_json:
        LOG.info(json.dumps(fields))
    else:
        LOG.info(" ".join(f"{name}={_plain(value)}" for name, value in fields.items()))


def described(exchange: Exchange) -> dict[str, Any]:
    """Return what is said of a request."""
    tickets = exchange.tickets
    fields: dict[str, Any] = {
        "request_id": exchange.id,
        "path": exchange.path,
        "status": exchange.status,
        "seconds": round(time.monotonic() - exchange.began, 4),
    }
    if tickets:
        sequences = [ticket.request.sequence for ticket in tickets]
        first = [ticket.times.first_token for ticket in tickets if ticket.times.first_token]
        fields |= {
            "prompt_tokens": sum(len(item.prompt_ids) for item in sequences),
            "generated_tokens": sum(len(item.generated_ids) for item in sequences),
            "cached_tokens": sum(ticket.num_cached_tokens for ticket in tickets),
            "drafted_tokens": sum(item.speculation.proposed for item in sequences),
            "accepted_tokens": sum(item.speculation.accepted for item in sequences),
            "finish_reason": ",".join(str(item.finish_reason) for item in sequences),
        }
        if first:
            fields["first_token_s"] = round(min(first) - exchange.began, 4)
    fields |= exchange.parameters
    if exchange.error is not None:
        fields["error"] = f"{exchange.error.kind}: {exchange.error}"
    return fields


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return json.dumps(text) if " " in text or not text else text
