"""Reports made up for tests: rows with samples of a known distribution."""

import math
import random
from collections.abc import Callable, Sequence

import pytest

from hanok.bench.grid import GridRow, Skipped
from hanok.bench.intervals import level_of_each, paired_ratio
from hanok.bench.report import (
    Difference,
    LoadRow,
    Probe,
    Quality,
    Report,
    Row,
    Sample,
    Subject,
)
from hanok.bench.settings import Setting, Workload
from hanok.bench.spread import Spread

SHORT = Workload(prompt_tokens=128, new_tokens=32, batch=1)
LONG = Workload(prompt_tokens=512, new_tokens=32, batch=1)
SEVERAL = Workload(prompt_tokens=128, new_tokens=32, batch=8)
MIB = 2**20
QUALITIES = {
    "eager": (50.0, 0.0, 0.0, 1.0),
    "int8": (50.02, 3.8e-4, 2e-3, 0.984),
    "int4": (50.9, 8.7e-3, 6e-2, 0.923),
    "native": (50.01, 1.4e-4, 1e-3, 0.993),
}
SPEEDS = {  # seconds of an answer
    (Setting(attention="eager", cache=False), SHORT): 0.30,
    (Setting(attention="eager"), SHORT): 0.10,
    (Setting(attention="native"), SHORT): 0.034,
    (Setting(attention="native", quant="int8"), SHORT): 0.030,
    (Setting(attention="native", quant="int4"), SHORT): 0.024,
    (Setting(attention="eager"), LONG): 0.15,
    (Setting(attention="native"), LONG): 0.05,
    (Setting(attention="native", quant="int8"), LONG): 0.045,
    (Setting(attention="native"), SEVERAL): 0.11,
    (Setting(attention="native", quant="int8"), SEVERAL): 0.08,
}
Noise = Callable[[int], float]


def times(
    draws: random.Random, middle: float, rounds: Sequence[float], sigma: float
) -> list[float]:
    return [middle * slow * math.exp(draws.gauss(0, sigma)) for slow in rounds]


def made_report(
    seed: int = 0,
    *,
    rounds: int = 8,
    sigma: float = 0.03,
    machine: float = 1.0,
    unseen: float = 1.0,
    changed: dict[Setting, float] | None = None,
    only: Workload | None = None,
) -> Report:
    """A report of a machine that is `machine` times as slow, with `changed` times as long answers.

    By `unseen` everything takes longer but the probes.
    """
    draws = random.Random(seed)
    slow = [machine * math.exp(draws.gauss(0, 0.05)) for _ in range(rounds)]
    speeds = {key: value for key, value in SPEEDS.items() if only in (None, key[1])}
    level = level_of_each(len(speeds))
    firsts: dict[Workload, list[float]] = {}
    rows = []
    for (setting, workload), middle in speeds.items():
        seconds = times(draws, unseen * middle * (changed or {}).get(setting, 1.0), slow, sigma)
        is_reference = workload not in firsts
        first = firsts.setdefault(workload, seconds)
        found = Spread.of(seconds)
        ratio = paired_ratio(first, seconds, level)
        name = setting.quant if setting.quant != "none" else setting.attention
        perplexity, mean, p99, same = QUALITIES[name]
        rows.append(
            Row(
                setting=setting,
                workload=workload,
                label=setting.label("auto"),
                is_reference=is_reference,
                samples=tuple(
                    Sample(seconds=value, first_token_s=value / 4, foreign=0.01)
                    for value in seconds
                ),
                warmup_s=2 * found.median,
                seconds=found.median,
                seconds_min=found.low,
                seconds_max=found.high,
                s_per_token=found.median / 32,
                tokens_per_s=31 / found.median,
                first_token_s=found.median / 4,
                ratio=ratio,
                verdict=ratio.verdict,
                peak_bytes=(200 if setting.quant == "none" else 190) * MIB,
                peak_device_bytes=None,
                bandwidth_share=0.3 if setting.cache else None,
                flop_share=0.4,
                is_same_text=setting.quant != "int4",
                difference=Difference(prompt=0, token=18, gap=0.0625)
                if setting.quant == "int4"
                else None,
                quality=Quality(perplexity=perplexity, kl_mean=mean, kl_p99=p99, same_top1=same),
                proposed=None,
                accepted=None,
            )
        )
    return Report(
        checkpoint=Subject(
            name="tiny</script>story",
            fingerprint="f" * 32,
            family="llama",
            num_parameters=4_459_264,
            dtype="auto",
        ),
        machine={"cpu": "Some CPU, 2 threads", "gpus": "none", "hanok's kernels": "built"},
        versions={"hanok": "0.1.0", "torch": "2.13.0"},
        command="hanok bench --json report.json",
        started="2026-11-25T10:00:00+00:00",
        seconds=42.0,
        rounds=rounds,
        level=level,
        quality_tokens=1024,
        gb_per_s=30.0 / machine,
        gflop_per_s=400.0 / machine,
        probes=tuple(
            Probe(
                gb_per_s=30.0 / value * math.exp(draws.gauss(0, 0.02)),
                gflop_per_s=400.0 / value * math.exp(draws.gauss(0, 0.02)),
            )
            for value in slow
        ),
        loads=(
            LoadRow(
                label="bfloat16",
                seconds=1.3,
                load_s=0.07,
                weight_bytes=8 * MIB,
                peak_bytes=190 * MIB,
            ),
        ),
        rows=tuple(rows),
        skipped=(
            Skipped(
                row=GridRow(setting=Setting(attention="triton"), workload=SHORT),
                reason="needs a CUDA device (found: cpu)",
            ),
        ),
        notes=("a note",),
    )


@pytest.fixture
def report() -> Report:
    return made_report()
