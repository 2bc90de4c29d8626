"""Adds tokens to a checkpoint's folder: tokenizer files, configs and two matrices change together.

The model is not loaded. Rows that no token has yet are used first, and a matrix never becomes smaller;
files that do not change are hard-linked. An edit is planned (`plan_tokens` and the like, which write
nothing), shown (`diff`), and applied in one step (`apply`), after what must not change was checked in
the new files.

    plan = plan_tokens(folder, ["<think>", "</think>"], TokenOptions())
    report = apply(plan)

Memory: the changed rows. Bytes written: the shards with the embedding and the head, and JSON. Imports no
torch, unless a mean over a whole matrix is asked for.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from hanok.checkpoint.aside import folder_aside, folder_exchanged, folder_state, link_files
from hanok.checkpoint.card import Step, add_step, read_card
from hanok.checkpoint.files import (
    INDEX_SUFFIX,
    PICKLES,
    SAFETENSORS,
    Checkpoint,
    open_checkpoint,
    read_object,
)
from hanok.checkpoint.formats import FOREIGN
from hanok.checkpoint.rows import RowEdit, rewrite
from hanok.checkpoint.tokenizer import Tokenizer, open_tokenizer
from hanok.checkpoint.tokenizer_config import AddedToken
from hanok.checkpoint.tokenizer_edit import (
    LIBRARY,
    TokenizerEdit,
    added_tokens_text,
    with_tokens,
    without_tokens,
)
from hanok.checkpoint.writer import json_bytes
from hanok.errors import CheckpointError, OptionError, UnsupportedError
from hanok.memory.account import understand
from hanok.memory.token_checks import Edited, Invariant, check_edit
from hanok.memory.token_options import MEAN, TokenOptions
from hanok.memory.token_rows import (
    find_matrices,
    num_rows_for,
    pieces_of,
    row_edit,
    with_vocab_size,
)
from hanok.text_files import unified_diff

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS = frozenset(
    {*SAFETENSORS.suffixes, *PICKLES.suffixes, *(Path(name).suffix for name in FOREIGN)}
)
"""Endings of files that nobody edits by hand, and that two folders may therefore share."""
REPOSITORY = ".git"
NUM_EXAMPLES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A text with new tokens, before and after."""

    text: str
    before: tuple[str, ...]
    """Its tokens."""
    after: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensPlan:
    """An edit of a folder, of which nothing is written yet."""

    folder: Path
    state: Mapping[Path, tuple[int, int, int]]
    """What the folder's files were: an edit of others would mix the two."""
    contents: Mapping[str, bytes]
    """The small files that change, by name."""
    rows: tuple[RowEdit, ...]
    new: Mapping[str, int]
    known: Mapping[str, int]
    """Tokens that the vocabulary had already, and that are found in every text from now on."""
    same: tuple[str, ...]
    removed: tuple[str, ...]
    rows_before: int
    rows_after: int
    examples: tuple[Example, ...]
    notes: tuple[str, ...]
    tokenizer: Tokenizer
    """As it was."""
    tokenizer_after: Tokenizer

    @property
    def is_nothing(self) -> bool:
        """Whether the folder is as asked already."""
        return not self.contents and not self.rows

    @property
    def num_spare(self) -> int:
        """Rows that no token has afterwards."""
        return self.rows_after - self.tokenizer_after.vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensReport:
    """What an edit did."""

    folder: Path
    rewritten: tuple[str, ...]
    """The weights files that were written."""
    bytes_written: int
    invariants: tuple[Invariant, ...]
    copied: tuple[str, ...]
    """Files that are the same and were copied, where no hard link was possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInfo:
    """An added token of a folder."""

    token: AddedToken
    has_row: bool
    roles: tuple[str, ...] = ()


def plan_tokens(
    folder: str | Path, tokens: Sequence[str | AddedToken], options: TokenOptions
) -> TokensPlan:
    """Plan to add tokens to the folder of a checkpoint.

    Raises OptionError for options and texts that cannot be, CheckpointError for folders that are not
    whole, and UnsupportedError where the embedding or the head is quantized, by its name.
    """
    return _planned(Path(folder), tokens, options, None)


def plan_resize(
    folder: str | Path, num_rows: int | None, pad_to_multiple_of: int | None = None
) -> TokensPlan:
    """Plan to give a checkpoint's matrices more rows, which begin as the mean of the others.

    Raises OptionError for fewer rows than there are: tokens, or rows that were trained, would be lost.
    """
    options = TokenOptions(pad_to_multiple_of=pad_to_multiple_of, init=MEAN)
    return _planned(Path(folder), [], options, num_rows)


def plan_removal(folder: str | Path, texts: Sequence[str]) -> TokensPlan:
    """Plan to remove the last added tokens of a folder; their rows stay, for later ones.

    Raises OptionError for tokens that are not the last, or not added ones.
    """
    folder = _folder(Path(folder))
    state = folder_state(folder)
    checkpoint = open_checkpoint(folder)
    tokenizer = open_tokenizer(folder)
    edit = without_tokens(tokenizer.edited_files(), texts)
    matrices = find_matrices(checkpoint)
    templates = "".join(tokenizer.chat_template_texts)
    notes = [f"the chat template still writes {text!r}" for text in texts if text in templates]
    names = {tokenizer.ids[text]: text for text in texts}
    contents = dict(edit.contents)
    for name, config in ((CONFIG, checkpoint.config), (GENERATION, checkpoint.generation_config)):
        changed = _without_ids(config, names, name)
        if changed != config:
            contents[name] = json_bytes(changed)
    return TokensPlan(
        folder=folder,
        state=state,
        contents=contents,
        rows=(),
        new={},
        known={},
        same=(),
        removed=tuple(texts),
        rows_before=matrices.num_rows,
        rows_after=matrices.num_rows,
        examples=(),
        notes=(*notes, *matrices.notes),
        tokenizer=tokenizer,
        tokenizer_after=tokenizer.changed(edit.contents),
    )


def list_tokens(folder: str | Path) -> tuple[int, list[TokenInfo]]:
    """Return the rows of a checkpoint's embedding, and its added tokens by their ids."""
    folder = _folder(Path(folder))
    tokenizer = open_tokenizer(folder)
    num_rows = find_matrices(open_checkpoint(folder)).num_rows
    files = tokenizer.edited_files()
    roles: dict[str, list[str]] = {}
    for name, text in files.named.items():
        roles.setdefault(text, []).append(name)
    return num_rows, [
        TokenInfo(
            token=token,
            has_row=token.token_id is not None and token.token_id < num_rows,
            roles=tuple(roles.get(token.text, ())),
        )
        for token in files.added
    ]


def diff(plan: TokensPlan) -> Iterator[str]:
    """Yield the lines of a unified diff of the small files, and a line for each changed tensor."""
    for name, after in sorted(plan.contents.items()):
        before = _text_of(plan.folder / name)
        text = after.decode()
        if name == LIBRARY:  # of many files one line
            before = before and added_tokens_text(before.encode())
            text = added_tokens_text(after)
        yield from unified_diff(before, text, f"{name} (before)", f"{name} (after)")
    for edit in plan.rows:
        before_shape, after_shape = list(edit.tensor.shape), list(edit.shape)
        where = f"{edit.tensor.path.name}: {edit.tensor.name}"
        ids = sorted(edit.rows)
        of = f"rows {ids[0]} to {ids[-1]} new" if ids else "rows added"
        yield f"{where} {edit.tensor.dtype} {before_shape} -> {after_shape}, {of}"


def apply(
    plan: TokensPlan,
    output: str | Path | None = None,
    *,
    verify: Callable[[Path], None] | None = None,
    step: Step | None = None,
) -> TokensReport:
    """Write what was planned: into a new folder `output`, or in place of the old one in one step.

    What must not change is checked in the new files first, and by `verify`, which gets their folder; if
    anything is wrong, CheckpointError is raised and nothing has changed. In place, files that do not
    change stay what they are; elsewhere weights are hard links, and other files copies. `step` is
    written into the card.
    """
    _refuse_changed(plan)
    if step is not None:
        read_card(plan.folder)  # refused where it cannot be read, before anything is written
    target = None if output is None else Path(output)
    _refuse_target(plan, target)
    shards: dict[Path, list[RowEdit]] = {}
    for edit in plan.rows:
        shards.setdefault(edit.tensor.path.relative_to(plan.folder), []).append(edit)
    without = {*map(Path, plan.contents), *shards}

    def is_linked(name: Path) -> bool | None:
        if name in without or (target is not None and name.parts[0] == REPOSITORY):
            return None
        return target is None or name.suffix in WEIGHTS

    _refuse_little_room(target or plan.folder, plan.rows)
    with (
        _written(target or plan.folder),
        folder_exchanged(plan.folder) if target is None else folder_aside(target) as unfinished,
    ):
        copied = link_files(plan.folder, unfinished, is_linked)
        for name, data in plan.contents.items():
            _write_file(unfinished / name, plan.folder / name, data)
        with ThreadPoolExecutor(max_workers=2) as pool:
            written = pool.map(
                lambda name: _write_shard(unfinished / name, plan.folder / name, shards[name]),
                shards,
            )
            sizes = list(written)
        edited = Edited(
            folder=plan.folder,
            tokenizer=plan.tokenizer,
            rows=plan.rows,
            num_rows=plan.rows_after,
            found={**plan.new, **plan.known},
            removed=plan.removed,
        )
        invariants = check_edit(edited, unfinished)
        if broken := [item for item in invariants if item.is_needed and not item.holds]:
            raise CheckpointError(
                f"{plan.folder}: after the edit this would not hold: {broken[0].name} "
                f"({broken[0].detail}). Nothing was changed."
            )
        if verify is not None:
            verify(unfinished)
        if step is not None:
            add_step(unfinished, step)
        _refuse_changed(plan)
    return TokensReport(
        folder=target or plan.folder,
        rewritten=tuple(map(str, shards)),
        bytes_written=sum(sizes) + sum(map(len, plan.contents.values())),
        invariants=tuple(invariants),
        copied=tuple(str(file.relative_to(plan.folder)) for file in copied),
    )


def _refuse_target(plan: TokensPlan, target: Path | None) -> None:
    if target is None:
        links = sorted(str(name) for name in plan.state if (plan.folder / name).is_symlink())
        if links:
            raise CheckpointError(
                f"{plan.folder}: {', '.join(links[:5])} are symbolic links, as in the cache of "
                "downloads, which others may use. Write to another folder."
            )
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; choose another folder.")
    elif target.resolve().is_relative_to(plan.folder.resolve()):
        raise CheckpointError(f"{target} is inside of {plan.folder}; choose another folder.")


def _refuse_little_room(folder: Path, edits: Sequence[RowEdit]) -> None:
    there = next(parent for parent in folder.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(there).free
    old = sum(path.stat().st_size for path in {edit.tensor.path for edit in edits})
    needed = old + sum(map(_growth, edits))
    if needed > free:
        raise CheckpointError(
            f"{folder}: {needed / 2**30:,.2f} GiB are to be written, and {free / 2**30:,.2f} GiB are "
            "free there. Nothing was changed; make room, or write to another folder."
        )


def _growth(edit: RowEdit) -> int:
    return edit.row_bytes * (edit.num_rows - edit.tensor.shape[0])


def _refuse_changed(plan: TokensPlan) -> None:
    state = folder_state(plan.folder)
    if state != plan.state:
        names = sorted({str(name) for name, _ in state.items() ^ plan.state.items()})
        raise CheckpointError(
            f"{plan.folder}: {', '.join(names[:5])} changed since the edit was planned. Nothing was "
            "written; once nothing else writes there, run this again."
        )


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Raise CheckpointError for what the operating system refuses while a folder is written."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror or error}{where}. Nothing was changed."
        ) from error


def _planned(
    folder: Path, tokens: Sequence[str | AddedToken], options: TokenOptions, num_rows: int | None
) -> TokensPlan:
    folder = _folder(folder)
    state = folder_state(folder)
    checkpoint = open_checkpoint(folder)
    notes = _check_whole(checkpoint)
    if not all(file.suffix == ".safetensors" for file in checkpoint.files):
        raise UnsupportedError(
            f"{folder} has pickled weights alone. Convert them first: hanok convert {folder}"
        )
    tokenizer = open_tokenizer(folder)
    matrices = find_matrices(checkpoint)
    asked = [
        token if isinstance(token, AddedToken) else _added_token(token, options) for token in tokens
    ]
    edit = TokenizerEdit(contents={}, new={}, known={})
    if asked or options.roles:
        edit = with_tokens(
            tokenizer.edited_files(),
            asked,
            roles=options.roles,
            has_legacy_files=options.legacy_tokenizer_files,
        )
    after = tokenizer.changed(edit.contents) if edit.contents else tokenizer
    rows = num_rows_for(matrices.num_rows, after.vocab_size, num_rows, options.pad_to_multiple_of)
    starts = {
        token_id: pieces_of(text, options.init, tokenizer, matrices.num_rows)
        for text, token_id in edit.new.items()
    }
    names = {token_id: text for text, token_id in edit.new.items()}
    edits = [row_edit(ref, rows, starts, names, tokenizer.vocab_size) for ref in matrices.all]
    contents = dict(edit.contents)
    contents |= _config_contents(checkpoint, matrices.num_rows, rows, options, after)
    if rows != matrices.num_rows:
        contents |= _index_contents(folder, edits)
    return TokensPlan(
        folder=folder,
        state=state,
        contents=contents,
        rows=tuple(item for item in edits if item.rows or item.num_rows > item.tensor.shape[0]),
        new=edit.new,
        known=edit.known,
        same=edit.same,
        removed=(),
        rows_before=matrices.num_rows,
        rows_after=rows,
        examples=_examples(tokenizer, after, [*edit.new, *edit.known][:NUM_EXAMPLES]),
        notes=(*notes, *matrices.notes, *_other_forms(folder, checkpoint)),
        tokenizer=tokenizer,
        tokenizer_after=after,
    )


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not the folder of a checkpoint. Check the path.")
    return path


def _check_whole(checkpoint: Checkpoint) -> list[str]:
    """Raise CheckpointError where tensors are missing; return what could not be looked at."""
    try:
        understand(checkpoint)
        return []
    except UnsupportedError as error:
        # Quantized: the two matrices may well be floats, which `find_matrices` looks at.
        return [f"the other tensors were not looked at: {error}"]


def _added_token(text: str, options: TokenOptions) -> AddedToken:
    return AddedToken(
        text=text,
        token_id=None,
        is_special=options.special,
        is_single_word=options.single_word,
        strips_left=options.lstrip,
        strips_right=options.rstrip,
        is_normalized=options.normalized,
    )


def _config_contents(
    checkpoint: Checkpoint, before: int, after: int, options: TokenOptions, tokenizer: Tokenizer
) -> dict[str, bytes]:
    """Return config.json and generation_config.json where they change."""
    config = with_vocab_size(checkpoint.config, before, after)
    generation = dict(checkpoint.generation_config)
    for role, text in options.roles.items():
        token_id = tokenizer.ids[text]
        key = f"{role}_id"
        for owner in (config, config.get("text_config")):
            if isinstance(owner, dict) and (owner is config or key in owner):
                owner[key] = token_id
        old = checkpoint.generation_config.get(key, checkpoint.config.get(key))
        generation[key] = token_id
        if role == "eos_token":
            ends = old if isinstance(old, list) else [old]
            generation[key] = [token_id, *(i for i in ends if i not in (None, token_id))]
    found = {}
    if config != checkpoint.config:
        found[CONFIG] = json_bytes(config)
    if generation != checkpoint.generation_config:
        found[GENERATION] = json_bytes(generation)
    return found


def _without_ids(config: Mapping[str, Any], names: Mapping[int, str], file: str) -> dict[str, Any]:
    """Return a config whose lists of ids have none of these tokens.

    Raises OptionError where one has a role alone: the next token that gets its id would have it.
    """
    kept = dict(config)
    for key, value in config.items():
        if isinstance(value, dict):
            kept[key] = _without_ids(value, names, file)
        elif key.endswith("_token_id"):
            ids = value if isinstance(value, list) else [value]
            left = [item for item in ids if item not in names]
            if ids and not left:
                raise OptionError(
                    f"{names[ids[0]]!r} is the {key} of {file}: give that role to another token first."
                )
            kept[key] = left if isinstance(value, list) else value
    return kept


def _index_contents(folder: Path, edits: Sequence[RowEdit]) -> dict[str, bytes]:
    """Return the index with its new sizes, if the weights have one."""
    found = {}
    grown = sum(map(_growth, edits))
    numbers = sum(
        (edit.num_rows - edit.tensor.shape[0]) * prod(edit.tensor.shape[1:]) for edit in edits
    )
    for path in folder.glob(f"*.safetensors{INDEX_SUFFIX}"):
        index = read_object(path)
        metadata = dict(index.get("metadata") or {})
        for key, more in (("total_size", grown), ("total_parameters", numbers)):
            if isinstance(metadata.get(key), int):
                metadata[key] += more
        found[path.name] = json_bytes({**index, "metadata": metadata})
    return found


def _other_forms(folder: Path, checkpoint: Checkpoint) -> list[str]:
    """Return a note of weights that are another form of the model, and do not change."""
    used = {file.name for file in checkpoint.files}
    patterns = ("*.safetensors", "*.bin", "*.pth", *FOREIGN)
    others = sorted(
        {
            str(file.relative_to(folder))
            for pattern in patterns
            for file in folder.glob(pattern)
            if file.name not in used
        }
    )
    if not others:
        return []
    return [f"left as they are, without the new rows: {', '.join(others[:8])}"]


def _examples(before: Tokenizer, after: Tokenizer, texts: Sequence[str]) -> tuple[Example, ...]:
    found = []
    for text in texts:
        sample = f"Hello {text} world"
        shown = [
            tuple(
                tokenizer.spelling(token_id) or str(token_id)
                for token_id in tokenizer.encode(sample, add_special_tokens=False)
            )
            for tokenizer in (before, after)
        ]
        found.append(Example(text=sample, before=shown[0], after=shown[1]))
    return tuple(found)


def _write_file(path: Path, old: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if old.exists():
        shutil.copymode(old, path)


def _write_shard(path: Path, old: Path, edits: Sequence[RowEdit]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        size = rewrite(old, file, edits)
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(old, path)
    return size


def _text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
