"""EleutherAI's lm-evaluation-harness on our models: the extra `eval`.

    from flexolmo_jax.evals.harness import harness_model
    lm_eval.simple_evaluate(harness_model(flexolmo_jax.load("model")), tasks=["my_task"],
    task_manager=...)

`eval --tasks ... --harness` runs the tasks of `tasks.py` through it: the same requests, scored by
other people's code.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import UserError, from_a_clone
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.loaded import LoadedModel
from flexolmo_jax.model import Params, forward
from flexolmo_jax.runtime.progress import bar
from flexolmo_jax.storage.files import write_text

from .tasks import Task, batches

NEW_TOKENS = 256  # that are generated, where a task does not say how many


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
    """The methods of `LM`. It is joined to `LM` later, as that comes with the harness only."""

    def __init__(
        self, model: LoadedModel, without: Sequence[str], active: int | None, batch_size: int
    ):
        super().__init__()
        self._loaded, self._selection = model, {"without": without, "active": active}
        self._context, self._batch_size = model.config.max_seq_len, batch_size
        k, self._allowed = model.selection(without, active)
        self._scores = _scores(model.config, k, model.kernels)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        queries = []
        for request in requests:
            before, after = request.args
            continuation = self._encode(after)[-self._context :]
            ids = (self._encode(before) if before or self._start else [self._eos]) + continuation
            kept = ids[-(self._context + 1 - len(self._start)) :]
            queries.append(([*self._start, *kept], min(len(continuation), len(kept))))
        return self._score(queries)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Each token once, after BOS or an EOS, with as much before it as the context holds."""
        first = self._start or [self._eos]
        texts = [[*first, *self._encode(request.args[0])] for request in requests]
        return [sum(total for total, _ in self._score(self._windows(ids))) for ids in texts]

    def generate_until(self, requests: list[Any]) -> list[str]:
        texts = []
        for request in requests:
            prompt, options = request.args
            space = self._context - len(self._start)
            new = min(options.get("max_gen_toks", NEW_TOKENS), space - 1)
            ids = [*self._start, *self._encode(prompt)[-(space - new) :]]
            temperature = options.get("temperature", 0.0)
            (made,) = self._loaded.generate([ids], new, temperature=temperature, **self._selection)
            text = self._loaded.tokenizer.decode([int(i) for i in made])
            stops = options.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts

    def _score(self, queries: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of each query's last tokens: their log-probability, and whether each is the likeliest.

        A query is (ids, how many of them are scored).
        """
        result: list[tuple[float, bool]] = [(0.0, True)] * len(queries)
        each = batches([ids for ids, _ in queries], self._batch_size)
        with bar("lm-eval", len(queries)) as advance:
            for chosen, tokens, segments in each:
                scores = self._scores(self._loaded.params, tokens, segments, self._allowed)
                log_p, likeliest = map(np.asarray, scores)
                for b, i in enumerate(chosen):
                    ids, count = queries[i]
                    own = b, slice(len(ids) - count, len(ids))
                    total = float(log_p[own].sum(dtype=np.float64))
                    result[i] = total, bool(likeliest[own].all())
                advance(len(chosen))
        return result

    def _windows(self, ids: list[int]) -> list[tuple[list[int], int]]:
        """Queries that score each token but the first once."""
        context, windows = self._context, []
        for end in range(context + 1, len(ids) + context, context):
            taken = min(end, len(ids))
            window = ids[max(0, taken - context - 1) : taken]
            windows.append((window, min(context, taken - (end - context))))
        return windows

    def _encode(self, text: str) -> list[int]:
        return self._loaded.tokenizer.encode(text)

    @property
    def _start(self) -> list[int]:
        return self._loaded.tokenizer.start_ids

    @property
    def _eos(self) -> int:
        return self._loaded.tokenizer.eos_id


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


@functools.lru_cache
def _scores(
    config: ModelConfig, active: int, kernels: Kernels
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    @jax.jit
    def scores(
        params: Params, tokens: jax.Array, segments: jax.Array, allowed: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        how: dict[str, Any] = {"active": active, "kernels": kernels}
        logits = forward(config, params, tokens, segments, allowed=allowed, **how).logits
        targets = jnp.roll(tokens, -1, axis=1)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        likeliest = jnp.argmax(logits, axis=-1) == targets
        # at a token's own place, one after that which predicts it
        return jnp.roll(log_p, 1, axis=1), jnp.roll(likeliest, 1, axis=1)

    return scores


def _harness() -> tuple[Any, Any]:
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"the harness is not installed: {from_a_clone('eval')}") from None
    return lm_eval, TaskManager
