"""Documents -> token ids with EOS; of conversations also which of them are the assistant's.

A text becomes its tokens, behind BOS if the model's texts begin so. A conversation becomes what the
tokenizer's chat template makes of it, as `Chat.encode` does. EOS comes behind both, but not twice:
some templates end with it themselves.

Which tokens are the assistant's, its text and the token that ends its turn, is found in one of two
ways:

1. The template says so: what it puts between `{% generation %}` and `{% endgeneration %}`, as in
   transformers' `return_assistant_tokens_mask`.
2. What comes before a message of the assistant, up to where the model is to answer, has to be a
   beginning of the whole; and so has what ends with that message. The turn lies between. It is cut
   behind the last token in it that ends a turn.

A token that holds the last character of what is before, and the first of the turn, is the turn's.
"""

import contextlib
import itertools
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flexolmo_jax.data.chat import Chat, Piece, SpecialTokens, contents, safest, unused
from flexolmo_jax.data.documents import ASSISTANT, Document
from flexolmo_jax.data.records import token_dtype
from flexolmo_jax.data.rendering import Asked, Rendered, TemplateError, render_all
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError

# Records are to be the same on every day. Templates of Llama 3 fall back to this date.
DATE = "2024-07-26"
_MARKS_TURNS = re.compile(r"\{%[-+]?\s*generation\b")
_AS_TEXT = 'or give the document as "text"'

Turns = list[tuple[int, int]]  # where the assistant's begin and end in the text


class Tokenized(NamedTuple):
    """A document's tokens, EOS included, and how many bytes of it they do not spell.

    Some of these are lost, and some changed: see `Tokenizer.lost_in` and `changed_in`. `context`:
    bool, the tokens of a conversation that are not the assistant's; None of a text.
    """

    tokens: np.ndarray
    lost_bytes: int
    changed_bytes: int = 0
    context: np.ndarray | None = None
    lost_in_context: int = 0  # of `lost_bytes`
    changed_in_context: int = 0  # of `changed_bytes`


def tokenized(documents: Sequence[Document], tokenizer: Tokenizer) -> list[Tokenized]:
    """The tokens of each document.

    Raises UserError, with file and line, for a conversation without a chat template, and for one
    that the template cannot render, or not so that the assistant's tokens can be told.
    """
    conversations = [document for document in documents if document.messages]
    of_messages = _conversations(conversations, tokenizer) if conversations else iter(())
    return [next(of_messages) if one.messages else _text(one.text, tokenizer) for one in documents]


def _text(text: str, tokenizer: Tokenizer) -> Tokenized:
    # One document at a time: for several, the tokenizer would start threads of its own.
    each = (tokenizer.start_ids, *tokenizer.encode_pieces(text), [tokenizer.eos_id])
    tokens = np.concatenate([np.array(ids, token_dtype(tokenizer.vocab_size)) for ids in each])
    return Tokenized(tokens, tokenizer.lost_in(text), tokenizer.changed_in(text, tokens))


def _conversations(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[Tokenized]:
    if (chat := tokenizer.chat) is None:
        raise UserError(
            f"{documents[0].where}: it has messages, and the tokenizer has no chat template; give"
            f" the anchor or model of an instruct model as the tokenizer, {_AS_TEXT}"
        )
    special = SpecialTokens(chat, tokenizer)
    ends = set(chat.end_ids(tokenizer))
    each: list[_Conversation] = []
    for document in documents:
        with _told_where(document):
            each.append(_Conversation(document, chat, special))
    asked = [one for conversation in each for one in conversation.asked]
    answers = render_all(chat.template, asked, DATE)
    for document, conversation in zip(documents, each, strict=True):
        few, many = itertools.islice(answers, 2)
        with _told_where(document):
            yield conversation.tokens(few, many, ends, tokenizer)


@contextlib.contextmanager
def _told_where(document: Document) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{document.where}: {error}") from None


class _Conversation:
    """A conversation on its way to tokens: what is asked of the template, and what it answers."""

    def __init__(self, document: Document, chat: Chat, special: SpecialTokens):
        self._special = special
        texts = [chat.template, *contents(document.messages)]
        self._mark, self._before, self._behind = unused(texts, 3)
        ways = special.both_ways(document.messages, self._mark)
        few, many = (Asked(chat.variables(way, generation_prompt=False)) for way in ways)
        self._is_marked = bool(_MARKS_TURNS.search(chat.template))
        if self._is_marked:
            few = few._replace(around=(self._before, self._behind))
        else:
            turns = [i for i, one in enumerate(document.messages) if one["role"] == ASSISTANT]
            few = few._replace(beginnings=[b for i in turns for b in ((i, True), (i + 1, False))])
        self.asked = (few, many)

    def tokens(
        self,
        few: Rendered | TemplateError,
        many: Rendered | TemplateError,
        ends: set[int],
        tokenizer: Tokenizer,
    ) -> Tokenized:
        """The tokens of what the template made of few and of many marks; see `safest`."""
        if isinstance(few, TemplateError):
            raise UserError(f"the chat template fails on these messages: {few!s:.300}")
        text, turns = self._marked_turns(few.text) if self._is_marked else self._turns(few)
        other = many.text if isinstance(many, Rendered) else None
        pieces = list(self._special.pieces(safest(text, other, self._mark), self._mark))
        if not self._is_marked:
            turns = _cut_behind_ends(turns, pieces, ends)
        text = self._plain(text)
        is_said = np.zeros(len(text), bool)
        for start, end in turns:
            is_said[start:end] = True
        ids = [i for piece in pieces for i in piece.ids]
        said = [self._said(piece, is_said, tokenizer) for piece in pieces]
        changed, of_answers = self._changed(pieces, said, is_said, tokenizer)
        if ids[-1:] != [tokenizer.eos_id]:
            ids.append(tokenizer.eos_id)
            said.append(np.zeros(1, bool))
        context = ~np.concatenate(said)
        if context.all():
            raise UserError(
                "the chat template writes nothing of what the assistant says; give the tokenizer of"
                f" another instruct model, {_AS_TEXT}"
            )
        answers = "".join(text[start:end] for start, end in turns)
        array = np.array(ids, token_dtype(tokenizer.vocab_size))
        lost = tokenizer.lost_in(text)
        of_context = lost - tokenizer.lost_in(answers), changed - of_answers
        return Tokenized(array, lost, changed, context, *of_context)

    def _turns(self, rendered: Rendered) -> tuple[str, Turns]:
        """The text, and the turns by its beginnings. Raises UserError where one is none."""
        lengths = [length for length in rendered.beginnings if length is not None]
        if len(lengths) < len(rendered.beginnings):
            raise UserError(
                "which tokens are the assistant's cannot be told: the chat template writes a"
                " message of the assistant otherwise when others follow, or begins it otherwise"
                " than where the model is to answer (as those that take out earlier thinking);"
                f" give a conversation of one answer, {_AS_TEXT}"
            )
        places = [len(self._plain(rendered.text[:length])) for length in lengths]
        return rendered.text, list(zip(places[::2], places[1::2], strict=True))

    def _marked_turns(self, text: str) -> tuple[str, Turns]:
        """The text without the marks of turns, and the turns between them."""
        parts = re.split(f"([{self._before}{self._behind}])", text)
        plain, signs = parts[::2], parts[1::2]
        if signs != [self._before, self._behind] * (len(signs) // 2):
            raise UserError(
                "which tokens are the assistant's cannot be told: the chat template cuts what it"
                " marks with {% generation %}; give the tokenizer of another instruct model,"
                f" {_AS_TEXT}"
            )
        places = list(itertools.accumulate(len(self._plain(part)) for part in plain))
        return "".join(plain), list(zip(places[:-1:2], places[1::2], strict=True))

    def _said(self, piece: Piece, is_said: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
        """bool [n]: the tokens of a piece that hold a character of the assistant's."""
        of_piece = is_said[piece.start : piece.start + len(piece.text)]
        if of_piece.all() or not of_piece.any():
            return np.full(len(piece.ids), of_piece.any())
        lengths = tokenizer.byte_lengths[piece.ids].astype(int)
        ends = np.cumsum(lengths)

        def bytes_before(place: int) -> int:
            if place == len(piece.text):
                return int(ends[-1])
            return int(tokenizer.byte_lengths[self._special.plain(piece.text[:place])].sum())

        edges = np.flatnonzero(np.diff(of_piece, prepend=False, append=False)).tolist()
        found = np.zeros(len(piece.ids), bool)
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            found |= (ends > bytes_before(first)) & (ends - lengths < bytes_before(last))
        return found

    def _changed(
        self,
        pieces: Sequence[Piece],
        said: Sequence[np.ndarray],
        is_said: np.ndarray,
        tokenizer: Tokenizer,
    ) -> tuple[int, int]:
        """`Tokenizer.changed_in` of all text and of the assistant's, without special tokens."""
        changed = of_answers = 0
        for piece, own in zip(pieces, said, strict=True) if tokenizer.changes_text else ():
            if piece.ids == [self._special.ids.get(piece.text)]:
                continue
            ids, start = np.array(piece.ids, int), piece.start
            answer = itertools.compress(piece.text, is_said[start : start + len(piece.text)])
            changed += tokenizer.changed_in(piece.text, ids)
            of_answers += tokenizer.changed_in("".join(answer), ids[own])
        return changed, of_answers

    def _plain(self, text: str) -> str:
        return text.replace(self._mark, "")


def _cut_behind_ends(turns: Turns, pieces: Sequence[Piece], ends: set[int]) -> Turns:
    """Each turn until the last token in it that ends a turn; as it is where none does."""
    places = [piece.start + len(piece.text) for piece in pieces if not ends.isdisjoint(piece.ids)]
    cut = []
    for start, end in turns:
        at = bisect_right(places, end)
        cut.append((start, places[at - 1] if at and places[at - 1] > start else end))
    return cut
