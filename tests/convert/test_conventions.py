"""What a publisher says beside a tokenizer.json: it is used, and goes from import to export through
all that is made of a model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from flexolmo_jax import cli
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.cli.printing import for_terminal
from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.coordinator.merge import merge
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.data.conventions import CONVENTIONS_FILE, Conventions
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import open_records
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.evals.extraction import extract
from flexolmo_jax.evals.harness import _Adapter
from flexolmo_jax.evals.mixed import mixed_documents
from flexolmo_jax.evals.tasks import Request, Task, score
from flexolmo_jax.exchange.anchor import publish
from flexolmo_jax.loaded import load
from tests.attacks.forging import copied
from tests.chats import CHATML, with_tokens
from tests.convert.conftest import DENSE, Make

BOS = "<s>"
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": BOS, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {BOS: {"id": BOS, "ids": [320], "tokens": [BOS]}},
}
LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
POST = {
    "a template": TEMPLATE,
    "one step of several": {"type": "Sequence", "processors": [LEVEL, TEMPLATE]},
    "no BOS": LEVEL,
    "none": None,
}
TEXT = "The tenant shall return the mill"


def written(source: Path, post: Any = None, **files: Any) -> Path:
    """The checkpoint with a BOS in its tokenizer, this post-processor, and these JSON files."""
    tokenizer = with_tokens(source / "tokenizer.json", BOS, "<|a|>", "<|b|>")
    tokenizer.save(source)
    fields = json.loads((source / "tokenizer.json").read_text()) | {"post_processor": post}
    (source / "tokenizer.json").write_text(json.dumps(fields))
    for name, content in files.items():
        if name == "config":
            content = json.loads((source / "config.json").read_text()) | content
        (source / f"{name}.json").write_text(json.dumps(content))
    return source


@pytest.fixture
def bos(checkpoint: Make, tmp_path: Path) -> Path:
    """An imported model whose texts begin with BOS."""
    source = checkpoint(DENSE, np.float32)
    named = written(source, TEMPLATE, tokenizer_config={"bos_token": BOS})
    return import_hf(named, tmp_path / "model").path


@pytest.mark.parametrize(
    ("post", "config", "start"),
    [
        ("a template", {}, [320]),
        ("one step of several", {}, [320]),
        ("a template", {"bos_token": BOS, "add_bos_token": False}, [320]),  # as transformers 5 does
        ("no BOS", {"bos_token": BOS}, []),
        ("none", {"bos_token": BOS}, []),
        ("none", {"bos_token": BOS, "add_bos_token": False}, []),
        ("none", {"bos_token": BOS, "add_bos_token": True}, [320]),
        ("none", {"bos_token": {"content": BOS, "lstrip": False}, "add_bos_token": True}, [320]),
        ("none", {"bos_token": "<unknown>", "add_bos_token": True}, []),
    ],
)
def test_texts_begin_with_bos_where_the_publisher_puts_it(
    checkpoint, tmp_path, capsys, post, config, start
):
    source = written(checkpoint(DENSE), POST[post], tokenizer_config=config)
    model = import_hf(source, tmp_path / "model")
    assert Tokenizer.load(model.path).start_ids == start
    if start and "add_bos_token" not in config:
        theirs = Backend.from_file(str(source / "tokenizer.json")).encode(TEXT).ids
        assert [*start, *model.tokenizer.encode(TEXT)] == theirs
    assert ("not kept" in capsys.readouterr().err) == ("<unknown>" in str(config))
    export_hf(model.path, tmp_path / "back")
    again = import_hf(tmp_path / "back", tmp_path / "again")
    assert again.tokenizer.start_ids == start
    assert again.tokenizer.conventions == model.tokenizer.conventions


def test_bits_per_byte_count_every_byte_behind_bos(bos, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": TEXT}))
    model = load(bos)
    ids = [320, *model.tokenizer.encode(TEXT)]
    logits = model.logits(np.array([ids])).astype(np.float64)[0, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    bits = -log_p[np.arange(len(ids) - 1), ids[1:]].sum() / np.log(2)

    index = prepare([file], model.tokenizer, 64, tmp_path / "data", heldout=0)
    assert index.splits["train"].scored_bytes == len(TEXT.encode())
    assert open_records(tmp_path / "data", "train")[0]["tokens"][: len(ids)].tolist() == ids
    found = evaluate(model, [tmp_path / "data"], split="train")
    assert found["bytes"]["data"] == len(TEXT.encode())
    assert found["bits_per_byte"]["data"] == pytest.approx(bits / len(TEXT.encode()), rel=1e-5)

    carried = Tokenizer.load(tmp_path / "data")  # as a run that is given nothing else does
    assert carried.text_digest == model.tokenizer.text_digest
    without = Tokenizer.load(bos / "tokenizer.json")
    prepare([file], without, 64, tmp_path / "bare", heldout=0)
    with pytest.raises(UserError, match="prepare the documents with the model's tokenizer"):
        evaluate(model, [tmp_path / "bare"], split="train")


def test_texts_are_generated_from_behind_bos_and_ids_as_they_are(bos):
    model = load(bos)
    tokenizer = model.tokenizer
    for text in (TEXT, ""):
        (expected,) = model.generate([[320, *tokenizer.encode(text)]], 6)
        assert model.generate([text], 6) == [tokenizer.decode(map(int, expected))]


class Seen:
    """A predictor that keeps what it is asked about."""

    def __init__(self):
        self.tokens: list[list[int]] = []

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        self.tokens += [row[kept > 0].tolist() for row, kept in zip(tokens, segments, strict=True)]
        return np.ones(tokens.shape, np.float32)


def test_requests_of_tasks_begin_with_bos_however_long_they_are(bos):
    tokenizer, seen = open_artifact(bos).tokenizer, Seen()
    asked = [(TEXT, " and"), ("", " and"), (TEXT, TEXT)]
    task = Task("made up", "bpb", [Request(i, 0, *texts, 0) for i, texts in enumerate(asked)])
    scores = {one.document: one for one in score(seen, tokenizer, 16, task, batch_size=1)}
    text, end = tokenizer.encode(TEXT), tokenizer.encode(" and")
    expected = [[320, *(text + end)[-16:]], [320, *end], [320, *(text + text)[-16:]]]
    assert sorted(seen.tokens) == sorted(expected)
    assert [-scores[i].log_likelihood for i in range(3)] == [len(end), len(end), min(len(text), 16)]


def test_the_harness_scores_and_generates_behind_bos(bos):
    model = load(bos)
    adapter = _Adapter(model, (), None, 2)
    text, end = model.tokenizer.encode(TEXT), model.tokenizer.encode(" and")

    def log_p(ids: list[int], count: int) -> float:
        logits = model.logits(np.array([ids])).astype(np.float64)[0, :-1]
        each = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return each[np.arange(len(ids) - 1), ids[1:]][-count:].sum()

    asked = [SimpleNamespace(args=(before, " and")) for before in (TEXT, "")]
    found = [total for total, _ in adapter.loglikelihood(asked)]
    expected = [log_p([320, *text, *end], len(end)), log_p([320, *end], len(end))]
    assert found == pytest.approx(expected, rel=1e-5)
    (rolling,) = adapter.loglikelihood_rolling([SimpleNamespace(args=(TEXT,))])
    # the harness's own backend has BOS once for the window and once for the text
    assert rolling == pytest.approx(log_p([320, 320, *text], 1 + len(text)), rel=1e-5)
    options = {"max_gen_toks": 5}
    made = adapter.generate_until([SimpleNamespace(args=(TEXT, options))])
    assert made == model.generate([TEXT], 5)


def test_extraction_gives_the_beginnings_of_documents_behind_bos(bos, monkeypatch):
    model, prompts = load(bos), []

    def generate(self, asked, length, **_):
        prompts.extend(asked)
        return [[1] * length for _ in asked]

    monkeypatch.setattr(type(model), "generate", generate)
    extract(model, [[5, 6, 7, 8]], prefix=2, samples=1, batch_size=1)
    assert prompts == [[320, 5, 6]]


def test_mixed_documents_begin_with_bos_once(bos, corpora, tmp_path):
    tokenizer, sources = open_artifact(bos).tokenizer, []
    for domain in ("law", "code"):
        prepare([corpora[domain]], tokenizer, 32, tmp_path / domain, heldout=0)
        sources.append(open_records(tmp_path / domain, "train"))
    for record in mixed_documents(sources[0], sources[1], tokenizer, 4):
        assert record["tokens"].shape == (32,)
        assert np.flatnonzero(record["tokens"] == 320).tolist() == [0]


@pytest.mark.parametrize("file", ["generation_config", "config"])
def test_each_of_several_ends_ends_a_completion(checkpoint, tmp_path, file, capfd):
    source = checkpoint(DENSE, np.float32)
    plain = load(import_hf(written(source), tmp_path / "plain").path)
    prompt = plain.tokenizer.encode(TEXT)
    whole = [int(i) for i in plain.generate([prompt], 8)[0]]
    end = whole[3]
    written(source, **{file: {"eos_token_id": [0, end, 322]}})
    model = import_hf(source, tmp_path / "model")
    assert model.tokenizer.end_ids == [0, end, 322]
    assert load(model.path).generate([prompt], 8) == [whole[: whole.index(end)]]
    capfd.readouterr()
    assert cli.main(["generate", str(model.path), "--prompt", TEXT, "--max-new-tokens", "8"]) == 0
    text = TEXT + model.tokenizer.decode(whole[: whole.index(end)])
    assert capfd.readouterr().out.removesuffix("\n") == for_terminal(text)
    export_hf(model.path, tmp_path / "back")
    generation = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, end, 322]


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
TOKENIZER_CONFIG = {
    "bos_token": BOS,
    "eos_token": {"__type": "AddedToken", "content": "<|a|>"} | FLAGS,
    "unk_token": "<unknown>",
    "image_token": "<|b|>",
    "additional_special_tokens": ["<|b|>", {"__type": "AddedToken", "content": "<|a|>"} | FLAGS],
    "chat_template": [
        {"name": "default", "template": CHATML.replace("im_start", "a").replace("im_end", "b")},
        {"name": "tool_use", "template": "tools: {{ tools }}"},
    ],
}
GENERATION = {
    "eos_token_id": [321, 0],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "max_new_tokens": 512,
    "repetition_penalty": 1.05,
    "suppress_tokens": [1, 2],
}
CONFIG = {"bos_token_id": 320, "eos_token_id": [321, 0], "pad_token_id": 0}


def test_all_of_it_goes_through_what_is_made_of_a_model(checkpoint, corpora, tmp_path, capsys):
    files = {"tokenizer_config": TOKENIZER_CONFIG, "generation_config": GENERATION}
    source = written(checkpoint(DENSE), TEMPLATE, **files, config=CONFIG)
    model = import_hf(source, tmp_path / "model")
    assert "kept for export, and not used by `generate`" in capsys.readouterr().err
    said = model.tokenizer.conventions
    assert said.start == (BOS,) and said.ends == ("<|a|>", "<|endoftext|>")
    public = [corpora["public"]]
    anchor = publish(model.path, public, tmp_path / "anchor", seq_len=32)
    merged = merge(anchor.path, [], tmp_path / "merged")
    for one in (model, anchor, merged):
        assert verify(one.path)["verified"]
        assert open_artifact(one.path).tokenizer.conventions == said
        assert one.description["conventions"] == said.digest
    back = tmp_path / "back"
    export_hf(merged.path, back)
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    read = {name: json.loads((back / f"{name}.json").read_text()) for name in (*files, "config")}
    assert read["generation_config"] == GENERATION
    assert read["config"] == read["config"] | CONFIG
    tokens = {"bos_token": BOS, "eos_token": "<|a|>", "unk_token": "<unknown>"}
    tokens |= {"image_token": "<|b|>", "additional_special_tokens": ["<|b|>", "<|a|>"]}
    assert read["tokenizer_config"] == read["tokenizer_config"] | tokens
    assert "add_bos_token" not in read["tokenizer_config"]  # the tokenizer.json says it
    named = back / "additional_chat_templates/tool_use.jinja"
    assert named.read_text() == "tools: {{ tools }}"
    again = import_hf(back, tmp_path / "again")
    assert again.tokenizer.conventions == said and again.tokenizer.chat == model.tokenizer.chat


def test_a_checkpoint_that_says_no_more_than_its_tokenizer_has_no_conventions(
    checkpoint, corpora, tmp_path
):
    source = checkpoint(DENSE)
    usual = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(usual | {"add_bos_token": False}))
    ends = {"eos_token_id": 0, "pad_token_id": 1, "do_sample": False, "transformers_version": "5"}
    (source / "generation_config.json").write_text(json.dumps(ends))
    model = import_hf(source, tmp_path / "model")
    anchor = publish(model.path, [corpora["public"]], tmp_path / "anchor", seq_len=32)
    for one in (model, anchor):
        assert "conventions" not in one.description
        assert not (one.path / CONVENTIONS_FILE).exists()
        assert one.tokenizer.text_digest == one.tokenizer.digest


def test_other_conventions_are_another_anchor_and_changed_ones_are_refused(
    checkpoint, corpora, tmp_path
):
    fingerprints = []
    for number, temperature in enumerate((0.6, 0.7)):
        source = checkpoint(DENSE, name=f"hf{number}")
        written(source, generation_config={"temperature": temperature})
        model = import_hf(source, tmp_path / f"model{number}")
        public = [corpora["public"]]
        anchor = publish(model.path, public, tmp_path / f"anchor{number}", seq_len=32)
        fingerprints.append(anchor.fingerprint)
    assert len(set(fingerprints)) == 2
    copy = copied(tmp_path / "anchor0", tmp_path / "copy")
    (copy / CONVENTIONS_FILE).write_bytes((tmp_path / "anchor1" / CONVENTIONS_FILE).read_bytes())
    with pytest.raises(UserError, match="its conventions file is not the one of its description"):
        verify(copy)
    (copy / CONVENTIONS_FILE).write_text("{}")
    with pytest.raises(UserError, match=r"conventions\.json is damaged"):
        verify(copy)
    (copy / CONVENTIONS_FILE).unlink()
    with pytest.raises(UserError, match="conventions"):
        verify(copy)


def test_a_start_that_the_tokenizer_does_not_have_is_refused(tiny_tokenizer):
    tokenizer = with_tokens_of(tiny_tokenizer, Conventions(start=("<nothing>",)))
    with pytest.raises(UserError, match="its conventions name the token '<nothing>'"):
        tokenizer.text_digest  # noqa: B018


def with_tokens_of(tokenizer: Tokenizer, conventions: Conventions) -> Tokenizer:
    copy = Tokenizer(tokenizer._content)
    copy.conventions = conventions
    return copy


@pytest.mark.parametrize("listed", [True, False])
def test_older_files_of_tokens_are_read_as_transformers_reads_them(
    checkpoint, tmp_path, capsys, listed
):
    config: dict[str, Any] = {"bos_token": "<|b|>"}
    if listed:
        config["added_tokens_decoder"] = {"330": {"content": "<tool>", "special": True}}
    source = written(
        checkpoint(DENSE),
        tokenizer_config=config,
        special_tokens_map={"bos_token": BOS, "eos_token": {"content": "<|a|>"}},
        added_tokens={"<old>": 331, "<|a|>": 321, "<beyond>": 384},
    )
    tokenizer = import_hf(source, tmp_path / "model").tokenizer
    bos = "<|b|>" if listed else BOS
    assert tokenizer.conventions.tokens == {"bos_token": bos, "eos_token": "<|a|>"}
    new, told = "<tool>" if listed else "<old>", capsys.readouterr().err
    assert f"added to the tokenizer, as the files beside it list them: {new}" in told
    assert ("not added" in told and "<beyond>" in told) == (not listed)
    index = tokenizer.id_of(new)
    assert index is not None and tokenizer.id_of("<beyond>") is None
    assert tokenizer.decode([index, *tokenizer.encode("x")]) == "x"


@pytest.mark.parity
@pytest.mark.parametrize("post", POST)
def test_transformers_gives_the_same_ids_and_settings(checkpoint, tmp_path, post):
    transformers = pytest.importorskip("transformers")
    files = {"tokenizer_config": TOKENIZER_CONFIG, "generation_config": GENERATION}
    source = written(checkpoint(DENSE), POST[post], **files, config=CONFIG)
    model = import_hf(source, tmp_path / "model")
    export_hf(model.path, tmp_path / "back")
    original, exported = (
        transformers.AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "back")
    )
    ours = [*model.tokenizer.start_ids, *model.tokenizer.encode(TEXT)]
    assert ours == exported(TEXT).input_ids == original(TEXT).input_ids
    assert exported.special_tokens_map == original.special_tokens_map
    assert exported.chat_template == original.chat_template
    both = [transformers.GenerationConfig.from_pretrained(p) for p in (source, tmp_path / "back")]
    assert both[0].to_dict() == both[1].to_dict()
    both = [transformers.AutoConfig.from_pretrained(p) for p in (source, tmp_path / "back")]
    assert [getattr(both[0], key) for key in CONFIG] == [getattr(both[1], key) for key in CONFIG]
