"""Byte-level BPE tokenizers: loading, training, and how many bytes of text each token stands for.

The file is the `tokenizer.json` of the `tokenizers` package. Only byte-level tokenizers are
accepted: with them every token stands for a known number of UTF-8 bytes, so bits per byte can be
compared between models. A vocabulary may lack bytes that text hardly ever has (RARE). Encoding
drops those, and bits per byte count `LOST_BITS` for each.

Some tokenizers do not spell a text as it is: they bring it into a normal form (NFC, as Qwen's, or
NFD), put a space before it, or leave out white space beside an added token. Bits per byte count the
bytes of the text itself (`changed_in`). What makes another text of it, such as lower case, is
refused.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from flexolmo_jax.config import Reading
from flexolmo_jax.data.documents import AS_TEXT, HELDOUT, document_files, read_training_documents
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.progress import bar, note
from flexolmo_jax.storage.files import make_folder, write_text
from flexolmo_jax.storage.outputs import check_new_file
from flexolmo_jax.storage.paths import absolute, children, reason, size_of, takes_paths
from flexolmo_jax.storage.untrusted import no_panic, read_bytes

from .byte_level import (
    BYTES,
    changes_text,
    check_byte_level,
    check_keeps_text,
    check_special,
)
from .chat import Chat
from .conventions import Conventions
from .cuts import PIECE, find_cuts, pieces
from .tokenizer_file import LIMIT, read_tokenizer

TOKENIZER_FILE = "tokenizer.json"
EOS, PAD = "<|endoftext|>", "<|pad|>"
MOST = 1 << 21  # tokens: a tokenizer.json of more would be longer than is read
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>")
PAD_NAMES = (PAD, "<|padding|>", "<pad>")
LOST_BITS = 8.0  # of a byte that the vocabulary cannot spell: a guess among 256

# How dolma2 cuts text before BPE: contractions, words with the character before them, up to three
# digits, punctuation, line ends, spaces.
PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A byte-level BPE tokenizer. No text becomes a special token, and encoding adds none.

    Attributes:
        vocab_size: the largest token id plus one.
        eos_id: the token that ends a document, which a caller appends.
        pad_id: the token that fills a record (`eos_id` where the vocabulary has no padding token).
        digest: SHA-256 (hex) of the content, however the file is written.
        lost_bytes: those of RARE that the vocabulary lacks.
        byte_lengths: uint16 [V], the UTF-8 bytes each token stands for; 0 for special tokens and
            unused ids.
        changes_text: whether its tokens may spell other bytes than a text has: see `changed_in`.
        chat: how messages become tokens; None where no template is known.
        conventions: what its publisher says beside it.
    """

    chat: Chat | None = None
    conventions: Conventions = Conventions()

    def __init__(self, content: str, where: str = "the tokenizer"):
        """Takes the content of a tokenizer.json; `where` names it in messages. Raises UserError."""
        try:
            fields = read_tokenizer(content)
            # these are settings of a publisher's pipeline, not of the tokenizer
            fields["truncation"] = fields["padding"] = None
            added: dict[str, dict[str, Any]] = {
                token["content"]: token for token in fields["added_tokens"]
            }
            self.lost_bytes: bytes = check_byte_level(fields, added, where)
            for name in (*EOS_NAMES, *PAD_NAMES):
                if name in added:
                    # Some published files forget this: then a text could spell its own end.
                    added[name]["special"] = True
            check_special(fields["model"], added, where)
            check_keeps_text(fields, where)
            with no_panic(where):
                # Encoding adds no tokens: neither by a template, which could only repeat or drop
                # the text's own, nor for bytes that are lost.
                own = {"post_processor": None, "model": fields["model"] | {"unk_token": None}}
                self._backend = Backend.from_str(json.dumps(fields | own))
                # not the file's ids: the library moves added tokens that leave a gap
                vocab = self._backend.get_vocab()
        except UserError:
            raise
        except Exception as error:  # the backend raises bare Exception
            raise UserError(
                f"{where} is not a tokenizer.json of the tokenizers package: {error}"
            ) from error
        self._backend.encode_special_tokens = True  # as plain text
        eos = next((name for name in EOS_NAMES if name in added), None)
        if eos is None:
            raise UserError(
                f"{where} has no end-of-document token: expected an added token"
                f" {' or '.join(EOS_NAMES)}"
            )
        self._content, self._where = content, where
        names = ("normalizer", "pre_tokenizer", "added_tokens")
        self._splitting = {name: fields.get(name) for name in names}
        self.changes_text: bool = changes_text(fields)
        self.vocab_size: int = max(vocab.values()) + 1
        self.eos_id: int = vocab[eos]
        self.pad_id: int = vocab[next((name for name in PAD_NAMES if name in added), eos)]
        self.digest: str = _digest(fields)
        self.byte_lengths: np.ndarray = np.zeros(self.vocab_size, np.uint16)
        for name, i in vocab.items():
            if name not in added:
                self.byte_lengths[i] = len(name)
            elif not added[name]["special"]:
                self.byte_lengths[i] = len(name.encode())

    @classmethod
    @takes_paths
    def load(cls, path: Path) -> "Tokenizer":
        """From a tokenizer.json, or from a directory with one, and with the chat template and the
        conventions that lie there. Raises UserError."""
        file = path / TOKENIZER_FILE if path.is_dir() else path
        try:
            found = cls(read_bytes(absolute(file), LIMIT).decode("utf-8"), str(file))
        except OSError as error:
            raise UserError(
                f"cannot read {file}: {reason(error)}; expected a tokenizer.json or a directory"
                " that holds one"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not a tokenizer.json: it is not UTF-8 text") from error
        if path.is_dir():
            found.chat = Chat.load(path)
            found.conventions = Conventions.load(path) or Conventions()
        return found

    def save(self, path: Path) -> None:
        """Writes the file as it was loaded: to `path`, or to tokenizer.json in this directory, and
        chat template and conventions beside it."""
        if path.is_dir() and self.chat:
            self.chat.save(path)
        if path.is_dir() and self.conventions != Conventions():
            self.conventions.save(path)
        write_text(path / TOKENIZER_FILE if path.is_dir() else path, self._content)

    @property
    def digests(self) -> dict[str, str]:
        """What a description says of the tokenizer, and of the files beside it that there are."""
        found = {"tokenizer": self.digest}
        if self.chat:
            found["chat"] = self.chat.digest
        if self.conventions != Conventions():
            found["conventions"] = self.conventions.digest
        return found

    @property
    def text_digest(self) -> str:
        """SHA-256 (hex) of all that decides which tokens a text has: the tokens before it too."""
        if not self.conventions.start:
            return self.digest
        return hashlib.sha256(json.dumps([self.digest, self.start_ids]).encode()).hexdigest()

    @property
    def start_ids(self) -> list[int]:
        """The tokens before every text. Raises UserError for one that is not there."""
        return [self._known(name) for name in self.conventions.start]

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end a completion, beside EOS. Raises UserError for one that is not
        there."""
        return [self._known(name) for name in self.conventions.ends]

    def id_of(self, name: str) -> int | None:
        """The id of a token; None where there is none of this name."""
        return self._backend.token_to_id(name)

    def _known(self, name: str) -> int:
        if (index := self.id_of(name)) is None:
            raise UserError(
                f"{self._where}: its conventions name the token {name!r:.80}, which it does not"
                " have; use the tokenizer that belongs to them"
            )
        return index

    def own_start(self) -> list[str]:
        """The tokens that the file's own post-processor puts before a text; none of one that the
        library cannot read."""
        try:
            with no_panic(self._where):
                own = Backend.from_str(self._content)
                text = own.encode("a", add_special_tokens=False).ids
                ids = own.encode("a", add_special_tokens=True).ids
        except Exception:  # the backend raises bare Exception
            return []
        length = next((i for i in range(len(ids)) if ids[i : i + len(text)] == text), 0)
        return [self.token(i) for i in ids[:length]]

    @property
    def added_tokens(self) -> dict[int, AddedToken]:
        """The tokens that are no part of the BPE, special ones among them, by id."""
        return self._backend.get_added_tokens_decoder()

    @property
    def ids(self) -> frozenset[int]:
        """All ids that have a token."""
        return frozenset(self._backend.get_vocab().values())

    def with_added(self, tokens: Mapping[int, Mapping[str, Any]]) -> "Tokenizer":
        """With more tokens that are no part of the BPE, by id: each a content and flags. Raises
        UserError as for a file."""
        fields = json.loads(self._content)
        usual = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, token in sorted(tokens.items()):
            flags = {key: bool(token.get(key, no)) for key, no in usual.items()}
            special = bool(token.get("special", True))
            fields["added_tokens"].append(
                {"id": i, "content": token["content"], **flags, "special": special}
            )
        return Tokenizer(json.dumps(fields, ensure_ascii=False), self._where)

    def token(self, index: int) -> str:
        """The name of a special token. Raises KeyError where there is no token of this id."""
        with no_panic(self._where):
            name = self._backend.id_to_token(index)
        if name is None:
            raise KeyError(index)
        return name

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, special tokens neither added nor recognised."""
        return list(itertools.chain.from_iterable(self.encode_pieces(text)))

    def encode_pieces(self, text: str) -> Iterator[list[int]]:
        """The same, a piece of the text after the other, in the memory of one: see cuts.py."""
        cuts = self._cuts if len(text) > PIECE else None
        for piece in pieces(text, cuts) if cuts else (text,):
            yield self.encode_batch([piece])[0]

    def encode_with_special(self, text: str, add: bool = True) -> list[int]:
        """The token ids of a text as `transformers` reads it: the names of special tokens become
        these, and with `add` the file's own template adds some, such as one that begins a text."""
        with no_panic(self._where):
            return self._as_published.encode(text, add_special_tokens=add).ids

    @functools.cached_property
    def _as_published(self) -> Backend:
        with no_panic(self._where):
            fields = read_tokenizer(self._content) | {"truncation": None, "padding": None}
            return Backend.from_str(json.dumps(fields))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel, in memory that grows with their lengths."""
        with no_panic(self._where):
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]

    @functools.cached_property
    def _cuts(self) -> re.Pattern[str] | None:
        with no_panic(self._where):
            return find_cuts(self._splitting)

    def lost_in(self, text: str) -> int:
        """How many of the text's UTF-8 bytes no token stands for."""
        content = text.encode() if self.lost_bytes else b""
        return len(content) - len(content.translate(None, self.lost_bytes))

    def changed_in(self, text: str, ids: np.ndarray) -> int:
        """How many bytes more the text has than its tokens spell, without those that are lost.

        0 where the tokenizer spells texts as they are; it may be less. `ids`: int [n], the tokens.
        """
        if not self.changes_text:
            return 0
        spelled = int(self.byte_lengths[ids].sum(dtype=np.int64))
        return len(text.encode()) - spelled - self.lost_in(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: nothing for special tokens, U+FFFD for bytes that are not UTF-8."""
        with no_panic(self._where):
            return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)


@takes_paths
def train_tokenizer(
    files: Sequence[Path],
    vocab_size: int,
    out: Path,
    *,
    heldout: float = HELDOUT,
    sample_bytes: int = 1 << 28,
    reading: Reading = AS_TEXT,
) -> Tokenizer:
    """Trains a byte-level BPE on documents and writes it; the same files give the same tokenizer.

    A tokenizer reveals what it was trained on: use public text only.

    Args:
        files: document files or directories of them.
        vocab_size: counts the two special tokens and the 256 bytes too. Too little text gives a
            smaller one, and a note says so.
        out: a new file that ends in .json, or a new or empty directory for a tokenizer.json.
        heldout: the share of documents that are left out, because models are evaluated on them (as
            in `prepare`).
        sample_bytes: how much text to learn from: the first part of every file, in proportion to
            its size.
        reading: how the documents are read.

    Raises:
        UserError: a vocabulary smaller than 258 or larger than MOST, no text, an output that
            exists, or documents that cannot be read.
    """
    if not len(BYTES) + 2 <= vocab_size <= MOST:
        told = f"{len(BYTES) + 2} or more (256 bytes, {EOS}, {PAD}), {MOST} at most"
        raise UserError(f"got a vocabulary of {vocab_size} tokens, expected {told}")
    if out.is_file() or children(out):
        raise UserError(f"{out} exists: expected a new file or a new or empty directory")
    file = out if out.suffix == ".json" and not out.is_dir() else out / TOKENIZER_FILE
    check_new_file(file)
    inputs = [file for path in files for file in document_files(path, reading)]
    tokenizer = _trained(_sample(inputs, heldout, sample_bytes, reading), vocab_size)
    if (got := tokenizer.vocab_size) < vocab_size:
        note(f"the text gives {got} tokens, not {vocab_size}: there is too little of it for more")
    make_folder(file.parent)
    tokenizer.save(file)
    return tokenizer


def _trained(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(BYTES),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str())


def _sample(
    files: Sequence[Path], heldout: float, sample_bytes: int, reading: Reading
) -> Iterator[str]:
    """The first part of every file, in proportion to its size. UserError where none has text."""
    sizes = [size_of(file) for file in files]
    any_text = False
    with bar("tokenizer", min(sample_bytes, sum(sizes)), in_bytes=True) as advance:
        for file, size in zip(files, sizes, strict=True):
            left = max(1, sample_bytes * size // max(1, sum(sizes)))
            for text in read_training_documents(file, heldout, reading):
                # A character is at least one byte: this cuts only what is over the limit.
                text = text[:left]
                any_text = any_text or bool(text)
                yield text
                taken = len(text.encode())
                advance(taken)
                left -= taken
                if left <= 0:
                    break
    if not any_text:
        raise UserError(
            f"no text in {', '.join(str(file) for file in files) or 'no files'}: expected documents"
            " to learn from that are not held out"
        )


def _digest(fields: dict[str, Any]) -> str:
    # Older files join the two halves of a merge with a space.
    merges = [
        pair.split(" ") if isinstance(pair, str) else pair for pair in fields["model"]["merges"]
    ]
    canonical = fields | {"model": fields["model"] | {"merges": merges}}
    spelled = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(spelled.encode()).hexdigest()
