"""What a model's card is to say, from the files of its folder, the user's options and reports.

Nothing is guessed: a field is here because an option gave it, a file shows it, or the base model's card
has it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hanok.checkpoint.card import (
    QUALITY,
    QUANTIZATION,
    TRAINING,
    USAGE,
    CardContent,
    inherited_license,
    read_card,
    steps_of,
)
from hanok.checkpoint.card_options import CardOptions
from hanok.checkpoint.files import read_object
from hanok.checkpoint.formats import ADAPTER_CONFIG, CONFIG, quantization_of
from hanok.checkpoint.front_matter import front_matter
from hanok.checkpoint.hub import is_repo_id
from hanok.checkpoint.safetensors import parse_json_object
from hanok.errors import CheckpointError, OptionError

CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
"""Of the classes that transformers' AutoModelForCausalLM opens."""


def card_content(
    folder: Path, options: CardOptions, bases: Sequence[str], *, is_generator: bool
) -> CardContent:
    """Return what the card of `folder` is to say.

    `bases` are the texts of the base models' cards, `is_generator` says whether `hanok generate` opens
    the folder. Raises CheckpointError for damaged files, OptionError for reports without date or
    machine.
    """
    config = _object(folder / CONFIG)
    adapter = _object(folder / ADAPTER_CONFIG) if not config else {}
    old = read_card(folder)
    found = front_matter(old or "")
    base = list(options.base_model)
    stored = adapter.get("base_model_name_or_path")
    inferred_base = stored if isinstance(stored, str) and is_repo_id(stored) else None
    method = quantization_of(config, folder)
    relation = "adapter" if adapter else "quantized" if method else None
    has_base = bool(base or inferred_base or found.get("base_model"))
    fields = {
        "license": options.license,
        "license_name": options.license_name,
        "license_link": options.license_link,
        "base_model": base[0] if len(base) == 1 else base,
        "base_model_relation": options.relation,
        "datasets": list(options.dataset),
        "language": list(options.language),
    }
    says_license = options.license is not None or "license" in found
    inferred = {
        **({} if says_license else inherited_license(bases)),
        "base_model": inferred_base if not base else None,
        "base_model_relation": relation if has_base and not options.relation else None,
        "library_name": "peft" if adapter else "transformers" if config else None,
    }
    after = len(steps_of(old))
    sections = {
        QUANTIZATION: f"The weights are quantized: {method}." if method else "",
        USAGE: _usage(folder, config, adapter, is_generator=is_generator),
    }
    for heading, file in ((QUALITY, options.quality), (TRAINING, options.training)):
        if file is not None:
            sections[heading] = report_table(_report(file), after)
    return CardContent(
        fields={key: value for key, value in fields.items() if value},
        inferred={key: value for key, value in inferred.items() if value},
        sections=sections,
    )


def base_cards(options: CardOptions, folder: Path) -> tuple[list[str], list[str]]:
    """Return the texts of the base models' cards that are on this disk, and the names of the others.

    Without `base_folder` they are looked for in huggingface_hub's cache, never on the network.
    """
    texts: list[str] = []
    missing: list[str] = []
    for place in options.base_folder:
        text = read_card(place)
        if text is None:
            raise OptionError(f"--base-folder {place}: there is no README.md in it.")
        texts.append(text)
    if options.base_folder:
        return texts, missing
    for name in options.base_model or _bases_of(folder):
        text = _cached_card(name)
        if text is None:
            missing.append(name)
        else:
            texts.append(text)
    return texts, missing


def report_table(report: Mapping[str, Any], after: int) -> str:
    """Return a report as Markdown: when and where it was measured, and its rows as a table.

    `after` is how many of the card's steps were done before.
    """
    machine = "; ".join(f"{name}: {value}" for name, value in report["machine"].items())
    when = f"Measured on {report['date']}" + (f", after step {after}" if after else "")
    facts = [
        f"{name.replace('_', ' ')} {_cell(value)}"
        for name, value in report.items()
        if name not in ("date", "machine", "rows") and isinstance(value, str | int | float)
    ]
    rows = report["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [
        [name.replace("_", " ") for name in names],
        ["---", *["---:"] * (len(names) - 1)],
        *([_cell(row.get(name)) for name in names] for row in rows),
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{when}. {', '.join(facts)}.\n\n{table}\n\nMachine: {machine}."


def _report(file: Path) -> dict[str, Any]:
    try:
        report = parse_json_object(file.read_bytes(), str(file))
    except (OSError, CheckpointError) as error:
        raise OptionError(f"{file} is no report: {error}") from None
    rows = report.get("rows")
    lacking = [
        name
        for name, is_there in (
            ("date", isinstance(report.get("date"), str)),
            ("machine", isinstance(report.get("machine"), dict)),
            ("rows", isinstance(rows, list) and rows and all(isinstance(r, dict) for r in rows)),
        )
        if not is_there
    ]
    if lacking:
        raise OptionError(
            f"{file} has no {' and no '.join(lacking)}, and figures without them mean nothing. Give "
            "what `hanok quality --json` of this version prints, or an object with the same keys."
        )
    return report


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _usage(
    folder: Path, config: Mapping[str, Any], adapter: Mapping[str, Any], *, is_generator: bool
) -> str:
    """Return how the model is run; empty where the files do not show it."""
    found = []
    path = 'path = "."  # this folder, or the id of its repository on the hub'
    if is_generator:
        found.append(
            'With hanok:\n\n```sh\nhanok generate . "Once upon a time"\nhanok serve .\n```'
        )
    architectures = config.get("architectures") or []
    if any(str(name).endswith(CAUSAL_ENDINGS) for name in architectures):
        remote = ", trust_remote_code=True" if config.get("auto_map") else ""
        if _has_template(folder):
            prompt = (
                'messages = [{"role": "user", "content": "Hello!"}]\n'
                "inputs = tokenizer.apply_chat_template(\n"
                '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
            )
        else:
            prompt = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
        found.append(
            "With transformers:\n\n```python\nfrom transformers import AutoModelForCausalLM, "
            f"AutoTokenizer\n\n{path}\ntokenizer = AutoTokenizer.from_pretrained(path{remote})\n"
            f'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto"{remote})\n{prompt}\n'
            "output = model.generate(**inputs, max_new_tokens=64)\n"
            "print(tokenizer.decode(output[0], skip_special_tokens=True))\n```"
        )
    if adapter and adapter.get("task_type") == "CAUSAL_LM":
        found.append(
            "With peft, which loads the base model too:\n\n```python\nfrom peft import "
            f"AutoPeftModelForCausalLM\n\n{path}\n"
            'model = AutoPeftModelForCausalLM.from_pretrained(path, dtype="auto")\n```'
        )
    return "\n\n".join(found)


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    return bool(_object(folder / "tokenizer_config.json").get("chat_template"))


def _bases_of(folder: Path) -> list[str]:
    found = front_matter(read_card(folder) or "").get("base_model")
    names = found if isinstance(found, list) else [found]
    return [name for name in names if isinstance(name, str)]


def _cached_card(name: str) -> str | None:
    """Return the card of a model in huggingface_hub's cache; asks no network."""
    from huggingface_hub import try_to_load_from_cache

    if not is_repo_id(name):
        return None
    found = try_to_load_from_cache(name, "README.md")
    return read_card(Path(found).parent) if isinstance(found, str) else None


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
