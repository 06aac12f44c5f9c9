"""Chat templates of Hugging Face checkpoints: read, carried by all that is made of them, and
written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.coordinator.merge import append, merge, opt_out, replace
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.data.chat import CHAT_FILE, TEMPLATE_LIMIT
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.upcycle import assemble
from flexolmo_jax.exchange.anchor import publish
from flexolmo_jax.loaded import load
from flexolmo_jax.owner.package import package
from flexolmo_jax.owner.pair import train_pair
from tests.attacks.forging import copied, redescribed
from tests.chats import CHATML, FORMS, said, with_tokens
from tests.convert.conftest import DENSE, Make
from tests.tiny import pair_config

Instruct = Callable[..., Path]


@pytest.fixture
def instruct(checkpoint: Make, tiny: Path) -> Instruct:
    """Writes the checkpoint of an instruct model in the ChatML form. `config` and `generation` are
    keys of its JSON files; `template` is its file."""

    def make(name="hf", template: str | None = CHATML, generation: Any = None, **config) -> Path:
        directory, form = checkpoint(DENSE, name=name), FORMS["chatml"]
        with_tokens(tiny / "tokenizer.json", *form.special).save(directory)
        fields = form.tokens | config
        (directory / "tokenizer_config.json").write_text(json.dumps(fields))
        ends = {"eos_token_id": [321, 0]} if generation is None else generation
        (directory / "generation_config.json").write_text(json.dumps(ends))
        if template is not None:
            (directory / "chat_template.jinja").write_text(template)
        return directory

    return make


def chat_of(path: Path):
    return open_artifact(path).tokenizer.chat


@pytest.mark.parametrize(
    "keys",
    [
        {"template": CHATML},
        {"template": CHATML, "chat_template": "another"},
        {"template": None, "chat_template": CHATML},
        {
            "template": None,
            "chat_template": [
                {"name": "tool_use", "template": "another"},
                {"name": "default", "template": CHATML},
            ],
        },
        {"eos_token": {"content": "<|im_end|>", "lstrip": False}},
        {"unk_token": "<unknown>", "bos_token": None, "add_bos_token": False},
    ],
    ids=["a file", "a file first", "a key", "one of several", "a token's fields", "unused tokens"],
)
def test_a_template_is_read_wherever_hugging_face_puts_it(instruct, tmp_path, keys):
    model = import_hf(instruct(**keys), tmp_path / "model")
    chat = model.tokenizer.chat
    assert chat is not None and (chat.template, chat.tokens) == (CHATML, FORMS["chatml"].tokens)
    assert chat.ends == FORMS["chatml"].ends
    assert model.description["chat"] == chat.digest and verify(model.path)["verified"]


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": 321}, {}, ("<|im_end|>",)),
        ({"eos_token_id": [0, 320]}, {}, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
        ({"eos_token_id": None}, {}, ("<|im_end|>",)),
        ({}, {"eos_token": None}, ("<|endoftext|>",)),
    ],
)
def test_turns_end_with_what_ends_generation_and_the_eos_token(
    instruct, tmp_path, generation, config, ends
):
    model = import_hf(instruct(generation=generation, **config), tmp_path / "model")
    assert model.tokenizer.chat is not None and model.tokenizer.chat.ends == ends


def test_without_a_template_nothing_is_said_of_chats(instruct, tmp_path):
    model = import_hf(
        instruct(template=None, generation={"eos_token_id": 9999}), tmp_path / "model"
    )
    assert model.tokenizer.chat is None and "chat" not in model.description
    assert {path.name for path in model.path.iterdir()} == {
        "conventions.json",
        "flexolmo.json",
        "tokenizer.json",
        "weights",
    }
    fields = json.loads((export_of(model.path, tmp_path) / "tokenizer_config.json").read_text())
    assert fields["eos_token"] == "<|im_end|>"
    assert not (tmp_path / "back/chat_template.jinja").exists()
    named = instruct("other", template=None, chat_template=[{"name": "rag", "template": "x"}])
    assert import_hf(named, tmp_path / "named").tokenizer.chat is None


def export_of(path: Path, tmp_path: Path) -> Path:
    export_hf(path, tmp_path / "back")
    return tmp_path / "back"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"template": "{% if %}"}, r"chat_template\.jinja: the chat template is malformed: line 1"),
        ({"template": "x" * (TEMPLATE_LIMIT + 1)}, r"chat_template\.jinja has \d+ bytes; expected"),
        ({"template": ""}, r"chat_template\.jinja: the chat template has 0 bytes"),
        ({"template": "{{ bos_token }}", "bos_token": "<s>"}, r"special token '<s>', which"),
        (
            {"template": None, "chat_template": "{{"},
            r"tokenizer_config\.json: the chat template is mal",
        ),
        ({"template": None, "chat_template": 3}, r"tokenizer_config\.json: chat_template is 3"),
        ({"template": None, "chat_template": [{"name": "default"}]}, "chat_template is "),
        (
            {"template": None, "chat_template": [{"name": "default", "template": 1}]},
            "chat_template is 1",
        ),
        ({"eos_token": 3}, r"tokenizer_config\.json: eos_token is 3; expected text"),
        ({"generation": {"eos_token_id": 9999}}, r"generation_config\.json: eos_token_id is 9999"),
        ({"generation": {"eos_token_id": [-1]}}, r"eos_token_id is \[-1\]; expected ids"),
        ({"generation": {"eos_token_id": True}}, "eos_token_id is True; expected ids"),
        (
            {"generation": {"eos_token_id": 100}},
            r"special token '.*', which tokenizer\.json does n",
        ),
        ({"generation": [1]}, r"generation_config\.json is not an object"),
    ],
)
def test_files_that_cannot_be_right_are_refused(instruct, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        import_hf(instruct(**keys), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_template_that_is_no_text_or_no_file_is_refused(instruct, tmp_path):
    source = instruct()
    (source / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not UTF-8"):
        import_hf(source, tmp_path / "model")
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.jinja").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*chat_template\.jinja"):
        import_hf(source, tmp_path / "model")
    (source / "chat_template.jinja").rmdir()
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON"):
        import_hf(source, tmp_path / "model")


def test_a_chat_goes_from_import_to_export_through_all_that_is_made_of_it(
    instruct, corpora, prepared, tmp_path
):
    source = instruct()
    imported = import_hf(source, tmp_path / "imported")
    chat = imported.tokenizer.chat
    assert chat is not None
    public = [corpora["public"]]
    anchor = publish(imported.path, public, tmp_path / "anchor", seq_len=32).path
    for name, steps in (("law", 2), ("code", 2), ("newer", 3)):
        data = corpora["law" if name == "newer" else name]
        expert = "law" if name == "newer" else name
        run = pair_config(anchor, data, expert, f"train.steps={steps}", f"pair.sequence={steps}")
        train_pair(run, tmp_path / "runs" / name)
        contribution = package(tmp_path / "runs" / name, tmp_path / name).path
        assert "im_start" not in "".join(
            path.read_text(errors="replace") for path in contribution.iterdir()
        ), "the anchor has the chat; contributions name the anchor"
        assert not (contribution / CHAT_FILE).exists()
    merged = merge(anchor, [tmp_path / "law"], tmp_path / "merged").path
    append(merged, tmp_path / "code", tmp_path / "appended")
    replace(tmp_path / "appended", tmp_path / "newer", tmp_path / "replaced")
    opt_out(tmp_path / "replaced", ["law", "code"], tmp_path / "alone")
    assemble({"a": imported.path, "b": imported.path}, tmp_path / "assembled", active=1)
    models = ("imported", "anchor", "merged", "appended", "replaced", "alone", "assembled")
    for name in models:
        assert verify(tmp_path / name)["verified"], name
        assert open_artifact(tmp_path / name).description["chat"] == chat.digest, name
    for name in (*models, "runs/law"):
        assert chat_of(tmp_path / name) == chat, name
    never = merge(anchor, [], tmp_path / "never")
    assert never.description == open_artifact(tmp_path / "alone").description

    export_hf(tmp_path / "alone", tmp_path / "back")
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [321, 0]
    again = import_hf(tmp_path / "back", tmp_path / "again")
    assert again.tokenizer.chat == chat and again.tokenizer.digest == imported.tokenizer.digest


def test_another_chat_is_another_anchor(instruct, corpora, tmp_path):
    fingerprints = set()
    for number, template in enumerate((CHATML, CHATML + " ", None)):
        model = import_hf(instruct(f"hf{number}", template), tmp_path / f"model{number}")
        public = [corpora["public"]]
        anchor = publish(model.path, public, tmp_path / f"anchor{number}", seq_len=32)
        fingerprints.add(anchor.fingerprint)
    assert len(fingerprints) == 3


@pytest.mark.parametrize("change", ["a byte", "no file", "another chat", "a new file"])
def test_a_chat_that_is_not_the_published_one_is_refused(instruct, corpora, tmp_path, change):
    template = None if change == "a new file" else CHATML
    model = import_hf(instruct(template=template), tmp_path / "model")
    anchor = publish(model.path, [corpora["public"]], tmp_path / "anchor", seq_len=32).path
    merged = merge(anchor, [], tmp_path / "merged").path
    other = import_hf(instruct("other-hf", CHATML + " "), tmp_path / "other").path
    for path in (anchor, merged):
        copy = copied(path, tmp_path / f"copy of {path.name}")
        file = copy / CHAT_FILE
        if change == "a byte":
            file.write_text(file.read_text().replace("helpful", "harmful"))
        elif change == "no file":
            file.unlink()
        else:
            shutil.copy(other / CHAT_FILE, file)
        refused = r"chat template is not the one of its desc|is missing|unknown files"
        with pytest.raises(UserError, match=refused):
            verify(copy)
        with pytest.raises(UserError, match=refused):
            chat_of(load(copy).artifact.path)
        if change == "another chat":  # every digest that a forger can compute is right
            digest = Tokenizer.load(other).digests["chat"]
            redescribed(copy, lambda d, digest=digest: d.update(chat=digest))
            for use in (verify, load):
                with pytest.raises(UserError, match=r"fingerprint|another chat template"):
                    use(copy)


def test_a_merged_model_with_another_tokenizer_than_its_anchors_is_refused(model, tmp_path):
    copy = copied(model, tmp_path / "copy")
    file = copy / "tokenizer.json"
    with_tokens(file, "<|more|>").save(file)
    digest = Tokenizer.load(copy).digest
    redescribed(copy, lambda description: description.update(tokenizer=digest))
    for use in (verify, load):
        with pytest.raises(UserError, match="another tokenizer than its anchor"):
            use(copy)


@pytest.mark.parity
def test_transformers_renders_the_same_from_an_export(instruct, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = import_hf(instruct(), tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(export_of(model.path, tmp_path))
    chat, messages = model.tokenizer.chat, said("Where is\nthe mill?", "There.", " And <b>? ")
    assert chat is not None
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat.encode(model.tokenizer, messages) == expected
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id
    assert ends == chat.end_ids(model.tokenizer)
