"""What a publisher says of using a model, beside its tokenizer.json and its chat template.

It lies in `conventions.json`. A tokenizer whose publisher says no more than its tokenizer.json has
no such file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from .beside import Beside
from .chat import ENDS, NAME_LIMIT, TEMPLATE_LIMIT

CONVENTIONS_FILE = "conventions.json"
TEMPLATES = 16  # chat templates with names
TEMPLATE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$"
KEY = r"^[a-z][a-z0-9_]{0,63}$"
_Token = Annotated[str, Field(min_length=1, max_length=NAME_LIMIT)]
_Id = Annotated[int, Field(ge=0, lt=2**24)]
_Number = Annotated[float, Field(ge=-1e18, le=1e18)]
_Key = Annotated[str, Field(pattern=KEY)]
_Value = bool | int | _Number | Annotated[str, Field(max_length=1000)]


@dataclass(frozen=True)
class _File:
    """The content of `conventions.json`."""

    format: Literal[1]
    start: Annotated[tuple[_Token, ...], Field(max_length=4)]
    ends: Annotated[tuple[_Token, ...], Field(max_length=ENDS)]
    tokens: Annotated[dict[_Key, _Token], Field(max_length=64)]
    extra: Annotated[tuple[_Token, ...], Field(max_length=1000)]
    templates: Annotated[
        dict[
            Annotated[str, Field(pattern=TEMPLATE_NAME)],
            Annotated[str, Field(max_length=TEMPLATE_LIMIT)],
        ],
        Field(max_length=TEMPLATES),
    ]
    generation: Annotated[
        dict[_Key, _Value | Annotated[tuple[_Value, ...], Field(max_length=1000)]],
        Field(max_length=64),
    ]
    ids: dict[
        Literal["bos_token_id", "eos_token_id", "pad_token_id"],
        _Id | Annotated[tuple[_Id, ...], Field(max_length=64)],
    ]


@dataclass(frozen=True)
class Conventions(Beside):
    """What a publisher says. Tokens are named, not numbered."""

    FILE, SCHEMA = CONVENTIONS_FILE, _File
    LIMIT, SIGNS = 1 << 23, 1 << 18

    start: tuple[str, ...] = ()  # the tokens before every text, such as BOS
    ends: tuple[str, ...] = ()  # those that end a completion, if not just that of a document
    # the rest is for Hugging Face's files: special tokens by name, and those without one
    tokens: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    templates: Mapping[str, str] = field(default_factory=dict)  # for chats, beside the default
    generation: Mapping[str, Any] = field(default_factory=dict)  # of generation_config.json
    ids: Mapping[str, Any] = field(default_factory=dict)  # of config.json
