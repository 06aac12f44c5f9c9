"""`flexolmo data fetch`: a fake registry for what it promises, and (slow) the real ones."""

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexolmo_jax.data import sources
from flexolmo_jax.data.sources import Package, Source, fetch
from flexolmo_jax.errors import UserError

PRIVATE = ("code", "biomed", "legal", "drama")


def _prose(topic: str, count: int, length: int = 300) -> list[str]:
    """Distinct documents of about `length` characters that share no passage."""
    return [
        " ".join(f"{topic}{number}w{word}" for word in range(length // 10))
        for number in range(count)
    ]


class Registry:
    """A pip and npm that serve zip files from a folder, and count what they are asked for."""

    def __init__(self, folder: Path):
        self.folder, self.asked, self.refused = folder, [], set()

    def publish(self, client: str, name: str, documents: list[str]) -> Package:
        path = self.folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for number, document in enumerate(documents):
                wheel.writestr(zipfile.ZipInfo(f"text/{number:04d}.txt"), document)
        return Package(client, name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest())

    def run(self, command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess:
        text = (cwd / "requirements.txt").read_text() if "pip" in command else command[-1]
        name = text.replace("@", "==").split("==")[0]
        self.asked.append(name)
        if name in self.refused:
            return subprocess.CompletedProcess(
                command,
                1,
                "",
                f"WARNING: aside\nERROR: No matching distribution found for {name}\n",
            )
        wheel = self.folder / f"{name}-1.0-py3-none-any.whl"
        (cwd / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


def _read(archive: Path) -> Iterator[str]:
    return (text for _, text in sources._texts(archive, "text/*"))


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Two domains: `bees` from pip, `mixed` from two pip packages and one of npm."""
    (tmp_path / "registry").mkdir()
    fake = Registry(tmp_path / "registry")
    bees, wasps, ants = (
        fake.publish("pip", name, _prose(name, 40)) for name in ("bees", "wasps", "ants")
    )
    moths = fake.publish("npm", "moths", _prose("moths", 5))
    domains = {
        "bees": (Source("Bees", bees, _read),),
        "mixed": (
            Source("Wasps", wasps, _read),
            Source("Ants", ants, _read),
            Source("Moths", moths, _read),
        ),
    }
    monkeypatch.setattr(sources, "DOMAINS", domains)
    monkeypatch.setattr(sources.subprocess, "run", fake.run)
    monkeypatch.setattr(sources.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("FLEXOLMO_CACHE", str(tmp_path / "cache"))
    return fake


def _documents(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_domain_is_a_file_of_documents_that_name_their_source(registry, tmp_path):
    report = fetch(tmp_path / "out")
    documents = _documents(tmp_path / "out" / "mixed.jsonl")
    assert {document["text"] for document in documents} == {
        *_prose("wasps", 40),
        *_prose("ants", 40),
        *_prose("moths", 5),
    }
    assert all(document["text"].startswith(document["source"].lower()) for document in documents)
    assert report["mixed"]["documents"] == 85 and report["mixed"]["missing"] == {}
    assert report["mixed"]["bytes"] == sum(len(document["text"].encode()) for document in documents)


def test_documents_come_in_the_order_of_their_digests(registry, tmp_path):
    fetch(tmp_path / "out", ["mixed"])
    digests = [
        hashlib.sha256(b"order\n" + document["text"].encode()).hexdigest()
        for document in _documents(tmp_path / "out" / "mixed.jsonl")
    ]
    assert digests == sorted(digests)


def test_a_complete_domain_is_not_fetched_or_written_again(registry, tmp_path):
    first = fetch(tmp_path / "out")
    written = (tmp_path / "out" / "bees.jsonl").stat().st_mtime_ns
    registry.asked.clear()
    assert fetch(tmp_path / "out") == first
    assert registry.asked == [] and (tmp_path / "out" / "bees.jsonl").stat().st_mtime_ns == written


def test_another_limit_or_a_damaged_file_is_made_again_from_the_cache(registry, tmp_path):
    fetch(tmp_path / "out", ["bees"])
    registry.asked.clear()
    whole = (tmp_path / "out" / "bees.jsonl").read_bytes()
    assert fetch(tmp_path / "out", ["bees"], max_bytes=2000)["bees"]["bytes"] <= 2000
    fetch(tmp_path / "out", ["bees"])
    (tmp_path / "out" / "bees.jsonl").write_bytes(whole[:1000])
    fetch(tmp_path / "out", ["bees"])
    assert (tmp_path / "out" / "bees.jsonl").read_bytes() == whole
    assert registry.asked == []


def test_an_interrupted_fetch_goes_on_with_what_it_has(registry, tmp_path, monkeypatch):
    write, calls = sources._write_domain, []

    def interrupted(out, name, *rest):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(out, name, *rest)

    monkeypatch.setattr(sources, "_write_domain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path / "out")
    registry.asked.clear()
    report = fetch(tmp_path / "out")
    assert calls == ["bees", "mixed", "mixed"] and registry.asked == []
    assert report["bees"]["documents"] == 40 and report["mixed"]["documents"] == 85
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".fetch.json",
        "bees.jsonl",
        "mixed.jsonl",
    ]


def test_a_package_with_a_wrong_digest_is_refused_and_the_others_go_on(registry, tmp_path):
    registry.publish("pip", "wasps", _prose("hornets", 40))
    report = fetch(tmp_path / "out", ["mixed"])["mixed"]
    assert "wrong digest" in report["missing"]["Wasps"] and list(report["missing"]) == ["Wasps"]
    assert (
        report["documents"] == 45
        and "hornets" not in (tmp_path / "out" / "mixed.jsonl").read_text()
    )


def test_a_tampered_cache_is_not_used(registry, tmp_path):
    fetch(tmp_path / "out", ["bees"])
    (cached,) = (tmp_path / "cache" / "pip-bees-1.0").iterdir()
    cached.write_bytes(b"something else")
    registry.asked.clear()
    assert fetch(tmp_path / "again", ["bees"])["bees"]["documents"] == 40
    assert registry.asked == ["bees"]


def test_a_machine_without_npm_gets_the_rest_and_a_note(registry, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(sources.progress, "note", notes.append)
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    report = fetch(tmp_path / "out", ["mixed"])["mixed"]
    assert (
        report["missing"] == {"Moths": "npm is not on this machine"} and report["documents"] == 80
    )
    assert notes == ["npm moths 1.0: npm is not on this machine"]


def test_a_missing_source_is_tried_again_the_next_time(registry, tmp_path):
    registry.refused = {"ants"}
    missing = fetch(tmp_path / "out", ["mixed"])["mixed"]["missing"]
    assert missing == {"Ants": "pip failed: ERROR: No matching distribution found for ants"}
    written = (tmp_path / "out" / "mixed.jsonl").stat().st_mtime_ns
    assert fetch(tmp_path / "out", ["mixed"])["mixed"]["missing"] == missing
    assert (tmp_path / "out" / "mixed.jsonl").stat().st_mtime_ns == written
    registry.refused = set()
    registry.asked.clear()
    assert fetch(tmp_path / "out", ["mixed"])["mixed"]["missing"] == {}
    assert registry.asked == ["ants"]


def test_a_client_that_gives_no_answer_is_a_missing_source(registry, tmp_path, monkeypatch):
    def hangs(command, cwd, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    fetch(tmp_path / "out", ["bees"])
    monkeypatch.setattr(sources.subprocess, "run", hangs)
    report = fetch(tmp_path / "out")
    assert all("no answer within" in reason for reason in report["mixed"]["missing"].values())
    assert report["mixed"]["documents"] == 0 and report["bees"]["documents"] == 40
    assert not (tmp_path / "out" / "mixed.jsonl").exists()


def test_nothing_at_all_is_an_error_of_one_line(registry, tmp_path):
    registry.refused = {"bees", "wasps", "ants", "moths"}
    with pytest.raises(
        UserError, match=r"no text could be had for bees, mixed: .*No matching distribution"
    ) as error:
        fetch(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_an_archive_that_cannot_be_read_costs_its_source_only(registry, tmp_path, monkeypatch):
    def broken(archive):
        yield from _read(archive)
        raise KeyError("a member\nthat is not there")

    wasps, *others = sources.DOMAINS["mixed"]
    monkeypatch.setitem(sources.DOMAINS, "mixed", (wasps._replace(read=broken), *others))
    report = fetch(tmp_path / "out", ["mixed"])["mixed"]
    assert list(report["missing"]) == ["Wasps"] and report["documents"] == 45


def test_the_mistakes_of_a_user_are_told_in_one_line(registry, tmp_path):
    (tmp_path / "file").write_text("")
    for call, said in (
        (
            lambda: fetch(tmp_path / "out", ["bees", "birds"]),
            "unknown domain birds: expected some of bees, mixed",
        ),
        (lambda: fetch(tmp_path / "file"), "is a file: expected a directory"),
        (lambda: fetch(tmp_path / "out", max_bytes=0), "expected more than 0"),
    ):
        with pytest.raises(UserError, match=said):
            call()


def test_a_budget_is_shared_evenly_and_a_small_source_leaves_its_rest_to_others(registry, tmp_path):
    report = fetch(tmp_path / "out", ["mixed"], max_bytes=9000)["mixed"]
    sizes = {source["name"]: source["bytes"] for source in report["sources"]}
    moths = sum(map(len, _prose("moths", 5)))
    longest = max(map(len, _prose("wasps", 40)))
    assert sizes["Moths"] == moths
    assert all(abs(sizes[name] - (9000 - moths) / 2) <= 2 * longest for name in ("Wasps", "Ants"))
    assert 9000 - 2 * longest <= report["bytes"] <= 9000


def test_the_limit_of_a_source_holds_without_a_budget(registry, tmp_path, monkeypatch):
    (bees,) = sources.DOMAINS["bees"]
    monkeypatch.setitem(sources.DOMAINS, "bees", (bees._replace(limit=1500),))
    assert 1000 < fetch(tmp_path / "out", ["bees"])["bees"]["bytes"] <= 1500


def test_text_is_normalised_and_repeats_are_dropped(registry, tmp_path, monkeypatch):
    sentence = (
        "This software is provided to {} as it is and without any warranty of any kind whatsoever. "
    )
    licence = "".join(sentence.format(name) for name in ("Ann", "Bob", "Cid", "Dan"))
    variant = licence.replace("Cid", "Eve")
    raw = (
        "Cafe\u0301 and more\x00 of\u2028 it.\r\n\r\n\r\n\r\n\r\n"
        + "    indented words " * 20
        + "  \n"
    )
    package = registry.publish("pip", "messy", [licence, licence, variant, raw, "too short"])
    monkeypatch.setitem(sources.DOMAINS, "messy", (Source("Messy", package, _read),))
    texts = [document["text"] for document in _documents_of(tmp_path, "messy")]
    assert len(texts) == 2
    (clean,) = (text for text in texts if "indented" in text)
    assert clean.startswith("Café and more of\n it.\n\n\n    indented") and clean.endswith("words")


def _documents_of(tmp_path: Path, domain: str) -> list[dict]:
    fetch(tmp_path / "out", [domain])
    return _documents(tmp_path / "out" / f"{domain}.jsonl")


def test_apt_is_held_to_its_upstream_version_and_only_notes_another_build(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(sources.progress, "note", notes.append)
    package = Package("apt", "dict-x", "0.48", "0" * 64)
    for name in ("dict-x_1%3a0.49-1_all.deb", "dict-x_0.48.5-2_all.deb"):
        (tmp_path / name).write_bytes(b"deb")
    with pytest.raises(sources.Missing, match=r"apt serves version 1:0\.49-1: expected 0\.48"):
        sources._check(package, tmp_path / "dict-x_1%3a0.49-1_all.deb")
    assert notes == []
    sources._check(package, tmp_path / "dict-x_0.48.5-2_all.deb")
    assert len(notes) == 1 and hashlib.sha256(b"deb").hexdigest() in notes[0]


def test_pieces_of_a_text_are_short_and_lose_nothing():
    text = "\n\n".join(
        ("First paragraph.", "line of text\n" * 2000, "a sentence of a long line. " * 2000, "last")
    )
    pieces = list(sources._pieces(text, 4000))
    assert max(map(len, pieces)) <= 8000
    assert "".join("".join(pieces).split()).replace(".", "") == "".join(text.split()).replace(
        ".", ""
    )


def test_wikitext_becomes_plain_paragraphs():
    wikitext = (
        "{{Infobox|a={{b|c}}}}'''Ants''' are [[insect|insects]] of [[Earth]].<ref name=x>A"
        " book</ref>\n[[File:x.jpg|thumb|An [[ant]]]]{| class=t\n| cell\n|}\n== Nests ==\nSee"
        " [https://a.b the page].\n\n== References ==\n* one"
    )
    assert sources._plain(wikitext).strip().split("\n") == [
        "Ants are insects of Earth.",
        "",
        "Nests",
        "See the page.",
    ]


def test_the_catalogue_pins_every_package_and_keeps_public_to_pip():
    packages = {source.package for domain in sources.DOMAINS.values() for source in domain}
    assert all(len(package.sha256) == 64 and package.version for package in packages)
    assert {source.package.client for source in sources.DOMAINS["public"]} == {"pip"}
    for domain in sources.DOMAINS.values():
        assert len({source.name for source in domain}) == len(domain)


def _shingles(path: Path) -> set[int]:
    shingles = set()
    for document in _documents(path):
        words = document["text"].lower().split()
        shingles.update(hash(tuple(words[start : start + 8])) for start in range(len(words) - 7))
    return shingles


@pytest.mark.slow
def test_the_real_registries_give_broad_public_text_that_no_private_domain_shares(tmp_path):
    report = fetch(tmp_path, [*PRIVATE, "public"])
    assert report["public"]["missing"] == {}
    assert report["public"]["bytes"] > 15_000_000
    for source in report["public"]["sources"]:
        assert source["bytes"] > 50_000, source["name"]
    public = _shingles(tmp_path / "public.jsonl")
    for domain in PRIVATE:
        assert report[domain]["bytes"] > 4_000_000
        shingles = _shingles(tmp_path / f"{domain}.jsonl")
        assert len(shingles & public) < 0.005 * len(shingles), domain
    assert fetch(tmp_path, [*PRIVATE, "public"]) == report
