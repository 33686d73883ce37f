"""Take the pictures of the report in `docs/img` anew: `make screenshots`, after `make demo`."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
SHOTS = {
    "report-light": ("light", 1180, 1060, "top"),
    "report-dark": ("dark", 1180, 1060, "against"),
    "report-phone": ("light", 390, 1060, "top"),
}


def main(report: Path) -> None:
    """Open the page in headless Chromium and keep what a viewport shows."""
    found = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if found is None:
        raise SystemExit("no Chromium: apt-get install chromium-headless-shell fonts-inter")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for name, (scheme, width, height, anchor) in SHOTS.items():
            page = browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme=scheme,  # type: ignore[arg-type]
            )
            page.goto(f"{report.resolve().as_uri()}#{anchor}")
            page.wait_for_timeout(600)  # smooth scrolling
            image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            image.save(DOCS / "img" / f"{name}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "build/demo/report/report.html"))
