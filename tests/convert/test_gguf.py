"""GGUF files: what llama.cpp's converter wrote comes back bit for bit, and nothing in a stranger's
file is believed."""

import dataclasses
import struct
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest

from flexolmo_jax import cli
from flexolmo_jax.config import RopeScaling
from flexolmo_jax.convert.gguf_file import GgufFile
from flexolmo_jax.convert.importing_gguf import import_gguf
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import publish
from flexolmo_jax.loaded import load
from flexolmo_jax.model import init_params
from flexolmo_jax.model.tree import flatten
from tests.convert.conftest import DENSE
from tests.convert.gguf_writer import write_gguf
from tests.families import as_family

Kind = gguf.GGMLQuantizationType
# head sizes at which Llama 3.1's scaling has frequencies of all three kinds
WIDE = dataclasses.replace(DENSE, d_model=96, d_ffn=64, rope_theta=5e5, max_seq_len=512)
LLAMA3 = RopeScaling("llama3", factor=8.0, first_seq_len=64)
FAMILIES = {
    "olmo2": DENSE,
    "olmo3": dataclasses.replace(as_family(DENSE, "olmo3"), window_rope_theta=0),
    "llama": dataclasses.replace(as_family(WIDE, "llama"), rope_scaling=LLAMA3),
    "mistral": as_family(DENSE, "mistral"),
    "qwen2": dataclasses.replace(as_family(DENSE, "qwen2"), renormalise=True),
    "qwen3": as_family(DENSE, "qwen3"),
}


def params_of(config):
    """In values that bfloat16 holds."""
    params = init_params(config, jax.random.key(1))
    return jax.tree.map(lambda a: np.asarray(a, ml_dtypes.bfloat16).astype(np.float32), params)


@pytest.fixture
def written(tmp_path, tiny_tokenizer):
    def write(family="llama", config=None, **options) -> Path:
        config = config or FAMILIES[family]
        path = tmp_path / "model.gguf"
        write_gguf(path, family, config, params_of(config), tiny_tokenizer, **options)
        return path

    return write


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_back_bit_for_bit(family, written, tmp_path, tiny_tokenizer):
    config = FAMILIES[family]
    path = written(family)
    assert cli.main(["import-gguf", str(path), str(tmp_path / "model")]) == 0
    model = load(tmp_path / "model")
    assert model.config == config
    expected, found = flatten(params_of(config)), flatten(model.params)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if name not in ("experts/row", "experts/bias"):
            assert np.array_equal(value, np.asarray(found[name], np.float32)), name
    text = "Some text: 12345 and naïve 東京\n\n  of it."
    assert model.tokenizer.encode(text) == tiny_tokenizer.encode(text)
    assert model.tokenizer.eos_id == tiny_tokenizer.eos_id
    assert verify(tmp_path / "model")["verified"]


def test_a_file_may_lie_behind_links_as_in_a_hubs_cache(written, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / "0123").symlink_to("../model.gguf")
    (snapshot / "model.gguf").symlink_to("../../blobs/0123")
    expected = import_gguf(written(), tmp_path / "expected").description
    assert import_gguf(snapshot / "model.gguf", tmp_path / "out").description == expected


TEMPLATE = (
    "{% for m in messages %}{{ bos_token + m['role'] + ': ' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant: ' }}{% endif %}"
)


def with_chat(template: Any = TEMPLATE, bos=0, eos=1):
    def change(fields, tensors):
        fields["tokenizer.chat_template"] = template
        fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"] = bos, eos

    return change


def test_a_chat_template_comes_with_it(written, tmp_path):
    model = load(import_gguf(written(change=with_chat()), tmp_path / "model").path)
    tokenizer = model.tokenizer
    assert tokenizer.chat is not None and tokenizer.chat.ends == (tokenizer.token(1),)
    ids = tokenizer.chat.encode(tokenizer, [{"role": "user", "content": "Hello"}])
    assert ids == [0, *tokenizer.encode("user: Hello"), 1, 0, *tokenizer.encode("assistant: ")]
    assert isinstance(model.chat([{"role": "user", "content": "Hello"}], max_new_tokens=4), str)


@pytest.mark.parametrize(
    ("fields", "start"), [({}, []), ({"add_bos_token": False}, []), ({"add_bos_token": True}, [3])]
)
def test_texts_begin_with_bos_where_the_file_says_so(written, tmp_path, fields, start):
    def change(given, tensors):
        given |= {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
        given["tokenizer.ggml.bos_token_id"] = 3

    model = import_gguf(written(change=change), tmp_path / "model")
    assert model.tokenizer.start_ids == start and verify(model.path)["verified"]
    assert ("conventions" in model.description) == bool(start)


def test_an_anchor_is_published_from_it(written, tmp_path, corpora):
    model = import_gguf(written(), tmp_path / "model")
    anchor = publish(model.path, [corpora["public"]], tmp_path / "anchor")
    assert anchor.config == dataclasses.replace(FAMILIES["llama"], router_bias=True)
    assert anchor.config.tied_head == FAMILIES["llama"].tied_head


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q5_0])
def test_quantised_matrices_are_what_the_package_makes_of_them(kind, written, tmp_path):
    path = written("llama", kind=kind)
    with GgufFile(path) as file:
        values, is_finite = file.read("blk.1.ffn_down.weight", np.float32)
        assert file.tensors["blk.1.ffn_down.weight"].type == kind and is_finite
        theirs = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
        assert np.array_equal(values, gguf.quants.dequantize(theirs.data, kind))
    model = load(import_gguf(path, tmp_path / "model").path)
    ours = np.asarray(model.params["experts"]["down"], np.float32)[1, 0]
    assert np.array_equal(ours, values.T.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_large_tensors_are_read_in_parts(written, monkeypatch):
    path = written("llama", kind=Kind.Q8_0)
    with GgufFile(path) as file:
        whole, _ = file.read("token_embd.weight")
        monkeypatch.setattr("flexolmo_jax.convert.gguf_file.BLOCK", 200)  # two rows
        parts, _ = file.read("token_embd.weight")
    assert np.array_equal(whole, parts)


def test_values_that_are_not_finite_are_refused_by_name(written, tmp_path):
    def spoil(fields, tensors):
        tensors["blk.1.ffn_up.weight"][0, 0] = np.nan

    source = written(change=spoil)
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight in .* has the value nan"):
        import_gguf(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def setting(name, value):
    return lambda fields, tensors: fields.update({name: value})


def scaled(fields, tensors):
    tensors["rope_freqs.weight"] = tensors["rope_freqs.weight"] * np.float32(1.1)


def with_yarn(factor):
    def change(fields, tensors):
        del tensors["rope_freqs.weight"]
        scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
        scaling["attn_factor"] = factor
        fields.update({f"rope.scaling.{name}": value for name, value in scaling.items()})

    return change


def linear(fields, tensors):
    del tensors["rope_freqs.weight"]
    fields["rope.scaling.factor"] = 2.0


def test_a_factor_without_a_type_is_linear(written, tmp_path):
    model = import_gguf(written(change=linear), tmp_path / "model")
    scaling = model.config.rope_scaling
    assert scaling is not None and (scaling.kind, scaling.factor) == ("linear", 2.0)


NORM = "output_norm.weight"
BAD = {
    "architecture": (setting("architecture", "gemma2"), "general.architecture is 'gemma2'"),
    "mixture": (setting("expert_count", 8), "expert_count is 8; expected a dense model"),
    "part": (setting("split.count", 3), "split.count is 3: it is a part of a model"),
    "softcap": (setting("final_logit_softcapping", 30.0), "final_logit_softcapping is 30.0"),
    "attention's scale": (setting("attention.scale", 0.5), "llama.attention.scale is 0.5"),
    "partial rotary": (setting("rope.dimension_count", 16), "rope.dimension_count is 16; expected"),
    "values": (setting("attention.value_length", 16), "value_length is 16; expected 32"),
    "layers differ": (setting("attention.head_count", [3, 6]), r"head_count is \[3, 6\]"),
    "width": (setting("feed_forward_length", [64, 32]), "intermediate_size"),
    "no context": (lambda f, t: f.pop("context_length"), "max_position_embeddings"),
    "scaling": (scaled, "holds another scaling than Llama 3.1's"),
    "two scalings": (
        setting("rope.scaling.factor", 2.0),
        "rope.scaling.type is 'linear' beside rope_freqs.weight",
    ),
    "no sign of it": (
        lambda f, t: t.update({"rope_freqs.weight": np.ones(16, np.float32)}),
        "holds another scaling than Llama 3.1's",
    ),
    "longrope": (
        lambda f, t: [t.pop("rope_freqs.weight"), f.update({"rope.scaling.type": "longrope"})],
        "rope_type",
    ),
    "yarn": (with_yarn(1.7), r"attn_factor is 1.7; expected 1 or 1.1386"),
    "pattern": (
        lambda f, t: f.update(
            {"attention.sliding_window": 7, "attention.sliding_window_pattern": [True, False]}
        ),
        "attention.sliding_window is 7",
    ),
    "missing": (lambda f, t: t.pop(NORM), f"misses tensors: {NORM}"),
    "extra": (lambda f, t: t.update({"blk.7.x": t[NORM]}), "has unexpected tensors: blk.7.x"),
    "shape": (lambda f, t: t.update({NORM: t[NORM][:-1]}), rf"{NORM} has shape \(95,\); expected"),
    "no embedding": (lambda f, t: t.pop("token_embd.weight"), "vocab_size"),
    "SentencePiece": (
        setting("tokenizer.ggml.model", "llama"),
        "model is 'llama'; expected 'gpt2'",
    ),
    "rule": (setting("tokenizer.ggml.pre", "tekken"), "pre is 'tekken'; expected one of"),
    "no rule": (lambda f, t: f.pop("tokenizer.ggml.pre"), "pre is None"),
    "types": (setting("tokenizer.ggml.token_type", [1, 3]), "2 types of tokens"),
    "no merges": (lambda f, t: f.pop("tokenizer.ggml.merges"), "merges is None"),
    "merge": (setting("tokenizer.ggml.merges", ["a"]), "is not a tokenizer.json"),
    "template": (with_chat("{% for %}"), "the chat template is malformed: line 1"),
    "no template": (with_chat(7), "tokenizer.chat_template is 7; expected text"),
    "special token": (with_chat(eos=999), "the special token 999; expected one of its 3.. tokens"),
    "end of a turn": (with_chat(eos=300), "which tokenizer.json does not have"),
    "more tokens": (
        lambda f, t: t.update(
            {
                "token_embd.weight": t["token_embd.weight"][:128],
                "output.weight": t["output.weight"][:128],
            }
        ),
        "has a tokenizer of 3.. tokens and vocab_size 128",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_imported_is_named_and_leaves_nothing(change, message, written, tmp_path):
    path = written(change=change)
    with pytest.raises(UserError, match=message):
        import_gguf(path, tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf"}


@pytest.mark.parametrize("factor", [1.0, 1.138629])
def test_yarn_scales_attention_as_llama_cpp_does(factor, written, tmp_path):
    model = import_gguf(written(change=with_yarn(factor)), tmp_path / "model")
    assert model.config.rope_scaling == RopeScaling("yarn", factor=4.0, first_seq_len=16)


def test_a_file_that_is_cut_short_is_refused_wherever_it_ends(written, tmp_path):
    content = written().read_bytes()
    cut = tmp_path / "cut.gguf"
    for end in (*range(0, 60), *range(60, len(content), len(content) // 40), len(content) - 1):
        cut.write_bytes(content[:end])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            GgufFile(cut)


def header(*, tensors=0, fields=0, rest=b"", version=3, magic=b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, fields) + rest


def text(value: bytes, length=None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


LIES = {
    "magic": (header(magic=b"GGML"), "does not begin with GGUF"),
    "version": (header(version=1), "it is of version 1"),
    "fields": (header(fields=2**60), "it has 1152921504606846976 fields"),
    "tensors": (header(tensors=2**60), "it has 1152921504606846976 tensors"),
    "length of a name": (
        header(fields=1, rest=text(b"a", 2**63)),
        "9223372036854775808 bytes more",
    ),
    "type": (header(fields=1, rest=text(b"a") + struct.pack("<I", 99)), "'a' is of type 99"),
    "numbers": (
        header(fields=1, rest=text(b"a") + struct.pack("<IIQ", 9, 0, 2**62)),
        "needs 4611686018427387904 bytes more",
    ),
    "texts": (
        header(fields=1, rest=text(b"a") + struct.pack("<IIQ", 9, 8, 2**62)),
        "an array of 4611686018427387904 texts",
    ),
    "arrays of arrays": (
        header(fields=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, 1)),
        "arrays of arrays",
    ),
    "not text": (header(fields=1, rest=text(b"\xff\xff")), "is not UTF-8"),
    "twice": (
        header(fields=2, rest=(text(b"a") + struct.pack("<IB", 0, 1)) * 2),
        "it has 'a' twice",
    ),
    "dimensions": (header(tensors=1, rest=text(b"t") + struct.pack("<I", 9)), "has 9 dimensions"),
    "type of a tensor": (
        header(tensors=1, rest=text(b"t") + struct.pack("<IQIQ", 1, 32, 4, 0)),
        "'t' is of type 4",
    ),
    "block": (
        header(tensors=1, rest=text(b"t") + struct.pack("<IQIQ", 1, 33, 2, 0)),
        "in blocks of 32",
    ),
    "offset": (
        header(tensors=1, rest=text(b"t") + struct.pack("<IQIQ", 1, 32, 0, 2**62)),
        "expected 46116860184273[0-9]* or more",
    ),
    "size": (
        header(tensors=1, rest=text(b"t") + struct.pack("<IQQIQ", 2, 2**30, 2**17, 0, 0)),
        "expected 56294995[0-9]* or more",
    ),
    "alignment": (
        header(fields=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 3)),
        "its alignment is 3",
    ),
}


@pytest.mark.parametrize(("content", "message"), LIES.values(), ids=LIES.keys())
def test_counts_and_types_that_lie_are_refused_at_once(content, message, tmp_path):
    path = tmp_path / "lie.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        GgufFile(path)


def test_a_changed_byte_is_no_traceback(written, tmp_path):
    path = written()
    content = path.read_bytes()
    end = content.index(b"blk.1.")  # fields and the first tensors
    rng = np.random.default_rng(0)
    places = rng.integers(0, end, 100)
    for n, (place, value) in enumerate(zip(places, rng.integers(0, 256, 100), strict=True)):
        path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
        try:
            import_gguf(path, tmp_path / f"model-{n}")
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
