"""The command line: what is printed where, exit codes, and that listing verbs costs nothing."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tests.engine.test_embed import WORDS, save_base

import hanok
from hanok.cli.fields import field_texts
from hanok.cli.main import cli, main
from hanok.cli.units import finite
from hanok.engine.model import Model
from hanok.engine.params import SamplingParams
from hanok.engine.sequence import TokenEvent
from hanok.errors import OptionError, RequestError


def run(*args: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(args), input=text)


def test_help_lists_every_verb_without_importing_torch() -> None:
    code = (
        "import sys; from hanok.cli.main import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'rich', 'jinja2') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in ("generate", "chat", "info", "convert"):
        assert f"\n  {verb} " in shown.stdout
    assert shown.stdout.strip().endswith("[]")


def test_every_sampling_parameter_is_an_option_with_its_text() -> None:
    shown = " ".join(run("generate", "--help").stdout.split())
    texts = field_texts(SamplingParams)
    for item in fields(SamplingParams):
        name = item.name.replace("token_ids", "token_id").replace("_", "-")  # one at a time
        assert f"--{name}" in shown
        assert texts[item.name] in shown
    assert "[default: the checkpoint's, else 256]" in shown
    assert "[default: 0.0]" in shown


def test_an_unknown_verb_names_the_nearest() -> None:
    result = run("generat")
    assert result.exit_code == 2
    assert "Verbs: generate" in result.stderr


def test_generate_prints_the_text_and_the_speed_apart() -> None:
    prompt = "Once upon a time"
    result = run("generate", prompt, "--max-new-tokens", "12")
    expected = hanok.load(hanok.BUNDLED).generate(prompt, max_new_tokens=12)
    assert result.stdout == expected.text + "\n"
    assert "the small one that ships with hanok" in result.stderr
    assert "tokens/s" in result.stderr
    assert "12 tokens, ended by length" in result.stderr


def test_generate_reads_the_prompt_from_anywhere(tmp_path: Path) -> None:
    path, options = str(hanok.BUNDLED), ("--max-new-tokens", "5")
    given = run("generate", path, "The dog", *options).stdout
    file = tmp_path / "prompt.txt"
    file.write_text("The dog")
    assert run("generate", path, *options, text="The dog").stdout == given
    assert run("generate", path, "--file", str(file), *options).stdout == given
    assert run("generate", path, "--file", "-", *options, text="The dog").stdout == given
    assert run("generate", path, "The dog", "--echo", *options).stdout == "The dog" + given
    assert run("generate", path, "The dog", "--no-cache", *options).stdout == given


def test_generate_json_is_one_object() -> None:
    result = run("generate", "The dog", "--json", "--max-new-tokens", "4", "--top-logprobs", "2")
    found = json.loads(result.stdout)
    expected = hanok.load(hanok.BUNDLED).generate("The dog", max_new_tokens=4)
    assert found["token_ids"] == expected.token_ids
    assert found["text"] == expected.text
    assert found["finish_reason"] == "length"
    assert found["num_prompt_tokens"] == len(expected.prompt_ids)
    assert [len(row) for row in found["top_logprobs"]] == [2] * 4


def test_guessed_tokens_change_no_text_and_are_counted() -> None:
    options = ("--max-new-tokens", "60", "--ignore-eos", "--quant", "int8")
    prompt = "The dog saw a cat. The cat saw a dog. The dog saw"
    plain = run("generate", prompt, *options)
    assert "guessed" not in plain.stderr
    for words in (["--speculate", "ngram", "--max-draft", "4"], ["--draft", str(hanok.BUNDLED)]):
        found = run("generate", prompt, *options, *words)
        assert found.stdout == plain.stdout
        counts = re.search(r"(\d+) of (\d+) guessed tokens right, (\d+) passes", found.stderr)
        assert counts is not None
        right, guessed, passes = map(int, counts.groups())
        assert right <= guessed
        assert passes + right in (60, 61)
        as_json = json.loads(run("generate", prompt, *options, *words, "--json").stdout)
        assert set(as_json["speculation"]) == {"proposed", "accepted", "passes"}
    talk = run("chat", "--speculate", "ngram", "--max-new-tokens", "9", text="Hello.\nAgain.\n")
    assert talk.stdout == run("chat", "--max-new-tokens", "9", text="Hello.\nAgain.\n").stdout
    assert talk.stderr.count("guessed tokens right") == 2


def test_sampling_options_reach_the_model() -> None:
    options = (
        "--temperature",
        "0.9",
        "--seed",
        "5",
        "--max-new-tokens",
        "9",
        "--logit-bias",
        "20=-9",
    )
    result = run("generate", "The dog", *options)
    expected = hanok.load(hanok.BUNDLED).generate(
        "The dog", temperature=0.9, seed=5, max_new_tokens=9, logit_bias={20: -9.0}
    )
    assert result.stdout == expected.text + "\n"


def test_a_wrong_bias_is_refused() -> None:
    result = run("generate", "The dog", "--logit-bias", "x=1")
    assert result.exit_code == 2
    assert "'x=1' is not ID=BIAS" in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["generate", "nowhere/model"], 2, "nowhere/model: no such file or folder"),
        (["generate", "nowhere", "hi"], 3, "nowhere: no such file or folder"),
        (["generate", "hi", "--attention", "sdpaa"], 2, "attention 'sdpaa' is unknown"),
        (["generate", "hi", "--attention", "sdpa_efficient"], 4, "needs a CUDA device"),
        (["generate", "hi", "--top-p", "0.5"], 2, "temperature above 0"),
        (["generate", "hi", "--device-map", "quantum"], 2, "'quantum', which is not there"),
        (["generate", "hi", "--device-map", "{model"], 2, "is not a JSON object"),
        (["generate", "hi", "--max-memory", "cpu=1MiB"], 6, "cpu lacks"),
        (["generate", "hi", "--max-memory", "cpu=70Gb"], 2, "may mean bits"),
        (["generate", ""], 2, "there is no prompt"),
        (["generate", "hi", "--quant", "int5"], 2, "quantization 'int5' is unknown"),
        (["generate", "hi", "--speculate", "draft"], 2, "give --draft PATH"),
        (["generate", "hi", "--max-draft", "3"], 2, "--max-draft given, but --speculate is off"),
        (
            ["chat", "--speculate", "ngram", "--draft", "x"],
            2,
            "--draft given, but --speculate is ngram",
        ),
        (["serve", "--port", "0", "--draft", "nowhere"], 3, "nowhere"),
        (
            ["generate", "hi", "--draft", str(hanok.BUNDLED), "--max-memory", "cpu=9MiB"],
            6,
            "the model that drafts, does not fit into memory",
        ),
        (
            ["generate", "hi", "--speculate", "ngram", "--no-cache"],
            2,
            "speculation needs the cache",
        ),
        (["quality", "--text", "nowhere"], 5, "nowhere cannot be read: No such file"),
        (["quality", "--quant", "int8,int8"], 2, "'int8' is there twice"),
        (["convert", "nowhere"], 3, "nowhere"),
        (["info", "nowhere"], 3, "nowhere"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(
    args: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if args == ["generate", ""]:
        args = ["generate"]
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == code
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("hanok: ") or "No model given" in shown
    assert "Traceback" not in shown


def test_what_the_system_refuses_is_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_full_disk(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "report.md")

    monkeypatch.setattr(cli, "main", on_a_full_disk)
    with pytest.raises(SystemExit) as exit_:
        main(["quality"])
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "hanok: report.md: No space left on device.\n"


def test_prompts_are_utf8_wherever_they_come_from(tmp_path: Path) -> None:
    """A mark before the text is no part of it; other encodings are one message and an exit code."""
    short = ("--max-new-tokens", "2", "--json", "--temperature", "0")
    file = tmp_path / "prompt.txt"
    plain = run("generate", *short, "Hello.")
    file.write_bytes("\ufeffHello.".encode())
    marked = run("generate", *short, "--file", str(file))
    piped = CliRunner().invoke(cli, ["generate", *short], input=file.read_bytes())
    dashed = CliRunner().invoke(cli, ["generate", *short, "--file", "-"], input=file.read_bytes())
    for result in (marked, piped, dashed):
        assert result.exit_code == 0, result.output
        assert (
            json.loads(result.stdout)["num_prompt_tokens"]
            == (json.loads(plain.stdout)["num_prompt_tokens"])
        )
    for data, message in (
        ("déjà".encode("latin-1"), "is not UTF-8 text, at byte 1 (0xE9)"),
        ("déjà".encode("utf-16"), "it begins like UTF-16"),
    ):
        file.write_bytes(data)
        grid = ("bench", "--grid", str(file))
        for args in (("generate", "--file", str(file)), ("bench", "--text", str(file)), grid):
            result = run(*args)
            assert isinstance(result.exception, RequestError)
            assert message in str(result.exception)
        result = CliRunner().invoke(cli, ["generate"], input=data)
        assert "standard input is not UTF-8" in str(result.exception)


def test_chat_goes_on_after_a_turn_in_another_encoding() -> None:
    options = ["chat", "--max-new-tokens", "4", "--temperature", "0"]
    plain = CliRunner().invoke(cli, options, input=b"Hello.\n")
    mixed = CliRunner().invoke(cli, options, input="déjà\n".encode("latin-1") + b"Hello.\r\n")
    assert mixed.exit_code == 0
    assert mixed.stdout == plain.stdout
    assert "hanok: the turn is not UTF-8 text, at byte 1 (0xE9)" in mixed.stderr


def test_chat_keeps_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    stream = Model.stream

    def spy(self: Model, prompt: Any, **options: Any) -> Iterator[TokenEvent]:
        seen.append([dict(message) for message in prompt])
        return stream(self, prompt, **options)

    monkeypatch.setattr(Model, "stream", spy)
    result = run(
        "chat", "--max-new-tokens", "6", text="Hello.\nAnd then?\n/undo\n/reset\nHi.\n/exit\n"
    )
    assert result.exit_code == 0
    assert seen[0] == [{"role": "user", "content": "Hello."}]
    assert [message["role"] for message in seen[1]] == ["user", "assistant", "user"]
    assert seen[1][2]["content"] == "And then?"
    assert seen[2] == [{"role": "user", "content": "Hi."}]
    model = hanok.load(hanok.BUNDLED)
    first = model.generate(seen[0], max_new_tokens=6).text
    second = model.generate(seen[1], max_new_tokens=6).text
    assert result.stdout.splitlines()[:2] == [first, second] or first in result.stdout
    assert second.strip() in result.stdout


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    stream = Model.stream

    def interrupted(self: Model, prompt: Any, **options: Any) -> Iterator[TokenEvent]:
        seen.append([dict(message) for message in prompt])
        events = stream(self, prompt, **options)
        yield next(events)
        yield next(events)
        if len(seen) == 1:
            raise KeyboardInterrupt
        yield from events

    monkeypatch.setattr(Model, "stream", interrupted)
    result = run("chat", "--max-new-tokens", "5", text="Hello.\nMore?\n")
    assert result.exit_code == 0
    assert "(stopped)" in result.stderr
    assert len(seen) == 2
    assert [message["role"] for message in seen[1]] == ["user", "assistant", "user"]


def test_a_turn_that_cannot_be_served_is_taken_back() -> None:
    too_long = "word " * 2000
    result = run("chat", "--max-new-tokens", "4", text=f"{too_long}\nHello.\n")
    assert result.exit_code == 0
    assert "context holds 1024" in result.stderr
    assert "4 tokens; first after" in result.stderr


def test_info_says_why_a_tokenizer_cannot_be_read(tmp_path: Path) -> None:
    folder = shutil.copytree(hanok.BUNDLED, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert (
        json.loads(run("info", str(folder), "--json").stdout)["checkpoint"]["tokenizer"] == "none"
    )
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}", encoding="utf-8")
    found = json.loads(run("info", str(folder), "--json").stdout)["checkpoint"]["tokenizer"]
    assert found.startswith("cannot be read: ")
    assert "no file says its tokenizer_class" in found


def test_info_says_what_multiplies_each_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    from hanok.kernels.native import native
    from hanok.quant.kernels import panels

    found = json.loads(run("info", "--json").stdout)["quantization"]
    assert set(found) == {"int8", "int4", "nf4", "fp8", "int8-outlier"}
    if native() is not None:
        assert "8.50 bits. panels: hanok" in found["int8"]
        assert "many tokens: torch" in found["fp8"]
        assert "plain: torch" in found["int8-outlier"]
        assert "not panels: they do not take outlying columns" in found["int8-outlier"]
        assert "not triton: needs a CUDA device (found: cpu)" in found["int8"]
    monkeypatch.setattr(panels, "native", lambda: None)
    monkeypatch.setattr(panels, "why_not", lambda: "not built")
    without = json.loads(run("info", "--json").stdout)["quantization"]
    assert "plain: torch, dequantized block by block" in without["int4"]
    assert "not panels: the kernels are not built" in without["int4"]


def test_info_says_when_the_kernels_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    from hanok.kernels import processor
    from hanok.kernels.native import native

    def kernels() -> str:
        shown: str = json.loads(run("info", "--json").stdout)["machine"]["hanok's kernels"]
        return shown

    for cap in (None, "avx2"):
        monkeypatch.setattr(processor, "instruction_set_cap", lambda cap=cap: cap)
        is_told = kernels().endswith(", capped by HANOK_ISA=avx2")
        assert is_told is (cap is not None and native() is not None)


def test_info_reads_headers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("info must not load weights")

    monkeypatch.setattr("hanok.memory.load.load_decoder", refuse)
    found = json.loads(run("info", str(hanok.BUNDLED), "--json").stdout)
    model = hanok.load(hanok.BUNDLED)
    assert found["checkpoint"]["family"] == model.config.model_type
    assert found["checkpoint"]["parameters"] == model.num_parameters()
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["threads"].startswith(f"{torch.get_num_threads()}, ")
    assert found["attention"]["sdpa"].startswith("fits")
    assert "needs a CUDA device" in found["attention"]["sdpa_efficient"]
    assert "parameters" in run("info", str(hanok.BUNDLED)).stdout


def test_info_of_a_config_alone_and_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((hanok.BUNDLED / "config.json").read_bytes())
    bundled, alone = (
        json.loads(run("info", str(folder), "--json").stdout)["checkpoint"]
        for folder in (hanok.BUNDLED, tmp_path)
    )
    same = ("family", "parameters", "context", "layers", "tied head")
    assert [alone[name] for name in same] == [bundled[name] for name in same]
    assert (alone["files"], alone["bytes by dtype"]) == ("none", "none")
    (tmp_path / "a.gguf").touch()
    refused = run("info", str(tmp_path)).exception
    assert "holds GGUF (a.gguf) weights" in str(refused)


def test_what_generates_refuses_a_base_model_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_base(tmp_path / "model")
    folder = str(tmp_path / "model")

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("nothing must be loaded")

    monkeypatch.setattr("hanok.engine.model.load_decoder", refuse)
    for words in (
        ["generate", folder, "a"],
        ["generate", "--draft", folder, "a"],
        ["chat", folder],
        ["bench", folder],
        ["tune", folder],
        ["quality", folder],
        ["serve", folder, "--speculate", "ngram"],
        ["serve", "--draft", folder],
        ["plan", "--draft", folder],
    ):
        error = run(*words, text="").exception
        assert isinstance(error, OptionError), words
        assert WORDS in str(error), words
        assert error.exit_code == 2
    found = json.loads(run("info", folder, "--json").stdout)["checkpoint"]
    assert found["tied head"].startswith("no head at all")
    assert "no head: config.json names the base model MistralModel" in found["notes"]


def test_convert_then_nothing_to_do(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = hanok.load(hanok.BUNDLED)
    model.save(source)
    weights = {
        "model." + name if name != "lm_head.weight" else name: tensor
        for name, tensor in {"embed_tokens.weight": torch.zeros(4, 2)}.items()
    }
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    result = run("convert", str(source), str(tmp_path / "out"))
    assert "Wrote 1 tensors, 32 bytes" in result.stdout
    assert "lm_head.weight shares its memory with model.embed_tokens.weight" in result.stdout
    again = run("convert", str(source), str(tmp_path / "out"))
    assert "Nothing to do" in again.stdout


@pytest.mark.parametrize(
    "text", ["int8", "int4", "nf4", "fp8", "int8-outlier", "int4:group_size=64"]
)
def test_generate_quantizes_while_it_loads(text: str) -> None:
    options = ("--max-new-tokens", "8", "--temperature", "0", "--json")
    result = run("generate", "Once upon a time", "--quant", text, *options)
    assert result.exit_code == 0, result.stderr
    plain = run("generate", "Once upon a time", *options)
    first, second = (json.loads(item.stdout)["token_ids"] for item in (result, plain))
    assert first[:2] == second[:2]  # a trained model is sure of how a story begins


def test_quality_is_a_table_a_file_and_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hanok.bench import quality

    monkeypatch.setattr(quality, "read_gb_per_s", lambda device: 10.0)
    monkeypatch.setattr(quality, "decode_per_s", lambda model: 100.0)
    text, markdown, plot = tmp_path / "text", tmp_path / "table.md", tmp_path / "plot.svg"
    text.write_text("Once upon a time there was a little girl who had a dog. " * 4)
    options = (
        "--text",
        str(text),
        "--quant",
        "int8,int4:group_size=64,head=none",
        "--quant",
        "nf4",
    )
    written = ("--markdown", str(markdown), "--plot", str(plot))
    result = run("quality", *options, *written, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    names = ["reference", "int8", "int4:group_size=64,head=none", "nf4"]
    assert [row["name"] for row in report["rows"]] == names
    assert all(name in markdown.read_text() for name in names)
    assert "<svg" in plot.read_text()
    table = run("quality", *options, "--window", "32")
    assert all(
        name in table.stdout for name in ("reference", "int8", "nf4", "perplexity", "tokens/s")
    )
    text.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text, at byte 0" in str(run("quality", "--text", str(text)).exception)


@pytest.mark.parametrize(
    ("option", "file", "message"),
    [
        ("--markdown", "nowhere/table.md", "there is no folder"),
        ("--plot", "nowhere/plot.png", "there is no folder"),
        ("--plot", "plot.xyz", "the file name must end in one of"),
    ],
)
def test_what_quality_cannot_write_is_said_before_it_measures(
    option: str, file: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hanok.bench import quality

    monkeypatch.setattr(quality, "measure_quality", lambda *a, **k: pytest.fail("measured"))
    assert message in str(run("quality", option, str(tmp_path / file)).exception)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    message = str(run("quality", "--plot", "plot.png").exception)
    assert "pip install 'hanok[plot]'" in message


@pytest.mark.parametrize(
    ("given", "variants"),
    [
        (("int8,int4,nf4",), ["int8", "int4", "nf4"]),
        (("int4:group_size=64,head=int8,nf4",), ["int4:group_size=64,head=int8", "nf4"]),
        (("int8, bfloat16", "int4:head=none"), ["int8", "bfloat16", "int4:head=none"]),
        (
            ("nf4,int4:symmetric=false,group_size=64",),
            ["nf4", "int4:symmetric=false,group_size=64"],
        ),
    ],
)
def test_a_comma_begins_the_next_variant_unless_an_option_follows(
    given: tuple[str, ...], variants: list[str]
) -> None:
    from hanok.cli.verbs.quality import split_variants

    assert split_variants(given) == variants


def test_json_has_no_word_for_what_is_no_number() -> None:
    report = {"rows": ({"name": "int4", "kl_mean": math.nan, "perplexity": math.inf},), "n": 0.5}
    assert finite(report) == {
        "rows": [{"name": "int4", "kl_mean": None, "perplexity": None}],
        "n": 0.5,
    }
