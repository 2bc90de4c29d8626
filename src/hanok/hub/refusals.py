"""What an answer other than success means, and what to do: one text for each HTTP status."""

from http import HTTPStatus

from hanok.errors import HubError

SERVER_ERRORS = 500


class Refused(HubError):
    """A hub answered a request with another status than success."""

    def __init__(self, text: str, *, status: int, code: str) -> None:
        super().__init__(text)
        self.status = status
        self.code = code
        """The hub's own word for the reason ("RepoNotFound"), "" without one."""


def refusal(
    status: int, *, what: str, host: str, is_storage: bool, has_token: bool, code: str, said: str
) -> Refused:
    """Return the error for an answer.

    `what` is what was asked for ("a commit to org/name"); `is_storage` whether the answer came from
    where the hub keeps large files, to which it gives out links; `said` is the server's own explanation.
    """
    find = _storage_text if is_storage else _hub_text
    text = f"{what}: {find(status, host, has_token, code)}"
    if said:
        text += f" It says: {said}"
    return Refused(text, status=status, code=code)


def _hub_text(status: int, host: str, has_token: bool, code: str) -> str:
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if code == "GatedRepo":
        return f"gated (HTTP {status}). Accept its terms on {host}, and {login}."
    if status == HTTPStatus.UNAUTHORIZED and not has_token:
        return (
            f"{host} wants to know who you are (HTTP 401): it is private, or does not exist. To see "
            f"private ones or to write, {login}."
        )
    if status == HTTPStatus.UNAUTHORIZED:
        return (
            f"{host} does not accept your token (HTTP 401): it is expired, revoked or mistyped. Make "
            f"another one at {host}/settings/tokens and {login}; HF_TOKEN is used before a login."
        )
    if code == "RevisionNotFound":
        return f"{host} has no such branch, tag or commit (HTTP 404). Check the revision."
    if code == "EntryNotFound":
        return f"{host} has no such file at this revision (HTTP 404). Check its name."
    texts = {
        HTTPStatus.BAD_REQUEST: f"{host} finds a fault in the request (HTTP 400). Mend what it names.",
        HTTPStatus.PAYMENT_REQUIRED: (
            f"{host} wants a payment first (HTTP 402): the storage of this account is used up. Delete "
            "what is not needed, or buy storage in its settings."
        ),
        HTTPStatus.FORBIDDEN: (
            f"your token may not do this on {host} (HTTP 403). Writing needs a token of the role "
            '"write", or a fine-grained one with write access to this user or organization '
            f"({host}/settings/tokens), and membership in the organization."
        ),
        HTTPStatus.NOT_FOUND: (
            f"{host} has nothing of this name that you may see (HTTP 404). Check the name; for a "
            f"private one {login}."
        ),
        HTTPStatus.CONFLICT: (
            f"{host} has something of this name already, or is changing it at this moment (HTTP 409). "
            "Run it again; choose another name if it remains."
        ),
        HTTPStatus.PRECONDITION_FAILED: (
            f"another commit came first (HTTP 412): {host} is no longer at the commit that this push "
            "was compared with, and nothing was changed. Look at what was committed, and push again; "
            "what was uploaded is not sent a second time."
        ),
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: (
            f"too large for {host} (HTTP 413). Write weights in shards of 5 GB, and push many small "
            "files in several calls (--include)."
        ),
        HTTPStatus.TOO_MANY_REQUESTS: (
            f"too many requests for {host} (HTTP 429). Wait some minutes and run it again; what was "
            "transferred is kept."
        ),
    }
    if status in texts:
        return texts[HTTPStatus(status)]
    if status >= SERVER_ERRORS:
        return (
            f"{host} fails (HTTP {status}), and did so each time. Nothing of yours is wrong; run it "
            "again later: what was transferred is kept."
        )
    return f"{host} answers HTTP {status}, which is unexpected here."


def _storage_text(status: int, host: str, has_token: bool, code: str) -> str:
    if status in (HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        return (
            f"the storage at {host} does not accept the link that the hub gave out (HTTP {status}): it "
            "has expired, or this machine's clock is wrong. Check the clock, and run it again."
        )
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return f"too large for the storage at {host} (HTTP 413). Write weights in shards of 5 GB."
    if status >= SERVER_ERRORS:
        return f"the storage at {host} fails (HTTP {status}), and did so each time. Run it again later."
    return f"the storage at {host} answers HTTP {status}. Run it again."
