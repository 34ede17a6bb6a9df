"""Terms of use of an embedded model: shown before its first use, and accepted by name or not used at all.

``DSO_ACCEPT_TERMS`` names the models whose terms the user accepts, with commas between them. What was converted once
was accepted then, so nobody is asked twice.
"""

from __future__ import annotations

import os
import sys
from html.parser import HTMLParser
from pathlib import Path

from dso.errors import UserError

VARIABLE = "DSO_ACCEPT_TERMS"
BLOCKS = frozenset(("p", "h1", "h2", "h3", "h4", "li", "div", "tr", "br"))
NO_TEXT = frozenset(("script", "style", "button", "devsite-feedback"))


class TermsNotAccepted(UserError):
    """A model whose terms of use nobody has accepted."""


def require_accepted(name: str, page: Path, address: str) -> None:
    """Print the terms of a model on stderr, unless they were accepted.

    Args:
        name: of the model.
        page: its terms, as the HTML file that its package ships.
        address: where they are published.

    Raises:
        TermsNotAccepted: if they were not; the message says how to.
    """
    if name in os.environ.get(VARIABLE, "").replace(" ", "").split(","):
        return
    print(plain_text(page.read_text("utf-8", "replace")), file=sys.stderr)
    raise TermsNotAccepted(
        f"model {name!r} has terms of use, which are printed above and published at {address}; "
        f"if you accept them, say so with: {VARIABLE}={name}"
    )


def plain_text(html: str) -> str:
    """The text of a page's article, of the whole page where it has none, a paragraph to a line."""
    reader = _Reader("<article" in html)
    reader.feed(html)
    lines = (" ".join(line.split()) for line in "".join(reader.parts).splitlines())
    return "\n".join(line for line in lines if line)


class _Reader(HTMLParser):
    def __init__(self, in_article: bool):
        super().__init__()
        self.parts: list[str] = []
        self._article, self._open = in_article, 0
        self._mute = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._open += tag == "article"
        self._mute += tag in NO_TEXT
        if tag in BLOCKS:
            self.handle_data("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self.handle_data("\n")
        self._mute -= tag in NO_TEXT
        self._open -= tag == "article"

    def handle_data(self, data: str) -> None:
        if self._mute <= 0 and (self._open > 0 or not self._article):
            self.parts.append(data if data == "\n" else data.replace("\n", " "))
