"""An adapter without its base: its configuration, and whether each product has both of its matrices.

Imports no torch.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from hanok.check.finding import Finding, shown
from hanok.checkpoint.adapter_files import PREFIX, WEIGHTS, A, B, open_adapter
from hanok.checkpoint.formats import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG
from hanok.checkpoint.lora_config import LoraConfig
from hanok.checkpoint.safetensors import TensorRef
from hanok.errors import CheckpointError, UnsupportedError


def adapter_weights(folder: Path) -> Path | None:
    """Return the weights of a folder that holds an adapter and no model."""
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / CONFIG).is_file():
        return None
    found = [folder / name for name in sorted(ADAPTER_WEIGHTS, reverse=True)]
    return next((file for file in found if file.is_file()), None)


def adapter_findings(folder: Path, tensors: Mapping[str, TensorRef]) -> Iterator[Finding]:
    """Yield what is wrong with an adapter by its configuration and headers."""
    try:
        config = open_adapter(folder).config
    except UnsupportedError as error:
        yield Finding(
            level="note",
            kind="unknown-adapter",
            where=ADAPTER_CONFIG,
            what=_without_folder(error, folder),
            advice="nothing, if another program runs it",
        )
        return
    except CheckpointError as error:
        if tensors:  # else it is the weights that are absent or damaged, which is another finding
            yield _wrong(_without_folder(error, folder))
        return
    others = sorted(
        f"{name} is {list(ref.shape)}"
        for name, ref in tensors.items()
        if not _fits(name, ref, config)
    )
    if others:
        yield _wrong(f"ranks other than {ADAPTER_CONFIG} says (r is {config.r}): {shown(others)}")


def _without_folder(error: Exception, folder: Path) -> str:
    text = str(error).rstrip(".")
    for name in (ADAPTER_CONFIG, WEIGHTS):
        text = text.removeprefix(f"{folder / name}: ")
    return text


def _fits(name: str, ref: TensorRef, config: LoraConfig) -> bool:
    for ending, axis in ((A, 0), (B, 1)):
        if name.endswith(ending):
            path = name.removesuffix(ending).removeprefix(PREFIX)
            return len(ref.shape) == 2 and ref.shape[axis] == config.rank_of(path)
    return True


def _wrong(what: str) -> Finding:
    return Finding(
        level="error",
        kind="adapter",
        where="adapter",
        what=what,
        advice="get the configuration and the weights of one training",
    )
