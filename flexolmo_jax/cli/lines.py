"""A result as YAML in few lines, for people. `--json` has every digit, for programs.

members:                                                # a line for each record with a name
- {name: code, owner: ACME}
experts: [anchor, code, law]                            # words, and numbers, beside each other
routing:
  public: {anchor: 0.61, code: 0.3, law: 0.09}
"""

import math
from typing import Any

import yaml

WIDTH = 100  # columns, behind which a line ends; that of a record does not
NUMBERS = (int, float)


def text_of(result: dict[str, Any]) -> str:
    return "".join(_part({key: value}) for key, value in result.items())


def _part(part: dict[str, Any]) -> str:
    (value,) = part.values()
    has_records = isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
    width = math.inf if has_records else WIDTH
    return yaml.dump(part, Dumper=_Dumper, width=width, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        node = super().represent_sequence(tag, sequence, flow_style)
        node.flow_style = all(map(_is_word, sequence))
        for child, value in zip(node.value, sequence, strict=True):
            if isinstance(value, dict) and "name" in value:
                child.flow_style = True
        return node

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> Any:
        node = super().represent_mapping(tag, mapping, flow_style)
        node.flow_style = not mapping
        for (_, child), value in zip(node.value, mapping.values(), strict=True):
            if isinstance(value, dict) and all(isinstance(n, NUMBERS) for n in value.values()):
                child.flow_style = True
        return node


def _is_word(value: Any) -> bool:
    return " " not in value if isinstance(value, str) else isinstance(value, NUMBERS)
