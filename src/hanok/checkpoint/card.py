"""Model cards: what README.md of a model says, checked and written.

A card is front matter (`front_matter.py`), which the hub reads, and Markdown. What hanok knows is one
section of the Markdown between two comments: what was done to the model, by which commands, what was
measured, and how to run it. Everything outside is the user's and stays as it is, to the byte; the
section is replaced at each write, and what cannot be computed again (steps, reports) is read back from
it.

A card says only what there is evidence for: what is not known is left out.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape, unescape
from pathlib import Path
from typing import Any, get_args

from hanok.checkpoint.card_options import Relation
from hanok.checkpoint.front_matter import edited, front_matter, split
from hanok.checkpoint.licenses import LICENSES, OTHER
from hanok.checkpoint.writer import write_bytes
from hanok.errors import CheckpointError
from hanok.registry import nearest_first
from hanok.text_files import unified_diff

CARD = "README.md"
BEGIN = (
    "<!-- hanok: begin. Text between these two comments is replaced when hanok writes the card. -->"
)
END = "<!-- hanok: end -->"
STEPS, QUANTIZATION, TRAINING = "What was done", "Quantization", "Training"
QUALITY, USAGE = "Quality", "How to run it"
HEADINGS = (STEPS, QUANTIZATION, TRAINING, QUALITY, USAGE)
"""The parts of the section, in their order."""

_BEGIN = re.compile(r"^<!-- hanok: begin\b.*-->(?=[ \t]*\r?$)", re.MULTILINE)
_END = re.compile(rf"^{re.escape(END)}(?=[ \t]*\r?$)", re.MULTILINE)
_HEADING = re.compile(r"^## (.+?)[ \t]*$", re.MULTILINE)
_STEP = re.compile(
    r"\d+\. (?P<date>\d{4}-\d\d-\d\d), hanok (?P<version>\S+): (?P<text>.*)"
    r"\n   (?P<fence>`+) (?P<command>.*) (?P=fence)"
)
# As the hub names repositories: no two - or . in a row, none of them at an end of a name.
_NAME = r"(?!\S*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?!.*\.git$)(?!.{{97}})(?:{_NAME}/)?{_NAME}")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that was done to the files of a model."""

    command: str
    """The command line, without folders of the machine it ran on."""
    version: str
    """Of hanok."""
    date: str
    """Such as 2026-11-28."""
    text: str
    """What changed, as one sentence without a full stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardContent:
    """What is to be written into a card."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """Front matter that the user asked for: it replaces other values of the card."""
    inferred: Mapping[str, Any] = field(default_factory=dict)
    """Front matter that files of the model show: it is added where the card says nothing."""
    sections: Mapping[str, str] = field(default_factory=dict)
    """Markdown of parts of the section, by their heading; the others stay as they are."""
    steps: tuple[Step, ...] = ()
    """Added after those of the card."""


# Reading and checking


def read_card(folder: Path) -> str | None:
    """Return the text of a folder's card with its line breaks as they are; None without one."""
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text: {error}") from None


def problems(text: str, *, bases: Sequence[str] = ()) -> list[str]:
    """Return what the hub would refuse about a card, or a reader would miss; empty if nothing.

    `bases` are the cards of the models it was made from, whose licence it should have.
    """
    try:
        found = front_matter(text)
    except CheckpointError as error:
        return [str(error)]
    if not split(text).opening:
        return [
            "there is no front matter, so the hub shows neither licence nor base model: begin the "
            "card with a line of ---, keys such as `license: mit`, and another line of ---"
        ]
    return [
        *_license_problems(found),
        *_base_problems(found),
        *_list_problems(found),
        *_text_problems(found),
        *_evaluation_problems(found.get("model-index")),
        *_contradictions(found, bases),
    ]


def _license_problems(found: Mapping[str, Any]) -> list[str]:
    value = found.get("license")
    if value is None or value in ("", []):
        return [
            "license is missing, and without one others may not use the model. Give one of the hub's "
            "identifiers (apache-2.0, mit, …), or `other` with license_name and license_link"
        ]
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        return [f"license is {value!r} and must be text"]
    unknown = [
        f"license {name!r} is not an identifier of the hub; the nearest are "
        f"{', '.join(nearest_first(name, sorted(LICENSES))[:3])}. For a licence without one write "
        "`license: other` with license_name and license_link"
        for name in names
        if name not in LICENSES
    ]
    missing = [key for key in ("license_name", "license_link") if not found.get(key)]
    if OTHER in names and missing:
        unknown.append(
            f"license is {OTHER} without {' and '.join(missing)}, so a reader does not learn which; "
            "license_link may be the address of its text, or the file LICENSE"
        )
    return unknown


def _base_problems(found: Mapping[str, Any]) -> list[str]:
    bases, relation = found.get("base_model"), found.get("base_model_relation")
    result = [
        f"base_model {name!r} is not the id of a model on the hub (org/name)"
        for name in _listed(bases)
        if not isinstance(name, str) or not _REPO_ID.fullmatch(name)
    ]
    known = get_args(Relation)
    if relation is not None and relation not in known:
        result.append(f"base_model_relation is {relation!r} and must be one of {', '.join(known)}")
    if relation is not None and not bases:
        result.append(f"base_model_relation is {relation!r}, but base_model is missing")
    return result


def _list_problems(found: Mapping[str, Any]) -> list[str]:
    result = []
    for key in ("datasets", "language", "metrics"):
        wrong = [item for item in _listed(found.get(key)) if not isinstance(item, str)]
        if wrong:
            why = ""
            if wrong[0] is False:
                why = "; YAML reads a plain `no` as false, so write 'no' in quotes"
            result.append(f"{key} has {wrong[0]!r}, and must be text or a list of texts{why}")
    tags = found.get("tags")
    if tags is not None and not (
        isinstance(tags, list) and all(isinstance(item, str) for item in tags)
    ):
        result.append(f"tags is {tags!r:.80} and must be a list of texts")
    result += [
        f"datasets has {name!r}, which is not the id of a dataset on the hub (name or org/name)"
        for name in _listed(found.get("datasets"))
        if isinstance(name, str) and not _REPO_ID.fullmatch(name)
    ]
    result += [
        f"language has {name!r}; it must be a code of ISO 639 in two or three small letters, `code` "
        "or `multilingual`"
        for name in _listed(found.get("language"))
        if isinstance(name, str) and not _LANGUAGE.fullmatch(name)
    ]
    return result


def _text_problems(found: Mapping[str, Any]) -> list[str]:
    keys = ("library_name", "pipeline_tag", "license_name", "license_link", "model_name")
    return [
        f"{key} is {found[key]!r:.80} and must be text"
        for key in keys
        if found.get(key) is not None and not isinstance(found[key], str)
    ]


def _evaluation_problems(index: Any) -> list[str]:
    """Return what `model-index` lacks: the hub refuses a card whose results it cannot read."""
    if index is None:
        return []
    if not isinstance(index, list) or not all(isinstance(model, dict) for model in index):
        return ["model-index must be a list with name and results for each model"]
    found = []
    for at, model in enumerate(index):
        where = f"model-index[{at}]"
        found += _missing(model, where, ("name", "results"))
        results = model.get("results")
        for place, result in enumerate(results if isinstance(results, list) else []):
            inner = f"{where}.results[{place}]"
            found += _missing(result, inner, ("task.type", "dataset.type", "dataset.name"))
            metrics = result.get("metrics") if isinstance(result, dict) else None
            found += _missing(result, inner, ("metrics",))
            for number, metric in enumerate(metrics if isinstance(metrics, list) else []):
                found += _missing(metric, f"{inner}.metrics[{number}]", ("type", "value"))
    return found


def _missing(value: Any, where: str, paths: Iterable[str]) -> list[str]:
    result = []
    for path in paths:
        inner = value
        for name in path.split("."):
            inner = inner.get(name) if isinstance(inner, dict) else None
        if inner is None:
            result.append(f"{where} has no {path}, which the hub needs to read the results")
    return result


def _contradictions(found: Mapping[str, Any], bases: Sequence[str]) -> list[str]:
    result = []
    for base in bases:
        try:
            theirs = _license_of(front_matter(base))
        except CheckpointError as error:
            result.append(f"the base model's card cannot be read: {error}")
            continue
        ours = _license_of(found)
        if ours and theirs and ours != theirs:
            result.append(
                f"the licence is {' '.join(ours.values())}, and the base model's card says "
                f"{' '.join(theirs.values())}; keep the base's licence unless its terms allow another"
            )
    return result


def inherited_license(bases: Sequence[str]) -> dict[str, str]:
    """Return the licence's front matter that a model made from others has; empty if they differ."""
    found = []
    for base in bases:
        try:
            found.append(_license_of(front_matter(base)))
        except CheckpointError:
            return {}
    return found[0] if found and all(item == found[0] for item in found) else {}


def _license_of(found: Mapping[str, Any]) -> dict[str, str]:
    if not isinstance(found.get("license"), str):
        return {}
    keys = (
        ("license", "license_name", "license_link") if found["license"] == OTHER else ("license",)
    )
    return {key: found[key] for key in keys if isinstance(found.get(key), str)}


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# Writing


def written(text: str | None, content: CardContent) -> str:
    """Return a card's text with `content`; the same content twice gives the same text.

    None is a card that does not exist yet. CheckpointError where the front matter cannot be edited
    safely, or the section's comments are not one pair.
    """
    text = text or ""
    found = front_matter(text)
    known = {*found, *content.fields}
    inferred = {key: value for key, value in content.inferred.items() if key not in known}
    text = edited(text, {**content.fields, **inferred})
    before, section, after = _cut(text)
    parts = _parts_of(section)
    parts |= {heading: body.strip("\n") for heading, body in content.sections.items()}
    if content.steps:
        old = _steps_in(parts.get(STEPS, ""))
        new = [step for step in map(_plain, content.steps) if step not in old]
        parts[STEPS] = _steps_text([*old, *new])
    parts = {heading: body for heading, body in parts.items() if body}
    if not parts:
        return text
    ordered = sorted(parts, key=lambda name: HEADINGS.index(name) if name in HEADINGS else -1)
    body = "\n\n".join(f"## {heading}\n\n{parts[heading]}" for heading in ordered)
    block = f"{BEGIN}\n\n{body}\n\n{END}"
    line_break = "\r\n" if "\r\n" in text else "\n"
    if not section:
        before = _parted(before, line_break)
        after = line_break
    return before + block.replace("\n", line_break) + after


def steps_of(text: str | None) -> tuple[Step, ...]:
    """Return what a card says was done, in order."""
    return tuple(_steps_in(_parts_of(_cut(text or "")[1]).get(STEPS, "")))


def write_card(folder: Path, content: CardContent) -> str:
    """Write `content` into a folder's card, all of it or nothing; return the difference (see `diff`)."""
    old = read_card(folder)
    new = written_at(folder, old, content)
    if new != (old or ""):
        write_bytes(folder / CARD, new.encode("utf-8"))
    return diff(old, new)


def written_at(folder: Path, text: str | None, content: CardContent) -> str:
    """Return `written`, whose errors name the folder's file."""
    try:
        return written(text, content)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CARD}: {error}") from None


def add_step(folder: Path, step: Step) -> None:
    """Add a step to a folder's card, which is made if there is none."""
    write_card(folder, CardContent(steps=(step,)))


def diff(old: str | None, new: str) -> str:
    """Return what changes in a card, as a unified diff; empty if nothing does."""
    return "\n".join(unified_diff(old or "", new, f"a/{CARD}", f"b/{CARD}"))


def _cut(text: str) -> tuple[str, str, str]:
    """Return what is before our section, the section with its comments, and what is after it."""
    begins, ends = list(_BEGIN.finditer(text)), list(_END.finditer(text))
    if not begins and not ends:
        return text, "", ""
    if len(begins) != 1 or len(ends) != 1 or begins[0].end() > ends[0].start():
        raise CheckpointError(
            f"it has {len(begins)} comments that begin hanok's section and {len(ends)} that end it, and "
            f"must have one of each, in this order; remove the others ({END})"
        )
    begin, end = begins[0].start(), ends[0].end()
    return text[:begin], text[begin:end], text[end:]


def _parts_of(section: str) -> dict[str, str]:
    """Return the parts of our section by heading."""
    inner = section.replace("\r\n", "\n").partition("-->")[2].rpartition(END)[0]
    pieces = _HEADING.split(inner)
    return {
        heading: body.strip("\n") for heading, body in zip(pieces[1::2], pieces[2::2], strict=True)
    }


def _parted(text: str, line_break: str) -> str:
    """Return text that ends in an empty line, so that a section may follow."""
    if not text:
        return text
    while not text.endswith(2 * line_break):
        text += line_break
    return text


def _steps_in(text: str) -> list[Step]:
    found = [
        Step(
            command=match["command"],
            version=match["version"],
            date=match["date"],
            text=unescape(match["text"]),
        )
        for match in _STEP.finditer(text)
    ]
    if rest := _STEP.sub("", text).strip():
        raise CheckpointError(
            f"the list of steps has text that is not a step, and would be lost: {rest!r:.80}. Move it "
            f"out of hanok's section, before the comment or after {END}"
        )
    return found


def _steps_text(steps: Iterable[Step]) -> str:
    lines = []
    for number, step in enumerate(steps, start=1):
        fence = "`" * (1 + max((len(run) for run in re.findall("`+", step.command)), default=0))
        lines.append(
            f"{number}. {step.date}, hanok {step.version}: {escape(step.text, quote=False)}\n"
            f"   {fence} {step.command} {fence}"
        )
    return "\n".join(lines)


def _plain(step: Step) -> Step:
    """Return the step as it is read back: its texts on one line."""
    return Step(
        command=" ".join(step.command.split()),
        version=step.version,
        date=step.date,
        text=" ".join(step.text.split()),
    )
