"""How `hanok train preview` shows training data: files, masks, lengths, packs, and single documents."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from hanok.checkpoint.tokenizer import Tokenizer
from hanok.training.data.dataset import DataReport, Dataset, FileReport

LEARNT_STYLE, GIVEN_STYLE = "bold green", "dim"
NUM_BARS = 8
BAR_WIDTH = 40
SHOWN_BAD_ROWS = 5


def print_preview(dataset: Dataset, numbers: Sequence[int]) -> None:
    """Print a summary of the data, then the documents `numbers`, as far as there are so many."""
    console = Console(highlight=False, soft_wrap=True)
    report = dataset.summary()
    for file in report.files:
        for line in _file_lines(file):
            console.print(line, markup=False)
    notes = [f"Note: {note}" for note in dataset.notes]
    for line in [*_data_lines(report), *_length_lines(dataset.lengths), *notes]:
        console.print(line, markup=False)
    for number in numbers:
        if number < len(dataset.lengths):
            console.print()
            _print_document(console, dataset, number)


def _file_lines(file: FileReport) -> list[str]:
    times = "" if file.times == 1 else f", read {file.times:g} times"
    lines = [
        f"{file.file}: {file.format}, {file.num_rows:,} rows, {file.num_bad_rows:,} of them bad"
        f"{times}; {file.num_documents:,} documents, {file.num_tokens:,} tokens, "
        f"{file.num_targets:,} learnt ({_share(file.num_targets, file.num_tokens)})"
    ]
    lines += [f"  line {line}: {reason}" for line, reason in file.bad_rows[:SHOWN_BAD_ROWS]]
    if file.num_bad_rows > SHOWN_BAD_ROWS:
        lines.append(f"  and {file.num_bad_rows - SHOWN_BAD_ROWS:,} more bad rows")
    if file.ways:
        found = ", ".join(f"{count:,} by {way}" for way, count in file.ways.most_common())
        lines.append(f"  answers found: {found}")
    lines += [f"  {count:,} turns not learnt: {why}" for why, count in file.dropped.most_common()]
    return lines


def _data_lines(report: DataReport) -> list[str]:
    lines = [
        f"An epoch: {report.num_documents:,} documents, {report.num_tokens:,} tokens, "
        f"{report.num_targets:,} learnt ({_share(report.num_targets, report.num_tokens)}), in "
        f"{report.num_packs:,} packs of at most {report.pack_tokens:,}, {report.efficiency:.1%} full."
    ]
    if report.num_truncated:
        lines.append(f"Cut at the longest length: {report.num_truncated:,} documents.")
    if report.num_left_out:
        lines.append(f"Left out, since nothing is to be learnt: {report.num_left_out:,} documents.")
    return lines


def _length_lines(lengths: Sequence[int]) -> list[str]:
    """Return a histogram of lengths, with edges that double."""
    if not lengths:
        return []
    edges = [max(lengths)]
    while len(edges) < NUM_BARS and edges[0] // 2 >= min(lengths):
        edges.insert(0, edges[0] // 2)
    lower = [0, *edges[:-1]]
    counts = [
        sum(low < length <= high for length in lengths)
        for low, high in zip(lower, edges, strict=True)
    ]
    width = len(f"{edges[-1]:,}")
    lines = ["Tokens of a document, up to:"]
    for edge, count in zip(edges, counts, strict=True):
        bar = "█" * round(BAR_WIDTH * count / max(counts))
        lines.append(f"  {edge:>{width},} {bar} {count:,}")
    return lines


def _print_document(console: Console, dataset: Dataset, number: int) -> None:
    place = dataset.place(number)
    ids, targets = dataset.tokens(place)
    learnt = sum(targets)
    console.print(
        f"Document {number}, {dataset.where(place)}: {len(ids):,} tokens, {learnt:,} learnt",
        markup=False,
    )
    console.print(_painted(dataset.tokenizer, ids, targets, is_marked=not console.is_terminal))


def _painted(
    tokenizer: Tokenizer, ids: Sequence[int], targets: Sequence[bool], *, is_marked: bool
) -> Text:
    """Return the text of tokens, what is learnt in colour or between marks."""
    text = Text()
    begin = 0
    while begin < len(ids):
        is_target = targets[begin]
        end = next((i for i in range(begin, len(ids)) if targets[i] != is_target), len(ids))
        words = _shown(tokenizer.decode(ids[begin:end], skip_special_tokens=False))
        if is_target and is_marked:
            words = f"«{words}»"
        text.append(words, style=LEARNT_STYLE if is_target else GIVEN_STYLE)
        begin = end
    return text


def _shown(text: str) -> str:
    """Return a text without characters that would do something to a terminal."""
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"
