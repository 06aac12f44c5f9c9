"""Chat templates in Hugging Face's files.

chat_template.jinja       the template; else tokenizer_config.json has it
tokenizer_config.json     the special tokens that a template may name: bos_token, ...
special_tokens_map.json   the same in older checkpoints
generation_config.json    eos_token_id: the tokens that end a turn, beside eos_token; without it
                          config.json has them
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.data.chat import TEMPLATE_LIMIT, TOKEN_NAMES, Chat, make_chat
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import absolute, reason
from flexolmo_jax.storage.untrusted import read_bytes

TEMPLATE = "chat_template.jinja"
BESIDE = TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, GENERATION_CONFIG = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


def read_chat(
    directory: Path, beside: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer
) -> Chat | None:
    """The chat of a checkpoint; None where it has no template.

    Args:
        beside: the contents of config.json and of those files of BESIDE that are there.

    Raises:
        UserError: naming the file, for a template that is too large or malformed, for tokens that
            are no text or no numbers, and for those that the tokenizer does not have.
    """
    config = beside.get(TOKENIZER_CONFIG, {})
    file, template = directory / TEMPLATE, None
    if file.exists():
        template = read_text(file)
    elif "chat_template" in config:
        file = directory / TOKENIZER_CONFIG
        template = _chosen(file, config["chat_template"])
    if template is None:
        return None
    tokens = _tokens(directory / TOKENIZER_CONFIG, special_tokens(beside))
    given = beside.get(GENERATION_CONFIG, {}).get("eos_token_id")
    ends = _names(directory / GENERATION_CONFIG, given, tokenizer)
    if given is None:
        special = {token.content for token in tokenizer.added_tokens.values()}
        names, _ = known_ends(beside["config.json"], tokenizer)
        ends = [name for name in names if name in special]
    if "eos_token" in tokens:
        ends.append(tokens["eos_token"])
    return make_chat(template, tokens, ends, tokenizer, str(file))


def special_tokens(beside: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """tokenizer_config.json with special_tokens_map.json.

    As in transformers, the map goes first where the config does not list added tokens.
    """
    config, older = beside.get(TOKENIZER_CONFIG, {}), beside.get(SPECIAL_TOKENS, {})
    if "added_tokens_decoder" in config:
        return {**older, **config}
    return {**config, **older}


def known_ends(config: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[list[str], list[Any]]:
    """The tokens of `eos_token_id`, and what is in it that the tokenizer does not have."""
    ids, known = config.get("eos_token_id"), tokenizer.ids
    given = [] if ids is None else ids if isinstance(ids, list) else [ids]
    names = [tokenizer.token(i) for i in given if type(i) is int and i in known]
    unknown = [i for i in given if not (type(i) is int and i in known)]
    return list(dict.fromkeys(names)), unknown


def named_templates(templates: Any) -> dict[str, str]:
    """The templates of a list with names; none of anything else."""
    try:
        found = {entry["name"]: entry["template"] for entry in templates}
    except (TypeError, KeyError):
        return {}
    return {
        name: text
        for name, text in found.items()
        if isinstance(name, str) and isinstance(text, str)
    }


def read_text(file: Path) -> str:
    """The text of a template's file. Raises UserError."""
    try:
        return read_bytes(absolute(file), TEMPLATE_LIMIT).decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {reason(error)}; download it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text; download it again") from None


def _chosen(file: Path, templates: Any) -> str | None:
    """The template of a configuration: a text, or the default of several with names."""
    if templates is None or isinstance(templates, str):
        return templates
    try:
        chosen = {entry["name"]: entry["template"] for entry in templates}.get("default")
    except (TypeError, KeyError):
        chosen = templates
    if chosen is not None and not isinstance(chosen, str):
        raise UserError(
            f"{file}: chat_template is {chosen!r:.80}; expected text, or a list of names and"
            " templates; download it again"
        )
    return chosen


def _tokens(file: Path, config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in TOKEN_NAMES:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        if not isinstance(text, str):
            raise UserError(f"{file}: {name} is {token!r:.80}; expected text; download it again")
        found[name] = text
    return found


def _names(file: Path, ids: Any, tokenizer: Tokenizer) -> list[str]:
    """The tokens of `eos_token_id`: a number or a list of them."""
    given = [] if ids is None else ids if isinstance(ids, list) else [ids]
    try:
        if not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in given):
            raise KeyError
        return [tokenizer.token(i) for i in given]
    except KeyError:
        raise UserError(
            f"{file}: eos_token_id is {ids!r:.80}; expected ids of tokens that the tokenizer has;"
            " download it again"
        ) from None
