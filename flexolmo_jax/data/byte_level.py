"""Which tokenizers are taken: byte-level BPEs whose tokens spell a text, and whose special tokens
no text can become."""

from typing import Any

from tokenizers import Regex, pre_tokenizers

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.untrusted import no_panic

from .tokenizer_file import objects_in

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
# steps that keep every byte of a text, but for its normal form and a space before it
_KEEPING = {
    "normalizer": ("Sequence", "NFC", "NFD"),
    "pre_tokenizer": ("Sequence", "ByteLevel", "Split", "Digits", "Punctuation", "FixedLength"),
}
# what a split that keeps only what it matches has to match whole
_PROBE = "a b\n\n  c\t1!\u00e9\u3000\r\n"


def check_byte_level(fields: dict[str, Any], added: dict[str, Any], where: str) -> bytes:
    """Returns the bytes of RARE that the vocabulary lacks. Raises UserError for what is no
    byte-level BPE."""
    model, split = fields["model"], fields["pre_tokenizer"] or {}
    kinds = [step["type"] for step in split.get("pretokenizers", [split]) if step]
    levels = [step for step in objects_in(split) if step.get("type") == "ByteLevel"]
    # a second one would take the signs of bytes for text
    if model["type"] != "BPE" or "ByteLevel" not in kinds or len(levels) > 1:
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


def check_special(model: dict[str, Any], added: dict[str, Any], where: str) -> None:
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


def check_keeps_text(fields: dict[str, Any], where: str) -> None:
    """Raises UserError for steps that make another text of a text, or leave out a part of it."""
    for part, keeping in _KEEPING.items():
        for step in objects_in(fields.get(part)):
            kind, removes = step.get("type"), _removes(step, where)
            if kind not in (None, *keeping) or removes:
                raise UserError(
                    f"{where} has the {part} {kind!r:.40}, which "
                    + ("leaves out a part of a text" if removes else "makes another text of a text")
                    + ", so that its bytes cannot be counted; expected a tokenizer that keeps texts"
                    " as they are, but for NFC and NFD"
                )


def _removes(step: dict[str, Any], where: str) -> bool:
    """Whether a step leaves out a part of a text."""
    if step.get("behavior") != "Removed" or not step.get("invert"):
        return step.get("behavior") == "Removed"
    expression = step["pattern"].get("String") or Regex(step["pattern"]["Regex"])
    with no_panic(where):
        kept = pre_tokenizers.Split(expression, "removed", invert=True).pre_tokenize_str(_PROBE)
    return "".join(part for part, _ in kept) != _PROBE


def changes_text(fields: dict[str, Any]) -> bool:
    """Whether what the tokens spell may have other bytes than the text."""
    splits, added = objects_in(fields.get("pre_tokenizer")), fields["added_tokens"]
    strips = (one.get("lstrip") or one.get("rstrip") for one in added if not one.get("special"))
    return (
        any(step.get("type") != "Sequence" for step in objects_in(fields.get("normalizer")))
        or any(step.get("add_prefix_space") or step.get("invert") for step in splits)
        or any(strips)
    )
