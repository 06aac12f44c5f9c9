"""What the sections of a config share."""

import math
from typing import Any, ClassVar

from flexolmo_jax.errors import UserError


class Section:
    """`check` raises UserError for values that cannot work, or not together."""

    at: ClassVar[str] = ""  # the section's key, which messages name

    def check(self) -> None: ...

    def expect(self, key: str, holds: bool, expected: str) -> None:
        expect(holds, f"{self.at}.{key}", getattr(self, key), expected)

    def expect_positive(self, *keys: str) -> None:
        for key in keys:
            self.expect(key, 0 < getattr(self, key) < math.inf, "a positive, finite number")

    def expect_not_negative(self, *keys: str) -> None:
        for key in keys:
            self.expect(key, 0 <= getattr(self, key) < math.inf, "a finite number from 0 on")


def expect(holds: bool, what: str, got: Any, expected: str) -> None:
    """Raises UserError where a config's value is not what it has to be."""
    if not holds:
        raise UserError(f"{what} is {got!r:.200}; expected {expected}")
