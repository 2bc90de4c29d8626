"""Every error that hanok raises deliberately.

HanokError
├── OptionError        an option or argument is unknown, or its value is out of range
├── CheckpointError    a file or a tensor of a checkpoint is missing, damaged or inconsistent
├── UnsupportedError   no implementation fits: the message lists each one with its reason
├── BudgetError        not enough memory: by how much, where, and what would help
├── RequestError       one prompt, conversation or token list cannot be served
├── GenerationError    computing one request failed; the others continue
├── RequestAbortedError  a request was aborted before it was finished
├── DeadlineError      a request was not finished before its deadline
├── HubError           a hub refused a request, or could not be reached
├── ClosedError        an engine was stopped, or is about to be, and takes no requests
└── DataError          rows of training data are missing, damaged, or would teach something else

A message says what happened, with which values, why, and what to do. `exit_code` is what the command
line returns; `http_status` is what a server answers.
"""


class HanokError(Exception):
    """Base of every error that hanok raises deliberately."""

    exit_code = 1
    http_status = 500


class OptionError(HanokError):
    """An option or argument is unknown, or its value is out of range."""

    exit_code = 2
    http_status = 422


class CheckpointError(HanokError):
    """A file or a tensor of a checkpoint is missing, damaged or inconsistent with the rest."""

    exit_code = 3


class UnsupportedError(HanokError):
    """No implementation fits the request; the message lists each one with its reason."""

    exit_code = 4
    http_status = 501


class BudgetError(HanokError):
    """There is not enough memory for the request, or less than when it was planned."""

    exit_code = 6


class RequestError(HanokError):
    """One prompt, conversation or token list cannot be served; nothing else is affected."""

    exit_code = 5
    http_status = 422


class GenerationError(HanokError):
    """Computing one request failed; the others continue."""

    exit_code = 7
    http_status = 424


class RequestAbortedError(HanokError):
    """A request was aborted before it was finished."""

    exit_code = 8
    http_status = 499


class DeadlineError(HanokError):
    """A request was not finished before its deadline."""

    exit_code = 9
    http_status = 408


class HubError(HanokError):
    """A hub refused a request, answered what it should not, or could not be reached."""

    exit_code = 11
    http_status = 502


class ClosedError(HanokError):
    """An engine was stopped, or is about to be, and takes no requests."""

    exit_code = 10
    http_status = 503


class DataError(HanokError):
    """Rows of training data are missing, damaged, or would teach something else than was meant."""

    exit_code = 12
    http_status = 422
