"""How a checkpoint pools a text's hidden states into one vector: sentence-transformers' files.

`modules.json` lists modules in order (a transformer, a pooling, perhaps a normalization), and the
pooling's `config.json` says which kind of pooling it is. Imports no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast, get_args

from hanok.errors import CheckpointError, OptionError, UnsupportedError

Pooling = Literal["last", "mean"]
"""The hidden state of the last token, or the mean over all tokens."""

KINDS: Mapping[str, Pooling] = {"lasttoken": "last", "mean_tokens": "mean", "mean": "mean"}
MODULES = ("Transformer", "Pooling", "Normalize")
MODULES_FILE = "modules.json"
SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json")
"""Other files that sentence-transformers keeps next to a model: prompts and tokenization settings."""
ELSE = 'say --pooling last (in Python: embed(…, pooling="last")), or mean, to have vectors all the same'


def has_modules(folder: Path) -> bool:
    """Return whether a checkpoint is one of sentence-transformers: an embedder."""
    return (folder / MODULES_FILE).is_file()


def choose_pooling(asked: str | None, folder: Path, config: Mapping[str, Any]) -> Pooling:
    """Return the pooling to use: the one asked for, else the checkpoint's, else "last".

    `config` is the checkpoint's config.json. Raises OptionError for an unknown pooling, and, if none is
    asked for, whatever `read_pooling` raises; UnsupportedError also for a checkpoint that brings its own
    code for hidden states.
    """
    if asked in get_args(Pooling):
        return cast(Pooling, asked)
    if asked is not None:
        raise OptionError(f"pooling {asked!r} is unknown. Choose last or mean.")
    own_code = config.get("auto_map")
    own_code = own_code.get("AutoModel") if isinstance(own_code, Mapping) else None
    if own_code:
        # Embedders of this kind let tokens attend to later ones (gte-Qwen2): other vectors.
        raise UnsupportedError(
            f"{folder / 'config.json'} has its hidden states computed by code that comes with it "
            f"({own_code}), which is not run here. Where that code computes what transformers' own "
            f"{config.get('model_type')} does, {ELSE}."
        )
    return read_pooling(folder) or "last"


def read_pooling(folder: Path) -> Pooling | None:
    """Return the pooling that a checkpoint asks for; None if it does not say.

    Raises UnsupportedError for another kind, or for modules after it that change the vector, and
    CheckpointError for files that cannot be read.
    """
    config = folder / "1_Pooling" / "config.json"
    for module in _modules(folder):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in MODULES:
            raise UnsupportedError(
                f"{folder / MODULES_FILE} has a {kind} module, which is not computed here; {ELSE}."
            )
        if kind == "Pooling":
            config = folder / str(module.get("path", "")) / "config.json"
    if not config.is_file():
        return None
    values = _read(config)
    if not isinstance(values, dict):
        raise CheckpointError(f"{config} is not an object.")
    found = _kinds(values)
    if len(found) != 1 or found[0] not in KINDS:
        names = " and ".join(found) or "nothing"
        raise UnsupportedError(
            f"{config} asks for {names}; only lasttoken or mean_tokens alone is computed here; {ELSE}."
        )
    return KINDS[found[0]]


def pooling_files(folder: Path) -> list[Path]:
    """Return the files of sentence-transformers in a checkpoint, those of its modules too."""
    names = ["1_Pooling", *(str(module.get("path", "")) for module in _modules(folder))]
    inner = [PurePosixPath(name) for name in dict.fromkeys(names)]
    # The model's own files are not among these, and no path may lead out of the folder.
    places = [path for path in inner if path.parts and not {"..", path.anchor} & set(path.parts)]
    found = [folder / name for name in (MODULES_FILE, *SETTINGS)]
    for place in places:
        found += sorted((folder / place).glob("*"))
    return [file for file in found if file.is_file()]


def _modules(folder: Path) -> list[Mapping[str, Any]]:
    """Return the modules in order; empty if the checkpoint does not list them."""
    if not has_modules(folder):
        return []
    modules = _read(folder / MODULES_FILE)
    if not isinstance(modules, list) or not all(isinstance(item, dict) for item in modules):
        raise CheckpointError(f"{folder / MODULES_FILE} is not a list of modules.")
    return modules


def _kinds(values: Mapping[str, Any]) -> list[str]:
    """Return what a pooling's config asks for, in its older or its newer spelling."""
    if values.get("pooling_mode") is not None:
        given = values["pooling_mode"]
        return [str(item) for item in given] if isinstance(given, list) else [str(given)]
    prefix = "pooling_mode_"
    return [key.removeprefix(prefix) for key, on in values.items() if key.startswith(prefix) and on]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Fetch the file again.") from error
