"""Every finding: a sound folder, broken in exactly one way, and what is said about it."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.check.conftest import CONFIG, edit, random_tensors, write

from hanok.check.finding import CheckReport
from hanok.check.folder import check_folder
from hanok.check.options import CheckOptions
from hanok.checkpoint.files import open_checkpoint
from hanok.checkpoint.writer import write_json
from hanok.errors import OptionError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
INDEX = "model.safetensors.index.json"
Break = Callable[[Path], object]


def check(folder: Path, **options: Any) -> CheckReport:
    return check_folder(folder, CheckOptions(threads=2, **options))


def test_nothing_is_found_in_a_sound_folder(sound: Path) -> None:
    before = {file: file.read_bytes() for file in sound.iterdir()}
    report = check(sound)
    assert (report.findings, report.skipped) == ((), ())
    assert report.facts["vocabulary"] == "2,048 tokens, 2,064 rows (16 spare)"
    assert report.facts["ends at"] == "1 '</s>'"
    assert report.facts["chat template"] == "default; roles user, assistant"
    assert report.facts["model"].startswith("llama, 147,616 parameters, head")
    assert before == {file: file.read_bytes() for file in sound.iterdir()}


def rewritten(change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Break:
    """Write the model anew with other tensors."""

    def broken(folder: Path) -> None:
        tensors = random_tensors(CONFIG)
        change(tensors)
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        write(folder, tensors)
        if config:
            edit(folder / "config.json", **config)

    return broken


def changed(file: str, **values: Any) -> Break:
    return lambda folder: edit(folder / file, **values)


def index_changed(change: Callable[[dict[str, Any]], object]) -> Break:
    def broken(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content)
        write_json(folder / INDEX, content)

    return broken


def shard(folder: Path, number: int = 2) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number - 1]


def value_at(name: str, row: int, column: int, value: float) -> Break:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][row, column] = value

    return rewritten(change)


def set_rows(name: str, rows: list[int], value: Any) -> Break:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][rows] = tensors[name][value] if isinstance(value, list) else value

    return rewritten(change)


def cut_off(folder: Path) -> None:
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[:-10])


def twice(folder: Path) -> None:
    shutil.copy(shard(folder, 1), folder / "model-extra.safetensors")
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["ghost"] = "model-extra.safetensors"
    write_json(folder / INDEX, content)


def as_pickle(folder: Path) -> None:
    tensors = {name: ref for name, ref in open_checkpoint(folder).tensors.items()}
    assert tensors
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(random_tensors(CONFIG), folder / "pytorch_model.bin")


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def as_bomb(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Bomb()}, protocol=2))


def linked_out(folder: Path) -> None:
    outside = folder.parent / "outside.json"
    (folder / "tokenizer_config.json").rename(outside)
    (folder / "tokenizer_config.json").symlink_to(outside)


def fewer_rows(tensors: dict[str, torch.Tensor]) -> None:
    for name in (EMBED, HEAD):
        tensors[name] = tensors[name][:2040].clone()


def template(text: str) -> Break:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def moved(content: dict[str, Any]) -> None:
    names = sorted(set(content["weight_map"].values()))
    content["weight_map"][EMBED] = next(n for n in names if n != content["weight_map"][EMBED])


def no_tokens(folder: Path) -> None:
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["type"] = "Nothing"
    write_json(folder / "tokenizer.json", tokens)


BREAKS: dict[str, tuple[Break, str, str, str]] = {
    "a NaN": (
        value_at(GATE, 3, 5, float("nan")),
        "error",
        "not-finite",
        r"1 number not finite .* \[3, 5\]",
    ),
    "an infinity": (
        value_at(EMBED, 2000, 0, float("-inf")),
        "error",
        "not-finite",
        r"embed_tokens.*\[2000, 0\]",
    ),
    "dead rows": (
        set_rows(GATE, [4, 9], 0.0),
        "warning",
        "dead-rows",
        r"rows of zeros.*: 2 of 48 \(4, 9\)",
    ),
    "constant rows": (
        set_rows(GATE, [7], 0.5),
        "warning",
        "constant-rows",
        r"one number.*: 1 of 48 \(7\)",
    ),
    "a dead token": (
        set_rows(EMBED, [500], 0.0),
        "warning",
        "dead-rows",
        "1 token with rows of zeros: 500 '",
    ),
    "a dead special token": (
        set_rows(EMBED, [2], 0.0),
        "note",
        "untrained",
        r"1 special token with rows of zeros: 2 '<\|user\|>'",
    ),
    "tokens alike": (
        set_rows(EMBED, [700, 701], [699]),
        "warning",
        "twin-rows",
        r"2 tokens with the same row as another: .* \(700\) as .* \(699\)",
    ),
    "special tokens alike": (set_rows(HEAD, [3], [2]), "note", "twin-rows", r"\(3\) as"),
    "a missing tensor": (
        rewritten(lambda tensors: tensors.pop(GATE)),
        "error",
        "tensors",
        "1 missing: model.layers.1.mlp.gate_proj.weight",
    ),
    "a tensor left over": (
        rewritten(lambda tensors: tensors.update(extra=torch.ones(9))),
        "error",
        "tensors",
        "1 left over: extra",
    ),
    "another shape": (
        changed("config.json", intermediate_size=64),
        "error",
        "tensors",
        r"of the wrong shape: .* is \[48, 32\] and should be \[64, 32\]",
    ),
    "no head, nothing said": (
        rewritten(lambda tensors: tensors.pop(HEAD), tie_word_embeddings=None),
        "error",
        "no-tie",
        "does not say tie_word_embeddings",
    ),
    "no head, untied": (
        rewritten(lambda tensors: tensors.pop(HEAD)),
        "error",
        "tensors",
        "1 missing: lm_head.weight",
    ),
    "a tied head that differs": (
        changed("config.json", tie_word_embeddings=True),
        "error",
        "tied-head",
        "differs from the embedding",
    ),
    "a tied head stored twice": (
        rewritten(
            lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}), tie_word_embeddings=True
        ),
        "note",
        "tied-copy",
        "is stored though it is the embedding",
    ),
    "another dtype": (
        changed("config.json", dtype="float16"),
        "warning",
        "dtype",
        "says float16, and the weights are bfloat16",
    ),
    "several dtypes": (
        rewritten(lambda tensors: tensors.update({GATE: tensors[GATE].float()})),
        "note",
        "mixed-dtypes",
        "bfloat16 .* float32 6,144 bytes|float32 6,144 bytes, bfloat16",
    ),
    "an unread key": (changed("config.json", mystery=3), "error", "config", "mystery"),
    "an unknown family": (
        changed("config.json", model_type="unheard"),
        "note",
        "unknown-family",
        "'unheard', which hanok does not read",
    ),
    "quantized": (
        changed("config.json", quantization_config={"quant_method": "gptq"}),
        "note",
        "quantized",
        r"quantized \('gptq'\)",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "error", "no-config", "is absent"),
    "a config that is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        "error",
        "json",
        "config.json.*not JSON",
    ),
    "a key twice": (
        lambda f: (f / "generation_config.json").write_text(
            '{"eos_token_id": 1, "eos_token_id": 1}'
        ),
        "warning",
        "json-twice",
        "gives the name 'eos_token_id' twice",
    ),
    "no weights": (
        lambda f: [file.unlink() for file in f.glob("*.safetensors*")],
        "error",
        "no-weights",
        "holds no weights",
    ),
    "another program's weights alone": (
        lambda f: (
            [file.unlink() for file in f.glob("*.safetensors*")],
            (f / "model.gguf").write_bytes(b"GGUF"),
        ),
        "warning",
        "no-weights",
        r"holds no weights that hanok reads, but GGUF \(model.gguf\)",
    ),
    "no index": (
        lambda f: (f / INDEX).unlink(),
        "error",
        "no-index",
        "is missing next to 3 shards",
    ),
    "an index that is no JSON": (
        lambda f: (f / INDEX).write_text("{"),
        "error",
        "index",
        "is not JSON",
    ),
    "an index that leads out": (
        index_changed(lambda c: c["weight_map"].update({EMBED: "../other.safetensors"})),
        "error",
        "index",
        "into '../other.safetensors', which is no file of the folder",
    ),
    "a shard missing": (
        lambda f: shard(f).unlink(),
        "error",
        "shard-missing",
        "lacks 1 file of those it names: model-00002-of-00003.safetensors",
    ),
    "a shard cut off": (cut_off, "error", "damaged", "cut off, get the file again"),
    "a tensor in another shard": (
        index_changed(moved),
        "error",
        "index-shard",
        r"gives 1 tensor to another file than has it: model.embed_tokens.weight \(in ",
    ),
    "a tensor in two shards": (twice, "error", "tensor-twice", "has .* tensors? that .* has too"),
    "a name without a tensor": (
        index_changed(lambda c: c["weight_map"].update(ghost=c["weight_map"][EMBED])),
        "warning",
        "index-absent",
        "lists 1 tensor that no file has: ghost",
    ),
    "a tensor without a name": (
        index_changed(lambda c: c["weight_map"].pop(GATE)),
        "warning",
        "index-unlisted",
        "does not list 1 tensor of its files: model.layers.1.mlp.gate",
    ),
    "a wrong total": (
        index_changed(lambda c: c["metadata"].update(total_size=7)),
        "warning",
        "total-size",
        "says total_size 7, and the tensors have 295232 bytes",
    ),
    "no total": (
        index_changed(lambda c: c.pop("metadata")),
        "warning",
        "total-size",
        "says total_size None",
    ),
    "a stray shard": (
        lambda f: shutil.copy(shard(f, 1), f / "model-00001-of-00002.safetensors"),
        "warning",
        "unused-weights",
        "that no index names and no reader loads",
    ),
    "a whole file next to the index": (
        lambda f: whole_file(f),
        "warning",
        "unused-index",
        "is next to model.safetensors, which readers take instead",
    ),
    "another layout": (
        lambda f: shutil.copy(shard(f, 1), f / "consolidated.safetensors"),
        "note",
        "other-format",
        "a second copy of the weights",
    ),
    "a GGUF": (
        lambda f: (f / "model.gguf").write_bytes(b"GGUF"),
        "note",
        "other-format",
        "in the format of GGUF",
    ),
    "pickled weights": (as_pickle, "warning", "pickle", "the weights are a pickle"),
    "pickled code": (as_bomb, "error", "pickled-code", "Nothing was executed"),
    "training state": (
        lambda f: (f / "optimizer.pt").write_bytes(pickle.dumps({"a": Bomb()})),
        "warning",
        "pickle",
        "training state, a pickle",
    ),
    "a pickle next to the weights": (
        lambda f: torch.save({"a": torch.ones(2)}, f / "pytorch_model.bin"),
        "warning",
        "pickle",
        "next to the weights, which is not read",
    ),
    "code": (
        lambda f: (f / "modeling_x.py").write_text("print()"),
        "note",
        "code",
        "trust_remote_code",
    ),
    "a pointer": (
        lambda f: (f / "tokenizer.json").write_bytes(
            b"version https://git-lfs.github.com/spec/v1\n"
        ),
        "error",
        "lfs-pointer",
        "Git LFS pointer",
    ),
    "pointers in place of weights": (
        lambda f: shard(f).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "error",
        "lfs-pointer",
        "model-00002.*Git LFS pointer",
    ),
    "a leftover": (
        lambda f: (f / ".config.json.0123abcd.partial").write_text("x"),
        "warning",
        "leftover",
        "left by a write that was cut off, 1 bytes",
    ),
    "a link that leads out": (linked_out, "warning", "outside-link", "outside the folder"),
    "a broken link": (
        lambda f: (f / "notes.txt").symlink_to(f / "nowhere"),
        "error",
        "broken-link",
        "which is not there",
    ),
    "no tokenizer that opens": (no_tokens, "error", "tokenizer", "cannot be read by tokenizers"),
    "more tokens than rows": (
        rewritten(fewer_rows, vocab_size=2040),
        "error",
        "tokens-beyond-rows",
        "has 2,040 rows, and the tokenizer has ids up to 2,047: 2040 '",
    ),
    "an id beyond the rows": (
        changed("generation_config.json", eos_token_id=[1, 2064]),
        "error",
        "id-beyond-rows",
        "eos_token_id is 2064; tokens are 0 to 2,063",
    ),
    "an id that is no number": (
        changed("config.json", bos_token_id="<s>"),
        "error",
        "id-beyond-rows",
        "bos_token_id is '<s>'",
    ),
    "a padding token of -1": (
        changed("config.json", pad_token_id=-1),
        "warning",
        "id-beyond-rows",
        "pad_token_id is -1, which some readers take for no token",
    ),
    "another first token": (
        changed("generation_config.json", bos_token_id=2),
        "warning",
        "bos-token",
        r"bos_token_id is 2 '<\|user\|>', and the tokenizer's bos_token is 0 '<s>'",
    ),
    "another padding token": (
        lambda f: (
            edit(f / "tokenizer_config.json", pad_token="<s>"),
            edit(f / "config.json", pad_token_id=5),
        ),
        "note",
        "pad-token",
        "pad_token_id is 5 .*pad_token is 0 '<s>'",
    ),
    "no padding token": (
        changed("tokenizer_config.json", pad_token="<s>"),
        "note",
        "no-pad",
        "the tokenizer pads with 0 '<s>'",
    ),
    "another end": (
        changed("generation_config.json", eos_token_id=3),
        "warning",
        "end-token",
        r"ends generation at 3 '<\|assistant\|>', and not at the tokenizer's eos_token 1 '</s>'",
    ),
    "no end in the configs": (
        lambda f: (
            edit(f / "generation_config.json", eos_token_id=None),
            edit(f / "config.json", eos_token_id=None),
        ),
        "warning",
        "no-end",
        "neither it nor config.json has eos_token_id, and the tokenizer ends a text with 1",
    ),
    "no end at all": (
        lambda f: (
            edit(f / "generation_config.json", eos_token_id=None),
            edit(f / "config.json", eos_token_id=None),
            edit(f / "tokenizer_config.json", eos_token=None),
            template(
                "{{ messages[0].content }}{% for m in messages[1:] %}{{ m.content }}{% endfor %}"
            )(f),
        ),
        "warning",
        "no-end",
        "no file names a token that ends a text",
    ),
    "two names for a token": (
        lambda f: write_json(f / "special_tokens_map.json", {"eos_token": {"content": "<|user|>"}}),
        "warning",
        "special-tokens",
        "eos_token is '<|user|>', and '</s>' in tokenizer_config.json".replace("|", r"\|"),
    ),
    "two templates": (
        changed("tokenizer_config.json", chat_template="{{ messages }}"),
        "warning",
        "two-templates",
        "differs from the chat_template",
    ),
    "a template that is not valid": (
        template("{% if %}"),
        "error",
        "template",
        "not a valid template",
    ),
    "a template that refuses": (
        template("{{ raise_exception('never') }}"),
        "error",
        "template",
        "does not render a conversation with user messages: .*never",
    ),
    "a template for one question": (
        template(
            "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}"
            "{{ messages[0].content }}"
        ),
        "error",
        "template",
        "with assistant messages: .*one",
    ),
    "a template that forgets": (
        template("{{ messages[0].content }}"),
        "error",
        "template",
        "leaves out what the assistant says",
    ),
    "an end of turn that ends nothing": (
        template("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"),
        "warning",
        "end-of-turn",
        r"ends an answer with 2 '<\|user\|>': answers in a chat do not end there",
    ),
    "an end of turn of two tokens": (
        template("{% for m in messages %}{{ m.content }}<|user|> <|assistant|>{% endfor %}"),
        "warning",
        "end-of-turn",
        r"ends an answer with 2 '<\|user\|>', 3 '<\|assistant\|>'",
    ),
    "temperature without sampling": (
        changed("generation_config.json", temperature=0.7, top_p=0.9),
        "warning",
        "generation-config",
        "do_sample is not set, so temperature = 0.7, top_p = 0.9 have no effect",
    ),
    "sampling at temperature 0": (
        changed("generation_config.json", do_sample=True, temperature=0.0),
        "error",
        "generation-config",
        "do_sample is true with temperature 0",
    ),
}


def whole_file(folder: Path) -> None:
    other = folder.parent / "other"
    write(other, random_tensors(CONFIG), 10**9)
    shutil.copy(other / "model.safetensors", folder)


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_found(name: str, sound: Path) -> None:
    broken, level, kind, message = BREAKS[name]
    broken(sound)
    report = check(sound)
    matching = [
        item
        for item in report.findings
        if (item.level, item.kind) == (level, kind)
        and re.search(message, f"{item.where}: {item.what}")
    ]
    assert len(matching) == 1, report.findings
    assert matching[0].advice
    allowed = CONSEQUENCES.get(name, set()) | {kind}
    others = {item.kind for item in report.findings} - allowed
    assert others == set(), report.findings


CONSEQUENCES: dict[str, set[str]] = {
    "a whole file next to the index": {"unused-weights"},
    "a tensor in two shards": {"index-absent"},
    "pickled code": {"pickle"},
    "another program's weights alone": {"other-format"},
}


def test_findings_come_worst_first_and_a_page_of_docs_lists_every_kind(sound: Path) -> None:
    for name in ("code", "a wrong total", "a NaN"):
        if name != "a NaN":
            BREAKS[name][0](sound)
    edit(sound / "config.json", bos_token_id="x")
    levels = [item.level for item in check(sound).findings]
    assert levels == ["error", "warning", "note"]
    page = (Path(__file__).parents[2] / "docs" / "check.md").read_text()
    listed = set(re.findall(r"`([a-z-]+)`", page))
    assert {kind for _, _, kind, _ in BREAKS.values()} <= listed


def test_every_kind_of_the_source_is_broken_here() -> None:
    source = Path(check_folder.__code__.co_filename).parent
    text = "".join(file.read_text() for file in sorted(source.glob("*.py")))
    kinds = set(re.findall(r'kind="([a-z-]+)"', text)) | {"bos-token", "pad-token", "pickled-code"}
    kinds |= {"dead-rows", "constant-rows", "index-absent", "index-unlisted", "config"}
    tested = {kind for _, _, kind, _ in BREAKS.values()}
    assert kinds - tested == ELSEWHERE


ELSEWHERE = {
    *("adapter", "unknown-adapter", "idle-adapter"),
    *("decided", "large-file", "no-format", "no-model"),
}
"""Tested below, with folders of another kind."""


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    assert [item.kind for item in check(tmp_path).findings] == ["no-model"]


def test_another_prefix_and_no_format_are_noted(sound: Path) -> None:
    for file in sound.glob("*.safetensors*"):
        file.unlink()
    renamed = {f"module.{name}": tensor for name, tensor in random_tensors(CONFIG).items()}
    save_file(renamed, sound / "model.safetensors")
    found = check(sound).findings
    assert sorted((item.level, item.kind) for item in found) == [
        ("note", "decided"),
        ("note", "no-format"),
    ]


def mkdir(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_file_larger_than_the_hub_advises_is_noted(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanok.check.files.LARGEST_BYTES", 100_000)
    found = [item for item in check(sound).findings if item.kind == "large-file"]
    assert {item.where for item in found} >= {shard(sound, 1).name}


def test_quantized_weights_are_read_and_only_what_applies_is_checked(sound: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors[GATE] = torch.zeros(48, 16, dtype=torch.uint8)
    tensors[GATE.replace("weight", "weight_scale")] = torch.full((48, 1), float("nan"))
    for file in sound.glob("*.safetensors*"):
        file.unlink()
    write(sound, tensors)
    edit(sound / "config.json", quantization_config={"quant_method": "compressed-tensors"})
    report = check(sound)
    assert [(item.level, item.kind) for item in report.findings] == [
        ("error", "not-finite"),
        ("note", "quantized"),
    ]
    assert report.skipped[0].reason == "the weights are quantized"


def test_an_answer_that_ends_with_several_tokens_ends_at_any_of_them(sound: Path) -> None:
    template("{% for m in messages %}{{ m.content }}<|user|> </s>{% endfor %}")(sound)
    assert check(sound).findings == ()


def test_only_the_file_that_readers_take_must_name_the_first_token(sound: Path) -> None:
    edit(sound / "config.json", bos_token_id=2)
    assert check(sound).findings == ()
    edit(sound / "generation_config.json", bos_token_id=None)
    assert [(item.kind, item.where) for item in check(sound).findings] == [
        ("bos-token", "config.json")
    ]


def test_roles_are_those_that_are_written_out(sound: Path) -> None:
    template("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}")(sound)
    assert check(sound).facts["chat template"] == "default; roles user, system, assistant"
    template("{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}")(sound)
    assert check(sound).facts["chat template"] == "default; roles user, assistant"


def test_without_values_no_weight_is_read(sound: Path) -> None:
    BREAKS["a NaN"][0](sound)
    report = check(sound, values=False)
    assert report.findings == ()
    assert report.skipped[-1].check == "values of weights"


def test_a_snapshot_of_the_hubs_cache_is_sound(sound: Path, tmp_path: Path) -> None:
    blobs = mkdir(mkdir(tmp_path / "models--org--name") / "blobs")
    snapshot = mkdir(mkdir(blobs.parent / "snapshots") / "abc")
    for number, file in enumerate(sorted(sound.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert check(snapshot).findings == ()


def test_progress_counts_the_bytes_of_the_weights(sound: Path) -> None:
    totals: list[int] = []
    done: list[int] = []
    check_folder(sound, CheckOptions(threads=2), progress=done.append, on_start=totals.append)
    assert totals == [sum(done)] == [295232]


def test_what_is_no_folder_is_an_option_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not a folder"):
        check_folder(tmp_path / "nowhere")
