"""What a publisher says of a model's tokens and of generation, in Hugging Face's files.

    tokenizer_config.json      special tokens by name; add_bos_token; added_tokens_decoder
    special_tokens_map.json    the same special tokens, in older checkpoints
    added_tokens.json          tokens that the tokenizer.json may lack, in older checkpoints
    additional_chat_templates/ chat templates with names
    generation_config.json     eos_token_id, temperature, ...; without it config.json has the ids

Texts begin with what the tokenizer.json's own post-processor puts there, as in transformers, or
with BOS where `add_bos_token` is true. What Hugging Face's files say by default is not kept.
"""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.data.chat import ENDS, NAME_LIMIT, TEMPLATE_LIMIT
from flexolmo_jax.data.conventions import KEY, TEMPLATE_NAME, TEMPLATES, Conventions
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.files import make_folder, write_text
from flexolmo_jax.storage.paths import children

from .chat import (
    ADDED_TOKENS,
    GENERATION_CONFIG,
    TEMPLATE,
    TOKENIZER_CONFIG,
    known_ends,
    named_templates,
    read_text,
    special_tokens,
)

Beside = Mapping[str, Mapping[str, Any]]  # the contents of files, by name
FOLDER = "additional_chat_templates"
EXTRA = ("additional_special_tokens", "extra_special_tokens")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# keys of a generation_config.json that say nothing of how to generate, or are read apart
SILENT = {"eos_token_id", "transformers_version", "_from_model_config"}


def read_conventions(directory: Path, beside: Beside, tokenizer: Tokenizer) -> Conventions:
    """The conventions of a checkpoint, whose `beside` holds config.json too.

    A note says what cannot be kept.
    """
    said, given = special_tokens(beside), beside.get(GENERATION_CONFIG, {})
    left: list[str] = []
    tokens, extra = _tokens(said)
    start = tokenizer.own_start()
    if not start and said.get("add_bos_token") is True and "bos_token" in tokens:
        start = [tokens["bos_token"]]
    if any(tokenizer.id_of(token) is None for token in start):
        left.append(f"add_bos_token, for the tokenizer has no {start[0]!r:.80}")
        start = []
    ends = _ends(beside, tokenizer, left)
    generation, usual = {}, {"do_sample": False, "pad_token_id": tokenizer.pad_id}
    for key, value in given.items():
        if key in SILENT or value is None or usual.get(key) == value:
            continue
        if re.fullmatch(KEY, key) and _is_plain(value) and len(generation) < 64:
            generation[key] = value
        else:
            left.append(f"{key} of {GENERATION_CONFIG}")
    written = _written_tokens(tokenizer)
    found = Conventions(
        start=tuple(start),
        ends=tuple(ends) if ends != [tokenizer.token(tokenizer.eos_id)] else (),
        tokens=tokens if tokens and tokens != written else {},
        extra=tuple(extra),
        templates=_templates(directory, beside, left),
        generation=generation,
        ids=_ids(beside, tokenizer),
    )
    if left:
        note(f"not kept of {directory}: {', '.join(left)}")
    settings = {key: value for key, value in generation.items() if key not in IDS}
    if settings:
        told = ", ".join(f"{key} {value}" for key, value in settings.items())
        note(f"kept for export, and not used by `generate` unless given to it: {told:.300}")
    return found


def with_added_tokens(tokenizer: Tokenizer, beside: Beside, vocab_size: int) -> Tokenizer:
    """With the tokens that are listed beside a tokenizer.json which lacks them, as transformers
    adds them. A note says which."""
    listed = beside.get(TOKENIZER_CONFIG, {}).get("added_tokens_decoder")
    if isinstance(listed, dict):
        named = [(i, token) for i, token in listed.items() if isinstance(token, dict)]
    else:
        older = beside.get(ADDED_TOKENS, {})
        named = [(str(i), {"content": name}) for name, i in older.items() if type(i) is int]
    taken, missing, left = tokenizer.ids, {}, []
    for i, token in named:
        if not (name := _text(token)) or tokenizer.id_of(name) is not None:
            continue
        if re.fullmatch("[0-9]{1,8}", i) and vocab_size > int(i) not in taken:
            missing[int(i)] = token
        else:
            left.append(name)
    names = [_text(token) for token in missing.values()]
    if names:
        note(f"added to the tokenizer, as the files beside it list them: {', '.join(names):.300}")
    if left:
        note(
            f"not added, for another token has their ids or the model none: {', '.join(left):.300}"
        )
    return tokenizer.with_added(missing) if missing else tokenizer


def written(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, dict[str, Any]]:
    """The contents of tokenizer_config.json and generation_config.json, and the keys of config.json
    that name tokens."""
    said, chat, eos = tokenizer.conventions, tokenizer.chat, tokenizer.eos_id
    tokens: dict[str, Any] = dict(said.tokens) or _written_tokens(tokenizer)
    if said.extra:
        tokens[EXTRA[0]] = list(said.extra)
    if said.start and list(said.start) != tokenizer.own_start():
        tokens["add_bos_token"] = True
    ends = tokenizer.end_ids or (chat.end_ids(tokenizer) if chat else [eos])
    pad = {"pad_token_id": tokenizer.pad_id}
    generation = {"eos_token_id": ends if len(ends) > 1 else ends[0], **pad, "do_sample": False}
    return {
        TOKENIZER_CONFIG: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_seq_len,
            **tokens,
        },
        GENERATION_CONFIG: generation | dict(said.generation),
        "config.json": {"bos_token_id": None, "eos_token_id": eos, **pad} | dict(said.ids),
    }


def write_templates(directory: Path, tokenizer: Tokenizer) -> None:
    """Writes the chat templates that have names."""
    if tokenizer.conventions.templates:
        make_folder(directory / FOLDER)
    for name, template in tokenizer.conventions.templates.items():
        write_text(directory / FOLDER / f"{name}.jinja", template)


def _written_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """The special tokens of an export of a tokenizer without conventions."""
    if tokenizer.chat:
        return dict(tokenizer.chat.tokens)
    eos, pad = tokenizer.token(tokenizer.eos_id), tokenizer.token(tokenizer.pad_id)
    return {"eos_token": eos, "pad_token": pad}


def _tokens(said: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Special tokens by name, and those without one."""
    given = {key: value for key, value in said.items() if key.endswith("_token")}
    extra: list[Any] = []
    for key in EXTRA:
        if isinstance(more := said.get(key), dict):
            given |= more
        elif isinstance(more, list):
            extra += more
    named = {key: _text(value) for key, value in given.items() if re.fullmatch(KEY, key)}
    kept = {key: text for key, text in named.items() if text}
    without = list(dict.fromkeys(text for one in extra if (text := _text(one))))
    return dict(itertools.islice(kept.items(), 64)), without[:1000]


def _text(token: Any) -> str:
    """A token's text; "" of what is none."""
    text = token.get("content") if isinstance(token, dict) else token
    return str(text) if _is_text(text, NAME_LIMIT) else ""


def _is_text(value: Any, most: int) -> bool:
    """Whether it is Unicode text of at most so many bytes."""
    try:
        return isinstance(value, str) and len(value.encode()) <= most
    except UnicodeEncodeError:
        return False


def _ends(beside: Beside, tokenizer: Tokenizer, left: list[str]) -> list[str]:
    """The tokens that end a completion; `left` is told of those that cannot."""
    given = beside.get(GENERATION_CONFIG, {})
    given = beside["config.json"] if given.get("eos_token_id") is None else given
    names, unknown = known_ends(given, tokenizer)
    left += [f"eos_token_id {i!r:.40}, for the tokenizer has no such token" for i in unknown]
    left += [f"the end {name!r:.80}, for at most {ENDS} are" for name in names[ENDS:]]
    return names[:ENDS]


def _ids(beside: Beside, tokenizer: Tokenizer) -> dict[str, Any]:
    """Of config.json, where they are others than an export would have."""
    config, usual = beside["config.json"], written(tokenizer, 0)["config.json"]
    given = {key: config[key] for key in IDS if config.get(key) is not None}
    return {
        key: value
        for key, value in given.items()
        if value != usual[key] and _are_ids(value if isinstance(value, list) else [value])
    }


def _are_ids(values: list[Any]) -> bool:
    return len(values) <= 64 and all(type(i) is int and 0 <= i < 2**24 for i in values)


def _is_plain(value: Any) -> bool:
    """Whether it is a number, a short text, or a list of such."""
    if isinstance(value, list):
        return len(value) <= 1000 and not any(
            isinstance(v, list) or not _is_plain(v) for v in value
        )
    if isinstance(value, str):
        return _is_text(value, 1000)
    return isinstance(value, int | float) and abs(value) <= 1e18


def _templates(directory: Path, beside: Beside, left: list[str]) -> dict[str, str]:
    """The chat templates beside the default: those of files, or of a list with names."""
    folder = directory / FOLDER
    found: dict[str, str] = {}
    for file in children(folder):
        if file.suffix == ".jinja":
            try:
                found[file.stem] = read_text(file)
            except UserError:
                left.append(str(file))
    if not found and not (directory / TEMPLATE).exists():
        found = named_templates(beside.get(TOKENIZER_CONFIG, {}).get("chat_template"))
    kept: dict[str, str] = {}
    for name, template in sorted(found.items()):
        if name == "default":
            continue
        fits = re.fullmatch(TEMPLATE_NAME, name) and _is_text(template, TEMPLATE_LIMIT)
        if fits and len(kept) < TEMPLATES:
            kept[name] = template
        else:
            left.append(f"the chat template {name!r:.80}")
    return kept
