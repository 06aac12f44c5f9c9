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

from .chat import Chat
from .conventions import Conventions
from .cuts import PIECE, find_cuts, pieces
from .tokenizer_file import LIMIT, objects_in, read_tokenizer

TOKENIZER_FILE = "tokenizer.json"
EOS, PAD = "<|endoftext|>", "<|pad|>"
MOST = 1 << 21  # tokens: a tokenizer.json of more would be longer than is read
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>")
PAD_NAMES = (PAD, "<|padding|>", "<pad>")
# the 256 characters that stand for bytes in a vocabulary: printable ones for themselves, the others
# for U+0100 and those that follow it
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(0x100) if byte not in _PRINTABLE)
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)
}

# GPT-NeoX's vocabulary leaves these out: no UTF-8 has them.
_NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))
# Control characters, and the first bytes of characters beyond U+3FFFF. SmolLM2's lacks eight.
RARE = frozenset((*range(0x20), 0x7F, *range(0xF1, 0xF5))) - frozenset(b"\t\n\r")
LOST_BITS = 8.0  # of a byte that the vocabulary cannot spell: a guess among 256
# steps that keep every byte of a text, but for its normal form and a space before it
_KEEPING = {
    "normalizer": ("Sequence", "NFC", "NFD"),
    "pre_tokenizer": (
        *("Sequence", "ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts"),
        "FixedLength",
    ),
}

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
            self.lost_bytes: bytes = _check_byte_level(fields, added, where)
            for name in (*EOS_NAMES, *PAD_NAMES):
                if name in added:
                    # Some published files forget this: then a text could spell its own end.
                    added[name]["special"] = True
            _check_special(fields["model"], added, where)
            _check_keeps_text(fields, where)
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
        self.changes_text: bool = _changes_text(fields)
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
            message = (
                f"cannot read {file}: {reason(error)}; expected a tokenizer.json or a directory"
                " that holds one"
            )
            raise UserError(message) from error
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
        chat = {"chat": self.chat.digest} if self.chat else {}
        said = self.conventions != Conventions()
        return (
            {"tokenizer": self.digest}
            | chat
            | ({"conventions": self.conventions.digest} if said else {})
        )

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
    if tokenizer.vocab_size < vocab_size:
        note(
            f"the text gives {tokenizer.vocab_size} tokens, not {vocab_size}: there is too little"
            " of it for more"
        )
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


def _check_byte_level(fields: dict[str, Any], added: dict[str, Any], where: str) -> bytes:
    """Returns the bytes of RARE that the vocabulary lacks. Raises UserError for what is no
    byte-level BPE."""
    model, split = fields["model"], fields["pre_tokenizer"] or {}
    kinds = [step["type"] for step in split.get("pretokenizers", [split]) if step]
    if model["type"] != "BPE" or "ByteLevel" not in kinds:
        kind = "SentencePiece's BPE" if model.get("byte_fallback") else f"a {model['type']}"
        raise UserError(
            f"{where} is {kind} with pre-tokenizer {kinds or None}: expected a byte-level BPE"
        )
    missing = {byte for sign, byte in BYTES.items() if sign not in model["vocab"]}
    missing -= _NEVER_IN_UTF8
    if usual := missing - RARE:
        raise UserError(
            f"{where} lacks tokens for {len(usual)} bytes of usual text and would lose it: expected"
            " a byte-level BPE"
        )
    learnt = (name for name in model["vocab"] if name not in added)
    if foreign := next((name for name in learnt if not BYTES.keys() >= set(name)), None):
        raise UserError(
            f"{where} has the token {foreign!r}, which does not spell bytes: expected a"
            " byte-level BPE"
        )
    return bytes(sorted(missing))


def _check_special(model: dict[str, Any], added: dict[str, Any], where: str) -> None:
    """Raises UserError for a special token that text can become.

    It counts no bytes and is left out of what is decoded, so that text would be lost.
    """
    special = {name for name, token in added.items() if token.get("special")}
    special &= model["vocab"].keys()
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    spelled = special & BYTES.keys() or special.intersection("".join(pair) for pair in pairs)
    # then a whole word of the vocabulary needs no merges; words of letters are not cut into parts
    if model.get("ignore_merges"):
        spelled |= {name for name in special if name.lstrip("\u0120").isalpha()}
    if spelled:
        raise UserError(
            f"{where} has the special token {min(spelled)!r:.40}, which is a part of usual text and"
            " would be lost; expected special tokens that no text becomes"
        )


def _check_keeps_text(fields: dict[str, Any], where: str) -> None:
    """Raises UserError for steps that make another text of a text, or leave out a part of it."""
    for part, keeping in _KEEPING.items():
        for step in objects_in(fields.get(part)):
            kind, removes = step.get("type"), step.get("behavior") == "Removed"
            if kind not in (None, *keeping) or (removes and not step.get("invert")):
                raise UserError(
                    f"{where} has the {part} {kind!r:.40}, which "
                    + ("leaves out a part of a text" if removes else "makes another text of a text")
                    + ", so that its bytes cannot be counted; expected a tokenizer that keeps texts"
                    " as they are, but for NFC and NFD"
                )


def _changes_text(fields: dict[str, Any]) -> bool:
    """Whether what the tokens spell may have other bytes than the text."""
    splits, added = objects_in(fields.get("pre_tokenizer")), fields["added_tokens"]
    strips = (one.get("lstrip") or one.get("rstrip") for one in added if not one.get("special"))
    return (
        any(step.get("type") != "Sequence" for step in objects_in(fields.get("normalizer")))
        or any(step.get("add_prefix_space") or step.get("invert") for step in splits)
        or any(strips)
    )


def _digest(fields: dict[str, Any]) -> str:
    # Older files join the two halves of a merge with a space.
    merges = [
        pair.split(" ") if isinstance(pair, str) else pair for pair in fields["model"]["merges"]
    ]
    canonical = fields | {"model": fields["model"] | {"merges": merges}}
    spelled = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(spelled.encode()).hexdigest()
