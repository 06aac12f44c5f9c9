"""What the program runs with: its version, and JAX's environment variables, which a user sets.
Mistakes there are told in one line.
"""

import os
import traceback
from collections.abc import Mapping

from flexolmo_jax.errors import UserError

_X64 = "JAX_ENABLE_X64"
_YES = ("1", "on", "t", "true", "y", "yes")
# in the messages of JAX against what an environment variable says
_REFUSALS = (
    "Unable to initialize backend",
    "for JAX flag",
    "for environment 'JAX_",
    "Disallowed host-to-device transfer",
    "Disallowed device-to-host transfer",
)


def package_version() -> str:
    import importlib.metadata as metadata

    try:
        return metadata.version("flexolmo-jax")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "checkout"


def check(environment: Mapping[str, str]) -> None:
    """Raises UserError where JAX would compute with other types than this program's."""
    if environment.get(_X64, "").strip().lower() in _YES:
        raise UserError(
            f"{_X64} is {environment[_X64]!r:.20}; expected integers and numbers of 32 bits; unset"
            " it"
        )


def refusal(error: Exception) -> str | None:
    """What JAX has against its environment variables; None for any other error."""
    said = " ".join(str(error).split())[:300]
    if isinstance(error, AssertionError) and _is_of_backends(error):
        said = f"there is no {os.environ.get('JAX_PLATFORMS', 'device')!r:.40} on this machine"
    elif not any(words in said for words in _REFUSALS):
        return None
    names = ", ".join(sorted(name for name in os.environ if name.startswith("JAX_"))) or "none"
    return f"JAX refused: {said}; correct or unset its environment variables (set are: {names})"


def _is_of_backends(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and os.path.basename(frames[-1].filename) == "xla_bridge.py"
