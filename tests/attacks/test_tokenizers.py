"""Attacks in a tokenizer.json. The promise: a stranger's tokenizer is refused in a line, or takes
what its size tells."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.data.tokenizer import PRE_TOKENS, Tokenizer
from flexolmo_jax.data.tokenizer_file import _check_expression
from flexolmo_jax.errors import UserError

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
TEXT = "The patient's 12 fevers, aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!\n\n  " * 20


@pytest.fixture
def fields(tiny_tokenizer, tmp_path) -> dict[str, Any]:
    tiny_tokenizer.save(tmp_path / "tokenizer.json")
    return json.loads((tmp_path / "tokenizer.json").read_text())


def replace(pattern: Any, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def split(expression: str) -> dict[str, Any]:
    steps = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    ]
    steps.append(
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    )
    return {"type": "Sequence", "pretokenizers": steps}


def add(fields: dict[str, Any], content: str, special: bool) -> None:
    """Adds a token as a publisher does, under the id that it has in the vocabulary."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    index = fields["model"]["vocab"].get(content, len(fields["model"]["vocab"]) + 9)
    fields["added_tokens"].append({"id": index, "content": content, "special": special, **flags})


def merged(fields: dict[str, Any]) -> list[str]:
    return ["".join(pair) for pair in fields["model"]["merges"]]


ATTACKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a megabyte of a character": lambda f: f.update(
        normalizer=replace({"String": "e"}, "e" * 1_000_000)
    ),
    "twenty doublings": lambda f: f.update(
        normalizer=sequence(*[replace({"String": "e"}, "ee")] * 20)
    ),
    "a long prefix": lambda f: f.update(normalizer={"type": "Prepend", "prepend": "x" * 100_000}),
    "a decoder that grows": lambda f: f.update(
        decoder={
            "type": "Sequence",
            "decoders": [f["decoder"], replace({"String": "e"}, "e" * 999)],
        }
    ),
    "thousands of steps": lambda f: f.update(normalizer=sequence(*[{"type": "NFC"}] * 5000)),
    "repeats in repeats": lambda f: f.update(pre_tokenizer=split(r"(a+)+$")),
    "alternatives in repeats": lambda f: f.update(pre_tokenizer=split(r"(?:a|aa)+$|x")),
    "repeats far inside": lambda f: f.update(pre_tokenizer=split(r"((?:x(a*)y?)z?)*$")),
    "a regular expression in a normaliser": lambda f: f.update(
        normalizer=replace({"Regex": "(a*)*b"}, "")
    ),
    "a long expression": lambda f: f.update(pre_tokenizer=split("a?" * 5000)),
    "exact repeats of alternatives": lambda f: f.update(pre_tokenizer=split(r"(?:a|aa){40}$")),
    "optional parts in repeats": lambda f: f.update(pre_tokenizer=split(r"((a?a?)?(a?a?)?){9}$")),
    "an expression that calls itself": lambda f: f.update(
        pre_tokenizer=split(r"(?<x>a\g<x>?\g<x>?c)")
    ),
    "neighbouring repeats": lambda f: f.update(pre_tokenizer=split(r"a*a*a*a*c?(?!a|b)")),
    "neighbouring repeats in groups": lambda f: f.update(
        pre_tokenizer=split(r"(?:a*)(?:a*)(a*)[^ab]")
    ),
    "forty steps that double": lambda f: f.update(
        normalizer=sequence(*[{"type": "ByteLevel"}] * 40)
    ),
    "forty pre-tokenizers that double": (
        lambda f: f["pre_tokenizer"].update(
            type="Sequence",
            pretokenizers=[
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                }
            ]
            * 40,
        )
    ),
    "a compiled map": lambda f: f.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "a token of a megabyte": (
        lambda f: f["model"]["vocab"].update({"a" * 1_000_000: len(f["model"]["vocab"]) + 9})
    ),
    "an id of 4e9": lambda f: f["model"]["vocab"].update({"the": 4_000_000_000}),
    "an added id of 4e9": lambda f: f["added_tokens"][0].update(id=4_000_000_000),
    "a negative id": lambda f: f["model"]["vocab"].update({"the": -1}),
    "an id that is none": lambda f: f["model"]["vocab"].update({"the": "7"}),
    "an unknown token that is not there": lambda f: f["model"].update(unk_token="nothing"),
    "dropout": lambda f: f["model"].update(dropout=0.5),
    "a prefix of what goes on": lambda f: f["model"].update(continuing_subword_prefix="##" * 100),
    "an end of words": lambda f: f["model"].update(end_of_word_suffix="</w>"),
    "no vocabulary": lambda f: f["model"].pop("vocab"),
    "merges that are none": lambda f: f["model"].update(merges=[[1, 2], "a", None]),
    "an added token that is none": lambda f: f["added_tokens"].append(None),
    "no model": lambda f: f.pop("model"),
    "an added token of more bytes than are counted": lambda f: add(f, "\u00e9" * 40_000, False),
    "an expression that matches nothing": lambda f: f.update(
        normalizer=replace({"Regex": ""}, "x")
    ),
    "an empty text to replace": lambda f: f.update(normalizer=replace({"String": ""}, "x")),
    "pieces of no length": lambda f: f["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "FixedLength", "length": 0}
    ),
    "a letter that is special": lambda f: add(f, "a", True),
    "a word that is special": lambda f: add(f, next(made for made in merged(f)), True),
    "a special word that needs no merges": lambda f: (
        add(f, "\u0120patient", True),
        f["model"].update(ignore_merges=True),
        f["model"]["vocab"].update({"\u0120patient": len(f["model"]["vocab"]) + 9}),
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_tokenizer_is_refused_before_it_is_used(fields, attack, capfd):
    """Normalisers that multiply, expressions that never end, ids that ask for gigabytes, fallbacks
    that panic."""
    ATTACKS[attack](fields)
    start = time.process_time()
    with pytest.raises(UserError) as error:
        Tokenizer(json.dumps(fields)).encode(TEXT)
    assert "\n" not in str(error.value) and time.process_time() - start < 5
    assert "panicked" not in capfd.readouterr().err  # the library prints where it fails


def test_a_file_that_is_no_file_or_too_large_is_refused(tmp_path):
    """A device, a pipe, or more than any vocabulary takes."""
    import os

    (tmp_path / "device").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "utf16").write_bytes('{"model": {}}'.encode("utf-16"))
    for name in ("device", "pipe", "large", "deep", "utf16"):
        with pytest.raises(UserError):
            Tokenizer.load(tmp_path / name)


def test_a_panic_of_the_library_is_an_error_of_ours(fields, tmp_path):
    """A panic is no Exception of Python's: nothing would have caught it."""
    tokenizer = Tokenizer(json.dumps(fields), "theirs")

    class Panics:
        def encode_batch_fast(self, *_: object, **__: object) -> None:
            raise type("PanicException", (BaseException,), {})(
                "called `Option::unwrap()` on a `None` value"
            )

    tokenizer._backend = Panics()  # type: ignore[assignment]
    with pytest.raises(UserError, match="theirs makes its library fail"):
        tokenizer.encode("a")


def test_a_real_panic_is_told_in_a_line(tmp_path):
    """The library's own, with an expression that its engine gives up on, where our check is not
    asked."""
    program = (
        "from tokenizers import Regex, Tokenizer, models, normalizers\nfrom flexolmo_jax.errors"
        " import UserError\nfrom flexolmo_jax.storage.untrusted import no_panic\nbackend ="
        " Tokenizer(models.BPE()); backend.normalizer = normalizers.Replace(Regex('(a|aa)+$'),"
        " '')\ntry:\n    with no_panic('it'): backend.encode('a' * 60 + 'b')\nexcept UserError as"
        " error: print('told:', error)\nexcept Exception as error: print('told:',"
        " type(error).__name__)\nelse: print('told: nothing')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.startswith("told: "), done.stderr[-500:]


REAL = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "dolma2": PRE_TOKENS,
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "digits": r"\d{1,3}(?=(?:\d{3})*\b)",
    "deepseek": (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
        r" ?[\p{P}\p{S}]+[\r\n]*"
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_expressions_of_published_tokenizers_are_let_in(name):
    _check_expression(REAL[name])


def test_a_large_vocabulary_is_read_in_seconds(fields):
    """The checks must not cost more than the library itself."""
    vocab = fields["model"]["vocab"]
    letters = [chr(0x61 + i) for i in range(26)]
    names = (a + b + c + d for a in letters for b in letters for c in letters for d in letters)
    start = max(vocab.values()) + 10
    vocab.update(
        {
            name: start + i
            for i, name in zip(range(150_000), names, strict=False)
            if name not in vocab
        }
    )
    content, begin = json.dumps(fields), time.process_time()
    assert Tokenizer(content).vocab_size > 150_000
    assert time.process_time() - begin < 15


@pytest.mark.parametrize("empty", ["[]", "{}"])
def test_millions_of_empty_objects_are_refused_before_they_are_made(empty):
    """A file of 62 MiB once took 3 GB and half a minute. The promise: a tokenizer takes what its
    size tells."""
    content = (
        '{"model": {"vocab": {}, "merges": ['
        + ",".join([empty] * 3_000_000)
        + ']}, "added_tokens": []}'
    )
    with pytest.raises(UserError, match="commas and brackets"):
        Tokenizer(content)


@settings(
    max_examples=60,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=SLOW,
)
@given(data=st.data())
def test_odd_values_anywhere_in_a_tokenizer_are_told_in_a_line(
    tiny_tokenizer, tmp_path_factory, data
):
    path = tmp_path_factory.getbasetemp() / "odd-tokenizer.json"
    tiny_tokenizer.save(path)
    root = json.loads(path.read_text())
    node: Any = root
    while True:
        key = data.draw(
            st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node))))
        )
        if (
            not isinstance(node[key], dict | list)
            or not node[key]
            or data.draw(st.integers(0, 2)) == 0
        ):
            break
        node = node[key]
    node[key] = data.draw(
        st.sampled_from(
            [None, True, -1, 2**31, 1e308, "", "x" * 1000, [], {}, [[]], {"type": "x"}, "\x1b[2J"]
        )
    )
    try:
        tokenizer = Tokenizer(json.dumps(root))
        tokenizer.decode(tokenizer.encode("the river, 12 bridges\n"))
    except UserError as error:
        assert re.fullmatch(r"[^\n\x1b]+", str(error))


def test_a_tokenizer_of_the_project_itself_passes(tiny_tokenizer: Tokenizer, tmp_path: Path):
    tiny_tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.digest == tiny_tokenizer.digest and again.encode(TEXT) == tiny_tokenizer.encode(
        TEXT
    )


def piece(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}


@pytest.mark.parametrize("pieces", [[], ["A", "A"], ["A"] * 25, ["B"]])
def test_a_template_neither_repeats_nor_drops_text(fields, pieces):
    """A text has its own tokens: a template gave them 25 times, or none, or made the library
    fail."""
    expected = Tokenizer(json.dumps(fields)).encode(TEXT)
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece(name) for name in pieces],
        "pair": [piece("A"), piece("B")],
        "special_tokens": {},
    }
    assert Tokenizer(json.dumps(fields)).encode(TEXT) == expected


def test_an_anchors_tokenizer_has_no_ids_beyond_its_vocabulary(anchor, monkeypatch):
    """Numbers are those of the text: ids beyond the vocabulary were read as its last token, and
    bits per byte came out without a word."""
    artifact = open_artifact(anchor)
    fields = json.loads((anchor / "tokenizer.json").read_text())
    fields["model"]["vocab"]["a"] = 999_999
    large = Tokenizer(json.dumps(fields))
    monkeypatch.setattr(Tokenizer, "load", lambda path: large)
    hostile = dataclasses.replace(
        artifact, description=artifact.description | {"tokenizer": large.digest}
    )
    with pytest.raises(UserError, match="1000000 tokens; expected at most 384"):
        _ = hostile.tokenizer
