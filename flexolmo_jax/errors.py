"""The one error a user is meant to see, and how strangers' words are shown: on one line, without
effect on a terminal."""


def printable(text: str, keep: str = "") -> str:
    """Text of anybody, to be shown: what is not printable (escapes, line ends, marks that turn the
    direction of writing) is spelled out.

    `keep`: characters that stay as they are all the same.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


class UserError(Exception):
    """A mistake in what the user gave: says what was got, what was expected and what to do, in one
    line."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RunError(Exception):
    """A run that cannot go on for a reason in the run itself (a diverged loss): one line as well,
    but status 1."""

    def __str__(self) -> str:
        return printable(super().__str__())
