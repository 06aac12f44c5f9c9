"""An owner's conversations: from documents of messages to a pair that chats."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax import cli
from flexolmo_jax.config import Loss
from flexolmo_jax.data import shards
from flexolmo_jax.data.chat import Chat
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import Index, Records, open_records
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.exchange.anchor import publish
from flexolmo_jax.exchange.contribution import open_contribution
from flexolmo_jax.train.metrics import read_metrics
from flexolmo_jax.train.pretrain import pretrain
from tests.chats import UNMARKED, said, with_tokens
from tests.tiny import documents, run_config

T = 128


@pytest.fixture(scope="module")
def chat_anchor(tiny: Path, corpora, tiny_tokenizer) -> Path:
    """An anchor whose tokenizer has a chat template."""
    folder = tiny / "chat-tokenizer"
    folder.mkdir()
    tokenizer = with_tokens(tiny / "tokenizer.json", "<|im_start|>", "<|im_end|>")
    tokenizer.chat = Chat(UNMARKED, {}, ("<|im_end|>",))
    tokenizer.save(folder)
    how = (f"data.tokenizer={folder}", f"data.seq_len={T}", "model.max_seq_len=256")
    pretrain(run_config("anchor", corpora["public"], *how), tiny / "chat-anchor-run")
    return publish(tiny / "chat-anchor-run", [corpora["public"]], tiny / "chat-anchor").path


@pytest.fixture(scope="module")
def chats(tiny: Path) -> Path:
    """Conversations of one or two answers, none of them longer than a record."""
    words = [text.split(": ")[1].split(".")[0] for text in documents("care", 150)]
    rows = [
        said(f"who {i}?", words[i][:24], "and?", "yes" * (i % 5))[: 2 + 2 * (i % 2)]
        for i in range(150)
    ]
    file = tiny / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in rows))
    return file


@pytest.fixture(scope="module")
def contribution(tiny: Path, chat_anchor, chats) -> Path:
    command = ["contribute", "--anchor", chat_anchor, "--documents", chats, "--name", "desk"]
    settings = ("data.loss=assistant", "data.batch_size=8", "train.steps=8", "mesh.fsdp=1")
    settings += (f"data.seq_len={T}",)
    command += [part for one in settings for part in ("--set", one)]
    assert cli.main([str(part) for part in [*command, "--out", tiny / "desk"]]) == 0
    return tiny / "desk"


@pytest.fixture(scope="module")
def data(contribution: Path) -> Path:
    """The owner's records."""
    return contribution.with_name("desk.work") / "data"


def test_an_owners_conversations_become_a_pair_that_chats(contribution, data, capfd):
    """With the template that came with the anchor."""
    index = Index.read(data)
    assert index.splits["train"].conversations == index.splits["train"].documents > 100
    run = contribution.with_name("desk.work") / "run"
    assert cli.main(["generate", str(run), "--chat", "--prompt", "who?"]) == 0
    answer = capfd.readouterr().out
    assert answer.strip() and "<|im" not in answer
    assert flexolmo_jax.load(run).experts == ("anchor", "desk")
    assert cli.main(["verify", str(contribution)]) == 0


def test_the_manifests_scores_are_of_what_the_assistant_says(contribution, data):
    """As the run's own evaluation: bits of the answers and of the ends of their turns, by the bytes
    of the answers."""
    run = contribution.with_name("desk.work") / "run"
    manifest = open_contribution(contribution).manifest["training"]["bits_per_byte"]
    pair = flexolmo_jax.load(run)
    scored, whole = (
        evaluate(pair, [data], limit=64, names=["desk"], loss=loss) for loss in ("assistant", "all")
    )
    bits, size = by_hand(pair, data)
    assert scored["bytes"]["desk"] == size < 0.6 * whole["bytes"]["desk"]
    np.testing.assert_allclose(scored["bits_per_byte"]["desk"], bits / size, rtol=1e-5)
    last = [row for row in read_metrics(run) if "bits_per_byte" in row][-1]["bits_per_byte"]
    np.testing.assert_allclose(last["desk"], bits / size, rtol=1e-5)
    # the released expert is in bfloat16
    np.testing.assert_allclose(manifest["pair"]["desk"], bits / size, rtol=0.02)
    assert abs(whole["bits_per_byte"]["desk"] / (bits / size) - 1) > 0.1
    assert manifest["pair"].keys() == {"desk", "public"}


def by_hand(model, data: Path) -> tuple[float, int]:
    """Bits and bytes of the held-out answers, each conversation alone."""
    tokenizer, records = model.tokenizer, open_records(data, "heldout")
    ids = {token.content: i for i, token in tokenizer.added_tokens.items()}
    opening = [ids["<|im_start|>"], *tokenizer.encode("assistant\n")]
    bits, size = 0.0, 0
    for record in map(records.__getitem__, range(len(records))):
        for segment in range(1, record["segments"].max() + 1):
            tokens = record["tokens"][record["segments"] == segment].tolist()
            log_p = model.logits([tokens])[0].astype(np.float64)
            log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
            is_said = False
            for t, token in enumerate(tokens):
                if is_said:
                    bits -= log_p[t - 1, token] / math.log(2)
                    size += len(tokenizer.decode([token]).encode())
                is_said = is_said and token != ids["<|im_end|>"]
                is_said |= tokens[max(0, t + 1 - len(opening)) : t + 1] == opening
    return bits, size


def test_a_conversation_costs_the_same_packed_and_alone(
    contribution, data, chats, tmp_path, monkeypatch
):
    model = flexolmo_jax.load(contribution.with_name("desk.work") / "run")
    lines = chats.read_text().splitlines(keepends=True)[:24]
    (tmp_path / "packed.jsonl").write_text("".join(lines))
    (tmp_path / "each").mkdir()
    for i, line in enumerate(lines):
        (tmp_path / "each" / f"{i:02}.jsonl").write_text(line)
    prepare([tmp_path / "packed.jsonl"], model.tokenizer, T, tmp_path / "packed", heldout=0)
    monkeypatch.setattr(shards, "SHARD", 1)  # records hold nothing of two files
    prepare([tmp_path / "each"], model.tokenizer, T, tmp_path / "alone", heldout=0)
    both = [tmp_path / name for name in ("packed", "alone")]
    assert len(open_records(both[0], "train")) < len(open_records(both[1], "train")) == 24
    found = evaluate(model, both, split="train", loss="assistant")
    assert found["bytes"]["packed"] == found["bytes"]["alone"] > 300
    assert found["tokens"]["packed"] == found["tokens"]["alone"]
    packed, alone = found["bits_per_byte"].values()
    np.testing.assert_allclose(packed, alone, rtol=1e-5)


def test_eval_scores_what_the_assistant_says_if_told_to(contribution, data, prepared, capfd):
    run = contribution.with_name("desk.work") / "run"
    model = flexolmo_jax.load(run)
    found = {}
    for loss in ("all", "assistant"):
        command = ["eval", str(run), "--data", str(data), "--loss", loss, "--json"]
        assert cli.main(command) == 0
        found[loss] = json.loads(capfd.readouterr().out)
        assert found[loss] == evaluate(model, [data], loss=loss)
    assert found["assistant"]["tokens"]["data"] < found["all"]["tokens"]["data"]
    public = json.loads((run / "flexolmo.json").read_text())["base"] + "/public"
    assert cli.main(["eval", str(run), "--data", public, "--loss", "assistant"]) == 2
    assert "--loss is assistant, and public have no conversations" in capfd.readouterr().err


def test_bytes_that_are_lost_count_where_they_are_scored(contribution, data, monkeypatch):
    model = flexolmo_jax.load(contribution.with_name("desk.work") / "run")
    expected: dict[Loss, int] = {"all": 50, "assistant": 20}
    before = {loss: evaluate(model, [data], loss=loss) for loss in expected}
    monkeypatch.setattr(Records, "lost_bytes", 50)
    monkeypatch.setattr(Records, "lost_in_context", 30)
    for loss, lost in expected.items():
        now, was = evaluate(model, [data], loss=loss), before[loss]
        size = was["bytes"]["data"]
        assert now["bytes"]["data"] == size + lost
        bits = was["bits_per_byte"]["data"] * size + 8 * lost
        np.testing.assert_allclose(now["bits_per_byte"]["data"], bits / (size + lost), rtol=1e-6)


def test_conversations_against_an_anchor_without_a_template_are_refused(
    anchor, chats, tmp_path, capfd
):
    command = ["contribute", "--anchor", anchor, "--documents", chats, "--name", "desk"]
    assert cli.main([*map(str, command), "--out", str(tmp_path / "desk")]) == 2
    told = capfd.readouterr().err
    assert f"{chats}, line 1: it has messages, and the tokenizer has no chat template" in told
    assert not list(tmp_path.iterdir())


def test_public_conversations_go_with_an_anchor(chat_anchor, chats, tiny, tmp_path):
    """Their records are of its fingerprint."""
    one = publish(tiny / "chat-anchor-run", [chats], tmp_path / "one")
    assert Index.read(one.path / "public").splits["train"].conversations
    assert Tokenizer.load(one.path / "public").chat == one.tokenizer.chat
    file = one.path / "public" / "train.context.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError):
        open_records(one.path / "public", "train").check_digests()
    assert cli.main(["verify", str(one.path)]) == 2
