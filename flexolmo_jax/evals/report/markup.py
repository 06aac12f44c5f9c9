"""HTML and SVG as strings. Text from outside is plain text, and escaped here."""

import html
import re

# What neither HTML nor XML may hold: control characters, lone surrogates, U+FFFE and U+FFFF.
FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def escape(text: str) -> str:
    """Text for elements and for quoted attributes; a forbidden character becomes U+FFFD."""
    return html.escape(FORBIDDEN.sub("\ufffd", text))


def printable(text: str) -> str:
    """Text without what moves a terminal's cursor, colours it, or turns a line's direction."""
    return "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text)


def element(tag: str, content: str | None = None, /, **attributes: str | float | None) -> str:
    """An element around `content`, which is markup; without any, a tag that closes itself.

    Attributes are plain text, and left out where None. Their names are written as Python's:
    `class_`, `aria_label`.
    """
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{named}/>" if content is None else f"<{tag}{named}>{content}</{tag}>"
