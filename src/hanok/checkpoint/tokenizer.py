"""Text to token ids and back, from a checkpoint's own files.

One `Tokenizer` covers every form in which vocabularies are published (`tokenizer_files.py`):
`tokenizer.json` (the tokenizers library), a SentencePiece `tokenizer.model` (its library, imported only
then), `vocab.json` with `merges.txt`, and files of ranks.

Invariants: the beginning-of-sequence token occurs at most once at the front, whatever adds it
(post-processor, configuration, template or the text itself); `decode` equals the joined pieces of a
stream of the same ids, and the library's own decode wherever that contains no U+FFFD.

Cost: opening reads the files once; encoding and decoding are linear. Chat templates: `chat.py`.
Streaming: `stream.py`.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers

from hanok.checkpoint.byte_level import Cuts, read_vocab_and_merges
from hanok.checkpoint.chat import ChatTemplates, RenderedChat
from hanok.checkpoint.ranks import read_tekken, read_tiktoken
from hanok.checkpoint.stream import StreamDecoder
from hanok.checkpoint.tokenizer_config import (
    AddedToken,
    TokenizerConfig,
    read_templates,
    read_tokenizer_config,
)
from hanok.checkpoint.tokenizer_edit import (
    ADDED,
    CONFIG,
    LIBRARY,
    SPECIAL_MAP,
    TokenizerFiles,
    with_tokens,
)
from hanok.checkpoint.tokenizer_files import (
    LOOKED_FOR,
    TEMPLATES_FOLDER,
    Form,
    find_vocabulary,
    refuse_pointers,
    tokenizer_files,
)
from hanok.checkpoint.vocabulary import (
    Frame,
    LibraryVocabulary,
    Located,
    SentencePieceVocabulary,
    Vocabulary,
    read_library_file,
)
from hanok.errors import CheckpointError, OptionError, RequestError

GivenToken = str | AddedToken | tokenizers.AddedToken


class Tokenizer:
    """One vocabulary with its special tokens and chat templates. Made by `open_tokenizer`.

    Threads may share it, but for `add_tokens`; a stream belongs to one thread.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        settings: TokenizerConfig,
        *,
        templates: ChatTemplates,
        files: tuple[Path, ...],
    ) -> None:
        self._vocabulary = vocabulary
        self._settings = settings
        self._added_pieces: Mapping[int, tuple[int, ...]] = {}
        self._changed: Mapping[str, bytes] = {}
        self._texts = vocabulary.texts
        self._templates = templates
        self._ids = vocabulary.ids
        self.files = files
        """The existing files that a copy of this tokenizer needs."""
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        """The largest id + 1. The embedding of a model may have more rows, for padding."""
        self.bos_token_id = self._named_id(settings, "bos_token")
        self._bos_text = settings.named.get("bos_token", "")
        self.eos_token_id = self._named_id(settings, "eos_token")
        self.pad_token_id = self._named_id(settings, "pad_token")
        self.unk_token_id = self._named_id(settings, "unk_token")
        special = (*settings.named.values(), *settings.extra)
        self.special_token_ids: frozenset[int] = vocabulary.special_ids | {
            self._ids[text] for text in special if text in self._ids
        }
        """The ids that `skip_special_tokens` leaves out."""
        adds_bos, adds_eos = vocabulary.adds_by_itself(self.bos_token_id, self.eos_token_id)
        # A folder that sets either of the two flags replaces the post-processor: that is how
        # published folders switch off the one in their tokenizer.json. A post-processor that adds
        # other tokens as well stays, since the two flags cannot express it.
        is_silent = settings.adds_bos is None and settings.adds_eos is None
        self._uses_post_processor = is_silent or vocabulary.adds_others(
            self.bos_token_id, self.eos_token_id
        )
        if not self._uses_post_processor:
            adds_bos = adds_bos if settings.adds_bos is None else settings.adds_bos
            adds_eos = adds_eos if settings.adds_eos is None else settings.adds_eos
        self._adds_bos, self._adds_eos = adds_bos, adds_eos

    def __len__(self) -> int:
        """The largest id + 1."""
        return self.vocab_size

    def _named_id(self, settings: TokenizerConfig, name: str) -> int | None:
        text = settings.named.get(name)
        return None if text is None else self._ids.get(text)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens spelled out in it become their ids.

        With `add_special_tokens`, the folder's tokens for the front and the end are added. The
        beginning-of-sequence token then occurs once, even if the text itself begins with it.
        """
        check_encodable(text)
        if not add_special_tokens:
            return self._vocabulary.encode(text)
        if self._uses_post_processor:
            ids = self._vocabulary.encode_processed(text)
        else:
            ids = self._vocabulary.encode(text)
        if self._adds_eos and self.eos_token_id is not None and ids[-1:] != [self.eos_token_id]:
            ids.append(self.eos_token_id)
        if self._adds_bos and self.bos_token_id is not None:
            ids = [self.bos_token_id, *_without_leading(ids, self.bos_token_id)]
        return ids

    def encode_rendered(self, texts: Sequence[str]) -> list[Located]:
        """The ids of rendered conversations, as `encode_chat` has them, with where each token lies.

        Many at once are faster than one after another where the library has threads of its own.
        """
        for text in texts:
            check_encodable(text)
        found = []
        for located in self._vocabulary.encode_located(texts):
            ids = self._with_one_bos(located.ids)
            found.append(Located(ids, located.spans[len(located.ids) - len(ids) :]))
        return found

    def fewest_tokens(self, text: str) -> int:
        """Return a lower bound on the number of tokens of `text`, without encoding it.

        It holds with special tokens and without. 0 if the vocabulary allows no certain bound.
        """
        bound = self._vocabulary.bound
        if bound is None:
            return 0
        # Repeated beginning-of-sequence tokens at the front count once.
        return bound.fewest(text.replace(self._bos_text, "") if self._bos_text else text)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`: the pieces of their stream, joined.

        An id without a token (a padding row of the embedding) adds nothing. Invalid bytes become
        U+FFFD, and no valid character next to them is lost.
        """
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        pieces = [stream.push(token_id) for token_id in ids]
        return "".join(pieces) + stream.finish()

    def stream(
        self,
        skip_special_tokens: bool = True,
        *,
        after: Sequence[int] = (),
        spelled: Collection[int] = (),
    ) -> StreamDecoder:
        """A decoder that takes one id at a time, for one sequence.

        It continues the ids `after`, so that their text and its pieces together are the text of all
        ids: a space between the two belongs to the first piece. Special tokens in `spelled` are not
        skipped.
        """
        skipped = self.special_token_ids.difference(spelled) if skip_special_tokens else frozenset()
        return self._texts.stream(skipped, after)

    def token_text(self, token_id: int) -> str:
        """The text of one token as it reads in the middle of a text; a part of a character as U+FFFD.

        Special tokens are spelled out. RequestError for an id without a token.
        """
        if not self._texts.is_known(token_id):
            raise RequestError(
                f"there is no token {token_id}: ids go from 0 to {self.vocab_size - 1}, and padding "
                "rows of an embedding have no text"
            )
        return self._texts.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds in the middle of a text; b"" for an id without a token.

        Special tokens are spelled out. Also b"" for the few tokens whose bytes no library reports.
        """
        return self._texts.data(token_id) if self._texts.is_known(token_id) else b""

    def token_to_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary spells `text` (its own spelling), or None."""
        return self._ids.get(text)

    def first_difference(self, other: "Tokenizer") -> int | None:
        """The smallest id that is not the same token in both, or None if all are."""
        differing = set(self._ids.items()) ^ set(other._ids.items())
        return min((token_id for _, token_id in differing), default=None)

    def spelling(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token, or None for an id without one."""
        return self._spellings.get(token_id)

    @cached_property
    def _spellings(self) -> Mapping[int, str]:
        found: dict[int, str] = {}
        for text, token_id in self._ids.items():
            found.setdefault(token_id, text)
        return found

    def add_tokens(
        self,
        new_tokens: GivenToken | Sequence[GivenToken],
        special_tokens: bool = False,
    ) -> int:
        """Add tokens to the vocabulary and return how many got a new id; others only get these rules.

        Special tokens are left out by `decode`. Ids follow the largest one, and a model needs a row for
        each: `Model.resize_token_embeddings`. `save` writes the changed files, and nothing else does.
        Not while other threads use the tokenizer. Raises as `tokenizer_edit.with_tokens` does.
        """
        given = [new_tokens] if isinstance(new_tokens, GivenToken) else new_tokens
        if not isinstance(given, Sequence) or not all(isinstance(t, GivenToken) for t in given):
            raise OptionError(
                f"{given!r:.80} are no tokens to add. Give a text, an AddedToken, or a list of them."
            )
        edit = with_tokens(
            self.edited_files(), [_added_token(token, special_tokens) for token in given]
        )
        pieces = {
            token_id: tuple(self.encode(text, add_special_tokens=False))
            for text, token_id in edit.new.items()
        }
        changed = self.changed(edit.contents)
        self.__dict__.clear()
        self.__dict__.update(changed.__dict__)
        self._added_pieces = {**self._added_pieces, **pieces}
        return len(edit.new)

    @property
    def added_pieces(self) -> Mapping[int, tuple[int, ...]]:
        """What the texts of tokens that have no row yet were before, by their new ids."""
        return self._added_pieces

    def rows_added(self) -> None:
        """Say that the added tokens have rows now."""
        self._added_pieces = {}

    def changed(self, contents: Mapping[str, bytes]) -> "Tokenizer":
        """Return the tokenizer that these files would make, in place of the folder's own."""
        changed = {**self._changed, **contents}
        with TemporaryDirectory(prefix="hanok-tokenizer-") as name:
            folder = Path(name)
            _write_files(self.files, changed, folder)
            found = open_tokenizer(folder)
        found.files, found._changed = self.files, changed
        found._added_pieces = self._added_pieces
        return found

    def edited_files(self) -> TokenizerFiles:
        """Return what an edit of the tokenizer's files begins with."""
        names = (CONFIG, SPECIAL_MAP, ADDED)
        objects = {name: json.loads(data) for name in names if (data := self._read(name))}
        present = self._read(LIBRARY)
        library = present or self._vocabulary.library_file(self._frame())
        is_sentencepiece = isinstance(self._vocabulary, SentencePieceVocabulary)
        return TokenizerFiles(
            library=library,
            replaces_sentencepiece=present is None and is_sentencepiece,
            objects=objects,
            added=self._vocabulary.added,
            named=self._settings.named,
            ids=self._ids,
        )

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, as they were or as they have been changed, into a folder."""
        _write_files(self.files, self._changed, folder)

    def _read(self, name: str) -> bytes | None:
        if name in self._changed:
            return self._changed[name]
        path = next((file for file in self.files if file.name == name), None)
        return None if path is None else path.read_bytes()

    def _frame(self) -> Frame:
        return (
            self._framing(self.bos_token_id) if self._adds_bos else None,
            self._framing(self.eos_token_id) if self._adds_eos else None,
        )

    def _framing(self, token_id: int | None) -> tuple[str, int] | None:
        text = None if token_id is None else self.spelling(token_id)
        return None if text is None or token_id is None else (text, token_id)

    @property
    def ids(self) -> Mapping[str, int]:
        """Every token's own spelling → id."""
        return self._ids

    @property
    def chat_template_names(self) -> tuple[str, ...]:
        """The names that `template` may be, in the order in which they were found."""
        return self._templates.names

    @property
    def chat_template_texts(self) -> tuple[str, ...]:
        """The templates themselves, in the order of their names."""
        return self._templates.texts

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, object] | None = None,
    ) -> str:
        """A conversation as text; RequestError where there is no template or it refuses.

        `template` is a name from `chat_template_names` or the text of a template; without it the
        folder's "tool_use" serves where there are tools, else its "default".
        """
        return self._templates.render(
            messages,
            template=template,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_variables=template_variables,
        )

    def render_chat_with_spans(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = False,
        template_variables: Mapping[str, object] | None = None,
    ) -> RenderedChat:
        """A conversation as text with the character ranges that `{% generation %}` encloses."""
        return self._templates.render_with_spans(
            messages,
            template=template,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            template_variables=template_variables,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, object] | None = None,
    ) -> list[int]:
        """The ids of `render_chat`. The template alone decides about special tokens.

        A beginning-of-sequence token occurs only if the template writes one, and then once.
        """
        rendered = self.render_chat(
            messages,
            template=template,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_variables=template_variables,
        )
        return self._with_one_bos(self.encode(rendered, add_special_tokens=False))

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        if self.bos_token_id is None or ids[:1] != [self.bos_token_id]:
            return ids
        return [self.bos_token_id, *_without_leading(ids, self.bos_token_id)]


def check_encodable(text: str) -> None:
    """Raise RequestError for a text with half a surrogate pair, which no encoding has.

    Given one, the libraries raise a TypeError or abort the process.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"character {error.start} of the text is {text[error.start]!r}, half of a surrogate "
            "pair, which no encoding has: repair the text before it is sent"
        ) from error


def open_tokenizer(folder: Path, *, now: Callable[[], datetime] = datetime.now) -> Tokenizer:
    """The tokenizer of a checkpoint folder. CheckpointError where files are missing or damaged.

    `now` is the clock that chat templates read through `strftime_now`.
    """
    present = tokenizer_files(folder)
    refuse_pointers(present)
    settings = read_tokenizer_config(folder)
    found = find_vocabulary(folder)
    if found is None:
        raise CheckpointError(_nothing_found(folder))
    form, files = found
    vocabulary: Vocabulary
    if form is Form.SENTENCEPIECE:
        vocabulary = SentencePieceVocabulary(files[0], settings)
        settings = vocabulary.complete(settings)
    else:
        library, cuts = _read_library(form, files, settings)
        if cuts is not None:
            settings = cuts.complete(settings, library)
        vocabulary = LibraryVocabulary(library, settings, cuts)
    additional = sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))
    return Tokenizer(
        vocabulary,
        settings,
        templates=read_templates(folder, additional, settings, now),
        files=present,
    )


def _added_token(token: "GivenToken", is_special: bool) -> AddedToken:
    if isinstance(token, AddedToken):
        return token
    if isinstance(token, str):
        return AddedToken(text=token, token_id=None, is_special=is_special)
    return AddedToken(
        text=token.content,
        token_id=None,
        is_special=token.special or is_special,
        is_single_word=token.single_word,
        strips_left=token.lstrip,
        strips_right=token.rstrip,
        is_normalized=token.normalized,
    )


def _write_files(files: Iterable[Path], changed: Mapping[str, bytes], folder: Path) -> None:
    for file in files:
        is_additional = file.parent.name == TEMPLATES_FOLDER and file.suffix == ".jinja"
        target = folder / TEMPLATES_FOLDER if is_additional else folder
        target.mkdir(parents=True, exist_ok=True)
        if file.name not in changed:
            shutil.copyfile(file, target / file.name)
    for name, data in changed.items():
        (folder / name).write_bytes(data)


def _read_library(
    form: Form, files: tuple[Path, ...], settings: TokenizerConfig
) -> tuple[tokenizers.Tokenizer, Cuts | None]:
    """A tokenizer of the library, and what is known of it that none of its files says."""
    if form is Form.VOCAB_AND_MERGES:
        return read_vocab_and_merges(files[0], files[1], settings)
    if form is Form.TEKKEN:
        return read_tekken(files[0], settings)
    if form is Form.TIKTOKEN:
        return read_tiktoken(files[0], settings)
    return read_library_file(files[0]), None


def _nothing_found(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder; looked in it for {LOOKED_FOR}. Pass a checkpoint folder"
    names = sorted(entry.name for entry in folder.iterdir())
    there = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return (
        f"{folder} has no tokenizer: looked for {LOOKED_FOR}; there is {there or 'nothing'}. Copy the "
        "tokenizer files of the published model into the folder"
    )


def _without_leading(ids: list[int], token_id: int) -> list[int]:
    count = next((place for place, other in enumerate(ids) if other != token_id), len(ids))
    return ids[count:]
