"""Adding five tokens to a checkpoint: hanok's edit of the folder; transformers' add, resize, save.

    python benchmarks/tokens.py [--quick] [--shape llama-1.1b] [--runs 5] [--output FILE.md]

Both begin with the same folder of four weights files and end with a new folder, in a process of their
own each time, in turn. Counted are the seconds of the whole process (interpreter and imports included)
and of the work alone, the bytes that were written and how many weights files, and the most memory that
the process held itself (anonymous memory, from /proc; pages of mapped files are the system's). hanok's
files are on the disk when it ends (fsync), transformers' perhaps not: `sync` is timed after both, apart.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import checkpoints
import measure

from hanok.bench.spread import Spread

SPECIAL = "<|im_sep|>"
ORDINARY = ("<think>", "</think>", "<answer>", "</answer>")
NUM_SHARDS = 4
NAMES = ("hanok", "transformers")
POLL_S = 0.002


def make_subject(shape: checkpoints.Shape, folder: Path) -> Path:
    """Return a checkpoint in four files, with a byte-level tokenizer that has a token for each row."""
    path = folder / f"{shape.name}-tokens"
    if (path / "tokenizer.json").exists():
        return path
    plain = checkpoints.make_checkpoint(shape, folder)
    total = sum(file.stat().st_size for file in plain.glob("*.safetensors"))
    from hanok.checkpoint.writer import write_json, write_safetensors

    write_safetensors(
        path, checkpoints.tensors_of(shape, 0), max_shard_bytes=-(-total // NUM_SHARDS) + 2**20
    )
    write_json(path / "config.json", shape.config())
    write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_tokenizer(path, shape.vocab_size)
    return path


def write_tokenizer(path: Path, size: int) -> None:
    """Write a tokenizer.json whose merges are pairs and triples of letters, in order."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {text: number for number, text in enumerate(special)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    merges = []
    pairs = [a + b for a in letters for b in letters]
    for left, right in [(a[0], a[1]) for a in pairs] + [(a, b) for a in pairs for b in pairs]:
        if len(vocabulary) == size:
            break
        merges.append((left, right))
        vocabulary[left + right] = len(vocabulary)
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(special)
    library.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


class Watch:
    """The most anonymous memory that this process held, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(POLL_S):
            self._look()

    def _look(self) -> None:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                self.peak_bytes = max(self.peak_bytes, int(line.split()[1]) * 1024)

    def stop(self) -> int:
        """Return the peak."""
        self._look()
        self._ended.set()
        self._thread.join()
        return self.peak_bytes


def run_hanok(source: Path, target: Path) -> None:
    """The user's five tokens by two commands' worth of calls."""
    from hanok.checkpoint.tokenizer_config import AddedToken
    from hanok.memory.token_options import TokenOptions
    from hanok.memory.tokens import apply, plan_tokens

    special = AddedToken(text=SPECIAL, token_id=None, is_special=True)
    apply(plan_tokens(source, [special, *ORDINARY], TokenOptions()), target)


def run_transformers(source: Path, target: Path) -> None:
    """The same as transformers' documentation does it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.add_tokens(list(ORDINARY))
    model.resize_token_embeddings(len(tokenizer))
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    model.save_pretrained(target, max_shard_size=-(-size // NUM_SHARDS) + 2**20)
    tokenizer.save_pretrained(target)


def work(name: str, source: Path, target: Path, spawned: float) -> None:
    """Be the process of one side; print what it took."""
    watch = Watch()
    began = time.time()
    {"hanok": run_hanok, "transformers": run_transformers}[name](source, target)
    ended = time.time()
    old = {file.stat().st_ino for file in source.iterdir()}
    new = [file for file in target.iterdir() if file.stat().st_ino not in old]
    row = {
        "process_s": ended - spawned,
        "work_s": ended - began,
        "peak_bytes": watch.stop(),
        "written_bytes": sum(file.stat().st_size for file in new),
        "shards": sum(file.suffix == ".safetensors" for file in new),
    }
    print(json.dumps(row))


def run_side(name: str, source: Path, folder: Path, threads: int) -> measure.Row:
    """Run one side in a new process, and sync after it."""
    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    command = [sys.executable, str(Path(__file__)), "--side", name, str(source), str(target)]
    row = measure.run_cold(command, threads=threads)
    began = time.perf_counter()
    os.sync()
    row["sync_s"] = time.perf_counter() - began
    return row


def check_equal(source: Path, folder: Path) -> str:
    """Return whether transformers computes the same logits of old tokens in both results."""
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, found, cut = torch.tensor([[5, 9, 400, 77]]), [], []
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    found.append(model(ids).logits[..., :400])
    tokenizer = AutoTokenizer.from_pretrained(path)
    cut.append(tokenizer.tokenize("a<think>bc</think> <|im_sep|>d"))
print(all(torch.equal(found[0], item) for item in found) and cut[1] == cut[2])
"""
    paths = [str(source), *(str(folder / name) for name in NAMES)]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True
    )
    return "equal" if done.stdout.split()[-1] == "True" else "DIFFERENT"


FIGURES = {
    "whole process, s": "process_s",
    "the work alone, s": "work_s",
    "sync after it, s": "sync_s",
    "written, MB": "written_bytes",
    "weights files written": "shards",
    "peak of own memory, MB": "peak_bytes",
}


def table(rows: dict[str, list[measure.Row]]) -> str:
    """Return the figures of both, and hanok / transformers."""
    lines: list[tuple[object, ...]] = []
    for name, key in FIGURES.items():
        scale = 1e-6 if name.endswith("MB") else 1.0
        found = {side: [row[key] * scale for row in rows[side]] for side in NAMES}
        spreads = [Spread.of(found[side]) for side in NAMES]
        ratio = Spread.of_ratio(found["hanok"], found["transformers"]) if spreads[1].low else "-"
        lines.append((name, *spreads, ratio))
    both = [[row["work_s"] + row["sync_s"] for row in rows[side]] for side in NAMES]
    lines.append(("work and sync, s", *map(Spread.of, both), Spread.of_ratio(both[0], both[1])))
    return measure.table(("", *NAMES, "hanok / transformers"), lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--shape", choices=list(checkpoints.SHAPES), default="llama-1.1b")
    made.add_argument("--folder", type=Path, default=checkpoints.DEFAULT_FOLDER)
    made.add_argument("--quick", action="store_true", help="a tiny shape, two runs: does it run?")
    measure.add_common_options(made, runs=5)
    return made


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        name, source, target, spawned = sys.argv[2:6]
        work(name, Path(source), Path(target), float(spawned))
        return
    options = parser().parse_args()
    if options.quick:
        options.shape, options.runs, options.patience = "tiny", 2, 0.0
    shape = checkpoints.SHAPES[options.shape]
    source = make_subject(shape, options.folder)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        rows = measure.interleave(
            {
                side: lambda side=side: run_side(side, source, folder, options.threads)
                for side in NAMES
            },
            runs=options.runs,
            guard=measure.guard_of(options),
            log=measure.log_of(options),
        )
        same = check_equal(source, folder)
    text = [
        measure.heading(f"Five tokens more, {shape.name} in {NUM_SHARDS} files", options.threads),
        f"- Disturbed by other programs: {measure.count_disturbed(rows)} of {2 * options.runs}",
        f"- transformers' logits of old tokens, and its cuts of a text with new ones: {same}",
        "",
        table(rows),
    ]
    measure.publish("\n".join(text), options.output)


if __name__ == "__main__":
    main()
