"""What an owner hands over: the expert's tensors and a manifest, in a directory with nothing else in it. Never data.

    expert.safetensors   layers.<l>.ffn.{gate,up,down}  layers.<l>.router.row  layers.<l>.router.bias (where trained with one)
    manifest.json        canonical JSON: owner's name for it, anchor fingerprint, model config, digests, training summary, ...

Checking one reads the manifest first: another anchor is refused before any tensor is touched. The manifest has the digest of the
other file and, in its last key, of itself: a byte that changed on the way is found wherever it is. Who sent it, a digest cannot say.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from flexolmo_jax.artifact import Artifact, canonical_json, open_artifact
from flexolmo_jax.config import ModelConfig, RunConfig, build, resolve, to_dict
from flexolmo_jax.data.documents import has_documents
from flexolmo_jax.data.prepare import prepare_cached
from flexolmo_jax.data.records import Index, open_records, sha256_of
from flexolmo_jax.errors import UserError
from flexolmo_jax.files import check_new, new_directory
from flexolmo_jax.model import Params
from flexolmo_jax.progress import note
from flexolmo_jax.train.evaluate import make_scorer, score_records

from .anchor import open_anchor, tensor_digest

FORMAT = 1
TENSORS, MANIFEST = "expert.safetensors", "manifest.json"
MATRICES = ("gate", "up", "down")
MANIFEST_TYPES: dict[str, type] = {
    **dict.fromkeys(("name", "domain", "licence", "anchor", "dtype", "privacy", "tool", "sha256"), str),
    **dict.fromkeys(("model", "tensors", "files", "training"), dict),
    "router_bias": bool,
}


@dataclass(frozen=True)
class Contribution:
    """A contribution whose manifest has been read; `expert()` reads and checks the rest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["anchor"]

    @property
    def has_bias(self) -> bool:
        return self.manifest["router_bias"]

    def expert(self) -> Params:
        """The expert as a parameter branch: gate, up, down [L, 1, ...], row [L, 1, D], bias [L, 1] (zeros where it has none).

        Raises UserError naming the first tensor that is missing, unknown, of another shape or dtype, not finite, or whose bytes
        are not those of the manifest.
        """
        tensors = self._checked_tensors()
        L = self.manifest["model"]["n_layers"]

        def stack(name: str) -> np.ndarray:
            return np.stack([tensors[f"layers.{layer}.{name}"] for layer in range(L)])[:, None]

        expert = {name: stack(f"ffn.{name}") for name in MATRICES} | {"row": stack("router.row")}
        expert["bias"] = stack("router.bias") if self.has_bias else np.zeros((L, 1), expert["row"].dtype)
        return expert

    def _checked_tensors(self) -> dict[str, np.ndarray]:
        path = self.path / TENSORS
        declared = self.manifest["tensors"]
        if sha256_of(path) != self.manifest["files"][TENSORS]:
            raise UserError(f"{path} is not the file of the manifest (its SHA-256 differs); ask its owner for the contribution again")
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({error}); ask its owner for it again") from None
        expected = tensor_shapes(build(ModelConfig, self.manifest["model"]), self.has_bias)
        for kind, names in (("misses", expected.keys() - tensors.keys()), ("holds unknown", tensors.keys() - expected.keys())):
            if names:
                raise UserError(f"{path} {kind} tensors: {', '.join(sorted(names)[:3])}; ask its owner for a whole contribution")
        for name, tensor in tensors.items():
            if tensor.shape != expected[name] or str(tensor.dtype) != self.manifest["dtype"]:
                got, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"{self.manifest['dtype']} {list(expected[name])}"
                raise UserError(f"{path}: {name} is {got}; expected {wanted}")
            if declared.get(name) != _entry(tensor):
                raise UserError(f"{path}: the bytes of {name} are not those of the manifest; ask its owner for the contribution again")
            if not np.isfinite(tensor.astype(np.float32)).all():
                raise UserError(f"{path}: {name} has values that are not finite; the expert is broken")
        return tensors


def tensor_shapes(config: ModelConfig, has_bias: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of a contribution to an anchor of this architecture."""
    D, F = config.d_model, config.d_ffn
    per_layer = {"ffn.gate": (D, F), "ffn.up": (D, F), "ffn.down": (F, D), "router.row": (D,)} | ({"router.bias": ()} if has_bias else {})
    return {f"layers.{layer}.{name}": shape for layer in range(config.n_layers) for name, shape in per_layer.items()}


def open_contribution(path: Path, anchor: Artifact | None = None) -> Contribution:
    """Reads a manifest. Raises UserError for anything else than a contribution, and for one made from another anchor."""
    path = Path(path)
    try:
        names = {p.name for p in path.iterdir()}
        text = (path / MANIFEST).read_text("utf-8")
        contribution = Contribution(path, _checked_manifest(text))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"{path} is not a contribution: it has no {MANIFEST}") from None
    except UserError as error:
        raise UserError(f"{path / MANIFEST}: {error}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path / MANIFEST} is damaged ({type(error).__name__}: {error}); ask its owner for it again") from None
    if unknown := names - {TENSORS, MANIFEST}:
        raise UserError(f"{path} holds {', '.join(sorted(unknown)[:3])}; a contribution is {TENSORS} and {MANIFEST} and nothing else")
    if anchor is not None and contribution.fingerprint != anchor.fingerprint:
        raise UserError(
            f"{path} was made from the anchor {contribution.fingerprint[:16]}; {anchor.path} is {str(anchor.fingerprint)[:16]}; "
            "experts only fit the anchor they were trained against"
        )
    for key in ("model", "dtype"):
        if anchor is not None and contribution.manifest[key] != anchor.description[key]:
            raise UserError(f"{path} names the fingerprint of {anchor.path} but has another {key}; ask its owner for it again")
    return contribution


def check_expert_name(name: str) -> None:
    """Names become parts of paths and of command lines. Raises UserError for one that cannot."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name) or name == "anchor":
        raise UserError(f"the expert's name is {name!r}; expected up to 64 letters, digits, and _ . - inside, and not 'anchor'")


def _checked_manifest(text: str) -> dict[str, Any]:
    """The manifest in a text. Raises ValueError, KeyError, TypeError, RecursionError or UserError where it is none, whoever wrote it."""
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise UserError(f"the format is {found!r:.40}; this version reads {FORMAT}")
    for key, kind in MANIFEST_TYPES.items():
        if not isinstance(manifest[key], kind):
            raise ValueError(f"{key} is {manifest[key]!r:.40}; expected a {kind.__name__}")
    if text != _sealed(manifest):
        raise ValueError("its bytes are not those that its own digest was taken of")
    check_expert_name(manifest["name"])
    config, declared = build(ModelConfig, manifest["model"]), manifest["tensors"]
    config.check()
    if len(declared) != (5 if manifest["router_bias"] else 4) * config.n_layers:
        raise ValueError(f"{len(declared)} tensors for {config.n_layers} layers")
    for name, shape in tensor_shapes(config, manifest["router_bias"]).items():
        got = declared[name]["dtype"], declared[name]["shape"]
        if got != (manifest["dtype"], list(shape)):
            raise ValueError(f"{name} is {got}; expected {manifest['dtype']} {list(shape)}")
    manifest["files"][TENSORS]
    return manifest


def _sealed(manifest: dict[str, Any]) -> str:
    """The file's text: canonical JSON with the digest of everything else in it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return canonical_json(rest | {"sha256": hashlib.sha256(canonical_json(rest).encode()).hexdigest()}) + "\n"


def package(source: Path, out: Path, which: str = "last") -> Contribution:
    """Makes a contribution of a pair's run: cast to the anchor's dtype first, then evaluated: what is merged is what was measured."""
    check_new(out)
    run = open_artifact(source)
    if not run.is_pair:
        raise UserError(f"{source} is not a pair's run; a contribution is made of one")
    config = resolve(yaml.safe_load((source / "config.yaml").read_text()))
    assert config.pair is not None
    anchor = open_anchor(run.base().path)
    dtype = anchor.description["dtype"]
    step = run.step(which)
    params = run.params(str(step))
    released = {name: np.asarray(a.astype(dtype)) for name, a in params["expert"].items()}
    scores = _evaluate(run, anchor, params, released, config)
    tensors = _by_layer(released)
    with new_directory(out) as directory:
        save_file(tensors, directory / TENSORS)
        manifest = {
            "format": FORMAT,
            "name": config.pair.name,
            "domain": config.pair.domain or config.pair.name,
            "licence": config.pair.licence,
            "anchor": anchor.fingerprint,
            "model": to_dict(anchor.config),
            "router_bias": "bias" in released,
            "dtype": dtype,
            "tensors": {name: _entry(tensor) for name, tensor in sorted(tensors.items())},
            "files": {TENSORS: sha256_of(directory / TENSORS)},
            "training": {
                "steps": step,
                "tokens": step * config.data.batch_size * config.data.seq_len,
                "public_share": config.pair.public_share,
                "bits_per_byte": scores,
            },
            "privacy": "none",
            "tool": f"flexolmo-jax {_version()}",
        }
        (directory / MANIFEST).write_text(_sealed(manifest), "utf-8")
    note(f"packaged {out}: {sum(t.nbytes for t in tensors.values()):,} bytes of weights, no data")
    return open_contribution(out, anchor)


def _evaluate(run: Artifact, anchor: Artifact, params: Params, released: dict[str, np.ndarray], config: RunConfig) -> dict[str, Any]:
    """Held-out bits per byte of the anchor and of the pair as it is handed over, on the owner's text and on public text."""
    assert config.pair is not None
    heldout = {d.title: d.path for d in (config.data.eval or config.data.train)}
    heldout |= {"public": config.pair.public or str(anchor.path / "public")}
    pair = params | {"expert": {name: jnp.asarray(a) for name, a in released.items()}}
    dense = {name: branch for name, branch in params.items() if name != "expert"}
    scorers = {"anchor": (make_scorer(anchor.config), dense), "pair": (make_scorer(run.config), pair)}
    scores: dict[str, Any] = {who: {} for who in scorers}
    for name, path in heldout.items():
        # Records are scored whatever their length: an owner's need not be as long as the anchor's public ones.
        seq_len = config.data.seq_len if has_documents(Path(path)) else Index.read(Path(path)).seq_len
        records = open_records(prepare_cached(Path(path), run.tokenizer, seq_len), "heldout")
        if len(records):
            for who, (scorer, weights) in scorers.items():
                score = score_records(scorer, weights, records, run.tokenizer, limit=config.train.eval_records)
                scores[who][name] = round(score.bits_per_byte, 6)
    return scores


def _by_layer(expert: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {name: f"ffn.{name}" for name in MATRICES} | {"row": "router.row", "bias": "router.bias"}
    layers = range(expert["row"].shape[0])
    return {f"layers.{layer}.{names[name]}": np.array(array[layer, 0], order="C") for name, array in expert.items() for layer in layers}


def _entry(tensor: np.ndarray) -> dict[str, Any]:
    """What a manifest says of one tensor."""
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": tensor_digest(tensor)}


def _version() -> str:
    try:
        return version("flexolmo-jax")
    except PackageNotFoundError:  # a checkout that is not installed
        return "checkout"
