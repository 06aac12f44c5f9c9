"""`flexolmo import-hf`: a Hugging Face checkpoint becomes a model here.

Tensors are read one by one, in the order of our leaves, through the key table of huggingface.py.
They may be in one file or in several, with or without an index; an expert's matrices may be tensors
of their own or, as transformers 5 holds them in memory, parts of one tensor for all experts of a
layer. Nothing is unpickled.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from flexolmo_jax.artifact import Artifact
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.integrity import MATRICES, name_of_tensor
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.files import clear
from flexolmo_jax.storage.outputs import check_new
from flexolmo_jax.storage.paths import absolute, children, reason, takes_paths
from flexolmo_jax.storage.tensorfile import TensorFile
from flexolmo_jax.storage.untrusted import conform, parse_json, read_bytes

from .chat import BESIDE, read_chat
from .families import FAMILIES
from .hub_config import model_config
from .huggingface import TOGETHER, Entry, key_table, some, transposed
from .identity import KEY, Tensors, described, from_note, matched, named
from .imported import Source, check_vocabulary, write_model

INDEX = "model.safetensors.index.json"
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors$"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TENSORS = 1 << 17  # more than any model has, in all files together
SIGNS = TENSORS + 1000  # commas and brackets of INDEX and of config.json
HEAD = "lm_head.weight"  # some files have it although the config says that it is the embedding


@takes_paths
def import_hf(
    hf_path: Path, out: Path, names: Sequence[str] = (), match: Mapping[str, Path] | None = None
) -> Artifact:
    """Writes a model: a dense one, or for a mixture one whose expert 0 is the anchor.

    Only a few tensors are in memory at once. A warning names tensors with values that are not
    finite.

    Args:
        names: of the other experts, in order (default: those that an export of ours noted in
            config.json, else expert1, expert2, ...).
        match: checkpoints of single experts by name. An expert with the same matrices has the name.

    Raises UserError, naming the config's key, the tensor or the file, for what our model does not
    compute, for files that config.json does not describe, and for names that are not the experts'.
    """
    check_new(out)
    clear(out)
    fields = _read_json(hf_path / "config.json")
    config = model_config(fields)
    noted = from_note(fields.get(KEY), hf_path / "config.json", config.n_experts - 1)
    if match:
        if names:
            raise UserError("got --names and --match; expected one of them")
        identify = matched(
            {name: _single(path) for name, path in match.items()}, config.n_experts - 1
        )
    else:
        identify = named(names, noted, config.n_experts - 1)
    tokenizer = Tokenizer.load(hf_path)
    check_vocabulary(tokenizer, config, hf_path)
    beside = {name: _read_json(hf_path / name) for name in BESIDE if (hf_path / name).exists()}
    tokenizer.chat = read_chat(hf_path, beside, tokenizer)
    with ExitStack() as files:
        checkpoint = _Checkpoint(hf_path, files)
        table = key_table(config, fields["model_type"])
        values = checkpoint.locate(table, tied=config.tied_head)
        architecture = FAMILIES[fields["model_type"]].architecture
        source = Source(config, architecture, tokenizer, checkpoint.dtype, values)
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

    def read(self) -> np.ndarray:
        """The values, laid out as our leaf has them."""
        values, is_finite = self.file.read_part(self.name, self.start, self.entry.shape)
        if not is_finite:
            note(f"warning: {self.name} in {self.file.path} has values that are not finite")
        return transposed(values) if self.entry.transpose else values


class _Checkpoint:
    """The safetensors files of a directory."""

    def __init__(self, directory: Path, opened: ExitStack):
        self._directory = directory
        self._files: dict[str, TensorFile] = {}  # by tensor
        for path in _tensor_files(directory):
            # The files in the cache of a hub are links, which TensorFile refuses.
            file = opened.enter_context(TensorFile(absolute(path), with_metadata=True))
            for name in file.entries:
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
        dtypes = {str(file.entries[name].dtype): name for name, file in self._files.items()}
        if len(dtypes) != 1:
            found = " and ".join(f"{name} is {dtype}" for dtype, name in sorted(dtypes.items()))
            raise UserError(
                f"{directory} has {found or 'no tensors'}; expected all tensors in one dtype; save"
                " the model in one"
            )
        self.dtype = next(iter(dtypes))

    def locate(self, table: Sequence[Entry], tied: bool) -> dict[str, list[_Located]]:
        """Where each leaf is, by its path, in the order of its index.

        Raises UserError naming tensors that are missing, unexpected or of another shape.
        """
        found: dict[str, list[_Located]] = defaultdict(list)
        missing, used = [], set()
        experts = 1 + max((entry.index[1] for entry in table if len(entry.index) == 2), default=0)
        for entry in table:
            name, start, shape = entry.name, 0, entry.shape
            if name not in self._files:
                name, start, shape = _fused(entry, experts) or (name, start, shape)
            if name not in self._files:
                missing.append(entry.name)
                continue
            file = self._files[name]
            if file.entries[name].shape != shape:
                raise UserError(
                    f"{file.path}: {name} has shape {file.entries[name].shape}; expected {shape} by"
                    f" config.json; {TOGETHER}"
                )
            found["/".join(entry.path)].append(_Located(file, name, start, entry))
            used.add(name)
        unexpected = sorted(self._files.keys() - used - ({HEAD} if tied else set()))
        for what, names in (("misses", missing), ("has unexpected", unexpected)):
            if names:
                raise UserError(f"{self._directory} {what} tensors: {some(names)}; {TOGETHER}")
        return found


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


def _single(path: Path) -> Tensors:
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
        values = _Checkpoint(path, files).locate(table, tied=config.tied_head)
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
    expected = found
    if INDEX in present:
        index: dict[str, Any] = {"weight_map": _read_json(directory / INDEX).get("weight_map")}
        try:
            conform(_Index, index)
        except ValueError as error:
            raise UserError(
                f"{directory / INDEX} has no weight_map from tensors to files beside it ({error});"
                " download it again"
            ) from None
        expected = sorted(set(index["weight_map"].values()))
    elif found and (match := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.safetensors", found[0])):
        expected = [
            f"{match[1]}-{i:05}-of-{match[2]}.safetensors" for i in range(1, int(match[2]) + 1)
        ]
    if missing := sorted(set(expected) - set(found)):
        raise UserError(f"{directory} misses {some(missing)}; download the whole checkpoint")
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
