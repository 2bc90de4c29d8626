"""`hanok push` to a hub on this machine, against a plain copy; and what kill -9 costs it.

    python benchmarks/push.py [--quick] [--bytes 2200000000] [--kills 10] [--output FILE.md]

The hub (tests/hub/fake_hub.py) is a process of its own. It speaks huggingface.co's protocol over
loopback and takes files in parts of 16 MiB; it discards their bytes, or writes them to the disk that
the copy is made on, without waiting for it. It compares sizes, not hashes. Copy and push take turns. The
files are in the page cache; a push begins with an empty journal and a new hub, so it hashes and sends
everything. The copy is Python's shutil.copyfile, which copies within the kernel; it is measured as it
is, and until its bytes are on the disk (fsync).

For the kills, a push in a process of its own is ended by SIGKILL once the hub has received a random
number of bytes, and run again. Bytes sent again are what the hub received in both runs beyond the files.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import measure

from hanok.bench.spread import Spread
from hanok.hub.options import PushOptions
from hanok.hub.push import push

HUB = measure.REPOSITORY / "tests" / "hub" / "fake_hub.py"
NUM_SHARDS = 4
BLOCK_BYTES = 2**22
LOOK_S = 0.002
COPY, DURABLE = "plain copy", "plain copy, on the disk (fsync)"
DISCARD, STORE = "push, hub discards", "push, hub stores"
PUSHER = """
import sys
from pathlib import Path
from hanok.hub.options import PushOptions
from hanok.hub.push import push
folder, url, token, state = sys.argv[1:]
push(folder, "me/model", PushOptions(endpoint=url), token=token, state_folder=Path(state))
"""


def make_files(folder: Path, num_bytes: int) -> None:
    """Write random bytes as shards, which no two of are alike."""
    folder.mkdir()
    generator = random.Random(20)
    for number in range(1, NUM_SHARDS + 1):
        left = num_bytes // NUM_SHARDS
        with (folder / f"model-{number:05}-of-{NUM_SHARDS:05}.safetensors").open("wb") as file:
            while left:
                left -= file.write(generator.randbytes(min(left, BLOCK_BYTES)))
    (folder / "config.json").write_text("{}")


@contextmanager
def running_hub(*words: str) -> Iterator[dict[str, Any]]:
    """Run a hub for a block; yield its address and token."""
    command = [sys.executable, str(HUB), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.kill()


def copy_once(folder: Path, scratch: Path, *, is_durable: bool = False) -> measure.Row:
    """Copy the files and remove the copies."""
    target = scratch / "copy"
    target.mkdir()
    began = time.perf_counter()
    for file in sorted(folder.iterdir()):
        shutil.copyfile(file, target / file.name)
        if is_durable:
            with (target / file.name).open("rb") as copied:
                os.fsync(copied.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return {"s": seconds}


def push_once(folder: Path, scratch: Path, *, stores: bool, connections: int) -> measure.Row:
    """Push the files to a new hub."""
    blobs, state = scratch / "blobs", scratch / "state"
    blobs.mkdir()
    words = ["--folder", str(blobs)] if stores else ["--discard"]
    with running_hub(*words) as hub:
        options = PushOptions(endpoint=hub["url"], connections=connections)
        began = time.perf_counter()
        report = push(folder, "me/model", options, token=hub["token"], state_folder=state)
        seconds = time.perf_counter() - began
    assert report.sent_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    shutil.rmtree(blobs)
    shutil.rmtree(state, ignore_errors=True)
    return {"s": seconds}


def received_by(hub: dict[str, Any]) -> int:
    with urlopen(f"{hub['url']}/stats", timeout=60) as answer:
        return int(json.load(answer)["received"])


def kill_once(folder: Path, scratch: Path, after_bytes: int) -> measure.Row:
    """Kill a push once the hub has received so much, run it again, and count what came twice."""
    state = scratch / "state"
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with running_hub("--discard") as hub:
        command = [sys.executable, "-c", PUSHER, str(folder), hub["url"], hub["token"], str(state)]
        with subprocess.Popen(command) as first:
            while received_by(hub) < after_bytes and first.poll() is None:
                time.sleep(LOOK_S)
            first.kill()
        received = received_by(hub)
        was_killed = first.returncode != 0
        subprocess.run(command, check=True)
        again = received_by(hub) - num_bytes
    shutil.rmtree(state, ignore_errors=True)
    return {"after": received, "again": again, "was_killed": was_killed}


def speed_table(rows: dict[str, list[measure.Row]], num_bytes: int) -> str:
    """Return seconds, rates, and the share of the copy's speed."""
    copies = [row["s"] for row in rows[COPY]]
    lines: list[tuple[object, ...]] = []
    for name, found in rows.items():
        seconds = [row["s"] for row in found]
        rates = [num_bytes / 1e6 / item for item in seconds]
        share = Spread.of_ratio(copies, seconds)
        lines.append((name, Spread.of(seconds), Spread.of(rates), share))
    return measure.table(("", "s", "MB/s", "share of the plain copy's speed"), lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--bytes", type=int, default=2_200_000_000)
    made.add_argument("--kills", type=int, default=10)
    made.add_argument("--connections", type=int, default=1)
    made.add_argument("--folder", type=Path, help="scratch folder (default: a new one in /var/tmp)")
    made.add_argument(
        "--quick", action="store_true", help="80 MB, two runs, two kills: does it run?"
    )
    measure.add_common_options(made, runs=5)
    return made


def main() -> None:
    options = parser().parse_args()
    if options.quick:
        options.bytes, options.runs, options.kills, options.patience = 80_000_000, 2, 2, 0.0
    base = options.folder or Path("/var/tmp")
    part_bytes = 16 * 2**20
    with tempfile.TemporaryDirectory(dir=base, prefix="hanok-push-") as name:
        scratch = Path(name)
        folder = scratch / "model"
        make_files(folder, options.bytes)
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
        one_push = partial(push_once, folder, scratch, connections=options.connections)
        copy_once(folder, scratch)  # reads the files into the page cache
        rows = measure.interleave(
            {
                COPY: lambda: copy_once(folder, scratch),
                DURABLE: lambda: copy_once(folder, scratch, is_durable=True),
                DISCARD: lambda: one_push(stores=False),
                STORE: lambda: one_push(stores=True),
            },
            runs=options.runs,
            guard=measure.guard_of(options),
            log=measure.log_of(options),
        )
        generator = random.Random(9)
        points = [generator.randrange(1, options.bytes) for _ in range(options.kills)]
        kills = [kill_once(folder, scratch, point) for point in points]
    killed = [row for row in kills if row["was_killed"]]
    most = max((row["again"] for row in killed), default=0)
    listed = [
        (
            f"{row['after'] / 1e6:,.1f}",
            f"{row['again'] / 1e6:,.2f}",
            f"{row['again'] / part_bytes:.2f}",
        )
        for row in killed
    ]
    text = [
        measure.heading(f"hanok push, {num_bytes / 1e6:,.0f} MB over loopback", options.threads),
        f"- Files: {NUM_SHARDS} shards; parts of {part_bytes:,} bytes; connections: "
        f"{options.connections}",
        f"- Disturbed by other programs: {measure.count_disturbed(rows)} of "
        f"{len(rows) * options.runs}",
        "",
        speed_table(rows, num_bytes),
        "",
        f"Killed {len(killed)} times of {options.kills}; at most {most / part_bytes:.2f} parts were "
        "sent again.",
        "",
        measure.table(("received at the kill, MB", "sent again, MB", "in parts"), listed),
    ]
    measure.publish("\n".join(text), options.output)


if __name__ == "__main__":
    main()
