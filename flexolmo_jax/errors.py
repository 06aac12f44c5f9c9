"""The errors that a user is meant to see, each printed as one line, and words they share."""


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


def from_a_clone(extra: str, environment: str = "") -> str:
    """How an extra is installed, in an environment that exists or in a new one of this name.

    The package is on no index: whoever takes its name there could be anybody.
    """
    make = f"python3 -m venv {environment} && {environment}/bin/" if environment else ""
    return f"from a clone of flexolmo-jax, {make}pip install -e '.[{extra}]'"


class UserError(Exception):
    """A mistake of the user: one line that says what was got, what was expected, what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RunError(Exception):
    """A run that cannot go on, as when its loss diverges. Exits with status 1, not 2."""

    def __str__(self) -> str:
        return printable(super().__str__())
