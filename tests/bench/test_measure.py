"""A measured grid: its texts and quality against the model itself; what fails takes its own rows."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from tests.models.plugins.families.decayed import Decay

import hanok
from hanok.bench.grid import GridRow
from hanok.bench.measure import BenchOptions, first_difference, run_bench
from hanok.bench.quality import measure_quality
from hanok.bench.report import Probe, Report
from hanok.bench.rows import bandwidth_share, prompt_flops
from hanok.bench.settings import Axes, Setting, Workload
from hanok.bench.subject import SubjectModel
from hanok.bench.workers import Process, Room, Shared, Workers
from hanok.errors import DeadlineError, GenerationError, OptionError, RequestError

TEXT = (hanok.BUNDLED / "quality.txt").read_text(encoding="utf-8")
LOAD = Shared(path=hanok.BUNDLED, draft=hanok.BUNDLED, threads=1, max_memory=None)
AXES = (
    Axes(prompt_tokens=(24,), new_tokens=(20,), attention=("eager",), cache=(False, True)),
    Axes(prompt_tokens=(24,), new_tokens=(20,), quant=("none", "int4"), cache_dtype=("int8",)),
    Axes(prompt_tokens=(24,), new_tokens=(20,), speculation=("ngram",)),
    Axes(prompt_tokens=(24,), new_tokens=(20,), attention=("eager", "native"), graphs=(False,)),
    Axes(prompt_tokens=(24,), new_tokens=(20,), batch=(3,), quant=("none", "int4")),
    Axes(prompt_tokens=(24,), new_tokens=(20,), batch=(3,), speculation=("ngram", "draft")),
    Axes(prompt_tokens=(24,), new_tokens=(20,), device_map=("cuda:7",)),
    Axes(prompt_tokens=(24, 2000), new_tokens=(20,), attention=("triton", "eager")),
)


@pytest.fixture(scope="module")
def measured() -> Report:
    options = BenchOptions(load=LOAD, axes=AXES, text=TEXT, rounds=2, quality_tokens=200)
    told: list[tuple[str, float, float | None]] = []
    planned = SubjectModel._why_not_load

    def why_not(self: SubjectModel, setting: Setting, workload: Workload) -> str | None:
        # Its load fails only when it is tried.
        return None if setting.device_map == "cuda:7" else planned(self, setting, workload)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SubjectModel, "_why_not_load", why_not)
        report = run_bench(options, lambda what, done, whole: told.append((what, done, whole)))
    assert {what.partition(":")[0] for what, _, _ in told} == {
        "first answer",
        "quality",
        "round 1",
        "round 2",
        "peak",
    }
    assert all(whole is None or whole >= done for _, done, whole in told)
    return report


def test_rows_and_what_is_left_out(measured: Report) -> None:
    assert [(row.label, row.workload.batch) for row in measured.rows] == [
        ("eager, no cache", 1),
        ("eager", 1),
        ("native, int8 cache", 1),
        ("native, int4, int8 cache", 1),
        ("native, ngram speculation", 1),
        ("native, no graphs", 1),
        ("native", 3),
        ("native, int4", 3),
        ("native, ngram speculation", 3),
        ("native, draft speculation", 3),
    ]
    assert [row.is_reference for row in measured.rows] == [
        row.label in ("eager, no cache", "native") for row in measured.rows
    ]
    reasons = [item.reason for item in measured.skipped]
    assert len(reasons) == 5
    assert reasons.count("nothing is recorded with attention eager, only with native") == 1
    assert reasons.count("needs a CUDA device (found: cpu)") == 1
    assert sum("longer than the model's context (2,020 of 1,024" in item for item in reasons) == 2
    assert sum("'cuda:7', which is not there" in item for item in reasons) == 1
    assert [load.label for load in measured.loads] == [
        "bfloat16",
        "bfloat16, int4",
        "bfloat16, with a draft model",
    ]
    assert measured.loads[1].weight_bytes < measured.loads[0].weight_bytes


def test_figures_are_those_of_the_samples(measured: Report) -> None:
    assert measured.rounds == len(measured.probes) == 2
    assert measured.level == pytest.approx(1 - 0.05 / 8)
    for row in measured.rows:
        seconds = [sample.seconds for sample in row.samples]
        assert len(seconds) == 2
        assert row.seconds == pytest.approx(sum(seconds) / 2)
        assert (row.seconds_min, row.seconds_max) == (min(seconds), max(seconds))
        tokens = 20 * row.workload.batch
        assert row.s_per_token == pytest.approx(row.seconds / tokens)
        assert 0 < row.first_token_s < row.seconds
        first = next(other for other in measured.rows if other.workload == row.workload)
        ratios = [a.seconds / b.seconds for a, b in zip(first.samples, row.samples, strict=True)]
        assert row.ratio.value == pytest.approx(math.sqrt(math.prod(ratios)))
        assert row.peak_bytes is not None
        assert row.peak_bytes > measured.loads[0].weight_bytes


def test_speculation_is_counted_and_keeps_the_text(measured: Report) -> None:
    for row in measured.rows:
        assert (row.proposed is None) == (row.setting.speculation == "off")
    for row in (measured.rows[4], *measured.rows[8:]):
        assert row.is_same_text
        assert row.bandwidth_share is None
        assert row.proposed is not None
        assert row.accepted is not None
        assert 0 <= row.accepted <= row.proposed
    drafted = measured.rows[9]
    assert drafted.accepted == drafted.proposed  # it drafts for itself


def test_texts_are_compared_token_by_token(measured: Report) -> None:
    """The gap is that of the reference's own logits, behind the tokens that both have."""
    model = hanok.load(hanok.BUNDLED, attn_implementation="native")
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(TEXT)
    starts = [index * len(tokens) // 3 for index in range(3)]
    prompts = [(tokens[start:] + tokens[:start])[:24] for start in starts]
    own = [
        model.generate(prompt, max_new_tokens=20, ignore_eos=True, temperature=0.0).token_ids
        for prompt in prompts
    ]
    other = hanok.load(hanok.BUNDLED, attn_implementation="native", quant="int4")
    theirs = [
        other.generate(prompt, max_new_tokens=20, ignore_eos=True, temperature=0.0).token_ids
        for prompt in prompts
    ]
    assert measured.rows[5].is_same_text
    row = measured.rows[7]
    place = first_difference(own, theirs)
    assert place is not None
    assert row.difference is not None
    assert not row.is_same_text
    prompt, token = place
    assert (row.difference.prompt, row.difference.token) == place
    scores = model.logits(prompts[prompt] + own[prompt][:token])[-1]
    gap = float(scores[own[prompt][token]] - scores[theirs[prompt][token]])
    assert row.difference.gap == pytest.approx(gap, abs=1e-6)
    assert measured.rows[1].is_same_text


def test_quality_is_that_of_the_quality_report(measured: Report) -> None:
    expected = measure_quality(hanok.BUNDLED, ["int4"], TEXT, max_tokens=200)
    assert measured.quality_tokens == expected.num_tokens == 200
    found = {row.label: row.quality for row in measured.rows}
    eager, int4 = found["eager"], found["native, int4"]
    assert eager is not None
    assert (eager.kl_mean, eager.same_top1) == (0.0, 1.0)
    assert int4 is not None
    # The reference there attends with another backend, which rounds otherwise.
    assert int4.perplexity == pytest.approx(expected.rows[1].perplexity, rel=1e-6)
    assert int4.kl_mean == pytest.approx(expected.rows[1].kl_mean, rel=0.05)
    kept = found["native, int8 cache"]
    plain = found["native"]
    assert kept is not None
    assert plain is not None
    assert kept.perplexity != plain.perplexity


def test_reasons_not_to_load() -> None:
    why_not = SubjectModel(LOAD).facts().why_not_load
    workload = Workload(prompt_tokens=8, new_tokens=8, batch=1)
    assert why_not(Setting(dtype="bfloat16"), workload) is None
    missing = why_not(Setting(dtype="bfloat16", device_map="cuda:7"), workload)
    assert "'cuda:7', which is not there" in (missing or "")
    small = SubjectModel(replace(LOAD, max_memory="cpu=1MB")).facts()
    lacks = small.why_not_load(Setting(dtype="bfloat16", device_map="cpu"), workload)
    assert (lacks or "").startswith("does not fit: cpu lacks ")
    with pytest.raises(OptionError, match="int9"):
        why_not(Setting(dtype="bfloat16", quant="int9"), workload)


def test_a_model_without_attention_is_measured_and_not_speculated_on() -> None:
    subject = SubjectModel(LOAD)
    assert subject.facts().why_not_speculation("ngram") is None
    subject.config = subject.config.with_layers(mixer=Decay(size=8))
    facts, setting = subject.facts(), Setting(dtype="bfloat16", attention="eager")
    usual = SubjectModel(LOAD).facts().attention(setting)
    assert (facts.attention(setting), facts.why_not_attention(setting)) == (usual, None)
    assert "cannot be truncated" in (facts.why_not_speculation("ngram") or "")
    assert facts.why_not_speculation("off") is None


def test_options_out_of_range() -> None:
    options = BenchOptions(load=LOAD, axes=(Axes(),), text=TEXT)
    with pytest.raises(OptionError, match="rounds is 0"):
        run_bench(replace(options, rounds=0))
    with pytest.raises(OptionError, match="the budget is 0"):
        run_bench(replace(options, budget_s=0))


def test_a_process_that_ends_is_told_with_its_words() -> None:
    process = Process()
    try:
        with pytest.raises(RequestError, match="nowhere"):
            process.ask("load", path="nowhere", draft=None, options={})
        with pytest.raises(
            GenerationError, match=r"ended with status 1(?s:.*)nothing is loaded yet"
        ):
            process.ask("gap", tokens=[1], own=0, other=1)
    finally:
        process.close()


def test_a_process_that_takes_too_long_is_ended_and_another_takes_its_place() -> None:
    load = Setting(dtype="bfloat16").load
    with Workers(LOAD, {load: Room(context=32, batch=1)}) as workers:
        with pytest.raises(DeadlineError, match="had not answered after 0 s"):
            workers.get(load, 0.0)  # not even Python has begun by then
        worker = workers.get(load)
        assert not worker.has_ended
        with pytest.raises(DeadlineError):
            worker.ask("gap", limit_s=0.0, tokens=[5] * 1000, own=0, other=1)
        assert worker.has_ended
        again = workers.get(load)
        assert again is not worker
        assert again.ask("gap", limit_s=60.0, tokens=[5], own=0, other=0) == {"gap": 0.0}


def test_a_copy_of_a_process_answers_apart() -> None:
    request = {
        "do": "load",
        "path": str(hanok.BUNDLED),
        "draft": None,
        "options": {"threads": 1},
    }
    answer = {
        "do": "answer",
        "prompts": [[5, 6, 7, 8]],
        "new_tokens": 2,
        "use_cache": True,
        "method": "off",
    }
    process = Process()
    try:
        first = process.ask("apart", steps=[request, answer])
        assert first == {**process.ask("apart", steps=[request, answer]), **without_times(first)}
        assert process.ask("apart", steps=[request, {"do": "peak"}])["peak_bytes"] > 2**24
        with pytest.raises(RequestError, match="a process ended with status"):
            process.ask("apart", steps=[{"do": "gap", "tokens": [1], "own": 0, "other": 1}])
        with pytest.raises(RequestError, match="nowhere"):
            process.ask("apart", steps=[{**request, "path": "nowhere"}, answer])
    finally:
        process.close()


def without_times(answer: dict[str, object]) -> dict[str, object]:
    return {key: answer[key] for key in ("seconds", "first_token_s", "foreign")}


def test_shares_are_their_formulas() -> None:
    config = hanok.load(hanok.BUNDLED).config
    workload = Workload(prompt_tokens=100, new_tokens=50, batch=4)
    row = GridRow(setting=Setting(), workload=workload)
    best = Probe(gb_per_s=10.0, gflop_per_s=100.0)
    # 200 tokens/s of 4 sequences are 50 passes; each reads 1 MB and 4 x 125 tokens: of 5 layers two
    # heads' keys and values, of 64 components in two bytes or, with a scale, in one.
    read = (10**6, "bfloat16")
    for kept, head_bytes in (("auto", 64 * 2), ("int8", 64 + 4)):
        kind = replace(row, setting=Setting(cache_dtype=kept))
        found = bandwidth_share(kind, 200.0, read, config, best)
        assert found == pytest.approx(50 * (10**6 + 4 * 125 * 5 * 4 * head_bytes) / 10e9)
    for setting in (Setting(cache=False), Setting(speculation="ngram")):
        assert bandwidth_share(replace(row, setting=setting), 200.0, read, config, best) is None
    assert bandwidth_share(row, None, read, config, best) is None
    norms = (2 * config.num_layers + 1) * config.hidden_size
    dense = 2 * (config.num_parameters() - norms)
    seen = 4 * config.attentions[0].qkv_sizes[0] * config.num_layers * 50
    assert prompt_flops(row, config) == pytest.approx(400 * (dense + seen))


def test_the_first_difference() -> None:
    assert first_difference([[1, 2], [3, 4]], [[1, 2], [3, 4]]) is None
    assert first_difference([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == (1, 1)
    assert first_difference([[1, 2], [3, 4]], [[0, 2], [3, 5]]) == (0, 0)


def test_a_checkpoint_without_a_tokenizer_has_prompts_and_nothing_to_score(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((hanok.BUNDLED / name).read_bytes())
    subject = SubjectModel(replace(LOAD, path=tmp_path))
    assert subject.windows(TEXT, 100) == []
    workload = Workload(prompt_tokens=9, new_tokens=1, batch=2)
    prompts = subject.prompts(TEXT, workload)
    assert prompts == SubjectModel(replace(LOAD, path=tmp_path)).prompts(TEXT, workload)
    assert [len(prompt) for prompt in prompts] == [9, 9]
    assert prompts[0] != prompts[1]
    assert all(0 <= token < subject.config.vocab_size for prompt in prompts for token in prompt)


def test_prompts_longer_than_the_text_begin_again() -> None:
    subject = SubjectModel(LOAD)
    text = "The dog ran. " * 3
    (prompt,) = subject.prompts(text, Workload(prompt_tokens=40, new_tokens=1, batch=1))
    (short,) = subject.prompts(text, Workload(prompt_tokens=5, new_tokens=1, batch=1))
    assert len(prompt) == 40
    assert prompt[:5] == short
