"""Adding tokens to a folder: what transformers makes of it, what stays as it was, what is refused."""

import fcntl
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import hanok
from hanok.checkpoint.card import steps_of
from hanok.checkpoint.files import open_checkpoint
from hanok.checkpoint.rows import read_row, row_bytes
from hanok.checkpoint.tokenizer import open_tokenizer
from hanok.cli.main import cli
from hanok.engine.equal import compare_logits
from hanok.errors import CheckpointError, OptionError, UnsupportedError
from hanok.memory.token_options import TokenOptions
from hanok.memory.tokens import (
    TokensPlan,
    apply,
    diff,
    list_tokens,
    plan_removal,
    plan_resize,
    plan_tokens,
)

SENTENCES = (
    "A courtyard opens to the south, and the well is near the kitchen door.",
    "마당은 남쪽으로 열려 있고 우물은 부엌 옆에 있다.",
    "for beam in beams:\n    lift(beam)  # two spaces",
)
TEXTS = ("the well", "  two  spaces ", "우물 옆\n\n마당 🙂", "Hello world", "")
SPECIAL = "<|im_sep|>"
ORDINARY = ("<think>", "</think>", "<answer>", "</answer>")
VOCABULARY = 330
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def byte_level(folder: Path) -> None:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    library.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def sentencepiece_model(folder: Path, **options: Any) -> None:
    (folder / "text.txt").write_text("\n".join(SENTENCES * 4), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    (folder / "text.txt").unlink()
    (folder / "tokenizer.vocab").unlink()


def save(folder: Path, model: Any, num_shards: int = 1) -> Path:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
    size = sum(item.nbytes for item in model.state_dict().values())
    model.to(torch.bfloat16).save_pretrained(
        folder, max_shard_size=size if num_shards == 1 else size // num_shards
    )
    return folder


def untied(folder: Path) -> Path:
    byte_level(folder)
    return save(folder, LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=VOCABULARY)), 4)


def tied(folder: Path) -> Path:
    byte_level(folder)
    config = LlamaConfig(**SIZES, vocab_size=VOCABULARY, tie_word_embeddings=True)
    return save(folder, LlamaForCausalLM(config))


def padded(folder: Path) -> Path:
    byte_level(folder)
    return save(folder, Qwen2ForCausalLM(Qwen2Config(**SIZES, vocab_size=384)), 2)


def with_sentencepiece(folder: Path) -> Path:
    sentencepiece_model(folder, model_type="bpe")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return save(folder, LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=VOCABULARY)))


def gemma(folder: Path) -> Path:
    sentencepiece_model(folder, model_type="bpe", add_dummy_prefix=False)
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return save(folder, Gemma2ForCausalLM(Gemma2Config(**SIZES, vocab_size=VOCABULARY)))


FOLDERS = {"tied": tied, "untied": untied, "padded": padded}
FOLDERS |= {"SentencePiece": with_sentencepiece, "Gemma": gemma}


@pytest.fixture(scope="module", params=FOLDERS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "model"
    folder.mkdir()
    return FOLDERS[request.param](folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small untied checkpoint in four files, to be broken."""
    path = tmp_path / "model"
    path.mkdir()
    return untied(path)


def add(path: Path, output: Path | None = None) -> None:
    apply(plan_tokens(path, [SPECIAL], TokenOptions(special=True)), output)
    apply(plan_tokens(output or path, ORDINARY, TokenOptions()))


def logits(path: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return found


def test_transformers_reads_the_same_model_with_five_more_tokens(
    original: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new"
    add(original, path)
    before, ours = open_tokenizer(original), open_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(path)
    ids = [ours.token_to_id(text) for text in (SPECIAL, *ORDINARY)]
    assert ids == list(range(before.vocab_size, before.vocab_size + 5))
    assert [theirs.convert_tokens_to_ids(text) for text in (SPECIAL, *ORDINARY)] == ids
    for text in TEXTS:
        assert ours.encode(text) == before.encode(text) == theirs.encode(text)
    marked = f"the{SPECIAL}well<think> two</think>\n<answer>마당</answer>"
    encoded = ours.encode(marked)
    assert encoded == theirs.encode(marked)
    assert set(ids) <= set(encoded)
    for skip in (True, False):
        assert ours.decode(encoded, skip_special_tokens=skip) == theirs.decode(
            encoded, skip_special_tokens=skip
        )
    assert "<think>" in ours.decode(encoded)
    assert SPECIAL not in ours.decode(encoded)
    old_rows = before.vocab_size
    prompt = before.encode("the well is near")
    assert torch.equal(logits(original, prompt)[:, :old_rows], logits(path, prompt)[:, :old_rows])
    with_new = logits(path, [*prompt, ids[1]])
    assert with_new.isfinite().all()
    compare_logits(original, path, old_rows)
    loaded = hanok.load(path)
    assert loaded.config.vocab_size == with_new.shape[1] >= ours.vocab_size
    assert len({tuple(loaded.decoder.embed_tokens.weight[i].tolist()) for i in ids}) == 5


def test_python_gives_what_the_command_gives(original: Path, tmp_path: Path) -> None:
    model = hanok.load(original)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert tokenizer.add_tokens(SPECIAL, special_tokens=True) == 1
    assert tokenizer.add_tokens(list(ORDINARY)) == 4
    assert tokenizer.add_tokens(list(ORDINARY)) == 0
    model.resize_token_embeddings(len(tokenizer))
    model.save(tmp_path / "by hand")
    runner = CliRunner()
    command = ["tokens", "add", str(original), SPECIAL, "--special"]
    assert runner.invoke(cli, [*command, "--output", str(tmp_path / "by command")]).exit_code == 0
    assert (
        runner.invoke(cli, ["tokens", "add", str(tmp_path / "by command"), *ORDINARY]).exit_code
        == 0
    )
    one, other = (open_checkpoint(tmp_path / name) for name in ("by hand", "by command"))
    assert one.tensors.keys() == other.tensors.keys()
    weights = [
        {name: value for file in item.files for name, value in load_file(file).items()}
        for item in (one, other)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert one.config["vocab_size"] == other.config["vocab_size"]
    texts = (*TEXTS, f"a{SPECIAL}<think>b")
    ids = [[open_tokenizer(item.folder).encode(text) for text in texts] for item in (one, other)]
    assert ids[0] == ids[1]


# What changes, and what does not


def test_only_the_files_with_the_two_matrices_are_written(folder: Path, tmp_path: Path) -> None:
    before = {file.name: file.stat().st_ino for file in folder.iterdir()}
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    holding = {index["model.embed_tokens.weight"], index["lm_head.weight"]}
    report = apply(plan_tokens(folder, ORDINARY, TokenOptions()), tmp_path / "new")
    assert set(report.rewritten) == holding
    assert len(set(index.values())) > len(holding)
    changed = {name for name in before if (tmp_path / "new" / name).stat().st_ino != before[name]}
    assert changed - holding <= {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }
    assert {file.name: file.stat().st_ino for file in folder.iterdir()} == before


def test_small_files_of_two_folders_can_be_changed_apart(folder: Path, tmp_path: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "empty").mkdir()
    apply(plan_tokens(folder, ORDINARY, TokenOptions()), tmp_path / "new")
    shared = {
        file.name
        for file in (tmp_path / "new").rglob("*")
        if file.is_file() and file.stat().st_nlink > 1
    }
    assert shared
    assert all(name.endswith(".safetensors") for name in shared)
    names = {file.name for file in folder.iterdir()} - {".git"}
    assert {file.name for file in (tmp_path / "new").iterdir()} == names
    apply(plan_tokens(folder, ORDINARY, TokenOptions()))
    assert {file.name for file in folder.iterdir()} == names | {".git"}
    assert (folder / ".git" / "HEAD").read_text() == "ref"


def test_weights_in_a_folder_of_their_own_are_changed_there(folder: Path) -> None:
    (folder / "weights").mkdir()
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "weights" / file.name)

    def move(index: Any) -> None:
        index["weight_map"] = {k: f"weights/{v}" for k, v in index["weight_map"].items()}

    change_json(folder / "model.safetensors.index.json", move)
    report = apply(plan_tokens(folder, ORDINARY, TokenOptions()))
    assert all(name.startswith("weights/") for name in report.rewritten)
    assert not list(folder.glob("*.safetensors"))
    assert hanok.load(folder).config.vocab_size == VOCABULARY + 4


# Others who write at the same time, and what the system refuses


def test_of_two_edits_planned_at_the_same_time_one_is_refused(folder: Path) -> None:
    one, other = (plan_tokens(folder, [text], TokenOptions()) for text in ("<a>", "<b>"))
    apply(one)
    with pytest.raises(
        CheckpointError, match=r"changed since the edit was planned.*run this again"
    ):
        apply(other)
    assert open_tokenizer(folder).token_to_id("<a>") == VOCABULARY
    apply(plan_tokens(folder, ["<b>"], TokenOptions()))
    assert open_tokenizer(folder).token_to_id("<b>") == VOCABULARY + 1


def test_a_file_that_appears_during_an_edit_is_not_lost(folder: Path) -> None:
    plan = plan_tokens(folder, ["<a>"], TokenOptions())
    with pytest.raises(CheckpointError, match=r"trainer_state\.json changed since"):
        apply(plan, verify=lambda _: (folder / "trainer_state.json").touch())
    assert (folder / "trainer_state.json").exists()
    assert open_tokenizer(folder).token_to_id("<a>") is None


def test_a_folder_that_another_process_changes_is_left_to_it(folder: Path) -> None:
    plan = plan_tokens(folder, ["<a>"], TokenOptions())
    other = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="being changed by another process"):
            apply(plan)
    finally:
        os.close(other)
    apply(plan)


def test_what_the_system_refuses_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    plan = plan_tokens(folder, ["<a>"], TokenOptions())
    with pytest.raises(CheckpointError, match=r"cannot be written: File exists.*Nothing was"):
        apply(plan, tmp_path / "file" / "new")
    with pytest.raises(CheckpointError, match="is inside of"):
        apply(plan, folder / "new")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written: File too large"):
            apply(plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "model"]
    apply(plan)


def test_a_card_that_cannot_be_read_stops_an_edit_before_it_begins(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"caf\xe9")
    found = CliRunner().invoke(cli, ["tokens", "add", str(folder), "<a>"])
    assert isinstance(found.exception, CheckpointError)
    assert str(found.exception).startswith(f"{folder}/README.md cannot be read as UTF-8")


def test_an_edit_in_place_leaves_the_other_files_what_they_are(folder: Path) -> None:
    before = {file.name: file.stat().st_ino for file in folder.iterdir()}
    report = apply(plan_tokens(folder, ORDINARY, TokenOptions()))
    after = {file.name: file.stat().st_ino for file in folder.iterdir()}
    assert before.keys() == after.keys()
    assert all(
        after[name] == before[name]
        for name in before
        if name.startswith("model-") and name not in report.rewritten
    )
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]
    assert hanok.load(folder).config.vocab_size == VOCABULARY + 4


def test_spare_rows_are_used_first_and_a_matrix_never_becomes_smaller(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    padded(path)
    plan = plan_tokens(path, ORDINARY, TokenOptions())
    assert (plan.rows_before, plan.rows_after, plan.num_spare) == (384, 384, 384 - VOCABULARY - 4)
    old = load_file(path / open_checkpoint(path).tensors["lm_head.weight"].path)["lm_head.weight"]
    apply(plan)
    checkpoint = open_checkpoint(path)
    new = load_file(checkpoint.tensors["lm_head.weight"].path)["lm_head.weight"]
    rows = [i for i in range(384) if not torch.equal(old[i], new[i])]
    assert rows == list(range(VOCABULARY, VOCABULARY + 4))
    assert checkpoint.config["vocab_size"] == 384
    model = hanok.load(path)
    model.resize_token_embeddings(VOCABULARY + 4)  # as callers who count tokens ask for
    assert model.config.vocab_size == 384
    with pytest.raises(OptionError, match="338 rows are fewer than the 384 that are there"):
        plan_resize(path, 338)


@pytest.mark.parametrize(
    ("asked", "multiple", "expected"),
    [(None, 64, 384), (350, None, 350), (350, 8, 352), (None, 11, 330)],
)
def test_rows_are_rounded_up(
    folder: Path, asked: int | None, multiple: int | None, expected: int
) -> None:
    plan = plan_resize(folder, asked, multiple)
    assert plan.rows_after == expected
    report = apply(plan) if not plan.is_nothing else None
    assert (report is None) == (expected == VOCABULARY)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape[0] == expected == model.config.vocab_size
    assert model.get_output_embeddings().weight.shape[0] == expected
    total = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]
    size = sum(ref.size_bytes for ref in open_checkpoint(folder).tensors.values())
    assert total["total_size"] == size


def test_a_removed_token_leaves_its_row_for_the_next(folder: Path) -> None:
    apply(plan_tokens(folder, ORDINARY, TokenOptions()))
    plan = plan_removal(folder, ORDINARY[2:])
    apply(plan)
    assert plan.num_spare == 2
    tokenizer = open_tokenizer(folder)
    assert tokenizer.vocab_size == VOCABULARY + 2
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<think>") == VOCABULARY
    after = plan_tokens(folder, ["<next>"], TokenOptions())
    assert after.new == {"<next>": VOCABULARY + 2}
    assert after.rows_after == after.rows_before == VOCABULARY + 4


def test_removing_gives_back_the_files_there_were(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.glob("tokenizer*")}
    apply(plan_tokens(folder, ORDINARY, TokenOptions()))
    apply(plan_removal(folder, ORDINARY))
    after = {file.name: file.read_bytes() for file in folder.glob("tokenizer*")}
    assert {name: json.loads(data) for name, data in after.items()} == {
        name: json.loads(data) for name, data in before.items()
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["<think>"], "only the last tokens can be removed, since ids stay: '</think>'"),
        (["no such"], "'no such' is no token of this vocabulary"),
    ],
)
def test_what_cannot_be_removed(folder: Path, texts: list[str], message: str) -> None:
    apply(plan_tokens(folder, ORDINARY, TokenOptions()))
    with pytest.raises(OptionError, match=message):
        plan_removal(folder, texts)


def test_pieces_of_the_vocabulary_and_tokens_with_a_role_stay(folder: Path) -> None:
    last = open_tokenizer(folder).spelling(VOCABULARY - 1)
    with pytest.raises(OptionError, match="part of the vocabulary itself"):
        plan_removal(folder, [str(last)])
    apply(plan_tokens(folder, ["<end>"], TokenOptions(special=True, eos="<end>")))
    with pytest.raises(OptionError, match="'<end>' is the eos_token"):
        plan_removal(folder, ["<end>"])


def test_an_end_token_ends_generation_in_all_files(folder: Path) -> None:
    plan = plan_tokens(
        folder, ["<end>", "<pad>"], TokenOptions(special=True, eos="<end>", pad="<pad>")
    )
    report = apply(plan)
    assert all(item.holds for item in report.invariants)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.generation_config["eos_token_id"][0] == VOCABULARY
    assert checkpoint.config["eos_token_id"] == VOCABULARY
    assert checkpoint.config["pad_token_id"] == VOCABULARY + 1
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.eos_token, theirs.pad_token) == ("<end>", "<pad>")
    assert VOCABULARY in hanok.load(folder).end_ids


def test_older_files_are_kept_up_to_date(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"1": {"content": "<s>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text('{"<s>": 1}')
    apply(plan_tokens(folder, ORDINARY, TokenOptions()))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"][str(VOCABULARY)]["content"] == "<think>"
    added = json.loads((folder / "added_tokens.json").read_text())
    assert added == {"<s>": 1} | {text: VOCABULARY + i for i, text in enumerate(ORDINARY)}


def test_older_files_are_written_if_asked_for(folder: Path) -> None:
    apply(plan_tokens(folder, ["<a>"], TokenOptions(legacy_tokenizer_files=True)))
    added = json.loads((folder / "added_tokens.json").read_text())
    assert added["<a>"] == VOCABULARY
    assert json.loads((folder / "special_tokens_map.json").read_text())["eos_token"] == "</s>"


def test_a_piece_of_the_vocabulary_keeps_its_id_and_is_found_everywhere(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    piece = next(t for t, i in tokenizer.ids.items() if t.isalpha() and t.isascii() and len(t) > 2)
    plan = plan_tokens(folder, [piece], TokenOptions())
    assert (plan.new, plan.known) == ({}, {piece: tokenizer.token_to_id(piece)})
    assert plan.rows == ()
    apply(plan)
    assert AutoTokenizer.from_pretrained(folder).encode(f"x{piece}x") == open_tokenizer(
        folder
    ).encode(f"x{piece}x")
    assert plan_tokens(folder, [piece], TokenOptions()).is_nothing


def test_a_token_given_again_keeps_its_rules(folder: Path) -> None:
    strict = TokenOptions(special=True, rstrip=True)
    apply(plan_tokens(folder, ["<end>"], strict))
    plan = plan_tokens(folder, ["<end>", "</s>"], TokenOptions())
    assert plan.is_nothing
    assert plan.same == ("<end>", "</s>")
    apply(plan_tokens(folder, ["<plain>"], TokenOptions()))
    apply(plan_tokens(folder, ["<plain>"], TokenOptions(special=True)))
    apply(plan_tokens(folder, ["<wide>"], TokenOptions(normalized=True)))
    apply(plan_tokens(folder, ["<wide>"], TokenOptions(special=True)))
    flags = {item.token.text: item.token for item in list_tokens(folder)[1]}
    assert flags["<end>"].strips_right
    assert flags["<plain>"].is_special
    assert not flags["<wide>"].is_normalized
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in ("a<end>  b", "a<plain>b", "a<wide>b"):
        ids = open_tokenizer(folder).encode(text)
        assert ids == theirs.encode(text)
        assert open_tokenizer(folder).decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_tokens_that_contain_and_overlap_each_other(folder: Path) -> None:
    texts = ["<t>", "<t>x", "one <t>", "t> two", " <", "<t> ", "\n\n<t>", "🙂", "e\u0301"]
    texts += [f"<|{number}|>" for number in range(1000)]
    report = apply(plan_tokens(folder, texts[:-1000], TokenOptions()))
    assert all(item.holds for item in report.invariants)
    plan = plan_tokens(folder, texts[-1000:], TokenOptions(special=True))
    assert len(plan.examples) < 10
    apply(plan)
    ours, theirs = open_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in (*texts, "one <t> two", "a<t>xb\n\n<t> 🙂e\u0301", "<|1|><|11|> <|1|"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(
            theirs.encode(text), skip_special_tokens=True
        )


def test_a_removed_token_ends_nothing_any_more(folder: Path) -> None:
    ends = TokenOptions(special=True, eos="<end>", pad="<end>")
    apply(plan_tokens(folder, ["<end>"], ends))
    apply(plan_tokens(folder, ["</s>"], TokenOptions(eos="</s>")))
    with pytest.raises(OptionError, match="'<end>' is the pad_token"):
        plan_removal(folder, ["<end>"])
    apply(plan_tokens(folder, ["</s>"], TokenOptions(pad="</s>")))
    generation = folder / "generation_config.json"
    assert json.loads(generation.read_text())["eos_token_id"] == [2, VOCABULARY]
    apply(plan_removal(folder, ["<end>"]))
    assert json.loads(generation.read_text())["eos_token_id"] == [2]
    apply(plan_tokens(folder, ["<next>"], TokenOptions()))
    assert VOCABULARY not in hanok.load(folder).end_ids


def test_a_token_with_a_role_in_a_config_alone_stays(folder: Path) -> None:
    apply(plan_tokens(folder, ["<a>"], TokenOptions()))
    change_json(folder / "config.json", lambda item: item.update(bos_token_id=VOCABULARY))
    with pytest.raises(OptionError, match=r"'<a>' is the bos_token_id of config\.json"):
        plan_removal(folder, ["<a>"])


def test_templates_that_write_a_removed_token_are_noted(folder: Path) -> None:
    apply(plan_tokens(folder, ['<"a">', "<b>", "<c>"], TokenOptions()))
    change_json(
        folder / "tokenizer_config.json", lambda item: item.update(chat_template='x<"a">{{ y }}')
    )
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("<c>")
    assert plan_removal(folder, ['<"a">', "<b>", "<c>"]).notes == (
        "the chat template still writes '<\"a\">'",
        "the chat template still writes '<c>'",
    )


def test_a_spelling_that_other_programs_misread_is_said(folder: Path) -> None:
    report = apply(plan_tokens(folder, ["naïve", "마당이다"], TokenOptions()))
    (said,) = [item for item in report.invariants if not item.holds]
    assert said.name == "other programs decode the new tokens"
    assert said.detail.startswith("'naïve' becomes 'na\ufffdve'")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.decode([VOCABULARY]) == "na\ufffdve"
    assert open_tokenizer(folder).decode([VOCABULARY]) == "naïve"
    assert theirs.decode([VOCABULARY + 1]) == "마당이다"


def test_tokens_without_rows_get_some_and_are_no_pieces(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens(["<old>"])
    theirs.save_pretrained(folder)
    with pytest.raises(OptionError, match="'<old>' is 330, and has no row yet"):
        plan_tokens(folder, ["<a>"], TokenOptions(init="like=<old>"))
    plan = plan_tokens(folder, ["<old>x"], TokenOptions())
    like = plan_tokens(folder, ["<a>"], TokenOptions(init="like=x"))
    for one, other in zip(plan.rows, like.rows, strict=True):
        assert one.rows == other.rows
    apply(plan_resize(folder, None))
    assert open_checkpoint(folder).tensors["lm_head.weight"].shape[0] == VOCABULARY + 1


def test_more_rows_than_the_disk_holds_are_refused_at_once(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"GiB are to be written, and .* free there"):
        apply(plan_resize(folder, 10**13))


# What rows begin as


def values(path: Path, name: str, index: int) -> list[float]:
    return read_row(open_checkpoint(path).tensors[name], index)


def test_rows_begin_as_asked(folder: Path) -> None:
    before = open_tokenizer(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = load_file(open_checkpoint(folder).tensors[name].path)[name].double()
        pieces = rows[before.encode("<think>", add_special_tokens=False)].mean(0)
        words = rows[before.encode("the well", add_special_tokens=False)].mean(0)
        for text, init, expected in (
            ("<think>", "pieces", pieces),
            ("<a>", "the well", words),
            ("<b>", "like=the", rows[before.ids["the"]] if "the" in before.ids else rows[5]),
        ):
            if init == "like=the" and "the" not in before.ids:
                init = f"like={before.spelling(5)}"
            plan = plan_tokens(folder, [text], TokenOptions(init=init))
            edit = next(item for item in plan.rows if item.tensor.name == name)
            found = torch.frombuffer(bytearray(edit.rows[VOCABULARY]), dtype=torch.bfloat16)
            torch.testing.assert_close(found, expected.to(torch.bfloat16), rtol=0, atol=0)
        plan = plan_tokens(folder, ["<c>", "<d>"], TokenOptions(init="mean"))
        edit = next(item for item in plan.rows if item.tensor.name == name)
        drawn = [
            torch.frombuffer(bytearray(data), dtype=torch.bfloat16).double()
            for data in edit.rows.values()
        ]
        assert not torch.equal(*drawn)
        for row in drawn:
            assert (row - rows.mean(0)).std() < 0.03 * rows.std()


# Invariants: each is broken once


def broken(
    monkeypatch: pytest.MonkeyPatch, plan: TokensPlan, name: str, breaking: Callable[[Path], None]
) -> None:
    """Let an edit write files with something wrong, and expect that it notices and undoes itself."""
    from hanok.memory import tokens

    written = tokens.check_edit

    def check(edited: Any, unfinished: Path) -> Any:
        breaking(unfinished)
        return written(edited, unfinished)

    before = {file: file.read_bytes() for file in plan.folder.iterdir()}
    monkeypatch.setattr(tokens, "check_edit", check)
    with pytest.raises(CheckpointError, match=rf"{name}.*\)\. Nothing was changed"):
        apply(plan)
    assert {file: file.read_bytes() for file in plan.folder.iterdir()} == before
    assert [entry.name for entry in plan.folder.parent.iterdir()] == [plan.folder.name]


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def swap_two_pieces(library: Any) -> None:
    vocabulary = library["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def test_an_old_token_with_another_id_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_tokens(folder, ORDINARY, TokenOptions())
    broken(
        monkeypatch,
        plan,
        "old tokens have their ids",
        lambda new: change_json(new / "tokenizer.json", swap_two_pieces),
    )


def test_old_text_with_other_tokens_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_tokens(folder, ORDINARY, TokenOptions())

    def break_merges(new: Path) -> None:
        change_json(new / "tokenizer.json", lambda item: item["model"]["merges"].clear())

    broken(monkeypatch, plan, "old text has its tokens", break_merges)


def test_a_token_that_is_not_found_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_tokens(folder, ORDINARY, TokenOptions())

    def drop(new: Path) -> None:
        change_json(new / "tokenizer.json", lambda item: item["added_tokens"].pop())

    broken(monkeypatch, plan, "added tokens are found and spelled", drop)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_an_old_row_with_other_bytes_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plan = plan_tokens(folder, ORDINARY, TokenOptions())
    path = next(item.tensor.path.name for item in plan.rows if item.tensor.name == name)

    def flip(new: Path) -> None:
        file = new / path
        ref = open_checkpoint(file, needs_config=False).tensors[name]
        with file.open("r+b") as opened:
            opened.seek(ref.offset_bytes + 7 * row_bytes(ref) + 3)
            byte = opened.read(1)
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([byte[0] ^ 1]))

    broken(monkeypatch, plan, rf"old tokens have their logits \(row 7 of {name}", flip)


def test_logits_that_differ_are_noticed(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    path = open_checkpoint(other).tensors["model.norm.weight"].path
    weights = load_file(path)
    weights["model.norm.weight"] *= 1.01
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="logits of old tokens differ by up to"):
        compare_logits(folder, other, VOCABULARY)
    plan = plan_tokens(folder, ORDINARY, TokenOptions())
    before = {file: file.read_bytes() for file in folder.iterdir()}

    def verify(unfinished: Path) -> None:
        compare_logits(other, unfinished, VOCABULARY)

    with pytest.raises(CheckpointError, match="logits of old tokens differ"):
        apply(plan, verify=verify)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    apply(plan, verify=lambda unfinished: compare_logits(folder, unfinished, VOCABULARY))


def test_an_end_token_that_ends_nothing_is_said(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    report = apply(plan_tokens(folder, ORDINARY, TokenOptions()))
    (said,) = [item for item in report.invariants if not item.holds]
    assert said.detail == "'</s>' is 2, generation ends at [7]"


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "piece"}, "init 'piece' is unknown; did you mean 'pieces'"),
        ({"init": "like=nothing"}, "'nothing' is no token"),
        ({"init": " "}, "init is empty"),
        ({"special": True, "normalized": True}, "exclude each other"),
        ({"init": "Mean "}, "init 'Mean ' is unknown; did you mean 'mean'"),
        ({"init": "like= well"}, "' well' is no token of this vocabulary, which spells it 'Ġwe"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
        ({"eos": "<nowhere>"}, "eos_token '<nowhere>' is no token"),
    ],
)
def test_options_that_cannot_be(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan_tokens(folder, ["<a>"], TokenOptions(**options))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["  "], "more than spaces"),
        ([""], "more than spaces"),
        (["<a>", "<a>"], "'<a>' given more than once"),
        (["\ud800"], "surrogate"),
    ],
)
def test_texts_that_can_be_no_token(folder: Path, tokens: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan_tokens(folder, tokens, TokenOptions())


def test_a_quantized_head_is_refused_by_its_name(folder: Path) -> None:
    path = open_checkpoint(folder).tensors["lm_head.weight"].path
    weights = load_file(path)
    head = weights.pop("lm_head.weight")
    save_file({**weights, "lm_head.qweight": head.to(torch.int8)}, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"

    def rename(value: Any) -> None:
        value["weight_map"]["lm_head.qweight"] = value["weight_map"].pop("lm_head.weight")

    change_json(index, rename)
    change_json(
        folder / "config.json",
        lambda item: item.update(quantization_config={"quant_method": "gptq", "bits": 4}),
    )
    with pytest.raises(UnsupportedError, match=r"lm_head\.qweight.*before it is quantized"):
        plan_tokens(folder, ["<a>"], TokenOptions())


def test_a_quantized_model_with_a_float_head_gets_its_tokens(folder: Path) -> None:
    change_json(
        folder / "config.json",
        lambda item: item.update(quantization_config={"quant_method": "gptq", "bits": 4}),
    )
    plan = plan_tokens(folder, ["<a>"], TokenOptions())
    assert any("quantized" in note for note in plan.notes)
    apply(plan)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors["lm_head.weight"].shape[0] == VOCABULARY + 1
    assert checkpoint.config["vocab_size"] == VOCABULARY + 1


def test_a_loaded_quantized_head_is_refused_by_its_name(folder: Path) -> None:
    model = hanok.load(folder, quant="int8:head=int8")
    with pytest.raises(UnsupportedError, match="lm_head gets no rows: it is quantized"):
        model.resize_token_embeddings(400)


def test_a_folder_of_links_is_not_edited_in_place(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    plan = plan_tokens(snapshot, ["<a>"], TokenOptions())
    with pytest.raises(CheckpointError, match="symbolic links"):
        apply(plan)
    apply(plan, tmp_path / "new")
    assert not any(file.is_symlink() for file in (tmp_path / "new").iterdir())
    assert hanok.load(tmp_path / "new").config.vocab_size == VOCABULARY + 1


def test_the_folder_one_is_in_is_not_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(CheckpointError, match="the folder you are in"):
        apply(plan_tokens(Path(), ["<a>"], TokenOptions()))


def test_an_output_that_is_there_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        apply(plan_tokens(folder, ["<a>"], TokenOptions()), tmp_path / "new")


def test_pickles_are_to_be_converted_first(tmp_path: Path) -> None:
    byte_level(tmp_path)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=VOCABULARY))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="hanok convert"):
        plan_tokens(tmp_path, ["<a>"], TokenOptions())


def test_other_forms_of_the_weights_are_named(folder: Path) -> None:
    (folder / "model.gguf").write_bytes(b"")
    (folder / "pytorch_model.bin").write_bytes(b"")
    plan = plan_tokens(folder, ["<a>"], TokenOptions())
    assert "left as they are, without the new rows: model.gguf, pytorch_model.bin" in plan.notes


def test_gpt2_names_are_found(tmp_path: Path) -> None:
    byte_level(tmp_path)
    save(
        tmp_path,
        GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=64)
        ),
    )
    apply(plan_tokens(tmp_path, ORDINARY, TokenOptions()), tmp_path.parent / "gpt2-new")
    assert hanok.load(tmp_path.parent / "gpt2-new").config.vocab_size == VOCABULARY + 4
    assert logits(tmp_path.parent / "gpt2-new", [VOCABULARY]).shape[1] == VOCABULARY + 4


# The command


def test_a_dry_run_shows_a_diff_and_changes_nothing(folder: Path) -> None:
    before = {file: file.read_bytes() for file in folder.iterdir()}
    found = CliRunner().invoke(cli, ["tokens", "add", str(folder), "<think>", "--dry-run"])
    assert found.exit_code == 0
    assert f"'<think>' is {VOCABULARY}, with a new row" in found.output
    assert '-  "vocab_size": 330' in found.output.replace(",", "")
    assert '+    "content": "<think>",' in found.output
    assert "lm_head.weight BF16 [330, 32] -> [331, 32], rows 330 to 330 new" in found.output
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_the_command_says_what_it_checked(folder: Path) -> None:
    runner = CliRunner()
    found = runner.invoke(
        cli, ["tokens", "add", str(folder), SPECIAL, "--special", "--verify-logits"]
    )
    assert found.exit_code == 0, found.output
    for line in (
        "yes  old tokens have their ids",
        "yes  old text has its tokens",
        "yes  old tokens have their logits",
        "yes  a row for each token",
    ):
        assert line in found.output
    assert "before:" in found.output
    assert f"'{SPECIAL}'" in found.output.partition("after:")[2].splitlines()[0]
    listed = runner.invoke(cli, ["tokens", "list", str(folder)])
    assert f"{VOCABULARY}  '{SPECIAL}'  special" in listed.output
    again = runner.invoke(cli, ["tokens", "add", str(folder), SPECIAL, "--special"])
    assert "Nothing to do" in again.output
    removed = runner.invoke(cli, ["tokens", "remove", str(folder), SPECIAL])
    assert f"'{SPECIAL}' is removed; its row stays" in removed.output
    assert list_tokens(folder)[0] == VOCABULARY + 1
    grown = runner.invoke(cli, ["tokens", "resize", str(folder), "--pad-to-multiple-of", "64"])
    assert "331 before, 384 after" in grown.output
    checked = runner.invoke(cli, ["tokens", "check", str(folder)])
    assert checked.exit_code == 0, checked.output
    assert "yes  added tokens are found and spelled: 3 of them" in checked.output
    change_json(folder / "config.json", lambda item: item.update(eos_token_id=999))
    change_json(folder / "generation_config.json", lambda item: item.update(eos_token_id=999))
    wrong = runner.invoke(cli, ["tokens", "check", str(folder)])
    assert wrong.exit_code == 1
    assert "error: " in wrong.output
    assert "999" in wrong.output
    steps = steps_of((folder / "README.md").read_text())
    assert [step.command for step in steps] == [
        f"hanok tokens add model '{SPECIAL}' --special",
        f"hanok tokens remove model '{SPECIAL}'",
        "hanok tokens resize model --pad-to-multiple-of 64",
    ]
    assert [step.text for step in steps] == [
        "adds 1 token, gives the vocabulary 331 rows (before: 330)",
        "removes 1 token",
        "gives the vocabulary 384 rows (before: 331)",
    ]


def test_a_diff_of_long_files_is_of_what_differs(folder: Path) -> None:
    lines = list(diff(plan_tokens(folder, ["<think>"], TokenOptions())))
    of_library = [line for line in lines if line.startswith(("+", "-"))]
    assert 0 < len(of_library) < 40


def test_rules_of_matching_are_transformers(folder: Path) -> None:
    options = TokenOptions(single_word=True, lstrip=True, rstrip=True)
    apply(plan_tokens(folder, ["beam"], options))
    ours, theirs = open_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("beam beams a beam  b", "xbeam", "beam"):
        assert ours.encode(text) == theirs.encode(text)
