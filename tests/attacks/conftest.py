"""What several modules of attacks stand on."""

from tests.attacks.foreign import sources

__all__ = ["sources"]
