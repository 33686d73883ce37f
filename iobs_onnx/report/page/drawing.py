"""Turn matplotlib figures into inline SVG that follows the page: its colours, font and width."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
ET.register_namespace("", _SVG)

# Colours nobody would choose: each stands for a variable of the style sheet, which light and
# dark set differently.
INK, MUTED, GRID, ACCENT, SECOND, GOOD, BAD, PAPER = (f"#0000{i:02x}" for i in range(1, 9))
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
    GOOD: "var(--good)",
    BAD: "var(--bad)",
    PAPER: "var(--card)",
}
# Drawn twice, for desks and for phones; the style sheet shows one. A unit is a CSS pixel.
_WIDTHS = {"wide": 1000, "narrow": 340}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "iobs-onnx",
    # Names of weights and files may hold dollar signs.
    "text.parse_math": False,
    "text.color": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titlepad": 10,
    "axes.labelsize": 12,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "font.size": 12,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "legend.labelcolor": MUTED,
    "savefig.facecolor": "none",
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": 11,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
    "ytick.labelsize": 11,
    "ytick.left": False,
    "ytick.minor.left": False,
    "xtick.minor.bottom": False,
}


def draw(
    name: str,
    label: str,
    paint: Callable[[Axes, bool], None],
    *,
    height: int = 300,
    tips: Mapping[str, str] | None = None,
) -> Markup:
    """Return a figure as SVG in two widths.

    Args:
        name: unique on the page; ids in the SVG start with it.
        label: says to a screen reader what is drawn.
        paint: draws on the axes; is told whether this is the narrow one.
        height: in pixels.
        tips: the text that shows over each mark whose URL is the key.
    """
    parts = []
    for kind, width in _WIDTHS.items():
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(width / 72, height / 72))
            paint(figure.add_subplot(), kind == "narrow")
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        svg = _inline(buffer.getvalue(), f"{name}-{kind}", label, tips or {})
        parts.append(f'<div class="figure {kind}">{svg}</div>')
    return Markup("".join(parts))  # matplotlib escapes every text


def _inline(text: str, prefix: str, label: str, tips: Mapping[str, str]) -> str:
    """Make a stand-alone SVG part of a page: own ids, the page's colours, tips on its links."""
    root = ET.fromstring(text)
    referred = _references(root)
    for parent in root.iter():
        for child in list(parent):
            # A rule for `*` and the RDF description would hold for the whole page.
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    for element in root.iter():
        _restyle(element)
        name = element.attrib.pop("id", None)
        if name in referred:
            element.set("id", f"{prefix}-{name}")
        for key, value in list(element.attrib.items()):
            if value.startswith("url(#"):
                element.set(key, f"url(#{prefix}-{value[5:]}")
        target = element.attrib.pop(_LINK, None)
        if target is not None:
            is_use = element.tag.endswith("}use")
            element.set("href", f"#{prefix}-{target[1:]}" if is_use else target)
            element.attrib.pop("target", None)
            if not is_use and target in tips:
                element.set("data-tip", tips[target])
                element.set("aria-label", tips[target])
    for key in ("width", "height"):
        root.attrib.pop(key)
    root.set("role", "group")
    root.set("aria-label", label)
    return ET.tostring(root, encoding="unicode")


def _references(root: ET.Element) -> set[str]:
    """Return the ids that other elements of the SVG refer to."""
    found = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if value.startswith("url(#"):
                found.add(value[5:].rstrip(")"))
            elif key == _LINK and element.tag.endswith("}use"):
                found.add(value[1:])
    return found


def _restyle(element: ET.Element) -> None:
    style = element.get("style")
    if style is None:
        return
    for colour, variable in _VARIABLES.items():
        style = style.replace(colour, variable)
    # The page's own font, in the size that matplotlib laid out.
    kept = [part for part in style.split(";") if "font-family" not in part]
    element.set("style", ";".join(kept))
