"""The page in a real browser: desk and phone, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SIZES = {"desk": (1280, 900), "phone": (390, 844)}


@pytest.fixture
def open_page(browser: Any) -> Any:
    """Open a file; fail at the end if the console said anything or anything was fetched."""
    pages, said = [], []

    def opened(path: Path, size: str, scheme: str = "light") -> Any:
        width, height = SIZES[size]
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: pages.append(request.url))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto(path.as_uri())
        return page

    yield opened
    assert said == []
    assert all(url.startswith(("file:", "data:")) for url in pages)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_it_fits_and_every_section_shows(open_page, run: Path, size: str, scheme: str) -> None:
    page = open_page(run / "report" / "report.html", size, scheme)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide == SIZES[size][0]
    for section in page.locator("main section").all():
        assert section.bounding_box()["height"] > 60
    figures = page.locator(".figure:visible")
    assert figures.count() == 3  # errors, zeros, ratios: one of the two widths of each
    main = page.locator("main").bounding_box()
    assert main["width"] <= 1120
    assert main["x"] == pytest.approx((SIZES[size][0] - main["width"]) / 2)
    box = figures.first.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= SIZES[size][0]
    style = "getComputedStyle(document.body)"
    paper, ink = page.evaluate(f"[{style}.backgroundColor, {style}.color]")
    brightness = [sum(map(int, c[4:-1].split(","))) for c in (paper, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")


def test_search_sort_masks_and_theme_work(open_page, run: Path, report: dict[str, Any]) -> None:
    page = open_page(run / "report" / "report.html", "desk")
    rows = page.locator("#sites tbody tr")
    page.fill("#search", "GEMM down")
    assert rows.locator("visible=true").count() == 1
    assert page.inner_text("#count") == "1 of 2"
    page.fill("#search", "nothing of the kind")
    assert page.inner_text("#count") == "0 of 2"
    page.fill("#search", "")

    errors = sorted(site["layer_error"] for site in report["sites"])
    for order in (errors, errors[::-1]):
        page.click("#sites th button:text('layer error')")
        shown = [float(row.locator("td").nth(4).inner_text()) for row in rows.all()]
        assert shown == pytest.approx(order, rel=1e-3)

    def drawn() -> str:
        return str(page.evaluate("document.getElementById('corner').toDataURL()"))

    first = drawn()
    page.select_option("#mask-site", label="down")
    second = drawn()
    assert second != first
    page.click(".theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert drawn() != second  # the other theme's colour

    # A mark of a figure leads to its row and shows its mask; while over it, its name.
    mark = page.locator(".figure:visible a[href='#site-2']").first
    mark.hover()
    assert "down" in page.inner_text("#tip")
    mark.click()
    assert page.evaluate("document.getElementById('mask-site').selectedIndex") == 1


def test_the_comparison_fits_a_phone(open_page, report: dict[str, Any], tmp_path: Path) -> None:
    from iobs_onnx.report.page import render_comparison, write_page

    html = render_comparison(["one run", "another run with a long name"], [report, report])
    page = open_page(write_page(tmp_path / "both.html", html), "phone")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.fill("#search", "down")
    assert page.inner_text("#count") == "1 of 2"
