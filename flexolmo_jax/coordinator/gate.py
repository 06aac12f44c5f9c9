"""The checks before a contribution is merged: signature, other owners' verdicts, admission."""

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
    admission: bool = True  # whether each contribution is tried, see `admit`
    screening: Sequence[Path] = ()  # files with verdicts of the other owners; empty: none needed

    def open(self, path: Path, base: Artifact) -> Contribution:
        """Opens a contribution and checks its manifest against the anchor, or a model on it.

        Raises UserError as `Contribution.check` does.
        """
        contribution = open_contribution(path)
        contribution.check(base, self.trust)
        return contribution

    def check(self, contributions: Sequence[Contribution], base: Artifact) -> None:
        """Checks what no manifest says: other owners' verdicts, and what the experts compute.

        Raises UserError for a contribution that is refused.
        """
        if self.screening:
            check_screening(contributions, self.screening, self.trust)
        if not self.admission:
            note(
                "warning: --no-admission: nobody checks the norms of the experts' weights, nor"
                " whether their outputs are finite"
            )
            return
        for contribution in contributions:
            admit(contribution, base)


ANYBODY = Gate()
