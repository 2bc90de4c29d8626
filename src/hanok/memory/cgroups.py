"""The control groups of this process, and the small files in which Linux tells numbers. No torch.

A limit holds for a group and everything below it. What a process may use is therefore the least of
what every group says, from its own up to the root, or as far up as a container shows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True, kw_only=True)
class Cgroup:
    """A group that this process is in."""

    name: str
    """Its path in the hierarchy: "/docker/abc"."""
    folder: Path
    """Where its files are."""
    version: int
    """1 or 2: files have other names in each."""


def cgroups(controller: str, root: Path = Path("/")) -> Iterator[Cgroup]:
    """Yield every group that may limit this process by `controller` ("memory", "cpu"), its own first.

    Hierarchies of both versions count. `root` is where /proc and /sys are looked for.
    """
    paths = _paths(controller, root)
    for line in read_lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        mount, system = before.split(), after.split(maxsplit=2)
        if len(mount) < 5 or len(system) < 3 or system[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if system[0] == "cgroup2" else 1
        if version not in paths or (version == 1 and controller not in system[2].split(",")):
            continue
        mounted, top = PurePosixPath(mount[3]), root / mount[4].lstrip("/")
        own = PurePosixPath(paths[version])
        # In a container only a part of the tree may be mounted, and names may be of another one.
        inner = own.relative_to(mounted) if own.is_relative_to(mounted) else PurePosixPath()
        folder = top / inner if (top / inner).is_dir() else top
        for place in (folder, *folder.parents):
            name = str(mounted / place.relative_to(top))
            yield Cgroup(name=name, folder=place, version=version)
            if place == top:
                break


def _paths(controller: str, root: Path) -> dict[int, str]:
    """Return the path of this process's group by the version of the hierarchy."""
    found = {}
    for line in read_lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon:
            continue
        if controllers == "":
            found[2] = path
        elif controller in controllers.split(","):
            found[1] = path
    return found


def read_lines(file: Path) -> list[str]:
    """Return the lines of a file; none where it cannot be read."""
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def read_fields(file: Path) -> dict[str, int]:
    """Return the numbers of lines such as "MemAvailable:  100 kB" or "inactive_file 100"."""
    found = {}
    for line in read_lines(file):
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[1].isdecimal():
            found[words[0]] = int(words[1])
    return found


def read_number(file: Path) -> int | None:
    """Return the number in a file; None if there is no such file, or it says "max" or "-1"."""
    lines = read_lines(file)
    return int(lines[0]) if lines and lines[0].strip().isdecimal() else None
