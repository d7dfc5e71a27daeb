"""Pictures of the report of a run for the docs: python tests/screenshots.py RUN FOLDER.

Needs Chromium. Writes laptop.png and dark.png (1280 x 800) and phone.png (390 x 844).
"""

import sys
import tempfile
import time
from pathlib import Path

from browser import Browser
from lamina.cli.report import report_run


def main(run: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        page = report_run(run, Path(place) / "report.html")
        browser = Browser(Path(place) / "browser", seconds=120)
        for name, width, height, dark, part in (
            ("laptop", 1280, 800, False, ""),
            ("phone", 390, 844, False, "lr"),
            ("dark", 1280, 800, True, "updates"),
        ):
            browser.open(page, width, height, dark)
            if part:  # else the page from its top
                browser.run(
                    f"document.getElementById('{part}').scrollIntoView({{behavior: 'instant'}})"
                )
                browser.wait(f"document.querySelector('#chart-{part} svg')")
            time.sleep(1.5)  # until all is painted
            browser.picture(folder / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
