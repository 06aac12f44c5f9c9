"""What generation asks of its compiled program."""

import pytest

from flexolmo_jax.model import decoding


@pytest.fixture
def program_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The position that each call of the program runs until, as they come."""
    calls: list[int] = []
    compiled = decoding.compiled

    def recorded(*arguments):
        both = compiled(*arguments)

        def run(params, state, request, until):
            calls.append(int(until))
            return both.run(params, state, request, until)

        return both._replace(run=run)

    monkeypatch.setattr("flexolmo_jax.generate.compiled", recorded)
    return calls
