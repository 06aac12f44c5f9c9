"""What the program runs with: its version, and JAX's environment variables, which a user sets.
Mistakes there are told in one line.
"""

import os
import re
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flexolmo_jax.errors import UserError

if TYPE_CHECKING:
    import jax

_GUARDED = ("disallow|disallow_explicit", "'allow': data move to devices and back")
# Settings of JAX, by which other programs compute or are checked, and that this one cannot run
# under, or only with other numbers: a pattern of values in small letters, and what is expected
# instead.
_REFUSED = {
    "JAX_ENABLE_X64": ("1|on|t|true|y|yes", "integers and numbers of 32 bits"),
    "JAX_NUMPY_RANK_PROMOTION": ("raise", "'allow': ranks are combined"),
    "JAX_NUMPY_DTYPE_PROMOTION": ("strict", "'standard': types are combined"),
    "JAX_RANDOM_SEED_OFFSET": ("(?!0$).+", "0: a run's random numbers are those of train.seed"),
    "JAX_THREEFRY_PARTITIONABLE": (
        "0|off|f|false|n|no",
        "'true': random numbers are the same on every mesh",
    ),
    "JAX_TRANSFER_GUARD": _GUARDED,
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": _GUARDED,
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": _GUARDED,
}
# in the messages of JAX against what an environment variable says
_REFUSALS = (
    "Unable to initialize backend",
    "for JAX flag",
    "for environment 'JAX_",
    "Disable jit is not supported",
    "Disallowed host-to-device transfer",
    "Disallowed device-to-host transfer",
    "but 'no_tracing' is set",
    "the no_execution config option is set",
)


def package_version() -> str:
    import importlib.metadata as metadata

    try:
        return metadata.version("flexolmo-jax")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "checkout"


def random_key(seed: "jax.Array | int") -> "jax.Array":
    """Where random numbers begin, with one generator whatever JAX's default is: with another, a run
    that resumes would draw others, and so would another mesh."""
    import jax

    return jax.random.key(seed, impl="threefry2x32")


def check(environment: Mapping[str, str]) -> None:
    """Raises UserError for a variable under which nothing here can run."""
    for name, (values, expected) in _REFUSED.items():
        if re.fullmatch(values, environment.get(name, "").strip().lower()):
            raise UserError(f"{name} is {environment[name]!r:.20}; expected {expected}; unset it")


def check_config(config: object) -> None:
    """The same of `jax.config`, which programs that import this one may have changed."""
    for variable, (values, expected) in _REFUSED.items():
        name = variable.lower()
        value = getattr(config, name, None)
        value = getattr(value, "value", value)  # some are enumerations
        if re.fullmatch(values, str(value).lower()):
            raise UserError(
                f"jax.config.{name} is {value!r:.20}; expected {expected}; set it back with"
                f" jax.config.update({name!r}, ...)"
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
