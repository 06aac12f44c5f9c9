"""A stranger's tokenizer.json, checked before the library sees it.

Nothing in it may take more memory or time than its size tells:

ids             below 2**24: the library makes room for all ids up to the largest
replacements    together at most 64 times as long as what they replace
expressions     no alternatives or repetitions inside a repeated group: matching may never end
the BPE model   no reference to a token that is missing
"""

import re
from collections.abc import Iterator
from typing import Any, NoReturn

from flexolmo_jax.storage.untrusted import parse_json

LIMIT = 1 << 26  # bytes of the file
# commas and brackets in it; 200,000 tokens and 450,000 merges, written as pairs, have 1.6 million
SIGNS = 1 << 22
IDS = 1 << 24
EXPANSION = 64  # how many times as long a text may become before it is cut into tokens
STEPS = 64  # of normalizers, pre-tokenizers and decoders
EXPRESSION = 4000  # characters of a regular expression
TOKEN = 65_535  # bytes that one token may stand for
# how many times as long a normalizer or pre-tokenizer can make a text; Unicode gives the bounds
GROWTH = {"ByteLevel": 2, "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18}
# A group's beginning, an escape, a set of characters, a repetition, or a single sign of a regular
# expression.
SIGN = re.compile(
    r"\((?:\?(?:[a-zA-Z-]*:|[=!>]|<[=!]))?|\\[pP]\{[^}]*\}|\\."
    r"|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.",
    re.DOTALL,
)
_REPEATS = re.compile(r"[*+]|\{\d*,?\d*\}")
_EXACTLY = re.compile(r"\{\d+\}")
_NEIGHBOURS = 2  # repetitions of unknown length, one after the other


def read_tokenizer(content: str) -> dict[str, Any]:
    """The fields of a tokenizer.json. Raises ValueError where it is not one, or is not safe."""
    fields = parse_json(content, SIGNS)
    if (
        not isinstance(fields, dict)
        or not isinstance(fields.get("model"), dict)
        or not isinstance(fields.get("added_tokens"), list)
    ):
        raise ValueError("it has no model, or no list of added_tokens")
    _check_tokens(fields["model"], fields["added_tokens"])
    _check_model(fields["model"])
    _check_steps(fields)
    return fields


def _check_tokens(model: dict[str, Any], added: list[Any]) -> None:
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise ValueError(
            f"its model is a {model.get('type')!r:.40} without a vocabulary and merges; expected a"
            " byte-level BPE"
        )
    if not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in added
    ):
        raise ValueError("an added token has no content")
    for index in (*model["vocab"].values(), *(token.get("id") for token in added)):
        if type(index) is not int or not 0 <= index < IDS:
            raise ValueError(f"a token has the id {index!r:.40}; expected one from 0 to {IDS - 1}")
    # each character of the vocabulary stands for a byte, those of an added token for themselves
    lengths = {name: len(name) for name in model["vocab"]}
    lengths |= {token["content"]: len(token["content"].encode()) for token in added}
    for name, length in lengths.items():
        if length > TOKEN or len(name.encode()) > 2 * TOKEN:
            raise ValueError(f"the token {name!r:.40}... stands for more than {TOKEN} bytes")


def _check_model(model: dict[str, Any]) -> None:
    unknown = model.get("unk_token")
    if unknown is not None and (not isinstance(unknown, str) or unknown not in model["vocab"]):
        raise ValueError(f"its unk_token {unknown!r:.40} is not in the vocabulary")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"its {key} is {model[key]!r:.40}; expected none of a byte-level BPE")


def _check_steps(fields: dict[str, Any]) -> None:
    expansion, steps = 1, 0
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        for step in objects_in(fields.get(part)):
            steps += 1
            kind = step.get("type")
            if kind == "Precompiled":
                raise ValueError(
                    "it has a Precompiled normalizer, which may change a text in any way"
                )
            if part in ("normalizer", "pre_tokenizer") and isinstance(kind, str):
                expansion *= GROWTH.get(kind, 1)
            for key in ("content", "prepend", "replacement"):
                if isinstance(text := step.get(key), str):
                    expansion *= max(len(text.encode()), 1)
            pattern = step.get("pattern")
            is_empty = isinstance(pattern, dict) and "" in pattern.values()
            if is_empty or step.get("length") == 0:
                raise ValueError(f"its {kind!r:.40} looks for empty text; expected a character")
            if isinstance(pattern, dict) and "Regex" in pattern:
                _check_expression(pattern["Regex"])
    if steps > STEPS or expansion > EXPANSION:
        raise ValueError(
            f"it makes text up to {expansion} times as long in {steps} steps; expected at most"
            f" {EXPANSION} times in {STEPS}"
        )


def objects_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a part of a tokenizer."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from objects_in(inner)


def _check_expression(expression: Any) -> None:
    """Raises ValueError for a regular expression that may take (almost) for ever to match.

    A text can take so long when there are many ways to match it. A repeated group must therefore
    match in one way only: it may hold neither alternatives nor parts of several lengths. And only a
    few repetitions of unknown length may follow each other without a plain sign between them. What
    is left takes at most the square of the text's length.
    """
    if not isinstance(expression, str) or len(expression) > EXPRESSION:
        raise ValueError(f"it has an expression that is no text of at most {EXPRESSION} characters")

    def refuse(why: str) -> NoReturn:
        raise ValueError(f"its expression {expression!r:.80} {why}")

    # for the whole expression and each group that is open: whether it can match in several ways
    varied = [False]
    # whether such a group has just ended; whether a sign has just come that nothing repeats
    closed = plain = False
    neighbours = 0
    for sign in SIGN.findall(expression):
        is_repetition = bool(_REPEATS.fullmatch(sign))
        is_open_ended = is_repetition and not _EXACTLY.fullmatch(sign)
        if _refers_back(sign):
            refuse("refers to its own groups")
        if is_repetition and closed:
            refuse("repeats a group that matches in several ways")
        neighbours += is_open_ended
        if neighbours > _NEIGHBOURS:
            refuse("has several repetitions one behind the other")
        varied[-1] = varied[-1] or is_open_ended or sign in "|?"
        if sign == "|" or (plain and not is_repetition and sign not in "?)"):
            neighbours = 0
        closed = sign == ")" and len(varied) > 1 and varied.pop()
        if sign.startswith("("):
            varied.append(False)
        varied[-1] = varied[-1] or closed
        plain = not (is_repetition or sign in "|?)" or sign.startswith("("))


def _refers_back(sign: str) -> bool:
    """Whether a sign names a group, or repeats what one has matched."""
    is_named_group = sign.startswith("(?<") and sign not in ("(?<=", "(?<!")
    return is_named_group or bool(re.fullmatch(r"\\[gk1-9]", sign))
