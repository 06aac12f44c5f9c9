"""Options that several verbs share, and the types of their values."""

import argparse
import re
from pathlib import Path
from typing import Any, get_args

from flexolmo_jax.errors import UserError
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.storage.paths import in_bucket, path_of
from flexolmo_jax.storage.placing import WAYS

from .verbs import option

# ---- types ----


def local(text: str) -> Path:
    if in_bucket(text):
        raise UserError(f"got {text}, expected a path of this machine; copy it there afterwards")
    return path_of(text)


def secret(text: str) -> Path:
    if in_bucket(text):
        raise UserError(
            f"got {text}, expected a path of this machine: private keys do not belong in buckets"
        )
    return path_of(text)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected 1 or more")
    return number


def finite(text: str) -> float:
    if not abs(number := float(text)) < 1e300:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number")
    return number


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a share from 0 to below 1")
    return value


def prompts_by_context(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected prompts x tokens of context, as 16x4096"
        )
    return int(match[1]), int(match[2])


def mesh(text: str) -> Any:
    from flexolmo_jax.config import MeshConfig, build, override

    pairs = [pair.strip() for pair in text.split(",")]
    axes = [axis for axis, equals, _ in (pair.partition("=") for pair in pairs) if equals]
    if not len(pairs) == len(axes) == len(set(axes)):
        raise UserError(
            f"--mesh got {text!r:.80}; expected AXIS=N,..., each axis once, as tensor=8"
        )
    ones = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}
    keys = override({"mesh": ones}, [f"mesh.{pair}" for pair in pairs])
    built = build(MeshConfig, keys["mesh"], "--mesh")
    built.check()
    return built


def kernels(text: str) -> str:
    if text not in (known := get_args(Kernels)):
        raise UserError(f"--kernels got {text!r:.80}; expected one of {', '.join(known)}")
    return text


def size(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+) *([KMGT]?)B?", text.strip(), re.IGNORECASE)
    number, unit = (match[1], match[2].upper() or " ") if match else ("0", " ")
    try:
        count = int(float(number) * 1000 ** " KMGT".index(unit))
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a size as 5GB or 500MB")
    return count


def reading_of(args: argparse.Namespace) -> Any:
    """How documents are read, by the options READING."""
    from flexolmo_jax.config import Reading

    reading = Reading(args.text_key, args.separator, args.skip_bad, args.strict)
    reading.check("--text-key", "--separator")
    return reading


# ---- options ----

ANCHOR = option("--anchor", required=True, type=path_of)
OUT = option("--out", required=True, type=path_of)
HELDOUT = option(
    "--heldout",
    type=share,
    default=0.05,
    help="share of documents that is for evaluation only (default 0.05)",
)
READING = (
    option(
        "--text-key",
        default="text",
        metavar="KEY",
        help="the key or column of a document's text (default text; a.b: b in a)",
    ),
    option(
        "--separator",
        default="<|endoftext|>",
        metavar="LINE",
        help="the line that ends a document of a .txt (default <|endoftext|>; '': a file is one "
        "document; one that begins with a dash: --separator=---)",
    ),
    option(
        "--skip-bad",
        action="store_true",
        help="leave out, and count, what is no document (default: the first is an error)",
    ),
    option(
        "--strict",
        action="store_true",
        help="refuse a directory that holds anything beside documents (default: it is told)",
    ),
)
RAY = option(
    "--ray",
    nargs="?",
    const="",
    metavar="ADDRESS",
    help="spread the work over a Ray cluster: host:port, or auto for one that runs here "
    "(default ADDRESS: $RAY_ADDRESS, or a new one of this machine)",
)
SET = option(
    "--set",
    action="append",
    default=[],
    metavar="A.B=C",
    help="override a config key (may be given again)",
)
CONTINUE = option(
    "--continue",
    dest="continues",
    action="store_true",
    help="train a run on, with its optimiser's state, though train.steps, optim or data are others "
    "now",
)
CHECKPOINT = option(
    "--checkpoint", default="last", help="of a run: last (default), best, or a step"
)
SIGN_KEY = option(
    "--sign-key", type=secret, help="the owner's private key (`flexolmo keygen` makes one)"
)
ALLOW_HUB = option(
    "--allow-hub-embedder",
    action="store_true",
    help="fetch and run the hub's model that the anchor names, if it does",
)
TRUST = (
    option("--signed", action="store_true", help="refuse what nobody signed"),
    option(
        "--trust",
        metavar="DIR",
        type=path_of,
        help="let in what one of DIR/*.pub signed and may sign (DIR/policy.yaml)",
    ),
)
ADMITTING = (
    option(
        "--no-admission",
        action="store_true",
        help="do not look at the sizes of weights, nor at what they compute",
    ),
    option(
        "--require-screening",
        action="append",
        default=[],
        metavar="PATH",
        type=path_of,
        help="verdicts of `screen`, files or directories (may be given again): every other key of "
        "--trust must have passed each one",
    ),
)
COMPOSING = (
    OUT,
    option(
        "--store",
        type=path_of,
        help="where experts are kept, each once (default: flexolmo-store beside the model)",
    ),
    option(
        "--by",
        choices=["auto", *WAYS, "stream"],
        default="auto",
        help="how files get there (auto: the cheapest that works)",
    ),
)
BASE = option(
    "--anchor",
    type=path_of,
    help="of a pair's run: its anchor, if it is neither where it was nor beside the run as it was "
    "(of a router's run: its model)",
)
MODEL = option("path", type=path_of, help="a run, anchor or model")
SELECTING = (
    option(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="exclude this expert (may be given again)",
    ),
    option("--active", type=int, metavar="K", help="experts a token uses (default: the model's)"),
)
KERNELS = option(
    "--kernels",
    type=kernels,
    default="auto",
    metavar="|".join(get_args(Kernels)),
    help="that route tokens to experts (default: the platform's own)",
)


def _mesh_option(default: str) -> Any:
    return option(
        "--mesh",
        metavar="AXIS=N,...",
        type=mesh,
        help=f"spread the weights over devices, as tensor=8; default: {default}",
    )


MESH = _mesh_option("one device")
PAIR_MESH = _mesh_option("the run's own mesh, or all devices where that does not fit them")
