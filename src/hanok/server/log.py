"""One log line per request: its parameters, times and outcome, but no text of its body.

Values that a client chose, such as the path, are quoted where they could be misread: a line stays one
line, its fields can be parsed, and no control character reaches the terminal.
"""

import json
import logging
import time
from typing import Any

from hanok.server.web import Exchange

LOG = logging.getLogger("hanok.requests")
QUOTED = frozenset(' "=\\')
"""A value with one of these is quoted; so is one with a nonprinting character."""
OF_CLIENTS = 422
"""Errors up to this status go to the client only: their messages may quote its texts."""


class LineFormatter(logging.Formatter):
    """Formats records; lines after the first, such as a traceback, are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's lines, with nonprinting characters escaped."""
        lines = super().format(record).split("\n")
        return "\n    ".join(
            "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines
        )


def log_request(exchange: Exchange, *, as_json: bool) -> None:
    """Write the line of a request that has ended."""
    fields = described(exchange)
    if as_json:
        LOG.info(json.dumps(fields))
    else:
        LOG.info(" ".join(f"{name}={_plain(value)}" for name, value in fields.items()))


def described(exchange: Exchange) -> dict[str, Any]:
    """Return the fields of a request's line."""
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
        kind = exchange.error.kind
        is_told = exchange.error.status > OF_CLIENTS
        fields["error"] = f"{kind}: {exchange.error}" if is_told else kind
        name = (exchange.error.parameter or "").partition(".")[0]
        if name.isidentifier():  # one of our fields; what follows may be a client's
            fields["field"] = name
    return fields


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    is_bare = text and text.isprintable() and QUOTED.isdisjoint(text)
    return text if is_bare else json.dumps(text)
