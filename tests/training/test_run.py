"""`hanok.train`: from paths to a folder that serves, what is seen on the way, and going on with it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import hanok
from hanok.checkpoint.card import problems
from hanok.checkpoint.tokenizer import open_tokenizer
from hanok.errors import GenerationError, OptionError
from hanok.training.callback import Sample, TrainCallback
from hanok.training.loop import StepReport, Trainer, TrainReport

PAIRS = [
    ("What did Lily see?", "Lily saw a small green frog."),
    ("Where did Tom go?", "Tom went to the big lake."),
    ("Who was sad?", "The little bear was sad."),
    ("What did Ben eat?", "Ben ate a red apple."),
] * 4
OPTIONS = hanok.TrainOptions(
    lora=hanok.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    pack_tokens=64,
    packs_per_step=2,
    learning_rate=3e-3,
    max_steps=6,
    save_steps=2,
    held_out=0.25,
    eval_steps=4,
)
FLOAT32 = hanok.LoadOptions(dtype="float32")


class Seen(TrainCallback):
    """Keeps all that it is told, and stops after a step."""

    def __init__(self, stop: int = 0) -> None:
        self._stop = stop
        self.progress: list[tuple[str, int, int]] = []
        self.steps: list[StepReport] = []
        self.samples: list[Sample] = []
        self.held_out: list[float] = []

    def on_progress(self, what: str, done: int, total: int) -> None:
        self.progress.append((what, done, total))

    def on_begin(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_held_out(self, step: int, loss: float) -> None:
        assert step == 0
        self.held_out.append(loss)

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)
        self.trainer.is_told_to_stop = report.step == self._stop

    def on_sample(self, sample: Sample) -> None:
        self.samples.append(sample)


@dataclass(frozen=True)
class Whole:
    """A training without a break, which several tests look at."""

    folder: Path
    seen: Seen
    report: TrainReport


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    seen = Seen()
    data = write_rows(folder / "rows.jsonl", PAIRS)
    report = run(data, folder / "run", seen, cache_folder=folder / "cache")
    return Whole(folder, seen, report)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", PAIRS)


def write_rows(path: Path, pairs: Sequence[tuple[str, str]]) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(data: Any, output: Path, callback: TrainCallback | None = None, **given: Any) -> Any:
    asked = {"options": OPTIONS, "load_options": FLOAT32} | given
    return hanok.train(hanok.BUNDLED, data, output, callback=callback, **asked)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_paths_become_a_folder_that_serves_and_says_how_it_was_made(whole: Whole) -> None:
    seen, report, tmp_path = whole.seen, whole.report, whole.folder
    data = tmp_path / "rows.jsonl"
    assert report.is_finished
    titles = list(dict.fromkeys(what for what, _, _ in seen.progress))
    assert titles == ["Loading bundled", "Tokenizing"]
    for title in titles:
        counts = [(done, total) for what, done, total in seen.progress if what == title]
        assert counts[-1][0] == counts[-1][1] > 0
    assert any((tmp_path / "cache").iterdir())
    card = (report.output / "README.md").read_text()
    assert str(tmp_path) not in card
    assert f"| rows.jsonl | {hashlib.sha256(data.read_bytes()).hexdigest()} | messages |" in card
    assert "lora.r 4, " in card
    assert "learning_rate 0.003" in card
    assert "Seed: 0." in card
    first, last = report.losses[0], report.losses[-1]
    assert f"{first:.4f} in the first step, {last:.4f} in the last of 6" in card
    assert (
        f"{seen.held_out[0]:.4f} after step 0 and {report.held_out_loss:.4f} after step 6" in card
    )
    assert all("front matter" not in problem for problem in problems(card))
    tokenizer = open_tokenizer(report.output)
    theirs = open_tokenizer(hanok.BUNDLED)
    question = [{"role": "user", "content": "Who?"}]
    assert tokenizer.encode_chat(question) == theirs.encode_chat(question)
    config = (report.output / "generation_config.json").read_text()
    assert json.loads(config) == json.loads(
        (Path(hanok.BUNDLED) / "generation_config.json").read_text()
    )
    model = hanok.load(hanok.BUNDLED, dtype="float32")
    model.adapters.load("new", report.output)


def test_the_template_that_was_trained_with_is_in_the_output(data: Path, tmp_path: Path) -> None:
    asked = hanok.DataOptions(chat_template="vicuna_v1.1")
    options = replace(OPTIONS, pack_tokens=128, max_steps=1, held_out=0.0)
    report = run(data, tmp_path / "run", options=options, data_options=asked)
    rendered = open_tokenizer(report.output).render_chat([{"role": "user", "content": "Who?"}])
    assert rendered.endswith(" USER: Who? ASSISTANT:")


def test_what_a_step_says(whole: Whole) -> None:
    seen, report, tmp_path = whole.seen, whole.report, whole.folder
    log = lines(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in log] == list(range(7))
    held_out = {line["step"]: line["held_out_loss"] for line in log if line["held_out_loss"]}
    assert held_out.keys() == {0, 4, 6}
    assert held_out[0] == seen.held_out[0]
    assert held_out[6] == report.held_out_loss
    assert held_out[6] < held_out[4] < held_out[0]
    steps = seen.steps
    assert [line["loss"] for line in log[1:]] == list(report.losses)
    assert [step.epoch for step in steps] == sorted(step.epoch for step in steps)
    assert any(step.epoch == 1 for step in steps)
    for step in steps:
        assert 0 < step.data_wait_s < step.seconds
        assert 0 < step.peak_share < float("inf")
        assert step.memory_bytes > 50 * 2**20
        assert step.tokens_per_s == pytest.approx(step.num_tokens / step.seconds)
    assert (tmp_path / "run" / "loss.html").is_file()
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_samples_are_what_the_adapter_says_and_change_nothing(data: Path, tmp_path: Path) -> None:
    prompts = (PAIRS[0][0], "Who is it?")
    asked = hanok.ReportOptions(samples=prompts, sample_tokens=12, report_to=("tensorboard",))
    options = replace(
        OPTIONS, lora=replace(OPTIONS.lora, lora_dropout=0.1), max_steps=3, eval_steps=2
    )
    dropped = run(data, tmp_path / "dropped", options=options)
    seen = Seen()
    report = run(data, tmp_path / "run", seen, options=options, report_options=asked)
    assert report.losses == dropped.losses
    files = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("dropped", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    found = lines(tmp_path / "run" / "samples.jsonl")
    assert [(item["step"], item["prompt"]) for item in found] == [
        (step, prompt) for step in (0, 2, 3) for prompt in prompts
    ]
    assert [(item.step, item.prompt, item.text) for item in seen.samples] == [
        (item["step"], item["prompt"], item["text"]) for item in found
    ]
    model = hanok.load(hanok.BUNDLED, dtype="float32")
    question = [{"role": "user", "content": prompts[0]}]
    chosen: Any = {"max_new_tokens": 12, "temperature": 0.0}
    assert found[0]["text"] == model.generate(question, **chosen).text
    model.adapters.load("new", report.output)
    model.use_adapter("new")
    assert found[-2]["text"] == model.generate(question, **chosen).text != found[0]["text"]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_samples_of_plain_texts_are_continuations(tmp_path: Path) -> None:
    file = tmp_path / "tale.txt"
    file.write_text("Lily saw a small green frog. " * 20)
    seen = Seen()
    asked = hanok.ReportOptions(samples=("Once upon a",), sample_tokens=4)
    options = replace(OPTIONS, held_out=0.0, eval_steps=0, max_steps=1)
    run(file, tmp_path / "run", seen, options=options, report_options=asked)
    expected = hanok.load(hanok.BUNDLED, dtype="float32").generate(
        "Once upon a", max_new_tokens=4, temperature=0.0
    )
    assert [item.step for item in seen.samples] == [0, 1]
    assert seen.samples[0].text == expected.text


def test_a_training_that_lost_steps_says_each_step_once(
    whole: Whole, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = list(whole.report.losses)
    stepped: Any = Trainer._step

    def dies(self: Trainer, documents: Any, packs: Any, number: int, num_steps: int) -> StepReport:
        if number == 3:
            raise GenerationError("killed")
        found: StepReport = stepped(self, documents, packs, number, num_steps)
        return found

    asked = hanok.ReportOptions(samples=("Who?",), sample_tokens=2)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", dies)
        with pytest.raises(GenerationError):
            run(data, tmp_path / "run", report_options=asked)
    log = tmp_path / "run" / "log.jsonl"
    assert [line["step"] for line in lines(log)] == [0, 1, 2, 3]
    assert "3 steps" in (tmp_path / "run" / "loss.html").read_text()
    seen = Seen()
    run(data, tmp_path / "run", seen, report_options=asked)
    assert [step.step for step in seen.steps] == [3, 4, 5, 6]
    assert [line["step"] for line in lines(log)] == list(range(7))
    assert [line["loss"] for line in lines(log)[1:]] == losses
    assert [line["step"] for line in lines(tmp_path / "run" / "samples.jsonl")] == [0, 4, 6]
    again = run(data, tmp_path / "run")  # nothing is left to do
    assert again.losses == ()
    assert again.held_out_loss == whole.report.held_out_loss
    card = (again.output / "README.md").read_text()
    assert f"{losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last of 6" in card


def test_told_to_stop_it_says_so_and_goes_on_with_the_same_data_only(
    data: Path, tmp_path: Path
) -> None:
    report = run(data, tmp_path / "run", Seen(stop=3))
    assert not report.is_finished
    assert report.held_out_loss is None
    assert (tmp_path / "run" / "loss.html").is_file()
    assert not report.output.exists()
    kept = tmp_path / "run/checkpoints/step-00000003/state.json"
    asked = json.loads(kept.read_text())["asked"]
    assert asked["options"]["lora.r"] == {"value": 4, "origin": "argument"}
    assert asked["options"]["schedule"] == {"value": "cosine", "origin": "default"}
    assert asked == json.loads((tmp_path / "run" / "options.json").read_text())
    other = write_rows(tmp_path / "other.jsonl", PAIRS[:8])
    with pytest.raises(
        OptionError, match=r"made with rows\.jsonl \(\w{8}\), and the data is now other"
    ):
        run(other, tmp_path / "run")
    with pytest.raises(OptionError, match="made with dtype 'float32', and 'bfloat16' is asked for"):
        run(data, tmp_path / "run", load_options=hanok.LoadOptions(dtype="bfloat16"))
    with pytest.raises(OptionError, match="made with packing True, and False is asked for"):
        run(data, tmp_path / "run", data_options=hanok.DataOptions(packing=False))
    assert run(data, tmp_path / "run").is_finished


def test_a_loaded_model_has_what_it_learnt(data: Path, tmp_path: Path) -> None:
    model = hanok.load(hanok.BUNDLED, dtype="float32", weights="copied")
    ids = model.encode("Lily saw")
    before = model.logits(ids)
    hanok.train(model, [data], tmp_path / "run", options=OPTIONS)
    assert (model.logits(ids) - before).abs().max() > 0
    with pytest.raises(OptionError, match="load_options given with a model that is loaded"):
        hanok.train(model, data, tmp_path / "other", load_options=FLOAT32)


def test_all_weights_become_a_model_that_serves(data: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, lora=None, learning_rate=1e-3)
    report = run(data, tmp_path / "run", options=options)
    assert report.held_out_loss is not None
    card = (report.output / "README.md").read_text()
    assert "base_model_relation: finetune" in card
    assert "trainable params: 4,459,264 || all params: 4,459,264" in card
    model = hanok.load(report.output, dtype="float32")
    question = [{"role": "user", "content": PAIRS[2][0]}]
    reply = model.generate(question, max_new_tokens=12, temperature=0.0)
    assert reply.text.strip() == PAIRS[2][1]


def test_options_that_cannot_be() -> None:
    with pytest.raises(
        OptionError, match=r"report_to: 'tensorbord' is unknown\. Known: tensorboard"
    ):
        hanok.ReportOptions(report_to=("tensorbord",))
    with pytest.raises(OptionError, match="sample_tokens is 0"):
        hanok.ReportOptions(sample_tokens=0)
