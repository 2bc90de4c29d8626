"""Byte-level BPE from files that do not say how a text is cut: vocab.json with merges.txt, and ranks.

Only a tokenizer.json holds a complete tokenizer. The other files list the merges, but not how the text
is normalized and split before merging. The table below gives that by tokenizer class or by model type;
any other folder is refused. GPT-2's class may be no more than a name (folders of several models give it
next to a tokenizer.json that splits differently), so for that class the vocabulary is checked too:
tokens that the assumed splits would always break show that it was trained with other splits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from hanok.checkpoint.tokenizer_config import TokenizerConfig
from hanok.errors import CheckpointError

END_OF_TEXT = "<|endoftext|>"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKED_REST = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

NO_CLASS = frozenset({"PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend"})
"""Classes that read any tokenizer.json, so that their name says nothing about its contents."""

_MIN_CONTRADICTIONS = 100
_MIN_SHARE = 0.01
_MIN_TOKENS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """How a text is split into the stretches in which bytes are merged."""

    title: str
    classes: tuple[str, ...] = ()
    """`tokenizer_class`, without "Fast"."""
    model_types: tuple[str, ...] = ()
    """`model_type` of config.json, where no class says more."""
    overrules_class: bool = False
    """The types were published with a class that is only a name."""
    may_be_only_named: bool = False
    """Folders with other vocabularies name this class as well, so the vocabulary must agree."""
    pattern: str | None = None
    """Each match is a stretch; None for the pattern of GPT-2."""
    composes: bool = False
    """Unicode's NFC comes first."""
    before: tuple[pre_tokenizers.PreTokenizer, ...] = ()
    """Cuts that come before the pattern."""
    after: tuple[pre_tokenizers.PreTokenizer, ...] = ()
    """Splits applied after the bytes are spelled in the byte alphabet."""
    takes_whole: bool = False
    """A stretch that is a token becomes that token, without merging."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Defaults for bos_token, eos_token, … where the folder does not name them."""
    begins_with: tuple[str, ...] = ()
    """Tokens that the class puts before a text."""
    ends_with: tuple[str, ...] = ()
    hidden: Mapping[int, bytes] = field(default_factory=dict)
    """Tokens that encoding never produces, since a special token has the same text; they only decode."""

    def library(self, vocabulary: BPE, *, adds_prefix_space: bool) -> tokenizers.Tokenizer:
        """A tokenizer of the library with these cuts."""
        library = tokenizers.Tokenizer(vocabulary)
        if self.composes:
            library.normalizer = normalizers.NFC()
        cuts = list(self.before)
        if self.pattern is not None:
            cuts.append(pre_tokenizers.Split(Regex(self.pattern), "isolated"))
        cuts.append(
            pre_tokenizers.ByteLevel(
                add_prefix_space=adds_prefix_space, use_regex=self.pattern is None
            )
        )
        library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, *self.after])
        library.decoder = decoders.ByteLevel()
        return library

    def complete(self, settings: TokenizerConfig, library: tokenizers.Tokenizer) -> TokenizerConfig:
        """`settings` with the names that the class gives, where the vocabulary has such tokens."""
        added = {token.text for token in settings.added}
        names = {
            name: text
            for name, text in self.names.items()
            if text in added or library.token_to_id(text) is not None
        }
        return settings.with_names(names)

    def frame(self, library: tokenizers.Tokenizer) -> None:
        """Let the library add the class's special tokens around a text, if the vocabulary has them."""
        frame = (*self.begins_with, *self.ends_with)
        ids = {text: library.token_to_id(text) for text in frame}
        if ids and None not in ids.values():
            library.post_processor = processors.TemplateProcessing(
                single=[*self.begins_with, "$A", *self.ends_with], special_tokens=list(ids.items())
            )


_EACH_DIGIT = pre_tokenizers.Digits(individual_digits=True)
_GPT2_NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
LLAMA3_BOS = "<|begin_of_text|>"

GPT2 = Cuts(
    title="GPT-2",
    classes=("GPT2Tokenizer", "CodeGenTokenizer"),
    model_types=("gpt2", "gpt_neo", "gptj", "codegen"),
    may_be_only_named=True,
    names=_GPT2_NAMES,
)
WHISPER = Cuts(
    title="Whisper",
    classes=("WhisperTokenizer",),
    names=_GPT2_NAMES,
    begins_with=("<|startoftranscript|>", "<|notimestamps|>"),
    ends_with=(END_OF_TEXT,),
)
STARCODER = Cuts(
    title="StarCoder",
    model_types=("gpt_bigcode", "starcoder2", "granite", "granitemoe"),
    overrules_class=True,
    may_be_only_named=True,
    before=(_EACH_DIGIT,),
    names=_GPT2_NAMES,
)
GPT_NEOX = Cuts(
    title="GPT-NeoX",
    classes=("GPTNeoXTokenizer",),
    model_types=("gpt_neox", "mpt", "olmo"),
    composes=True,
    names=_GPT2_NAMES,
)
QWEN2 = Cuts(
    title="Qwen2",
    classes=("Qwen2Tokenizer", "QWenTokenizer"),
    model_types=(
        "qwen",
        "qwen2",
        "qwen2_moe",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3",
        "qwen3_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_next",
    ),
    composes=True,
    pattern=rf"{_WORDS}|\p{{N}}|{_REST}",
    names={"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT},
)
QWEN3_5 = Cuts(
    title="Qwen3.5",
    classes=("Qwen3_5Tokenizer",),
    model_types=("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    overrules_class=True,
    composes=True,
    pattern=rf"{_MARKED_WORDS}|\p{{N}}|{_MARKED_REST}",
    names={"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT},
)
FALCON = Cuts(
    title="Falcon",
    model_types=("falcon",),
    before=(pre_tokenizers.Punctuation("contiguous"),),
    after=(
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ),
    names={"eos_token": END_OF_TEXT},
)
COHERE = Cuts(
    title="Command R",
    classes=("CohereTokenizer",),
    model_types=("cohere", "cohere2"),
    composes=True,
    before=(_EACH_DIGIT,),
    names={
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "pad_token": "<PAD>",
    },
)
LLAMA3 = Cuts(
    title="Llama 3",
    pattern=rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    takes_whole=True,
    begins_with=(LLAMA3_BOS,),
)
GLM4 = Cuts(
    title="GLM-4",
    classes=("ChatGLM4Tokenizer",),
    pattern=LLAMA3.pattern,
    takes_whole=True,
    names={"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT},
    begins_with=("[gMASK]", "<sop>"),
)
TABLE = (GPT2, WHISPER, STARCODER, GPT_NEOX, QWEN2, QWEN3_5, FALCON, COHERE, LLAMA3, GLM4)


def find_cuts(path: Path, settings: TokenizerConfig) -> Cuts:
    """Return the row for a folder; CheckpointError where none is certain. `path` is for the message."""
    named = settings.tokenizer_class
    model_type = settings.model_type
    for row in TABLE:
        if row.overrules_class and model_type in row.model_types:
            return row
    if named is not None and named not in NO_CLASS:
        for row in TABLE:
            if named.removesuffix("Fast") in row.classes:
                return row
        raise CheckpointError(_unknown(path, f"tokenizer_class is {named}"))
    # Of the classes that say nothing, this model's vocabulary is known by its first special token.
    if model_type == "llama" and settings.named.get("bos_token") == LLAMA3_BOS:
        return LLAMA3
    for row in TABLE:
        if model_type in row.model_types:
            return row
    said = "no file says its tokenizer_class" if named is None else f"tokenizer_class is {named}"
    raise CheckpointError(_unknown(path, f"{said}, model_type {model_type or 'is not given'}"))


def read_vocab_and_merges(
    vocab: Path, merges: Path, settings: TokenizerConfig
) -> tuple[tokenizers.Tokenizer, Cuts]:
    """Byte-level BPE from a vocab.json and merges.txt, and the row that it was read with."""
    cuts = find_cuts(vocab.parent / "vocab.json and merges.txt", settings)
    try:
        texts, pairs = BPE.read_file(str(vocab), str(merges))
        model = BPE(texts, pairs, ignore_merges=cuts.takes_whole)
    except Exception as error:
        # The library raises the bare Exception for everything that its parser refuses.
        raise CheckpointError(
            f"{vocab} and {merges.name} cannot be read as byte-level BPE: {error}; fetch both again"
        ) from error
    library = cuts.library(model, adds_prefix_space=bool(settings.adds_prefix_space))
    added = {token.text for token in settings.added} | set(settings.named.values())
    if cuts.may_be_only_named:
        _check_vocabulary(vocab, cuts, library, (text for text in texts if text not in added))
    return library, cuts


def _check_vocabulary(
    path: Path, cuts: Cuts, library: tokenizers.Tokenizer, spellings: Iterable[str]
) -> None:
    """Raise CheckpointError where the vocabulary was trained with splits other than these.

    Only tokens of ASCII letters are checked; there every published vocabulary agrees with its splits.
    """
    texts = [text.replace("Ġ", " ").replace("Ċ", "\n") for text in spellings]
    texts = [text for text in texts if len(text) > 1 and text.isascii()]
    cut = [text for text in texts if len(library.pre_tokenizer.pre_tokenize_str(text)) > 1]
    if len(cut) >= max(_MIN_CONTRADICTIONS, _MIN_SHARE * len(texts)):
        raise CheckpointError(
            _unknown(
                path,
                f"{len(cut):,} of its {len(texts):,} ASCII tokens, such as {min(cut)!r}, can never be "
                f"made with the cuts of {cuts.title}, which the folder's files name",
            )
        )
    has_numbers = any(text.strip(" ").isdigit() and len(text.strip(" ")) > 1 for text in texts)
    joins_digits = len(library.pre_tokenizer.pre_tokenize_str("00")) == 1
    if joins_digits and not has_numbers and len(texts) >= _MIN_TOKENS:
        raise CheckpointError(
            _unknown(
                path,
                f"none of its {len(texts):,} ASCII tokens is a number of two digits, as {cuts.title}, "
                "which the folder's files name, would have made",
            )
        )


def _unknown(path: Path, why: str) -> str:
    classes = ", ".join(name for row in TABLE for name in row.classes)
    return (
        f"{path} can be read only with the rules by which the text was cut when the vocabulary was "
        f"made, and those are not certain: {why}. Put the model's tokenizer.json into the folder, "
        "which holds its rules; where there is none, write one with transformers "
        "(AutoTokenizer.from_pretrained(…).save_pretrained(…)). Known rules are those of the "
        f"tokenizer_class {classes}; tokenizer_config.json says which it is"
    )


def byte_alphabet() -> dict[str, int]:
    """Character → byte, as byte-level BPE writes bytes.

    Printable characters of Latin-1 stand for themselves, the other bytes for U+0100 onwards, in
    order (Radford et al., 2019).
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(0x100)) - set(visible))
    return {
        **{chr(byte): byte for byte in visible},
        **{chr(0x100 + place): byte for place, byte in enumerate(hidden)},
    }
