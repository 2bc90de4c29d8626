"""Training data, ready to be learnt: documents of token ids with their targets, in packs.

`Dataset.open` reads files and folders in the formats of `formats.py`, renders conversations by the
function that serves (`masks.py`), keeps what was tokenized (`cache.py`) and knows the packs of every
epoch (`pack.py`). What looks wrong is found then, and `check` refuses it.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hanok.checkpoint.tokenizer import Tokenizer
from hanok.errors import DataError, OptionError
from hanok.training.data.cache import (
    HAS_DOUBLED_BOS,
    HAS_END,
    IS_OPEN,
    IS_TEXT,
    TokenCache,
    TokenFile,
)
from hanok.training.data.masks import Renderer
from hanok.training.data.options import (
    ALL_MASKED,
    DOUBLED_BOS,
    FINDINGS,
    NO_END,
    NONE_MASKED,
    TRUNCATED,
    DataOptions,
    Source,
    read_source,
)
from hanok.training.data.pack import pack_epoch, shuffled, take_times
from hanok.training.data.read import find_files, size_of
from hanok.training.data.templates import resolve
from hanok.training.data.tokenize import Reading, tokenize_file

SHOWN_TOKENS = 60
CONVERSATIONS = ("messages", "sharegpt", "alpaca")
"""The formats whose rows are rendered by a chat template."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a document is: tokens `start` to `end` of a tokenized file."""

    file: int
    row: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that looks wrong, in how many documents, and the first of them."""

    name: str
    count: int
    example: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """What one file became."""

    file: Path
    format: str
    """The format that was named or detected."""
    num_rows: int
    num_bad_rows: int
    bad_rows: tuple[tuple[int, str], ...]
    """(line, reason) of the first ones."""
    ways: Counter[str]
    """How often answers were found by marks, by prefix and by offsets."""
    dropped: Counter[str]
    """Turns that are not learnt, by reason."""
    num_documents: int
    num_tokens: int
    num_targets: int
    times: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What training data consists of, in its first epoch."""

    files: tuple[FileReport, ...]
    num_documents: int
    num_tokens: int
    num_targets: int
    num_packs: int
    pack_tokens: int
    num_truncated: int
    """Conversations that were cut."""
    num_left_out: int
    """Documents that have nothing to learn, or had it after the cut."""

    @property
    def efficiency(self) -> float:
        """The share of packs' room that has tokens."""
        return self.num_tokens / max(1, self.num_packs * self.pack_tokens)


class Dataset:
    """Documents in packs. Made by `Dataset.open`, and by `split` of another.

    `lengths` are the tokens of each document.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, Source, TokenFile]],
        places: Sequence[Place],
        options: DataOptions,
        *,
        tokenizer: Tokenizer,
        template: str | None,
        pack_tokens: int,
        seed: int,
    ) -> None:
        self._files = files
        self._places = places
        self._options = options
        self.tokenizer = tokenizer
        self.template = template
        """The template that conversations were rendered with: a name or a text; None, the default."""
        self.pack_tokens = pack_tokens
        self.seed = seed
        self.lengths = [place.end - place.start for place in places]
        self.findings: tuple[Finding, ...] = ()
        """What looks wrong, allowed or not."""
        self.notes: tuple[str, ...] = ()
        """What serving will not do as the data has it."""
        self.num_truncated = self.num_left_out = 0
        self._epoch: tuple[int, list[list[int]]] | None = None

    @classmethod
    def open(
        cls,
        sources: Sequence[str | Path | Source],
        tokenizer: Tokenizer,
        options: DataOptions,
        *,
        pack_tokens: int,
        seed: int = 0,
        end_ids: Collection[int] = (),
        cache_folder: Path | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> "Dataset":
        """Read, tokenize and mask `sources`: files, folders, or texts as `read_source` reads them.

        `end_ids` are the tokens at which the model stops when it serves. With `cache_folder` the
        documents are kept there, and a second call reads no row again. `progress` is called with the
        bytes that have been read and those of all files. Raises DataError or OptionError, each with
        what to do.
        """
        length = pack_tokens if options.max_length is None else options.max_length
        if length > pack_tokens:
            raise OptionError(
                f"max_length is {length}, more than the {pack_tokens} tokens of a pack; no document "
                "is split up over packs. Give a smaller max_length or larger packs."
            )
        asked = [item if isinstance(item, Source) else read_source(str(item)) for item in sources]
        template = resolve(options.chat_template)
        renderer = Renderer(
            tokenizer, template=template, end_ids=end_ids, appends_eos=options.append_eos
        )
        total, done = sum(size_of(source.path) for source in asked), 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress(done, total)

        reading = Reading(seed=seed, max_bad_rows=options.max_bad_rows, progress=advance)
        with ExitStack() as stack:
            if cache_folder is None:
                # What is mapped stays readable after its files are gone.
                made = TemporaryDirectory(prefix="hanok-train-")
                cache_folder = Path(stack.enter_context(made))
            cache = TokenCache(cache_folder, tokenizer)
            files = [
                (file, source, tokenize_file(file, source, renderer, cache, reading))
                for source in asked
                for file in find_files(source.path)
            ]
        found = _Places(files, length)
        dataset = cls(
            files,
            found.places,
            options,
            tokenizer=tokenizer,
            template=template,
            pack_tokens=pack_tokens,
            seed=seed,
        )
        dataset.notes = tuple(
            f"The template ends answers with {tokenizer.token_text(token_id)!r}, at which the model "
            "does not stop when it serves; add it to eos_token_id in generation_config.json."
            for token_id in sorted(renderer.unserved_ends)
        )
        dataset.findings = found.findings(options.max_truncated)
        dataset.num_truncated, dataset.num_left_out = found.num_truncated, found.num_left_out
        return dataset

    @property
    def has_conversations(self) -> bool:
        """Whether a chat template renders any of it."""
        return any(found.summary.format in CONVERSATIONS for _, _, found in self._files)

    def check(self) -> None:
        """Raise DataError for what looks wrong and is not allowed by name, with the document."""
        refused = [item for item in self.findings if item.name not in self._options.allow]
        if refused:
            lines = "\n".join(
                f"{item.name}: {FINDINGS[item.name]}; {item.count:,} documents. The first is "
                f"{self.where(item.example)}:\n    {self.excerpt(item.example)}"
                for item in refused
            )
            names = ",".join(item.name for item in refused)
            raise DataError(f"{lines}\nMend the rows, or allow them by name: --allow {names}.")
        if not self.lengths:
            raise DataError("nothing is left to learn: no document has a target.")

    def packs(self, epoch: int) -> list[list[int]]:
        """Return the packs of an epoch in their order, each the numbers of its documents.

        The same for the same data, options and seed. The largest pack is first.
        """
        if self._epoch is None or self._epoch[0] != epoch:
            size = self.pack_tokens if self._options.packing else None
            packs = pack_epoch(self.lengths, size, self._order(epoch), self.seed, epoch)
            self._epoch = epoch, packs
        return self._epoch[1]

    def document(self, number: int) -> tuple[list[int], list[bool]]:
        """Return the token ids of a document, and which of them are to be predicted; never the first."""
        return self.tokens(self._places[number])

    def tokens(self, place: Place) -> tuple[list[int], list[bool]]:
        """Return the token ids at a place, and which of them are to be predicted."""
        found = self._files[place.file][2]
        targets = [bool(item) for item in found.targets[place.start : place.end]]
        targets[:1] = [False] * len(targets[:1])
        return found.ids[place.start : place.end].tolist(), targets

    def place(self, number: int) -> Place:
        """Return where a document is."""
        return self._places[number]

    def where(self, place: Place) -> str:
        """Return the file and the line of a place's row."""
        file, _, found = self._files[place.file]
        return f"{file}:{found.lines[place.row]}"

    def excerpt(self, place: Place) -> str:
        """Return the beginning of a document as text, what is learnt between « and »."""
        ids, targets = self.tokens(place)
        text, is_open = "", False
        for token_id, is_target in zip(ids[:SHOWN_TOKENS], targets, strict=False):
            if is_target != is_open:
                text += "«" if is_target else "»"
                is_open = is_target
            text += self.tokenizer.token_text(token_id)
        text += ("»" if is_open else "") + ("…" if len(ids) > SHOWN_TOKENS else "")
        return repr(text)[1:-1]

    def split(self, share: float) -> tuple["Dataset", "Dataset"]:
        """Return this without a share of its documents, and those, drawn by the seed.

        Pieces of one text stay together. OptionError where either would be empty.
        """
        rows = list(dict.fromkeys((place.file, place.row) for place in self._places))
        count = round(len(rows) * share)
        if not 0 < count < len(rows):
            raise OptionError(
                f"a share of {share} of {len(rows)} rows leaves one of the two parts empty."
            )
        held = set(shuffled(rows, f"{self.seed}/held out")[:count])
        return self._with(held, is_held=False), self._with(held, is_held=True)

    def _with(self, held: Collection[tuple[int, int]], *, is_held: bool) -> "Dataset":
        kept = [place for place in self._places if ((place.file, place.row) in held) == is_held]
        return Dataset(
            self._files,
            kept,
            self._options,
            tokenizer=self.tokenizer,
            template=self.template,
            pack_tokens=self.pack_tokens,
            seed=self.seed,
        )

    def summary(self) -> DataReport:
        """Return what the data consists of."""
        order = self._order(0)
        counts = Counter(order)
        targets = [self._num_targets(place) for place in self._places]
        of_file: dict[int, list[int]] = {index: [] for index in range(len(self._files))}
        for number, place in enumerate(self._places):
            of_file[place.file].append(number)
        return DataReport(
            files=tuple(
                FileReport(
                    file=file,
                    format=found.summary.format,
                    num_rows=found.summary.num_rows,
                    num_bad_rows=found.summary.num_bad_rows,
                    bad_rows=tuple(found.summary.bad_rows),
                    ways=found.summary.ways,
                    dropped=found.summary.dropped,
                    num_documents=len(of_file[index]),
                    num_tokens=sum(self.lengths[number] for number in of_file[index]),
                    num_targets=sum(targets[number] for number in of_file[index]),
                    times=source.times,
                )
                for index, (file, source, found) in enumerate(self._files)
            ),
            num_documents=len(order),
            num_tokens=sum(self.lengths[number] * times for number, times in counts.items()),
            num_targets=sum(targets[number] * times for number, times in counts.items()),
            num_packs=len(self.packs(0)),
            pack_tokens=self.pack_tokens,
            num_truncated=self.num_truncated,
            num_left_out=self.num_left_out,
        )

    def _num_targets(self, place: Place) -> int:
        found = self._files[place.file][2]
        return found.targets[place.start + 1 : place.end].tobytes().count(1)

    def _order(self, epoch: int) -> list[int]:
        """Return the documents of an epoch, each as often as its source says."""
        of_source: dict[float, list[int]] = {}
        for number, place in enumerate(self._places):
            of_source.setdefault(self._files[place.file][1].times, []).append(number)
        return [
            number
            for times, numbers in of_source.items()
            for number in take_times(numbers, times, self.seed, epoch)
        ]


class _Places:
    """Cuts the documents of tokenized files to a length, and looks for what is wrong with them."""

    def __init__(self, files: Sequence[tuple[Path, Source, TokenFile]], max_length: int) -> None:
        self._max_length = max_length
        self.places: list[Place] = []
        self.num_truncated = self.num_left_out = self._num_answers = 0
        self._found: dict[str, Finding] = {}
        for index, (_, _, found) in enumerate(files):
            for row in range(len(found)):
                self._add(index, row, found)

    def findings(self, max_truncated: float) -> tuple[Finding, ...]:
        """Return what looks wrong. Cut documents count if their share is above `max_truncated`."""
        is_much = self.num_truncated > max_truncated * max(1, self._num_answers)
        return tuple(
            self._found[n] for n in FINDINGS if n in self._found and (n != TRUNCATED or is_much)
        )

    def _add(self, index: int, row: int, found: TokenFile) -> None:
        flags = int(found.flags[row])
        place = Place(index, row, found.start(row), int(found.ends[row]))
        if flags & HAS_DOUBLED_BOS:
            self._note(DOUBLED_BOS, place)
        if not flags & (HAS_END | IS_OPEN):
            self._note(NO_END, place)
        if flags & IS_TEXT:
            self._add_text(place)
        else:
            self._add_answers(place, int(found.counts[row]), found)

    def _add_text(self, place: Place) -> None:
        """Cut a text into pieces that share one token, so that each but the first is predicted once."""
        start = place.start
        while place.end - start > 1:
            end = min(place.end, start + self._max_length)
            self.places.append(replace(place, start=start, end=end))
            start = end - 1
        if place.end - place.start < 2:
            self._note(ALL_MASKED, place)
            self.num_left_out += 1

    def _add_answers(self, place: Place, num_targets: int, found: TokenFile) -> None:
        self._num_answers += 1
        length = place.end - place.start
        if not num_targets:
            self._note(ALL_MASKED, place)
            self.num_left_out += 1
            return
        if num_targets >= length - 1:
            self._note(NONE_MASKED, place)
        if length > self._max_length:
            place = replace(place, end=place.start + self._max_length)
            self.num_truncated += 1
            self._note(TRUNCATED, place)
            if not any(found.targets[place.start : place.end]):
                self.num_left_out += 1
                return
        self.places.append(place)

    def _note(self, name: str, place: Place) -> None:
        known = self._found.get(name)
        count = 1 if known is None else known.count + 1
        example = place if known is None else known.example
        self._found[name] = Finding(name=name, count=count, example=example)
