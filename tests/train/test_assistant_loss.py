"""With `data.loss: assistant` a step learns what the assistant says, and nothing else of
conversations."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.config import Dataset, ModelConfig, RunConfig, resolve
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import Record, open_records
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import init_params
from flexolmo_jax.runtime.sharding import make_mesh
from flexolmo_jax.train import step as step_module
from flexolmo_jax.train.feed import Feed
from flexolmo_jax.train.job import Job
from flexolmo_jax.train.sources import choose_tokenizer, open_sources
from tests.chats import UNMARKED, byte_chat, said

B, T = 8, 96
MODEL = ModelConfig(vocab_size=260, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_ffn=24)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_chat("chatml", UNMARKED)


def conversations(question: str) -> list[dict[str, Any]]:
    chats = (said(question, f"answer {i}", "more?", "yes " * (i % 3)) for i in range(64))
    return [{"messages": chat[: 2 + 2 * (i % 2)]} for i, chat in enumerate(chats)]


def prepared(tokenizer: Tokenizer, folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([folder / f"{name}.jsonl"], tokenizer, T, folder / name, heldout=0.1)
    return folder / name


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    text = [{"text": f"the mill {i} " * (i % 5 + 1)} for i in range(64)]
    return {
        "chats": prepared(tokenizer, folder, "chats", conversations("where?")),
        "other": prepared(tokenizer, folder, "who", conversations("who feeds it?")),
        "text": prepared(tokenizer, folder, "text", text),
        "both": prepared(tokenizer, folder, "both", [*text, *conversations("where?")]),
    }


def config(loss: str, *paths: Path) -> RunConfig:
    tree = {
        "run": "anchor",
        "model": dataclasses.asdict(MODEL),
        "data": {"train": [{"path": str(path)} for path in paths], "batch_size": B, "seq_len": T},
        "mesh": {"fsdp": 1},
    }
    return resolve(tree, [f"data.loss={loss}"])


def batch_of(run: RunConfig, tokenizer: Tokenizer, *extra: Dataset) -> dict[str, np.ndarray]:
    """The first batch that a step gets, and "source" of each of its records."""
    batches, _ = open_sources(run.data, tokenizer, 0, extra)
    nothing: Any = None
    job = Job(run, MODEL, nothing, nothing, ("anchor",), tokenizer, batches, {})
    feed = Feed(job, make_mesh(run.mesh), 0)
    try:
        placed = {name: np.asarray(array) for name, array in feed.next().items()}
    finally:
        feed.close()
    assert placed.keys() == {"tokens", "segments", "targets"}
    return placed | {"source": batches.at(0)["source"]}


def by_hand(record: Record, tokenizer: Tokenizer) -> np.ndarray:
    """bool [T]: what lies behind "<|im_start|>assistant\\n" until "<|im_end|>", and of what is no
    conversation all but the first token."""
    ids = {token.content: i for i, token in tokenizer.added_tokens.items()}
    begin, end = ids["<|im_start|>"], ids["<|im_end|>"]
    opening = [begin, *tokenizer.encode("assistant\n")]
    targets = np.zeros(T, bool)
    for segment in range(1, record["segments"].max() + 1):
        places = np.flatnonzero(record["segments"] == segment).tolist()
        tokens = record["tokens"][places].tolist()
        if tokens[0] != begin:
            targets[places[1:]] = True
            continue
        is_said = False
        for i, place in enumerate(places):
            targets[place] = is_said
            is_said = is_said and tokens[i] != end
            is_said |= tokens[max(i + 1 - len(opening), 0) : i + 1] == opening
    return targets


def gradient(run: RunConfig, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    params = jax.jit(functools.partial(init_params, MODEL))(jax.random.key(0))
    of_loss = jax.grad(functools.partial(step_module._loss, MODEL, run, None), has_aux=True)
    given = {key: jnp.asarray(batch[key]) for key in ("tokens", "segments", "targets")}
    return jax.jit(of_loss)(params, {}, given)[0]


def same(one: Any, other: Any) -> bool:
    return all(map(np.array_equal, *map(jax.tree.leaves, (one, other))))


def test_the_gradient_is_that_of_a_mask_made_by_hand(data, tokenizer):
    run = config("assistant", data["both"])
    batch = batch_of(run, tokenizer)
    records = [{key: batch[key][i] for key in ("tokens", "segments")} for i in range(B)]
    targets = np.stack([by_hand(record, tokenizer) for record in records])
    assert np.array_equal(batch["targets"], targets)
    whole = batch_of(config("all", data["both"]), tokenizer)
    assert np.array_equal(whole["tokens"], batch["tokens"])
    assert not (targets & ~whole["targets"]).any()
    assert 0.1 < targets.sum() / whole["targets"].sum() < 0.7
    ours = gradient(run, batch)
    assert same(ours, gradient(config("all", data["both"]), whole | {"targets": targets}))
    assert not same(ours, gradient(run, whole))


def test_what_the_user_says_changes_no_count_of_what_is_learnt(data, tokenizer):
    counts = []
    for name in ("chats", "other"):
        records = open_records(data[name], "train"), open_records(data[name], "heldout")
        each = [split[i] for split in records for i in range(len(split))]
        counts.append(sum(by_hand(record, tokenizer).sum() for record in each))
        learnt = sum((~record["context"] & (record["segments"] > 0)).sum() for record in each)
        assert learnt == counts[-1]
    answers = sum(len(f"answer {i}") + 1 + (4 * (i % 3) + 1) * (i % 2) for i in range(64))
    assert counts == [answers] * 2


def test_public_text_beside_conversations_counts_whole(data, tokenizer):
    run, text = config("assistant", data["chats"]), Dataset(path=str(data["text"]), weight=1.0)
    batch, whole = (batch_of(one, tokenizer, text) for one in (run, config("all", data["chats"])))
    of_text = batch["source"] == 1
    assert 0 < of_text.sum() < B
    assert np.array_equal(batch["targets"][of_text], whole["targets"][of_text])
    fewer = batch["targets"][~of_text].sum(axis=1) < whole["targets"][~of_text].sum(axis=1)
    assert fewer.all()


def test_it_is_refused_where_no_own_source_holds_conversations(data, tokenizer):
    run, public = config("assistant", data["text"]), Dataset(path=str(data["chats"]))
    with pytest.raises(UserError, match=r"data\.loss is 'assistant', and no source of data\.train"):
        open_sources(run.data, tokenizer, 0, [public])
    open_sources(config("assistant", data["text"], data["chats"]).data, tokenizer, 0)
    with pytest.raises(UserError, match=r"data\.loss"):
        config("user", data["chats"])


def test_the_tokenizer_of_prepared_conversations_has_their_template(data, tokenizer):
    """Also where they are not the first directory."""
    found = choose_tokenizer(config("all", data["text"], data["other"]).data)
    assert found.chat == tokenizer.chat
    assert choose_tokenizer(config("all", data["text"]).data).chat is None
