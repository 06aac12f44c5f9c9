"""How documents are read: where their text is, and what is not read."""

from dataclasses import dataclass

from .section import expect

FORMATS = (".jsonl", ".jsonlines", ".ndjson", ".json", ".txt", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lz4")
END = "<|endoftext|>"
_LONGEST = 1000  # characters of a key or a separator


@dataclass(frozen=True)
class Reading:
    """What `data` of a config and the options of a command say of raw documents.

    `separator` ends a document of a `.txt` where it is a line of its own; "" for none.
    """

    text_key: str = "text"
    separator: str = END
    skip_bad: bool = False
    strict: bool = False

    def check(self, text_key: str, separator: str) -> None:
        """Raises UserError for what can be none; takes how the user knows them."""
        is_key = 0 < len(self.text_key) <= _LONGEST
        expect(is_key, text_key, self.text_key, "the key of a document's text")
        is_line = self.separator == self.separator.strip()[:_LONGEST] and (
            "\n" not in self.separator
        )
        expect(is_line, separator, self.separator, "one line without spaces around it")


def suffixes_of(name: str) -> tuple[str, str]:
    """Of FORMATS and of COMPRESSIONS what a file's name ends in, "" for none."""
    lower = name.lower()
    compression = next((s for s in COMPRESSIONS if lower.endswith(s)), "")
    lower = lower.removesuffix(compression)
    return next((s for s in FORMATS if lower.endswith(s)), ""), compression


def without_suffixes(name: str) -> str:
    """A file's name without its format and compression. Other dots are part of the name."""
    form, compression = suffixes_of(name)
    return name[: -len(form + compression)] or name if form else name
