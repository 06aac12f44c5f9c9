"""Chat templates: how messages become the tokens that an instruct model was trained on.

    chat.encode(tokenizer, [{"role": "user", "content": "Hello"}])     # the model speaks next

A chat is the Jinja text of a template, the special tokens that it may name, and the tokens that end
a turn. It lies in `chat.json` beside `tokenizer.json`. Token ids equal those of `transformers`
(`apply_chat_template`), but for one thing: a message that spells a special token stays text. Where
the text of messages could be read as such a token, a mark is put before it. The mark is a character
that no message has. It is taken out after the template's own special tokens have been found.

A template may cut messages and join the parts. So all is rendered a second time, with a mark before
every character with which a special token begins. The second text is taken if it is the same, but
for its marks. It is not where the template itself asks how a message begins.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from flexolmo_jax.errors import UserError

from .beside import Beside
from .rendering import TemplateError, check_syntax, render

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

CHAT_FILE = "chat.json"
TEMPLATE_LIMIT = 1 << 16  # bytes
ENDS = 8  # tokens that may end a turn
NAME_LIMIT = 1000  # characters of a token
# the names that a template may use, as `tokenizer_config.json` has them
TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
MARKS = range(0xE000, 0xF900)  # characters for private use, which stand for nothing

Message = Mapping[str, str]  # role and content
_Name = Annotated[str, Field(min_length=1, max_length=NAME_LIMIT)]


@dataclass(frozen=True)
class _File:
    """The content of `chat.json`."""

    format: Literal[1]
    template: Annotated[str, Field(min_length=1, max_length=TEMPLATE_LIMIT)]
    tokens: dict[Annotated[str, Field(pattern=f"^({'|'.join(TOKEN_NAMES)})$")], _Name]
    ends: Annotated[tuple[_Name, ...], Field(min_length=1, max_length=ENDS)]


@dataclass(frozen=True)
class Chat(Beside):
    """A chat template. `make_chat` checks one of another's."""

    FILE, SCHEMA = CHAT_FILE, _File
    SIGNS = TEMPLATE_LIMIT + 100

    template: str  # Jinja
    tokens: Mapping[str, str]  # special tokens by the names that the template uses: bos_token, ...
    ends: tuple[str, ...]  # tokens that end a turn

    def special_ids(self, tokenizer: "Tokenizer") -> frozenset[int]:
        """The ids of the tokens that no message can spell, and that no reply shows."""
        return frozenset(SpecialTokens(self, tokenizer).ids.values())

    def end_ids(self, tokenizer: "Tokenizer") -> list[int]:
        """The ids of the tokens that end a turn. Raises UserError for one that is not there."""
        ids = {token.content: i for i, token in tokenizer.added_tokens.items()}
        if unknown := [name for name in self.ends if name not in ids]:
            raise UserError(
                f"the chat template ends a turn with {unknown[0]!r:.80}, which the tokenizer does"
                " not have; use the tokenizer that belongs to it"
            )
        return [ids[name] for name in self.ends]

    def render(self, messages: Sequence[Message], generation_prompt: bool = True) -> str:
        """The text of messages, special tokens by their names.

        With `generation_prompt` it ends where the model is to answer. Raises UserError for messages
        that are not text with a role, and where the template refuses them, fails or takes too much.
        """
        check_messages(messages)
        return self._rendered(generation_prompt, messages)[0] or ""

    def render_open(self, messages: Sequence[Message]) -> str:
        """The text of messages up to the end of the last, which the model goes on with.

        As `transformers` does with `continue_final_message`: spaces at that end stay where the
        template keeps them. Raises UserError as `render` does, and where the text lacks that end.
        """
        *others, last = check_messages(messages)
        (mark,) = unused([self.template, *contents(messages)], 1)
        marked = dict(last) | {"content": f"{last['content']}{mark} "}
        text, found, after = self.render([*others, marked], generation_prompt=False).rpartition(
            mark
        )
        if not found:
            raise UserError(
                "the chat template leaves out the end of the last message, which the model is to go"
                " on with; leave that message out"
            )
        return text if after.startswith(" ") else text.rstrip()

    def variables(self, messages: Sequence[Message], generation_prompt: bool) -> dict[str, Any]:
        """What the template is given."""
        same = {"tools": None, "documents": None, "add_generation_prompt": generation_prompt}
        return {**same, **self.tokens, "messages": [dict(message) for message in messages]}

    def _rendered(self, prompt: bool, *ways: Sequence[Message]) -> list[str | None]:
        """`render` of each; None where only the first can be rendered."""
        try:
            return render(self.template, *(self.variables(way, prompt) for way in ways))
        except TemplateError as error:
            raise UserError(f"the chat template fails on these messages: {error!s:.300}") from None

    def encode(
        self, tokenizer: "Tokenizer", messages: Sequence[Message], generation_prompt: bool = True
    ) -> list[int]:
        """The token ids of what `render` gives. Special tokens are the template's own only."""
        special = SpecialTokens(self, tokenizer)
        (mark,) = unused([self.template, *contents(check_messages(messages))], 1)
        few, many = self._rendered(generation_prompt, *special.both_ways(messages, mark))
        assert few is not None
        return special.encode(safest(few, many, mark), mark)


class Piece(NamedTuple):
    """A special token, or text between two."""

    start: int  # characters before it, without marks
    text: str
    ids: list[int]


class SpecialTokens:
    """The tokens that no message may spell: special ones, and those that the chat names.

    Some tokenizer.json forget to call the latter special.
    """

    def __init__(self, chat: Chat, tokenizer: "Tokenizer"):
        named = {*chat.tokens.values(), *chat.ends}
        added = tokenizer.added_tokens
        self._tokenizer = tokenizer
        self._tokens = {t.content: t for t in added.values() if t.special or t.content in named}
        self.ids = {t.content: i for i, t in added.items() if t.content in self._tokens}
        self._special = set(self.ids.values())
        self._lengths = sorted({len(name) for name in self._tokens}, reverse=True)
        starts = sorted({name[0] for name in self._tokens})
        self._start = re.compile(f"[{''.join(map(re.escape, starts))}]" if starts else "(?!)")
        # between the first and the second character of those that the tokenizer would find in text
        within = (
            f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})"
            for name in sorted(self._tokens)
            if not self._tokens[name].special
        )
        self._within = re.compile("|".join(within) or "(?!)")

    def both_ways(self, messages: Sequence[Message], mark: str) -> list[list[Message]]:
        """The messages with few and with many marks; `safest` chooses between what they give."""
        return [
            [{key: self._marked(m[key], mark, everywhere) for key in m} for m in messages]
            for everywhere in (False, True)
        ]

    def _marked(self, text: str, mark: str, everywhere: bool) -> str:
        """A message's text, with a mark before each place where a special token begins.

        It may also begin where the text ends, or end where it begins: what the template adds there
        could complete it. `everywhere`: where one could begin at all.
        """
        starts = (match.start() for match in self._start.finditer(text))
        places = {place for place in starts if everywhere or self._begins(text, place)}
        if self._ends(text.lstrip()):
            places.add(len(text) - len(text.lstrip()))
        parts, start = [], 0
        for place in sorted(places):
            parts.append(text[start:place])
            start = place
        return mark.join([*parts, text[start:]])

    def _begins(self, text: str, place: int) -> bool:
        if self._at(text, place):
            return True
        end = text[place : place + self._lengths[0]]
        if place + len(end) < len(text.rstrip()):
            return False
        return any(name.startswith((end, end.rstrip())) for name in self._tokens)

    def _ends(self, text: str) -> bool:
        """Whether a text begins as a special token ends."""
        names = [name for name in self._tokens if text[:1] in name]
        return any(text.startswith(name[i:]) for name in names for i in range(1, len(name)))

    def _at(self, text: str, place: int) -> str | None:
        """The longest special token that begins at this place."""
        names = (text[place : place + length] for length in self._lengths)
        return next((name for name in names if name in self._tokens), None)

    def encode(self, text: str, mark: str) -> list[int]:
        """The ids of rendered text. Where a mark is, no special token begins."""
        return [i for piece in self.pieces(text, mark) for i in piece.ids]

    def pieces(self, text: str, mark: str) -> Iterator[Piece]:
        """Rendered text, cut behind and before each special token."""
        start, place = 0, 0
        for match in self._start.finditer(text):
            at = match.start()
            if at < start or text[at - 1 : at] == mark or (name := self._at(text, at)) is None:
                continue
            plain, token = text[start:at].replace(mark, ""), self._tokens[name]
            yield Piece(place, plain, self.plain(plain.rstrip() if token.lstrip else plain))
            place += len(plain)
            yield Piece(place, name, [self.ids[name]])
            start, place = at + len(name), place + len(name)
            if token.rstrip:
                space = len(text) - start - len(text[start:].lstrip())
                start, place = start + space, place + space
        plain = text[start:].replace(mark, "")
        yield Piece(place, plain, self.plain(plain))

    def plain(self, text: str) -> list[int]:
        """The ids of text without special tokens."""
        parts = self._within.split(text)
        found = [i for part in parts if part for i in self._tokenizer.encode(part)]
        if not self._special.isdisjoint(found):
            raise UserError(
                "text of a message becomes a special token with this tokenizer; take it out of"
                " the message"
            )
        return found


def make_chat(
    template: str,
    tokens: Mapping[str, str],
    ends: Sequence[str],
    tokenizer: "Tokenizer",
    where: str,
) -> Chat:
    """The chat of a template that another made.

    Args:
        template: its Jinja text.
        tokens: special tokens by name (TOKEN_NAMES; others are left out). One that the template
            does not use may be unknown to the tokenizer: it is left out too.
        ends: the tokens that end a turn; none: that which ends a document.
        where: the file or files that this comes from, for messages.

    Raises:
        UserError: the template is too large or malformed, or a token is not in the tokenizer.
    """
    added = tokenizer.added_tokens.values()
    known = {token.content for token in added if len(token.content) <= NAME_LIMIT}
    if (size := len(template.encode(errors="replace"))) > TEMPLATE_LIMIT or not template:
        raise UserError(
            f"{where}: the chat template has {size} bytes; expected 1 to {TEMPLATE_LIMIT}"
        )
    used = {name for name in TOKEN_NAMES if re.search(rf"\b{name}\b", template)}
    given = {name: tokens[name] for name in TOKEN_NAMES if name in tokens}
    ends = tuple(dict.fromkeys(ends)) or (tokenizer.token(tokenizer.eos_id),)
    needed = [given[name] for name in used & given.keys()]
    if unknown := [token for token in (*needed, *ends) if token not in known]:
        raise UserError(
            f"{where}: the chat template uses the special token {unknown[0]!r:.80}, which"
            " tokenizer.json does not have; use the tokenizer that belongs to it"
        )
    if len(ends) > ENDS:
        raise UserError(f"{where}: {len(ends)} tokens end a turn; expected at most {ENDS}")
    try:
        check_syntax(template)
    except TemplateError as error:
        raise UserError(f"{where}: the chat template is malformed: {error!s:.200}") from None
    return Chat(template, {k: v for k, v in given.items() if v in known}, ends)


def check_messages(messages: Any) -> tuple[Message, ...]:
    """The same. Raises UserError for what is no list of messages."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"messages are {messages!r:.80}; expected a list of at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            got = sorted(map(str, message)) if isinstance(message, Mapping) else message
            raise UserError(f"message {number} has {got!r:.80}; expected a role and a content")
        for key, value in message.items():
            if not isinstance(value, str):
                raise UserError(f"message {number}: its {key} is {value!r:.80}; expected text")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"message {number}: character {error.start} of its {key} is not Unicode; give"
                    " it in UTF-8"
                ) from None
    return tuple(messages)


def contents(messages: Sequence[Message]) -> list[str]:
    """Every text in messages."""
    return [text for message in messages for text in message.values()]


def unused(texts: Sequence[str], count: int) -> list[str]:
    """Characters that none of the texts has."""
    used = set().union(*texts)
    found = list(itertools.islice((chr(c) for c in MARKS if chr(c) not in used), count))
    if len(found) < count:
        raise UserError("messages have every character for private use; take some out")
    return found


def safest(few: str, many: str | None, mark: str) -> str:
    """Of texts with few and with many marks, the second if it is the same but for the marks."""
    if many is not None and many.replace(mark, "") == few.replace(mark, ""):
        return many
    return few
