"""EleutherAI's lm-evaluation-harness on our models: `pip install 'flexolmo-jax[eval]'`.

    from flexolmo_jax.evals.harness import harness_model
    lm_eval.simple_evaluate(harness_model(flexolmo_jax.load("model")), tasks=["my_task"],
    task_manager=...)

`eval --tasks ... --harness` runs our own tasks through it: the same requests, scored by other
people's code.
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
from flexolmo_jax.errors import UserError
from flexolmo_jax.loaded import LoadedModel
from flexolmo_jax.model import Params, forward
from flexolmo_jax.runtime.progress import bar
from flexolmo_jax.storage.files import write_text

from .tasks import Task, batches

NEW_TOKENS = 256  # where a task does not say how many


def evaluate_through_harness(model: Any, tasks: Sequence[Task], folder: Path) -> dict[str, Any]:
    """{task: the harness's results} of multiple choice tasks, which are written into a folder in
    its form.

    Raises UserError without the harness, and for a task whose choices differ in more than what
    follows the context.
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
    """An `lm_eval.api.model.LM`. Raises UserError without the harness, and as
    `LoadedModel.selection` does."""
    _harness()
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    k, allowed = model.selection(without, active)
    run, context, encode = (
        _scores(model.config, k),
        model.config.max_seq_len,
        model.tokenizer.encode,
    )

    def score(queries: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of ids the last so many: their log-probability, and whether each is the likeliest."""
        result: list[tuple[float, bool]] = [(0.0, True)] * len(queries)
        with bar("lm-eval", len(queries)) as advance:
            for chosen, tokens, segments in batches([ids for ids, _ in queries], batch_size):
                log_p, likeliest = (
                    np.asarray(a) for a in run(model.params, tokens, segments, allowed)
                )
                for row, i in enumerate(chosen):
                    ids, count = queries[i]
                    of_row = slice(len(ids) - count, len(ids))
                    result[i] = (
                        float(log_p[row, of_row].sum(dtype=np.float64)),
                        bool(likeliest[row, of_row].all()),
                    )
                advance(len(chosen))
        return result

    class FlexOlmo(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            queries = []
            for request in requests:
                before, after = request.args
                continuation = encode(after)[-context:]
                ids = (
                    [model.tokenizer.eos_id, *encode(before)] if not before else encode(before)
                ) + continuation
                queries.append((ids[-(context + 1) :], len(continuation)))
            return score(queries)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            """Each token once, after an EOS, with as much before it as the context holds."""
            sums = []
            for request in requests:
                ids = [model.tokenizer.eos_id, *encode(request.args[0])]
                windows = []
                for end in range(context + 1, len(ids) + context, context):
                    taken = min(end, len(ids))
                    windows.append(
                        (
                            ids[max(0, taken - context - 1) : taken],
                            min(context, taken - (end - context)),
                        )
                    )
                sums.append(sum(total for total, _ in score(windows)))
            return sums

        def generate_until(self, requests: list[Any]) -> list[str]:
            texts = []
            for request in requests:
                prompt, options = request.args
                stops = options.get("until") or []
                new = min(options.get("max_gen_toks", NEW_TOKENS), context - 1)
                ids = encode(prompt)[-(context - new) :]
                text = model.tokenizer.decode(
                    [
                        int(i)
                        for i in model.generate(
                            [ids],
                            new,
                            without=without,
                            active=active,
                            temperature=options.get("temperature", 0.0),
                        )[0]
                    ]
                )
                for stop in [stops] if isinstance(stops, str) else stops:
                    text = text.split(stop)[0] if stop else text
                texts.append(text)
            return texts

    return FlexOlmo()


def _write_task(task: Task, folder: Path) -> None:
    documents: dict[int, dict[str, Any]] = {}
    for request in task.requests:
        document = documents.setdefault(
            request.document, {"context": request.context, "choices": {}, "label": request.label}
        )
        if document["context"] != request.context or task.metric == "bpb":
            raise UserError(
                f"{task.name} is no multiple choice after one context, which is all that runs"
                " through the harness; leave out --harness"
            )
        document["choices"][request.choice] = request.continuation
    lines = [
        {**of, "choices": [text for _, text in sorted(of["choices"].items())]}
        for of in documents.values()
    ]
    data = folder / f"{task.name}.jsonl"
    write_text(data, "".join(json.dumps(line) + "\n" for line in lines))
    form = {
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
    write_text(folder / f"{task.name}.yaml", json.dumps(form, indent=1) + "\n")


@functools.lru_cache
def _scores(config: ModelConfig, active: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    @jax.jit
    def scores(
        params: Params, tokens: jax.Array, segments: jax.Array, allowed: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        logits = forward(config, params, tokens, segments, active=active, allowed=allowed).logits
        targets = jnp.roll(tokens, -1, axis=1)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return jnp.roll(log_p, 1, axis=1), jnp.roll(
            jnp.argmax(logits, axis=-1) == targets, 1, axis=1
        )

    return scores


def _harness() -> tuple[Any, Any]:
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("the harness is not installed: pip install 'flexolmo-jax[eval]'") from None
    return lm_eval, TaskManager
