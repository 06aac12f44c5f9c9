"""Verbs for whoever uses a model: evaluate it, generate with it, convert it, look at it."""

import argparse
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import UserError, from_a_clone
from flexolmo_jax.storage.paths import path_of

from .options import (
    BASE,
    CHECKPOINT,
    HELDOUT,
    KERNELS,
    MESH,
    MODEL,
    READING,
    SELECTING,
    local,
    positive,
    reading_of,
    size,
)
from .printing import for_terminal
from .verbs import option, refuse_given, verb

SPLIT = option(
    "--split",
    default="heldout",
    choices=["heldout", "train", "all"],
    help="documents that are held out (default; 1 in 20 of raw ones), those for training, or all",
)
LOSS = option(
    "--loss",
    choices=["all", "assistant"],
    default="all",
    help="of conversations, score every token (default) or only what the assistant says",
)
CHOOSING = (  # among the likeliest tokens
    option("--top-k", type=int, default=0, help="0: all"),
    option("--top-p", type=float, default=1.0),
    option("--seed", type=int, default=0),
)


@verb(
    "eval",
    "Bits per byte and routing shares on held-out text; multiple choice and gold answers.",
    "eval model --data data/code data/public --tasks arc_easy,sciq,gsm8k_bpb --without legal "
    "--json",
    MODEL,
    option(
        "--data", nargs="+", default=[], type=path_of, help="prepared directories, or documents"
    ),
    *READING,
    option(
        "--tasks",
        metavar="A,B,...",
        help="of AllenAI's in-loop evaluation: arc_easy, sciq, gsm8k_bpb, humaneval_bpb, ...",
    ),
    option(
        "--harness",
        action="store_true",
        help=f"run the tasks through lm-eval ({from_a_clone('eval')})",
    ),
    *SELECTING,
    SPLIT,
    LOSS,
    option(
        "--limit",
        type=positive,
        help="records of each set and documents of each task: a sample spread evenly over all",
    ),
    option("--batch-size", type=positive, default=16),
    CHECKPOINT,
    BASE,
    MESH,
    KERNELS,
)
def _eval(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.evals.bits_per_byte import evaluate, in_brief
    from flexolmo_jax.evals.tasks import load_tasks
    from flexolmo_jax.loaded import load

    if not (args.data or args.tasks):
        raise UserError("there is nothing to evaluate on; give --data, --tasks or both")
    if args.harness and not args.tasks:
        raise UserError("--harness is for tasks; give --tasks too")
    if not args.data:
        refuse_given(args, (*READING, SPLIT, LOSS), "it is for --data, which is not given")
    tasks = load_tasks(args.tasks.split(","), args.limit) if args.tasks else []
    model = load(args.path, args.checkpoint, args.mesh, args.kernels, anchor=args.anchor)
    result = {}
    if args.data:
        how = {key: getattr(args, key) for key in ("split", "loss", "limit", "batch_size")}
        how["reading"] = reading_of(args)
        result = evaluate(model, args.data, **how, **_selection(args))
        result = result if args.json else in_brief(result)
    if tasks:
        result["tasks"] = _evaluated_tasks(model, tasks, args)
    return result


def _evaluated_tasks(model: Any, tasks: Any, args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.evals.predictors import OfModel
    from flexolmo_jax.evals.tasks import evaluate_tasks

    if not args.harness:
        length, predictor = model.config.max_seq_len, OfModel(model, **_selection(args))
        how = {"batch_size": args.batch_size, "trained": model.artifact.trained_seq_len}
        return evaluate_tasks(predictor, model.tokenizer, length, tasks, **how)
    import tempfile

    from flexolmo_jax.evals.harness import evaluate_through_harness, harness_model

    with tempfile.TemporaryDirectory() as folder:
        through = harness_model(model, batch_size=args.batch_size, **_selection(args))
        return evaluate_through_harness(through, tasks, Path(folder))


@verb(
    "extract",
    "Try to extract documents that a model was trained on: their beginnings are given, and "
    "sampled on from.",
    "extract model --documents mine.jsonl --limit 200",
    MODEL,
    option(
        "--documents",
        nargs="+",
        required=True,
        type=path_of,
        help="what it was trained on; held-out ones are passed over",
    ),
    *READING,
    option(
        "--limit",
        type=positive,
        default=100,
        help="documents to try (default 100), those with the smallest digests",
    ),
    option("--prefix", type=positive, default=32, help="tokens that are given (default 32)"),
    option("--tokens", type=positive, default=256, help="that are sampled (default 256)"),
    option("--samples", type=positive, default=10, help="of each document (default 10)"),
    option("--batch-size", type=positive, default=32),
    option("--seed", type=int, default=0),
    HELDOUT,
    *SELECTING,
    CHECKPOINT,
    BASE,
    MESH,
)
def _extract(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.data.documents import read_training_documents
    from flexolmo_jax.evals.extraction import extract, sample_documents
    from flexolmo_jax.loaded import load

    model = load(args.path, args.checkpoint, args.mesh, anchor=args.anchor)
    how = {"heldout": args.heldout, "reading": reading_of(args)}
    texts = (text for path in args.documents for text in read_training_documents(path, **how))
    documents = sample_documents(texts, model.tokenizer, args.limit, args.prefix, args.tokens)
    sampled = {"prefix": args.prefix, "samples": args.samples}
    how = {"batch_size": args.batch_size, "seed": args.seed, **_selection(args)}
    found = extract(model, documents, **sampled, **how)
    told = {"prefix": args.prefix, "tokens": args.tokens, "samples": args.samples}
    return {**found._asdict(), "rate": found.rate, **told}


@verb(
    "generate",
    "Complete prompts, or answer them as messages.",
    'generate model --prompt "The patient" --without legal',
    MODEL,
    option("--prompt", action="append", required=True, help="may be given again: a batch"),
    option(
        "--chat",
        action="store_true",
        help="each prompt is a user's message, which the model answers by its chat template: "
        '--chat --system "Be brief." --prompt "Where is the mill?"',
    ),
    option("--system", metavar="TEXT", help="with --chat: a message of the system before it"),
    option("--max-new-tokens", type=int, default=128),
    option("--temperature", type=float, default=0.0, help="0 (default) is greedy"),
    *CHOOSING,
    option(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="to compute in (default: that of the weights; float32 on a CPU)",
    ),
    *SELECTING,
    CHECKPOINT,
    BASE,
    MESH,
    KERNELS,
)
def _generate(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.loaded import load

    if args.system is not None and not args.chat:
        raise UserError("--system is a message of a chat; give --chat too")
    if args.temperature == 0:
        refuse_given(args, CHOOSING, "--temperature is 0, which takes the likeliest token")
    how = {"kernels": args.kernels, "dtype": args.dtype, "anchor": args.anchor}
    model = load(args.path, args.checkpoint, args.mesh, **how)
    sampling = {key: getattr(args, key) for key in ("temperature", "top_k", "top_p", "seed")}
    how = {**_selection(args), **sampling}
    if len(args.prompt) == 1 and not args.json:
        return _streamed(model, args, how)
    if args.chat:
        chats = (_messages(prompt, args.system) for prompt in args.prompt)
        completions = [model.chat(messages, args.max_new_tokens, **how) for messages in chats]
    else:
        completions = model.generate(args.prompt, args.max_new_tokens, **how)
    pairs = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in zip(args.prompt, completions, strict=True)
    ]
    shown = (pair["completion"] if args.chat else "".join(pair.values()) for pair in pairs)
    return {"completions": pairs, "text": "\n\n".join(shown)}


def _messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def _streamed(model: Any, args: argparse.Namespace, how: dict[str, Any]) -> dict[str, Any]:
    """Prints the completion of one prompt, or the answer to it, as it comes."""
    from flexolmo_jax.generate import TextStream

    (prompt,), tokenizer = args.prompt, model.tokenizer
    in_chat = args.chat and tokenizer.chat
    hidden = tokenizer.chat.special_ids(tokenizer) if in_chat else tokenizer.end_ids
    stream = TextStream(tokenizer, hidden)

    def show(step: int, ids: Any) -> None:
        # the prompt not earlier: a mistake may still come up
        before = "" if step or args.chat else prompt
        print(for_terminal(before + stream.push(int(ids[0]))), end="", flush=True)

    how |= {"max_new_tokens": args.max_new_tokens, "on_token": show}
    if args.chat:
        model.chat(_messages(prompt, args.system), **how)
    else:
        model.generate([prompt], **how)
    return {"text": stream.finish()}


def _selection(args: argparse.Namespace) -> dict[str, Any]:
    return {"without": args.without, "active": args.active}


@verb(
    "import-hf",
    "Make a model of a Hugging Face checkpoint: OLMo, Llama, Mistral, Qwen, or a mixture of them.",
    "import-hf allenai/OLMo-2-0425-1B model",
    option(
        "source",
        metavar="HF_DIR",
        help="config.json and *.safetensors, with tokenizer.json for text; or a name on the hub: "
        "org/name",
    ),
    option("out", type=path_of),
    option(
        "--names",
        default="",
        metavar="A,B,C",
        help="of the experts behind the anchor, in order (default: as our export noted them, else "
        "expert1,expert2,...)",
    ),
    option(
        "--match",
        action="append",
        default=[],
        metavar="NAME=HF_DIR",
        help="name the expert whose matrices are those of this checkpoint of one expert; repeat",
    ),
    option(
        "--dtype",
        help="bfloat16, float16 or float32 (default: that of most weights); the others are cast",
    ),
    option(
        "--tokenizer",
        metavar="PATH",
        type=path_of,
        help="a tokenizer.json, or a folder that holds it, in place of the checkpoint's",
    ),
)
def _import_hf(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.convert.hub import local_copy
    from flexolmo_jax.convert.importing import import_hf

    names = [name for name in args.names.split(",") if name]
    match = {}
    for given in args.match:
        name, equals, source = given.partition("=")
        if not equals or name in match:
            raise UserError(f"--match is {given!r:.100}; expected NAME=HF_DIR, and each name once")
        match[name] = local_copy(source)
    how = {"match": match, "dtype": args.dtype, "tokenizer_path": args.tokenizer}
    model = import_hf(local_copy(args.source), args.out, names, **how)
    sizes = {"dtype": model.dtype, "active": model.config.n_active}
    return {"out": str(args.out), "experts": list(model.experts), **sizes}


@verb(
    "import-gguf",
    "Make a model of a GGUF file of a Llama, Mistral, OLMo or Qwen, in bfloat16.",
    "import-gguf SmolLM2-135M-Instruct-Q8_0.gguf model",
    option("source", metavar="FILE", type=path_of, help="as llama.cpp's converter writes it"),
    option("out", type=path_of),
)
def _import_gguf(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.convert.importing_gguf import import_gguf

    model = import_gguf(args.source, args.out)
    return {"out": str(args.out), "experts": list(model.experts), "dtype": model.dtype}


@verb(
    "export-hf",
    "Write a run, anchor or model as a Hugging Face checkpoint, a mixture as FlexOlmo, Mixtral or "
    "Qwen 3 MoE.",
    "export-hf model model-hf --drop-bias --eval-data data/public",
    MODEL,
    option("out", type=path_of),
    option(
        "--max-shard-size",
        type=size,
        default="5GB",
        help="of a file: 5GB (default), 500MB, ...",
    ),
    option("--dtype", help="bfloat16, float16 or float32 (default: as stored)"),
    option(
        "--drop-bias",
        action="store_true",
        help="leave out router biases, for which the format has no place",
    ),
    option(
        "--eval-data",
        nargs="+",
        default=[],
        metavar="DATA",
        type=path_of,
        help="scored before and after biases are dropped",
    ),
    CHECKPOINT,
    BASE,
    MESH,
)
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
        mesh=args.mesh,
        anchor=args.anchor,
    )


@verb(
    "push-to-hub",
    "Upload an exported checkpoint, with its card, to Hugging Face's hub; private by default.",
    "push-to-hub model-hf lab/model",
    option("folder", metavar="HF_DIR", type=local, help="what export-hf wrote"),
    option("name", metavar="ORG/NAME"),
    option("--public", action="store_true", help="where the model is new: for everyone to see"),
)
def _push_to_hub(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.convert.hub import push

    return {"address": push(args.folder, args.name, public=args.public)}


@verb(
    "info",
    "What a path is; of a contribution, exactly what leaves its owner.",
    "info contribution",
    option("path", type=path_of),
)
def _info(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.coordinator.info import in_brief, info

    found = info(args.path)
    return found if args.json else in_brief(found)
