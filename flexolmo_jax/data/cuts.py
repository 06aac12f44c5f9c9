"""Where a long text may be cut so that the tokens of the pieces are the tokens of the whole.

A tokenizer takes about a hundred times the memory of a text: a long one is given in pieces. A cut
lies before a character b (white space, a comma, ...) and behind a letter or digit a, or before a
space and behind anything that is none. It is safe where

1. no expression by which the tokenizer splits text can match a and go on to b. Then what is matched
   before the cut is the same whether b follows or the text ends there: looking ahead is allowed
   only for `(?!\\S)`, which holds at the end as it holds before white space. Behind the cut nothing
   depends on what was before: expressions that look back, or for beginnings and ends, are refused.
2. of one of the splits, b begins a piece of its own: an alternative matches b alone.
3. no added token holds such an a and b, or asks for whole words, or takes the space beside it.
4. the text's normal form has a beginning there: b combines with nothing before it, and with NFC a
   stays what it is.

BPE works within pieces, so that is all. Where an expression is of another kind, no cut is safe, and
the whole text is one piece.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Regex, pre_tokenizers

from .tokenizer_file import SIGN, objects_in

PIECE = 1 << 16  # characters that a tokenizer is given at once, and as many more as have no cut
SPACE = " "
BEHIND = ' \t\r\n,.;:!?)"、。，'  # b
# a: only letters and digits that every version of Unicode has; NFC leaves them as they are
_LETTER_RANGES = (
    "0-9A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0391-\u03a1\u03b1-\u03c9\u0410-\u044f"
    "\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u0905-\u0939\u0e01-\u0e30\u3041-\u3094\u30a1-\u30fa"
    "\u4e00-\u9fa5\uac00-\ud7a3"
)
LETTERS = "".join(re.findall(f"[{_LETTER_RANGES}]", "".join(map(chr, range(0xD800)))))
# before a space: what no version of Unicode takes for white space
_NO_SPACE = r"[^\s\x00-\x20\x7f-\xa0\u180e\u200b-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff]"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ONLY_SPACE = re.compile(r"\\[srnt]| |\[(?:\\[rnt]| )+\]")
_ITEM = re.compile(r"\\[sSdDwWrnt]|\\[^A-Za-z0-9]|\\[pP]\{[^}]*\}|\[.*\]|[^\\^$()|?*+{}\[\]]", re.S)
_REPEATED = re.compile(r"[*+]|\{\d+,?\d*\}|\{,\d+\}")
_GROUPS = ("(", "(?:", "(?i:")
_AT_SPACE_OR_END = ["(?!", r"\S", ")"]


def find_cuts(fields: dict[str, Any]) -> re.Pattern[str] | None:
    """What matches the character behind each safe cut; None where no cut is known to be safe.

    fields: the normalizer, pre_tokenizer and added_tokens of a tokenizer.json.
    """
    normalizers = {step.get("type") for step in objects_in(fields["normalizer"])} - {"Sequence"}
    splits = _splits(fields["pre_tokenizer"])
    if splits is None or not normalizers <= {"NFC", "NFD"}:
        return None
    crossed, begun = set[str](), set[str]()  # of `BEHIND`
    is_space_crossed = False
    for alternatives in map(_alternatives, splits):
        if alternatives is None:
            return None
        for alternative in alternatives:
            crossed |= _crossed(alternative)
            is_space_crossed |= _is_space_crossed(alternative)
            if "(?!" not in alternative:
                begun |= {b for b in BEHIND if _takes("".join(alternative), b)}
    # NFD takes letters apart, and a space may come before each piece that begins with another sign
    at_spaces = "NFD" in normalizers or _adds_spaces(fields["pre_tokenizer"])
    behind_letters = "" if at_spaces else "".join(sorted(begun - crossed))
    ways = [f"(?<=[{_LETTER_RANGES}])[{re.escape(behind_letters)}]"] if behind_letters else []
    if SPACE in begun and not is_space_crossed:
        ways.append(f"(?<={_NO_SPACE}){SPACE}")
    if not ways:
        return None
    cuts = re.compile("|".join(ways))
    added = fields["added_tokens"]
    plain = [token for token in added if not token.get("special")]
    sees_more = any(token.get(k) for token in plain for k in ("single_word", "lstrip", "rstrip"))
    names = [token["content"] for token in added]
    names += [unicodedata.normalize("NFC", name) for name in names]
    return None if sees_more or any(map(cuts.search, names)) else cuts


def pieces(text: str, cuts: re.Pattern[str]) -> Iterator[str]:
    """The text in pieces of `PIECE` characters or more, up to the next cut."""
    start = 0
    while cut := cuts.search(text, start + PIECE):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _splits(pre_tokenizer: dict[str, Any]) -> list[str] | None:
    """The expressions that split text, one after the other; None where a step is of another kind.

    Digits and punctuation are split where they begin and end, which crosses no cut.
    """
    found = []
    for step in objects_in(pre_tokenizer):
        kind, pattern = step.get("type"), step.get("pattern")
        if kind == "Split" and isinstance(pattern, dict) and "Regex" in pattern:
            if step.get("behavior") != "Isolated" or step.get("invert"):
                return None
            found.append(pattern["Regex"])
        elif kind == "ByteLevel":
            found += [_GPT_2] if step.get("use_regex", True) else []
        elif kind == "Punctuation":
            if step.get("behavior") not in ("Isolated", "Contiguous"):
                return None
        elif kind not in ("Sequence", "Digits") and step.keys() != {"Regex"}:
            return None
    return found


def _adds_spaces(pre_tokenizer: dict[str, Any]) -> bool:
    return any(
        step.get("type") == "ByteLevel" and step.get("add_prefix_space")
        for step in objects_in(pre_tokenizer)
    )


def _alternatives(expression: str) -> list[list[str]] | None:
    """The signs of each alternative; None for signs of which nothing is known here.

    Alternatives inside a group stay as they are: what can follow one another in them is a part of
    what can follow one another in a row of them all.
    """
    found: list[list[str]] = [[]]
    depth, signs = 0, SIGN.findall(expression)
    for i, sign in enumerate(signs):
        is_look = signs[i : i + 3] == _AT_SPACE_OR_END
        is_group = sign in _GROUPS and signs[i + 1 : i + 2] != ["?"]
        known = _ITEM.fullmatch(sign) or _REPEATED.fullmatch(sign) or sign in ("?", "|", ")")
        # a group that is repeated can follow itself
        follows_group = i > 0 and signs[i - 1] == ")" and bool(_REPEATED.fullmatch(sign))
        if not (known or is_look or is_group) or follows_group:
            return None
        depth += (is_look or is_group) - (sign == ")")
        if sign == "|" and depth == 0:
            found.append([])
        else:
            found[-1].append(sign)
    return found


def _crossed(alternative: Sequence[str]) -> set[str]:
    """Those of `BEHIND` that an alternative can match behind a letter or digit, or look at there
    with another result than at the end."""
    crossed, after_letter = set[str](), False
    for i, sign in enumerate(alternative):
        if sign == "(?!":
            crossed |= set(BEHIND) - set(filter(str.isspace, BEHIND)) if after_letter else set()
        elif _ITEM.fullmatch(sign) and alternative[i - 1 : i + 2] != _AT_SPACE_OR_END:
            takes_letters = _takes(sign, LETTERS)
            if after_letter or (takes_letters and _is_repeated(alternative, i)):
                crossed |= {b for b in BEHIND if _takes(sign, b)}
            after_letter = after_letter or takes_letters
    return crossed


def _is_space_crossed(alternative: Sequence[str]) -> bool:
    """Whether an alternative can match a space behind anything that is none."""
    after_sign = False
    for i, sign in enumerate(alternative):
        if _ITEM.fullmatch(sign) and alternative[i - 1 : i + 2] != _AT_SPACE_OR_END:
            takes_signs = not _ONLY_SPACE.fullmatch(sign)
            if (after_sign or (takes_signs and _is_repeated(alternative, i))) and _takes(
                sign, SPACE
            ):
                return True
            after_sign = after_sign or takes_signs
    return False


def _is_repeated(alternative: Sequence[str], i: int) -> bool:
    return any(_REPEATED.fullmatch(sign) for sign in alternative[i + 1 : i + 2])


@functools.lru_cache
def _takes(expression: str, characters: str) -> bool:
    """Whether an expression matches something in these characters: by the tokenizer's engine."""
    runs = pre_tokenizers.Split(Regex(f"(?:{expression})+"), "removed")
    left = runs.pre_tokenize_str(characters)
    return sum(len(piece) for piece, _ in left) < len(characters)
