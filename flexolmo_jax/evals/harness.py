"""EleutherAI's lm-evaluation-harness on our models: the extra `eval`.

    from flexolmo_jax.evals.harness import harness_model
    lm_eval.simple_evaluate(harness_model(flexolmo_jax.load("model")), tasks=["my_task"],
    task_manager=...)

`eval --tasks ... --harness` runs the tasks of `tasks.py` through it: the same requests, scored by
other people's code.
"""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.chat import Chat
from flexolmo_jax.errors import UserError, from_a_clone
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.loaded import LoadedModel
from flexolmo_jax.model import Params, forward
from flexolmo_jax.model.decoding import ENDS
from flexolmo_jax.model.sizes import KEPT
from flexolmo_jax.runtime.progress import bar, note
from flexolmo_jax.runtime.sharding import batch_over, put_whole_batch
from flexolmo_jax.storage.files import write_text

from .harness_options import Endings, Options
from .tasks import Task, batches

Parts = tuple[list[int], list[int]]  # ids that are given, and those after them, which are scored


def evaluate_through_harness(model: Any, tasks: Sequence[Task], folder: Path) -> dict[str, Any]:
    """{task: the harness's results} of multiple choice tasks.

    The tasks are first written into `folder`, as the harness reads them. Raises UserError without
    the harness, and for a task whose choices do not all follow one context.
    """
    lm_eval, task_manager = _harness()
    for task in tasks:
        _write_task(task, folder)
    manager = task_manager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model,
        tasks=[task.name for task in tasks],
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {
        name: {
            key.removesuffix(",none"): value
            for key, value in result.items()
            if isinstance(value, float)
        }
        for name, result in found["results"].items()
    }


def harness_model(
    model: LoadedModel,
    *,
    without: Sequence[str] = (),
    active: int | None = None,
    batch_size: int = 16,
) -> Any:
    """An `lm_eval.api.model.LM`.

    Raises UserError without the harness, and as `LoadedModel.selection` does.
    """
    _harness()
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    class FlexOlmo(_Adapter, LM):
        pass

    return FlexOlmo(model, without, active, batch_size)


class _Adapter:
    """The methods of `LM`. It is joined to `LM` later, as that comes with the harness only.

    Texts become tokens, and requests become tokens to score, as in the harness's `hf` backend.
    """

    cache_hook: Any = None  # the harness's, which keeps an answer once it is there

    def __init__(
        self, model: LoadedModel, without: Sequence[str], active: int | None, batch_size: int
    ):
        super().__init__()
        self._loaded, self._tokenizer = model, model.tokenizer
        self._cuts = collections.Counter[str]()  # of requests, to be told
        self._context = model.config.max_seq_len
        self._batch_size = batch_over(model.mesh, batch_size)
        self._experts = model.selection(without, active)
        chat = self._tokenizer.chat
        tokens = {**self._tokenizer.conventions.tokens, **(chat.tokens if chat else {})}
        self._named = {token.content: i for i, token in self._tokenizer.added_tokens.items()}
        eos = self._named.get(tokens.get("eos_token", ""), self._tokenizer.eos_id)
        ends = chat.end_ids(self._tokenizer) if chat else ()
        self._ends = [*dict.fromkeys((eos, *ends, *self._tokenizer.end_ids))]
        # stands before a text that has nothing before it
        self._prefix = self._named.get(tokens.get("bos_token", ""), eos)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        parts = [self._parts(*request.args) for request in requests]
        return self._score("loglikelihood", requests, parts, lambda total, best: (total, best))

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Each token once, after the prefix, with as much before it as the context holds."""
        parts = [([self._prefix], self._encode(request.args[0])) for request in requests]
        return self._score("loglikelihood_rolling", requests, parts, lambda total, _: total)

    def generate_until(self, requests: list[Any]) -> list[str]:
        options = [Options.of(request.args[1]) for request in requests]
        prompts = [
            self._prompt(request.args[0], asked.new)
            for request, asked in zip(requests, options, strict=True)
        ]
        self._tell_cuts()
        answers = [""] * len(requests)
        with bar("lm-eval", len(requests)) as advance:
            for number, chosen in enumerate(self._together(prompts, options)):
                texts = self._complete([prompts[i] for i in chosen], options[chosen[0]], number)
                for i, text in zip(chosen, texts, strict=True):
                    answers[i] = text
                    self._keep("generate_until", requests[i], text)
                advance(len(chosen))
        return answers

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of messages. Without the prompt the model goes on with the last of them.

        Where the template takes no messages of the system, these are left out, and a note says so.
        """
        render = self._chat.render if add_generation_prompt else self._chat.render_open
        try:
            return render(chat_history)
        except UserError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = render(others)
            note(f"lm-eval: messages of the system are left out: {error}")
            return text

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps requests under that it has put into a template."""
        return "-".join(digest[:16] for digest in self._tokenizer.digests.values())

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._chat.template if chat_template else None

    @property
    def _chat(self) -> Chat:
        if self._tokenizer.chat is None:
            raise UserError(
                f"{self._loaded.artifact.path} has no chat template: expected one of an instruct"
                " model that was imported with it; leave apply_chat_template out"
            )
        return self._tokenizer.chat

    def _parts(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of both. Spaces between them belong to the continuation, and both are one text
        that is cut where the context's own tokens end."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if not kept:
            ids = self._encode(continuation, add=False)
            return (ids[:1], ids[1:]) if ids[:1] == [self._prefix] else ([self._prefix], ids)
        before = self._encode(kept) or [self._prefix]
        after = self._encode(kept + continuation)[len(before) :]
        # the last token of the context may hold all of the continuation
        return before, after or self._encode(continuation, add=False)

    def _score(
        self, kind: str, requests: Sequence[Any], parts: Sequence[Parts], answer: Callable[..., Any]
    ) -> list[Any]:
        """`answer` of each request: the sum of log-probabilities of what is scored of its parts,
        and whether each of these tokens is the likeliest."""
        windows = [(i, *window) for i, both in enumerate(parts) for window in self._windows(*both)]
        self._tell_cuts()
        left = collections.Counter(i for i, *_ in windows)
        sums, answers = [(0.0, True)] * len(parts), [answer(0.0, True)] * len(parts)
        each = batches([ids for _, ids, _ in windows], self._batch_size, self._context + 1)
        with bar("lm-eval", len(windows)) as advance:
            for chosen, tokens, segments in each:
                scores = self._scores(tokens, segments)
                for b, window in enumerate(chosen):
                    i, ids, count = windows[window]
                    log_p, best = (score[b, len(ids) - count : len(ids)] for score in scores)
                    total, all_best = sums[i]
                    log_p = float(log_p.sum(dtype=np.float64))
                    sums[i] = total + log_p, all_best and bool(best.all())
                    left[i] -= 1
                    if not left[i]:
                        answers[i] = answer(*sums[i])
                        self._keep(kind, requests[i], answers[i])
                advance(len(chosen))
        return answers

    def _windows(self, before: list[int], after: list[int]) -> list[tuple[list[int], int]]:
        """Ids that the model reads, and how many of the last are scored: each of `after` once.

        Where `after` alone is too long, it is in windows, as rolling likelihoods are: each begins
        at the token before those that it scores, and the last has as many as the context holds.
        """
        size = self._context
        if len(before) > 1 and len(before) + len(after) > size + 1:
            self._cuts["the start of the context is left out"] += 1
        if len(after) <= size:
            return [((before + after)[-(size + 1) :], len(after))] if after else []
        ids = before[-1:] + after
        ends = range(size + 1, len(ids), size)
        last = ids[-(size + 1) :], len(after) - size * len(ends)
        return [*((ids[end - size - 1 : end], size) for end in ends), last]

    def _scores(self, tokens: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        model, (active, allowed) = self._loaded, self._experts
        run = _scorer(model.config, active, model.mesh, model.kernels, tokens.shape)
        batch = [put_whole_batch(model.mesh, array) for array in (tokens, segments)]
        log_p, is_likeliest = run(model.params, *batch, allowed)
        return np.asarray(log_p), np.asarray(is_likeliest)

    def _prompt(self, text: str, new: int) -> tuple[list[int], int]:
        """Its ids, and how many may follow them: `new`, for which the start of the prompt is cut,
        or what a context has left that is no longer than `new`."""
        ids, size = self._encode(text) or [self._prefix], self._context
        if new >= size:
            new = max(1, size - len(ids))
            self._cuts["generation ends early"] += 1
        if len(ids) > size - new:
            self._cuts[f"the start of the prompt is left out for {new} new tokens"] += 1
        return ids[-(size - new) :], new

    def _together(
        self, prompts: Sequence[tuple[list[int], int]], options: Sequence[Options]
    ) -> Iterator[list[int]]:
        """Batches of requests that ask for the same, the shortest prompts first."""
        groups = collections.defaultdict[Options, list[int]](list)
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i][0])):
            groups[options[i]].append(i)
        for group in groups.values():
            for start in range(0, len(group), self._batch_size):
                yield group[start : start + self._batch_size]

    def _complete(
        self, prompts: Sequence[tuple[list[int], int]], asked: Options, number: int
    ) -> list[str]:
        """The texts that follow a batch of prompts, the `number`-th."""
        ids, limits = map(list, zip(*prompts, strict=True))
        decode, name = self._tokenizer.decode, self._tokenizer.token(self._ends[0])
        named = [self._named[text] for text in asked.until if text in self._named]
        ends, until = list(dict.fromkeys([*self._ends, *named])), (*asked.until, name)
        # a request may be repeated, to be sampled again
        seed = (asked.sampling.seed + number) % 2**32
        sampling = dataclasses.replace(asked.sampling, seed=seed)
        endings = Endings(self._tokenizer, limits, until, ends)
        made = self._loaded.generator.generate(
            ids, limits, self._experts, sampling, endings, ends[:ENDS]
        )
        texts = (decode(itertools.takewhile(lambda i: i not in ends, one)) for one in made)
        # one after the other, as the harness does
        return [functools.reduce(lambda text, stop: text.split(stop)[0], until, t) for t in texts]

    def _tell_cuts(self) -> None:
        for what, count in self._cuts.items():
            note(f"lm-eval: {what} in {count} requests, as the model reads {self._context} tokens")
        self._cuts.clear()

    def _encode(self, text: str, add: bool = True) -> list[int]:
        add = add and not text.startswith(self._tokenizer.token(self._prefix))
        ids = self._tokenizer.encode_with_special(text, add)
        start = self._tokenizer.start_ids if add else []
        return ids if ids[: len(start)] == start else [*start, *ids]

    def _keep(self, kind: str, request: Any, answer: Any) -> None:
        if self.cache_hook is not None:
            self.cache_hook.add_partial(kind, request.args, answer)


def _write_task(task: Task, folder: Path) -> None:
    documents: dict[int, dict[str, Any]] = {}
    for request in task.requests:
        document = documents.setdefault(
            request.document, {"context": request.context, "choices": {}, "label": request.label}
        )
        if document["context"] != request.context or task.metric == "bpb":
            raise UserError(
                f"{task.name} is no multiple choice after one context, and only such tasks run"
                " through the harness; leave out --harness"
            )
        document["choices"][request.choice] = request.continuation
    lines = []
    for document in documents.values():
        choices = [text for _, text in sorted(document["choices"].items())]
        lines.append(json.dumps(document | {"choices": choices}) + "\n")
    data = folder / f"{task.name}.jsonl"
    write_text(data, "".join(lines))
    fields = {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1},
    }
    write_text(folder / f"{task.name}.yaml", json.dumps(fields, indent=1) + "\n")


@functools.lru_cache(KEPT)
def _scorer(
    config: ModelConfig, active: int, mesh: Mesh | None, kernels: Kernels, shape: tuple[int, ...]
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """For batches of this shape: a function of its own, which goes with its program."""

    @jax.jit
    def scores(
        params: Params, tokens: jax.Array, segments: jax.Array, allowed: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        how: dict[str, Any] = {"active": active, "mesh": mesh, "kernels": kernels}
        logits = forward(config, params, tokens, segments, allowed=allowed, **how).logits
        targets = jnp.roll(tokens, -1, axis=1)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        is_likeliest = jnp.argmax(logits, axis=-1) == targets
        # at a token's own place, one after that which predicts it
        return jnp.roll(log_p, 1, axis=1), jnp.roll(is_likeliest, 1, axis=1)

    return scores


def _harness() -> tuple[Any, Any]:
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"the harness is not installed: {from_a_clone('eval')}") from None
    return lm_eval, TaskManager
