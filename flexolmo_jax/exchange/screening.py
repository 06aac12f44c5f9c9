"""Verdicts: what one owner says of another's expert, signed like a contribution.

A coordinator has public text only. An expert may leave that as it is and still ruin another owner's
domain. Only that owner can see it. So the owner tries the expert on private text (owner/screen.py)
and hands back one number, and nothing of the text. docs/screening.md is the specification.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AfterValidator, Field

from flexolmo_jax.description import canonical_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import write_new
from flexolmo_jax.storage.paths import children, is_apple_double, reason
from flexolmo_jax.storage.untrusted import conform, parse_json, read_bytes

from .contribution import Contribution
from .manifest import day
from .signature import Trust, check_signature, sign

KIND = "flexolmo screening verdict"  # signed too, so that no manifest's signature fits a verdict
FORMAT = 1
LIMIT = 1 << 16  # bytes
UNSIGNED = "ask its owner to screen again with --sign-key"
SUFFIX = ".json"
DIGITS = 4  # of the change: more would tell more of the text than a verdict needs

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, lt=2**63)]


@dataclass(frozen=True)
class Verdict:
    """What is signed."""

    kind: Literal["flexolmo screening verdict"]
    format: Literal[1]
    date: Annotated[str, AfterValidator(day)]
    anchor: Digest  # its fingerprint
    candidate: Digest  # the `sha256` of its manifest
    model: Digest  # the `sha256` of the description of what it was tried with
    tokens: Count
    bytes: Count
    # relative change of bits per byte by the candidate: 0.03 is 3 % worse
    change: Annotated[float, Field(ge=-1, allow_inf_nan=False)]
    max_worse: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    verdict: Literal["pass", "fail"]


def make_verdict(  # noqa: PLR0913 - the fields of a verdict
    *,
    anchor: str,
    candidate: str,
    model: str,
    tokens: int,
    bytes: int,
    change: float,
    max_worse: float,
) -> Verdict:
    """A verdict with today's date; the change is rounded first, and then decides."""
    change = round(change, DIGITS)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    verdict = "pass" if change <= max_worse else "fail"
    return Verdict(
        KIND, FORMAT, today, anchor, candidate, model, tokens, bytes, change, max_worse, verdict
    )


def write_verdict(verdict: Verdict, key: Ed25519PrivateKey | None, out: Path) -> None:
    """Writes a file of canonical JSON: the verdict and, with a key, its signature."""
    content = canonical_json(asdict(verdict)).encode()
    signature = parse_json(sign(content, key)) if key else None
    write_new(out, _spelled(asdict(verdict), signature))


def read_verdict(path: Path, trust: Trust) -> tuple[Verdict, str | None]:
    """A verdict and the public key that signed it.

    Raises UserError for anything else, and for a signature that `trust` refuses.
    """
    try:
        text = read_bytes(path, LIMIT)
        both = parse_json(text)
        value, signature = both["verdict"], both["signature"]
        if text != _spelled(value, signature):
            raise ValueError("not the canonical spelling")
        conform(Verdict, value)
        verdict = Verdict(**value)
        if verdict.verdict != ("pass" if verdict.change <= verdict.max_worse else "fail"):
            raise ValueError(
                f"the change is {verdict.change}, at most {verdict.max_worse}, and the verdict"
                f" {verdict.verdict}"
            )
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the verdict {path}: {reason(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a verdict of `flexolmo screen` ({error!s:.100}); ask its owner for it"
            " again"
        ) from None
    content = canonical_json(value).encode()
    signed = None if signature is None else (canonical_json(signature) + "\n").encode()
    signer = check_signature(content, signed, trust, path, remedy=UNSIGNED)
    return verdict, _key(signer)


def check_screening(
    contributions: Sequence[Contribution], verdict_paths: Sequence[Path], trust: Trust
) -> None:
    """Checks that every key of `trust`, but the contribution's own, has passed each contribution.

    One verdict `fail` is enough to refuse, even if its owner signed another that says `pass`.

    Args:
        contributions: what is to be merged.
        verdict_paths: files, or directories of `*.json`.
        trust: the owners' keys.

    Raises:
        UserError: for a contribution that is refused, verdicts that are missing, damaged, unsigned
            or by others, and where `trust` lists no keys.
    """
    if trust.keys is None:
        raise UserError(
            "screening needs the list of the owners' keys; give --trust DIR, the directory of their"
            " public keys"
        )
    verdicts = [(path, *read_verdict(path, trust)) for path in _files(verdict_paths)]
    for contribution in contributions:
        others = trust.keys.keys() - {_key(contribution.check(trust=trust))}
        if not others:
            raise UserError(
                f"nobody could have screened {contribution.path}: --trust lists no other key than"
                " that of its owner"
            )
        digest = contribution.manifest["sha256"]
        of_it = [each for each in verdicts if each[1].candidate == digest and each[2] in others]
        for path, verdict, key in of_it:
            if verdict.verdict == "fail":
                raise UserError(
                    f"{contribution.path} is refused by {trust.keys[str(key)]}: it makes their text"
                    f" {verdict.change:.1%} worse, at most {verdict.max_worse:.1%} is expected"
                    f" ({path}); leave it out, or ask its owner for another"
                )
        anchor = contribution.fingerprint
        passed = {key for _, verdict, key in of_it if verdict.anchor == anchor}
        if missing := others - passed:
            names = ", ".join(sorted(trust.keys[key] for key in missing))
            raise UserError(
                f"{contribution.path} is not screened by {names}; ask them for a verdict (`flexolmo"
                " screen`)"
            )


def _key(signer: Mapping[str, Any] | None) -> str | None:
    return signer["public_key"] if signer else None


def _files(paths: Sequence[Path]) -> list[Path]:
    files = []
    for path in paths:
        found = [path]
        if path.is_dir():
            inside = children(path, clutter=True)
            found = [child for child in inside if child.name.lower().endswith(SUFFIX)]
            found = [child for child in found if not is_apple_double(child)]
            if overlooked := [child for child in found if not child.name.endswith(SUFFIX)]:
                raise UserError(
                    f"{overlooked[0]} is not read; expected names that end in {SUFFIX}; rename it,"
                    " or move it elsewhere"
                )
        if not found:
            raise UserError(
                f"{path} holds no verdicts; expected files *.json (`flexolmo screen` writes them)"
            )
        files += found
    return files


def _spelled(verdict: Mapping[str, Any], signature: Mapping[str, Any] | None) -> bytes:
    return (canonical_json({"signature": signature, "verdict": verdict}) + "\n").encode()
