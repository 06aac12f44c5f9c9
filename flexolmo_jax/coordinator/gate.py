"""What a contribution passes on its way into a model: signature, verdicts, admission."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexolmo_jax.artifact import Artifact
from flexolmo_jax.exchange.admission import admit
from flexolmo_jax.exchange.contribution import Contribution, open_contribution
from flexolmo_jax.exchange.screening import check_screening
from flexolmo_jax.exchange.signature import ANY, Trust
from flexolmo_jax.runtime.progress import note


@dataclass(frozen=True)
class Gate:
    """What a contribution has to pass to be merged."""

    trust: Trust = ANY
    admission: bool = True  # whether each is tried, see `admit`
    screening: Sequence[Path] = ()  # verdicts of the other owners, if they are asked for

    def open(self, path: Path, base: Artifact) -> Contribution:
        """Opens one and checks its manifest. Raises UserError."""
        contribution = open_contribution(path)
        contribution.check(base, self.trust)
        return contribution

    def check(self, contributions: Sequence[Contribution], base: Artifact) -> None:
        """What no manifest says: what other owners found, and what the expert computes."""
        if self.screening:
            check_screening(contributions, self.screening, self.trust)
        if not self.admission:
            note(
                "warning: --no-admission: the sizes of the experts' weights, and whether what they"
                " compute is finite, are not looked at"
            )
            return
        for contribution in contributions:
            admit(contribution, base)


ANYBODY = Gate()
