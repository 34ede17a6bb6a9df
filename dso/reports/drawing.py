"""A plot as an SVG that stands in a page with a text alternative, and as a PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from dso.evaluation.figure import STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
LOOK: dict[Any, Any] = STYLE | {
    "font.size": 11.0,
    "legend.fontsize": 10.5,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "svg.fonttype": "none",  # text stays text: it can be read out, searched and scaled
    "svg.hashsalt": "dso",  # the same study gives the same page
    "text.parse_math": False,  # a $ in a name is a $
}
REFERENCE = re.compile(r"(url\(#|^#)")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot of a page.

    Attributes:
        name: of its PNG, without the suffix; unique within a page.
        title: one line above it.
        text: what it shows, in words.
        svg: an ``<svg role="img">`` element with ``<title>`` and ``<desc>``.
        png: the same picture.
    """

    name: str
    title: str
    text: str
    svg: str
    png: bytes


def draw(name: str, title: str, text: str, make: Callable[[], Figure]) -> Plot:
    """Draw a figure that ``make`` makes; no display is needed.

    Raises:
        ImportError: if matplotlib is missing; the message names the extra that has it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a report's plots need matplotlib; install it with: pip install 'dso[train]'") from error
    with matplotlib.rc_context(LOOK):
        figure = make()
        vector, pixels = io.StringIO(), io.BytesIO()
        figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
        figure.set_layout_engine("none")  # everything has its place now
        figure.savefig(pixels, format="png", dpi=170, metadata={"Software": None})
    return Plot(
        name=name, title=title, text=text, svg=labelled(vector.getvalue(), name, title, text), png=pixels.getvalue()
    )


def labelled(svg: str, name: str, title: str, text: str) -> str:
    """The element of an SVG document, ready for a page: with a text alternative, and with ids of its own."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        if own := element.get("id"):
            element.set("id", f"{name}-{own}")
        for key, value in element.attrib.items():
            if key != "id":
                element.set(key, REFERENCE.sub(rf"\g<1>{name}-", value))
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    root.attrib.pop("height", None)  # the page's width decides, the box of the view keeps the shape
    root.attrib.pop("width", None)
    for place, (tag, content) in enumerate((("title", title), ("desc", text))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = content
        root.insert(place, element)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    return ElementTree.tostring(root, encoding="unicode")
