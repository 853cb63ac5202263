"""A browser to look at pages with: Chromium through Playwright, where both are here."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium(playwright):
    """The path of Chromium: $SMOOSEG_CHROMIUM, the one that Playwright brought, or one of the system; None without."""
    places = [os.environ.get("SMOOSEG_CHROMIUM"), playwright.chromium.executable_path, *map(shutil.which, NAMES)]
    return next((place for place in places if place and Path(place).is_file()), None)


@contextmanager
def browser():
    """Chromium without a window; skips the test where it is not here."""
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install .[browser]")
    with api.sync_playwright() as playwright:
        place = chromium(playwright)
        if place is None:
            pytest.skip("needs Chromium: playwright install chromium, or SMOOSEG_CHROMIUM=PATH")
        running = playwright.chromium.launch(executable_path=place, args=["--no-sandbox"])
        try:
            yield running
        finally:
            running.close()
