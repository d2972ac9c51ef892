"""Pictures of the built documentation, as Chromium shows it: wide and narrow.

python docs/screenshots.py build/docs build/screenshots
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZES = {"wide": "1280,1600", "narrow": "390,1400"}
QUIET = ("--disable-background-networking", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
# A search is nothing to see without a query, and takes the page's scripts some time.
QUERIES = {"search": "?q=snapshot"}
PATIENT = "--virtual-time-budget=5000"


def take(browser: str, page: Path, picture: Path, size: str) -> None:
    """Have the browser draw a page, with a profile of its own that is thrown away."""
    query = QUERIES.get(page.stem, "")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, "--headless", "--no-sandbox", *QUIET, f"--user-data-dir={profile}"]
        command += [PATIENT] if query else []
        command += [f"--window-size={size}", f"--screenshot={picture}"]
        command += [page.resolve().as_uri() + query]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def main(site: Path, pictures: Path) -> None:
    """Take a picture of each page in each size."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        sys.exit(f"no browser to take pictures with: none of {', '.join(NAMES)} is installed")
    pictures.mkdir(parents=True, exist_ok=True)
    pages = sorted(site.glob("*.html"))
    for page in pages:
        for name, size in SIZES.items():
            take(browser, page, pictures / f"{page.stem}-{name}.png", size)
    print(f"{len(pages) * len(SIZES)} pictures in {pictures}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
