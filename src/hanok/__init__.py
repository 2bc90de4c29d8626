"""hanok: from an open-weight checkpoint on disk to production.

>>> import hanok
>>> model = hanok.load(hanok.BUNDLED)
>>> model.generate("Once upon a time", max_new_tokens=8).text  # doctest: +SKIP
', there was a little girl named'

The names below are public and stable. They are loaded when first used, so that importing hanok (and
`hanok --help`) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hanok.errors import (
    BudgetError,
    CheckpointError,
    ClosedError,
    DataError,
    DeadlineError,
    GenerationError,
    HanokError,
    HubError,
    OptionError,
    RequestAbortedError,
    RequestError,
    UnsupportedError,
)
from hanok.package import BUNDLED, __version__

if TYPE_CHECKING:
    from hanok.bench.quality import QualityReport, measure_quality
    from hanok.checkpoint.lora_config import LoraConfig
    from hanok.engine.engine import Engine
    from hanok.engine.generate import PrefixCache
    from hanok.engine.model import Generation, Model, Score, load
    from hanok.engine.params import SamplingParams
    from hanok.engine.sequence import SpeculationCounts, TokenEvent
    from hanok.engine.speculate import Speculation
    from hanok.engine.stats import EngineStats
    from hanok.engine.ticket import Ticket
    from hanok.hub.options import PullOptions, PushOptions
    from hanok.hub.pull import PullReport, pull
    from hanok.hub.push import Push, PushReport, push
    from hanok.memory.options import LoadOptions
    from hanok.memory.plan import LoadPlan
    from hanok.memory.planning import plan_draft, plan_load
    from hanok.training.callback import TrainCallback
    from hanok.training.data.dataset import Dataset
    from hanok.training.data.options import DataOptions, Source
    from hanok.training.loop import Trainer
    from hanok.training.options import TrainOptions
    from hanok.training.report_options import ReportOptions
    from hanok.training.run import train

_LAZY = {
    "DataOptions": "hanok.training.data.options",
    "Dataset": "hanok.training.data.dataset",
    "Engine": "hanok.engine.engine",
    "EngineStats": "hanok.engine.stats",
    "Generation": "hanok.engine.model",
    "LoadOptions": "hanok.memory.options",
    "LoadPlan": "hanok.memory.plan",
    "LoraConfig": "hanok.checkpoint.lora_config",
    "Model": "hanok.engine.model",
    "PrefixCache": "hanok.engine.generate",
    "PullOptions": "hanok.hub.options",
    "PullReport": "hanok.hub.pull",
    "Push": "hanok.hub.push",
    "PushOptions": "hanok.hub.options",
    "PushReport": "hanok.hub.push",
    "ReportOptions": "hanok.training.report_options",
    "SamplingParams": "hanok.engine.params",
    "Score": "hanok.engine.model",
    "QualityReport": "hanok.bench.quality",
    "Speculation": "hanok.engine.speculate",
    "Source": "hanok.training.data.options",
    "SpeculationCounts": "hanok.engine.sequence",
    "Ticket": "hanok.engine.ticket",
    "TokenEvent": "hanok.engine.sequence",
    "TrainCallback": "hanok.training.callback",
    "TrainOptions": "hanok.training.options",
    "Trainer": "hanok.training.loop",
    "load": "hanok.engine.model",
    "measure_quality": "hanok.bench.quality",
    "plan_draft": "hanok.memory.planning",
    "plan_load": "hanok.memory.planning",
    "pull": "hanok.hub.pull",
    "push": "hanok.hub.push",
    "train": "hanok.training.run",
}

__all__ = [
    "BUNDLED",
    "BudgetError",
    "CheckpointError",
    "ClosedError",
    "DataError",
    "DataOptions",
    "Dataset",
    "DeadlineError",
    "Engine",
    "EngineStats",
    "Generation",
    "GenerationError",
    "HanokError",
    "HubError",
    "LoadOptions",
    "LoadPlan",
    "LoraConfig",
    "Model",
    "OptionError",
    "PrefixCache",
    "PullOptions",
    "PullReport",
    "Push",
    "PushOptions",
    "PushReport",
    "QualityReport",
    "ReportOptions",
    "RequestAbortedError",
    "RequestError",
    "SamplingParams",
    "Score",
    "Source",
    "Speculation",
    "SpeculationCounts",
    "Ticket",
    "TokenEvent",
    "TrainCallback",
    "TrainOptions",
    "Trainer",
    "UnsupportedError",
    "__version__",
    "load",
    "measure_quality",
    "plan_draft",
    "plan_load",
    "pull",
    "push",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hanok' has no attribute {name!r}")
