"""Verbs of a data owner: train an expert, hand it over, try somebody else's."""

import argparse
import dataclasses
from typing import Any

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import path_of

from .options import (
    ALLOW_HUB,
    ANCHOR,
    CHECKPOINT,
    CONTINUE,
    HELDOUT,
    MESH,
    OUT,
    PAIR_MESH,
    RAY,
    READING,
    SET,
    SIGN_KEY,
    positive,
    reading_of,
    secret,
)
from .verbs import option, refuse_given, verb


@verb(
    "contribute",
    "An owner's one command: documents to a contribution. Goes on where it stopped.",
    "contribute --anchor anchor --documents records.jsonl --name hospital --out contribution",
    ANCHOR,
    option(
        "--documents",
        nargs="+",
        required=True,
        type=path_of,
        help='private documents, of "text" or "messages"; they never leave. To learn only what '
        "the assistant says: --set data.loss=assistant; of another key: --set data.text_key=KEY",
    ),
    ALLOW_HUB,
    option("--name", required=True, help="the expert's name"),
    SIGN_KEY,
    option("--config", type=path_of, help="a pair's YAML; anchor, name and data are filled in"),
    option(
        "--work",
        type=path_of,
        help="where private records and checkpoints go, which stay with you (default: OUT.work)",
    ),
    CONTINUE,
    SET,
    OUT,
)
def _contribute(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.config import Settings
    from flexolmo_jax.owner.contribute import contribute

    contribution = contribute(
        args.anchor,
        args.documents,
        args.name,
        args.out,
        settings=Settings(args.config, args.set),
        sign_key=args.sign_key,
        work=args.work,
        allow_hub=args.allow_hub_embedder,
        continues=args.continues,
    )
    return _packaged(args, contribution)


@verb(
    "package",
    "Make a contribution of a pair's run, or of an expert of an imported model.",
    "package runs/code --out contributions/code",
    option("run", type=path_of, help="a pair's run, or an imported model"),
    option("--expert", metavar="NAME", help="of the imported model"),
    option(
        "--anchor",
        type=path_of,
        help="of the imported model, what `flexolmo publish` made of it; of a pair's run its "
        "anchor, if it is neither where it was nor beside the run as it was",
    ),
    CHECKPOINT,
    PAIR_MESH,
    SIGN_KEY,
    OUT,
)
def _package(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.owner.package import package, package_imported

    if args.expert is not None and args.anchor is None:
        raise UserError(
            "an expert of an imported model is packaged with --expert NAME and --anchor ANCHOR;"
            " give both"
        )
    if args.expert:
        why = "an expert of an imported model has no run that could be evaluated"
        refuse_given(args, (CHECKPOINT, PAIR_MESH), why)
        made = package_imported(args.run, args.expert, args.anchor, args.out, args.sign_key)
    else:
        how = {"mesh": args.mesh, "anchor": args.anchor}
        made = package(args.run, args.out, args.checkpoint, args.sign_key, **how)
    return _packaged(args, made)


def _packaged(args: argparse.Namespace, contribution: Any) -> dict[str, Any]:
    training = contribution.manifest["training"]
    return {"out": str(args.out), "name": contribution.name, "training": training}


@verb(
    "keygen",
    "Make a key to sign contributions with: OUT, to keep, and OUT.pub, to give away.",
    "keygen keys/hospital",
    option("out", type=secret),
)
def _keygen(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.exchange.signature import PUBLIC, keygen

    files = {"private_key": str(args.out), "public_key_file": f"{args.out}{PUBLIC}"}
    return files | {"public_key": keygen(args.out)}


@verb(
    "screen",
    "An owner: try somebody else's contribution on one's own text, and write a verdict for the "
    "coordinator.",
    "screen theirs --anchor anchor --model model --documents mine.jsonl --sign-key keys/mine "
    "--out verdict.json",
    option("candidate", type=path_of, help="a contribution"),
    ANCHOR,
    option(
        "--model",
        required=True,
        type=path_of,
        help="a model with your expert in it, or the anchor",
    ),
    option(
        "--documents",
        nargs="+",
        required=True,
        type=path_of,
        help="yours; the held-out ones are scored, and none leaves",
    ),
    *READING,
    option(
        "--max-worse",
        type=float,
        default=0.02,
        metavar="PART",
        help="by which bits per byte may get worse (default 0.02)",
    ),
    option(
        "--limit", type=positive, help="records of each: a sample spread evenly over all of them"
    ),
    MESH,
    SIGN_KEY,
    option("--out", required=True, type=path_of, help="a new .json"),
)
def _screen(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.owner.screen import screen

    return screen(
        args.candidate,
        args.anchor,
        args.model,
        args.documents,
        args.out,
        max_worse=args.max_worse,
        sign_key=args.sign_key,
        limit=args.limit,
        mesh=args.mesh,
        reading=reading_of(args),
    )


@verb(
    "embed-domain",
    "The mean embedding of documents by the anchor's embedder: a router row.",
    "embed-domain --anchor anchor --input docs.jsonl --out row.npy",
    ANCHOR,
    option("--input", nargs="+", required=True, type=path_of),
    *READING,
    ALLOW_HUB,
    OUT,
    RAY,
)
def _embed_domain(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.exchange.anchor import embed_domain

    how = {"allow_hub": args.allow_hub_embedder, "ray": args.ray, "reading": reading_of(args)}
    row = embed_domain(args.anchor, args.input, args.out, **how)
    return {"out": str(args.out), "dim": len(row), "norm": float((row**2).sum() ** 0.5)}


@verb(
    "proxy",
    "Choose public documents that resemble private ones, for tuning the router: only public "
    "documents are written.",
    "proxy --anchor anchor --private mine.jsonl --public public.jsonl --out proxies.jsonl",
    option("--anchor", required=True, type=path_of, help="its embedder tells the documents apart"),
    option(
        "--private",
        nargs="+",
        required=True,
        type=path_of,
        help="the owner's documents; they never leave",
    ),
    ALLOW_HUB,
    option("--public", nargs="+", required=True, type=path_of, help="to choose from"),
    *READING,
    option("--public-text-key", metavar="KEY", help="of the public ones (default: --text-key)"),
    option(
        "--share",
        type=float,
        default=0.01,
        help="of the public documents to keep (default 0.01)",
    ),
    option(
        "--diversity",
        type=positive,
        default=1,
        metavar="N",
        help="choose diverse ones out of N times as many (default 1: the likest)",
    ),
    HELDOUT,
    option("--out", required=True, type=path_of, help="a new .jsonl"),
    RAY,
)
def _proxy(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.owner.proxy import select_proxies

    reading = reading_of(args)
    public_key = reading.text_key if args.public_text_key is None else args.public_text_key
    proxies = select_proxies(
        args.anchor,
        args.private,
        args.public,
        args.out,
        share=args.share,
        diversity=args.diversity,
        heldout=args.heldout,
        allow_hub=args.allow_hub_embedder,
        ray=args.ray,
        reading=reading,
        public_reading=dataclasses.replace(reading, text_key=public_key),
    )
    return {"out": str(args.out), **proxies._asdict(), "share": proxies.share}
