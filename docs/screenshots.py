"""Take the pictures of the report in `docs/img` anew: `make screenshots` makes the reports, too."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
# Folder of the report below build/, scheme, size, and where on the page.
SHOTS = {
    "report-light": ("demo/report", "light", 1180, 1060, "top"),
    "report-dark": ("demo/report", "dark", 1180, 1060, "against"),
    "report-phone": ("demo/report", "light", 390, 1060, "top"),
    "report-allocation": ("demo/allocated", "light", 1180, 600, "allocation"),
}


def main(build: Path) -> None:
    """Open the pages in headless Chromium and keep what a viewport shows."""
    found = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if found is None:
        raise SystemExit("no Chromium: apt-get install chromium-headless-shell fonts-inter")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for name, (folder, scheme, width, height, anchor) in SHOTS.items():
            page = browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme=scheme,  # type: ignore[arg-type]
            )
            report = (build / folder / "report.html").resolve()
            page.goto(f"{report.as_uri()}#{anchor}")
            page.wait_for_timeout(600)  # smooth scrolling
            image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            image.save(DOCS / "img" / f"{name}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "build"))
