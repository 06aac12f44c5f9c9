"""The one error a user is meant to see: the command line prints it as a single line and exits with status 2."""


class UserError(Exception):
    """A mistake in what the user gave: says what was got, what was expected and what to do, in one line."""


class RunError(Exception):
    """A run that cannot go on for a reason in the run itself (a diverged loss): one line as well, but status 1."""
