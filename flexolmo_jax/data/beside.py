"""Small JSON files beside a tokenizer.json, with digests of their bytes: chat and conventions."""

import hashlib
import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import write_text
from flexolmo_jax.storage.paths import absolute, reason
from flexolmo_jax.storage.untrusted import conform, parse_json, read_bytes


class Beside:
    """A frozen dataclass that is the content of a file."""

    FILE: ClassVar[str]
    SCHEMA: ClassVar[type]  # of its JSON, with `format`
    LIMIT: ClassVar[int] = 1 << 20  # bytes of the file
    SIGNS: ClassVar[int]  # commas and brackets in it

    @cached_property
    def content(self) -> str:
        """The text of the file."""
        fields: Any = self
        return json.dumps({"format": 1, **asdict(fields)}, indent=1, sort_keys=True) + "\n"

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the file."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """That of a directory; None where there is none. Raises UserError for a damaged file."""
        file = directory / cls.FILE
        try:
            text = read_bytes(absolute(file), cls.LIMIT)
            fields = parse_json(text, cls.SIGNS)
            conform(cls.SCHEMA, fields)
            del fields["format"]
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            found = cls(**given)
            if found.content.encode() != text:
                raise ValueError("its bytes are not as they were written")
            return found
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read {file}: {reason(error)}; fetch it again") from None
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error!s:.200}); fetch it again") from None

    def save(self, directory: Path) -> None:
        """Writes the file into the directory."""
        write_text(directory / self.FILE, self.content)
