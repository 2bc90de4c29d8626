"""Every option of a push and of a pull, once: for Python, the command line and the documentation."""

from dataclasses import dataclass
from pathlib import Path

from hanok.errors import OptionError

STATE_FOLDER = Path("~/.cache/hanok/hub")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """How a folder is pushed."""

    revision: str = "main"
    """Branch to commit to; it is created if it does not exist."""
    create_pr: bool = False
    """Open a pull request instead of committing to the branch."""
    private: bool = False
    """Make the repository private if it has to be created."""
    message: str | None = None
    """First line of the commit. None: "Push" and the folder's name."""
    include: tuple[str, ...] = ()
    """Push only files that match this pattern ("*.json"). Repeatable."""
    exclude: tuple[str, ...] = ()
    """Leave out files that match this pattern. Repeatable."""
    delete: tuple[str, ...] = ()
    """Delete files of the repository that match this pattern and are not pushed, in the same commit.
    Repeatable."""
    allow_pickles: bool = False
    """Push pickles (.bin, .pt) as well: they run code when others load them."""
    allow_secrets: tuple[str, ...] = ()
    """Name of a file that may be pushed although something in it looks like a secret. Repeatable."""
    dry_run: bool = False
    """Check everything, and change nothing."""
    follow: bool = False
    """Push a folder that is being written: each file as soon as it is complete, and one commit at the
    end."""
    until: str | None = None
    """Name of the file that is written last, for --follow. None: config.json and all weights."""
    patience_s: float = 3600.0
    """For --follow: how long to wait for another file before giving up."""
    connections: int = 1
    """Parts of a file that are sent at a time. A killed push sends as many again."""
    endpoint: str | None = None
    """Address of the hub. None: HF_ENDPOINT, or https://huggingface.co."""

    def __post_init__(self) -> None:
        if self.connections < 1:
            raise OptionError(f"connections is {self.connections}, and must be at least 1.")
        if self.patience_s <= 0:
            raise OptionError(f"patience_s is {self.patience_s}, and must be positive.")
        if self.until is not None and not self.follow:
            raise OptionError("until says when to stop following a folder; it needs follow.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """How a repository is pulled."""

    revision: str = "main"
    """Branch, tag or commit."""
    include: tuple[str, ...] = ()
    """Pull only files that match this pattern ("*.json"). Repeatable."""
    exclude: tuple[str, ...] = ()
    """Leave out files that match this pattern. Repeatable."""
    verify: bool = False
    """Hash the files that are in the cache already, too."""
    copy: bool = False
    """Copy weights to the destination. Without it they are links to the cache (hard links), which must
    not be written into."""
    connections: int = 4
    """Files that are received at a time."""
    cache_folder: Path | None = None
    """The cache. None: the one that transformers uses (HF_HUB_CACHE)."""
    endpoint: str | None = None
    """Address of the hub. None: HF_ENDPOINT, or https://huggingface.co."""

    def __post_init__(self) -> None:
        if self.connections < 1:
            raise OptionError(f"connections is {self.connections}, and must be at least 1.")
