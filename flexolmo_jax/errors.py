"""The errors that a user is meant to see. Each prints as one line."""


def printable(text: str, keep: str = "") -> str:
    """The text with every unprintable character, except those in `keep`, written as an escape.

    Text that comes from others may hold line ends, terminal commands, or marks that reverse the
    direction of writing. Printed as they are, they could make one message look like another.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


class UserError(Exception):
    """A mistake of the user: one line that says what was got, what was expected, what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RunError(Exception):
    """A run that cannot go on, as when its loss diverges. Exits with status 1, not 2."""

    def __str__(self) -> str:
        return printable(super().__str__())
