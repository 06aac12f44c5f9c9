"""`flexolmo import-hf`: a Hugging Face checkpoint becomes a model here.

Tensors are read one by one, in the order of our leaves, through the key table of huggingface.py.
They may be in one file or in several, with or without an index; an expert's matrices may be tensors
of their own or, as transformers 5 holds them in memory, parts of one tensor for all experts of a
layer. Nothing is unpickled.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from flexolmo_jax.artifact import Artifact
from flexolmo_jax.config import ModelConfig, expect
from flexolmo_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.integrity import MATRICES, name_of_tensor
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.files import clear
from flexolmo_jax.storage.outputs import check_new
from flexolmo_jax.storage.paths import absolute, children, reason, takes_paths
from flexolmo_jax.storage.tensorfile import TensorFile, finite
from flexolmo_jax.storage.untrusted import conform, parse_json, read_bytes

from .chat import BESIDE, GENERATION_CONFIG, read_chat
from .conventions import read_conventions, with_added_tokens
from .exporting import DTYPES
from .families import FAMILIES
from .hub_config import model_config
from .huggingface import TOGETHER, Entry, key_table, some, transposed
from .identity import KEY, Tensors, described, from_note, matched, named
from .imported import Source, check_vocabulary, write_model

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = r"(.*)-\d{5}-of-(\d{5})\.safetensors"
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors$"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TENSORS = 1 << 17  # more than any model has, in all files together
SIGNS = TENSORS + 1000  # commas and brackets of INDEX and of config.json
# Of a tied head, which the config says to be the embedding, files have either name, or both.
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BUFFERS = re.compile(r".*\brotary_emb\.inv_freq")  # of older files; config.json says what they hold
PART = 1 << 22  # numbers that are compared at once
ADAPTER = "adapter_config.json"


@takes_paths
def import_hf(
    hf_path: Path,
    out: Path,
    names: Sequence[str] = (),
    *,
    match: Mapping[str, Path] | None = None,
    dtype: str | None = None,
    tokenizer_path: Path | None = None,
) -> Artifact:
    """Writes a model: a dense one, or for a mixture one whose expert 0 is the anchor.

    Only a few tensors are in memory at once.

    Args:
        names: of the other experts, in order (default: those that an export of ours noted in
            config.json, else expert1, expert2, ...).
        match: checkpoints of single experts by name. An expert with the same matrices has the name.
        dtype: of the weights, by default the one that most of their numbers have.
        tokenizer_path: a tokenizer.json, or a directory with one, in place of the checkpoint's.

    Raises UserError, naming the config's key, the tensor or the file, for what our model does not
    compute, for files that config.json does not describe, for names that are not the experts', and
    for values that are not finite.
    """
    known = ", ".join(DTYPES)
    expect(dtype in (None, *DTYPES), "--dtype", dtype, f"one of {known}")
    check_new(out)
    clear(out)
    _check_whole_model(hf_path)
    fields = _read_json(hf_path / "config.json")
    config = model_config(fields)
    if match and names:
        raise UserError("got --names and --match; expected one of them")
    others = config.n_experts - 1
    noted = from_note(fields.get(KEY), hf_path / "config.json", others)
    tokenizer = _tokenizer(hf_path, tokenizer_path, fields, config)
    with ExitStack() as files:
        checkpoint = _Checkpoint(hf_path, files, dtype)
        table = key_table(config, fields["model_type"])
        values = checkpoint.locate(table, tied=config.tied_head)
        architecture = FAMILIES[fields["model_type"]].architecture
        source = Source(config, architecture, tokenizer, checkpoint.dtype, values)
        singles = {name: _single(path, checkpoint.dtype) for name, path in (match or {}).items()}
        if checkpoint.is_cast:
            noted = tuple(one.of_any_weights() for one in noted)
        identify = matched(singles, others) if match else named(names, noted, others)
        return write_model(out, source, identify)


@dataclass(frozen=True)
class _Index:
    """What is read of INDEX."""

    weight_map: dict[str, Annotated[str, Field(pattern=FILE_NAME)]]


class _Located(NamedTuple):
    """Where in the checkpoint the values of one entry of the key table are."""

    file: TensorFile
    name: str
    start: int  # the first value's place in the tensor
    entry: Entry
    dtype: str  # that it is imported in

    def read(self) -> np.ndarray:
        """The values, laid out as our leaf has them. Raises UserError for those that are not
        finite, or beyond the dtype."""
        values, is_finite = self.file.read_part(self.name, self.start, self.entry.shape)
        if not is_finite or values.dtype != self.dtype:
            values = finite(values, f"{self.name} in {self.file.path}", self.dtype)
        return transposed(values) if self.entry.transpose else values


class _Checkpoint:
    """The safetensors files of a directory."""

    def __init__(self, directory: Path, opened: ExitStack, dtype: str | None):
        """`dtype`: that all tensors are cast to; by default that of most numbers."""
        self._directory = directory
        self._files: dict[str, TensorFile] = {}  # by tensor
        for path in _tensor_files(directory):
            # The files in the cache of a hub are links, which TensorFile refuses.
            file = opened.enter_context(TensorFile(absolute(path), with_metadata=True))
            for name in file.entries:
                if BUFFERS.fullmatch(name):
                    continue
                if name in self._files:
                    raise UserError(
                        f"{name} is in {self._files[name].path} and in {path}; remove the file that"
                        " does not belong there"
                    )
                self._files[name] = file
            if len(self._files) > TENSORS:
                raise UserError(
                    f"{directory} has more than {TENSORS} tensors; expected those of one model"
                )
        self.dtype = self._chosen(dtype)

    def _chosen(self, dtype: str | None) -> str:
        """The dtype to import in. A note says which tensors are cast to it."""
        if not self._files:
            raise UserError(f"{self._directory} has no tensors; download the whole checkpoint")
        names: dict[str, list[str]] = defaultdict(list)
        numbers = Counter[str]()
        for name, file in self._files.items():
            entry = file.entries[name]
            names[entry.dtype.name].append(name)
            numbers[entry.dtype.name] += math.prod(entry.shape)
        dtype = dtype or numbers.most_common(1)[0][0]
        self.is_cast = names.keys() != {dtype}
        for other, cast in sorted(names.items()):
            if other != dtype:
                note(
                    f"cast from {other} to {dtype}: {some(cast)}; --dtype float32 keeps every value"
                )
        return dtype

    def locate(self, table: Sequence[Entry], tied: bool) -> dict[str, list[_Located]]:
        """Where each leaf is, by its path, in the order of its index.

        Raises UserError naming tensors that are missing, unexpected or of another shape.
        """
        found: dict[str, list[_Located]] = defaultdict(list)
        missing, used = [], set()
        if tied:
            self._check_tied(table[0].shape)
        experts = 1 + max((entry.index[1] for entry in table if len(entry.index) == 2), default=0)
        for entry in table:
            name, start, shape = entry.name, 0, entry.shape
            if name not in self._files:
                name, start, shape = _fused(entry, experts) or (name, start, shape)
            if tied and name == EMBEDDING and name not in self._files:
                name = HEAD  # safetensors' save_model keeps but one of two names
            if name not in self._files:
                missing.append(entry.name)
                continue
            file = self._files[name]
            if file.entries[name].shape != shape:
                raise UserError(
                    f"{file.path}: {name} has shape {file.entries[name].shape}; expected {shape} by"
                    f" config.json; {TOGETHER}"
                )
            found["/".join(entry.path)].append(_Located(file, name, start, entry, self.dtype))
            used.add(name)
        unexpected = sorted(self._files.keys() - used - ({HEAD} if tied else set()))
        for what, names in (("misses", missing), ("has unexpected", unexpected)):
            if names:
                raise UserError(f"{self._directory} {what} tensors: {some(names)}; {TOGETHER}")
        return found

    def _check_tied(self, shape: tuple[int, ...]) -> None:
        """Raises UserError for a head that is said to be the embedding and is another: versions of
        transformers take one or the other."""
        both = [self._files[name] for name in (EMBEDDING, HEAD) if name in self._files]
        if len(both) < 2:
            return
        is_same = both[1].entries[HEAD].shape == shape == both[0].entries[EMBEDDING].shape
        for start in range(0, math.prod(shape) * is_same, PART):
            size = (min(PART, math.prod(shape) - start),)
            embedding, _ = both[0].read_part(EMBEDDING, start, size)
            head, _ = both[1].read_part(HEAD, start, size)
            is_same = is_same and np.array_equal(embedding, head.astype(embedding.dtype))
        if not is_same:
            raise UserError(
                f"{both[1].path}: {HEAD} is not {EMBEDDING}, which it is by config.json; take it"
                " out of the file, or set tie_word_embeddings to false"
            )


def _fused(entry: Entry, experts: int) -> tuple[str, int, tuple[int, ...]] | None:
    """The tensor of all experts of a layer that this one is a part of: its name, where the part
    starts, and its shape."""
    match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", entry.name)
    if not match:
        return None
    prefix, expert, kind = match[1], int(match[2]), match[3]
    outputs, inputs = entry.shape
    if kind == "down":
        return f"{prefix}.down_proj", expert * outputs * inputs, (experts, outputs, inputs)
    start = (2 * expert + (kind == "up")) * outputs * inputs  # an expert's gate, then its up
    return f"{prefix}.gate_up_proj", start, (experts, 2 * outputs, inputs)


def _check_whole_model(directory: Path) -> None:
    """Raises UserError for an adapter, which transformers adds to the weights, or to others."""
    if (directory / ADAPTER).exists():
        raise UserError(
            f"{directory} holds an adapter ({ADAPTER}); expected the weights of a model; merge it"
            " into its model with peft's merge_and_unload, and save that"
        )


def _tokenizer(
    hf_path: Path, given: Path | None, fields: dict[str, Any], config: ModelConfig
) -> Tokenizer | None:
    """The tokenizer, with what its publisher says of it: that in `given`, or the checkpoint's own.

    None, with a note, where there is neither.
    """
    if given is None and TOKENIZER_FILE not in {path.name for path in children(hf_path)}:
        note(
            f"{hf_path} has no {TOKENIZER_FILE}: the model will have weights and logits, and no"
            " text: no eval, generate, chat or publish; give one with --tokenizer PATH"
        )
        return None
    tokenizer = Tokenizer.load(given or hf_path)
    if given and tokenizer.digests.keys() > {"tokenizer"}:  # a directory of ours, which says it all
        check_vocabulary(tokenizer, config, given)
        return tokenizer
    folder = given if given and given.is_dir() else hf_path
    places = {name: folder / name for name in BESIDE}
    places[GENERATION_CONFIG] = hf_path / GENERATION_CONFIG
    beside = {name: _read_json(path) for name, path in places.items() if path.exists()}
    beside["config.json"] = fields
    tokenizer = with_added_tokens(tokenizer, beside, config.vocab_size)
    check_vocabulary(tokenizer, config, given or hf_path)
    tokenizer.chat = read_chat(folder, beside, tokenizer)
    tokenizer.conventions = read_conventions(folder, beside, tokenizer)
    return tokenizer


def _single(path: Path, dtype: str) -> Tensors:
    """The matrices of a checkpoint's one expert: a dense model's FFN, or the second of two experts,
    of which the first is the anchor's."""
    fields = _read_json(path / "config.json")
    config = model_config(fields)
    if config.n_experts > 2:
        raise UserError(
            f"--match: {path} has {config.n_experts} experts; expected a dense model, or an anchor"
            " and one expert"
        )
    tensors: Tensors = {}
    with ExitStack() as files:
        table = key_table(config, fields["model_type"])
        values = _Checkpoint(path, files, dtype).locate(table, tied=config.tied_head)
        for name in MATRICES:
            leaf = f"experts/{name}"
            for located in values[leaf]:
                layer, expert = located.entry.index
                if expert == config.n_experts - 1:
                    tensors[name_of_tensor(leaf, layer)] = described(located.read())
    return tensors


def _tensor_files(directory: Path) -> list[Path]:
    """The checkpoint's safetensors files. Raises UserError where some or all are missing."""
    present = [path.name for path in children(directory)]
    found = [name for name in present if name.endswith(".safetensors")]
    shards = {name: match.groups() for name in found if (match := re.fullmatch(SHARD, name))}
    expected = indexed = _indexed(directory / INDEX) if INDEX in present else []
    if WHOLE in found and WHOLE not in indexed and set(indexed) <= set(found):
        expected = [WHOLE]  # transformers reads it first, whatever lies beside it
    elif not indexed and shards:
        expected = _of_one_set(directory, set(shards.values()))
    elif not indexed:
        expected = found
    old = [name for name in present if name.startswith("pytorch_model") and name.endswith(".bin")]
    if passed := [*sorted(set(found) - set(expected)), *(old if found else [])]:
        note(f"passed over in {directory}: {some(passed)}; the weights are in {some(expected)}")
    if missing := sorted(set(expected) - set(found)):
        raise UserError(
            f"{directory} misses {some(missing)}; download the whole checkpoint, or remove what"
            f" does not belong to it ({INDEX}?)"
        )
    if not expected:
        if pickles := [name for name in present if name.endswith(PICKLES)]:
            raise UserError(
                f"{directory} has its weights in {pickles[0]}, a pickle, which may run any program"
                " when loaded; have its owner save it as safetensors"
            )
        raise UserError(
            f"{directory} has no *.safetensors; expected a checkpoint as save_pretrained writes it"
        )
    return [directory / name for name in expected]


def _indexed(file: Path) -> list[str]:
    """The files that an index names."""
    index: dict[str, Any] = {"weight_map": _read_json(file).get("weight_map")}
    try:
        conform(_Index, index)
    except ValueError as error:
        raise UserError(
            f"{file} has no weight_map from tensors to files beside it ({error}); download it again"
        ) from None
    return sorted(set(index["weight_map"].values()))


def _of_one_set(directory: Path, sets: set[tuple[str, ...]]) -> list[str]:
    """The shards that belong together, of those that are there without an index."""
    if len(sets) > 1:
        told = " and ".join(f"{name}-*-of-{count}" for name, count in sorted(sets))
        raise UserError(
            f"{directory} has the shards {told}, and no {INDEX} that says which are the model's;"
            " remove the others"
        )
    ((name, count),) = sets
    return [f"{name}-{i:05}-of-{count}.safetensors" for i in range(1, int(count) + 1)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = parse_json(read_bytes(absolute(path)), SIGNS)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {reason(error)}; expected the directory of a Hugging Face"
            " checkpoint"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error!s:.120}; download it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not an object of JSON; download it again")
    return fields
