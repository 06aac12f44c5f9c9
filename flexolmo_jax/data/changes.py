"""Whether documents are still those that a directory was prepared from."""

from collections.abc import Sequence
from pathlib import Path

from flexolmo_jax.config import Reading
from flexolmo_jax.data.documents import AS_TEXT, document_files
from flexolmo_jax.data.records import Index, InputFile, name_in_index, sha256_of
from flexolmo_jax.storage.cache import cache_folder
from flexolmo_jax.storage.paths import in_bucket, size_of
from flexolmo_jax.storage.seen import digests_of


def changed_documents(prepared: Path, documents: Sequence[Path], reading: Reading = AS_TEXT) -> str:
    """How documents, read in this way, differ from those that a directory was prepared from, in
    words; "" where they do not.

    Their content and order count. Where they lie does not, nor what they are called.
    """
    index = Index.read(prepared)
    for key in ("text_key", "separator"):
        if getattr(index, key) != getattr(reading, key):
            return f"{key} was {getattr(index, key)!r}, now {getattr(reading, key)!r}"
    now = []
    for path in documents:
        files = document_files(path, reading)
        if in_bucket(path):  # where nothing is to come to the disk
            digests = [sha256_of(file) for file in files]
        else:
            digests = digests_of(path, files, cache_folder(on_disk=True), sha256_of)
        now += [
            InputFile(name_in_index(file.name), size_of(file), digest)
            for file, digest in zip(files, digests, strict=True)
        ]
    before = index.inputs
    if list(map(_kind_of, before)) == list(map(_kind_of, now)):
        return ""
    old, new = ({file.name: file.sha256 for file in inputs} for inputs in (before, now))
    found = {
        "edited": [name for name in new if old.get(name, new[name]) != new[name]],
        "new": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
    }
    told = (f"{what}: {', '.join(names[:3])}" for what, names in found.items() if names)
    return "; ".join(told) or "in another order"


def _kind_of(file: InputFile) -> tuple[str, str]:
    return Path(file.name).suffix, file.sha256
