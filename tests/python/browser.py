"""Chromium without a window, for tests of pages. A test that asks for it is skipped, with the reason, without one."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# What a page must not do is asked of the page, so what the browser itself would fetch is turned off.
_SWITCHES = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def missing() -> str | None:
    """Why there is no browser; None where there is one."""
    if importlib.util.find_spec("playwright") is None:
        return 'no playwright (pip install "octavo[test]")'
    return None if _chromium() else "no Chromium (Debian, Ubuntu: apt install chromium)"


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def launched() -> Iterator[Any]:
    """A playwright browser, with a profile of its own that is removed afterwards."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium's sandbox does not work for root
    with sync_playwright() as playwright:
        options = [*_SWITCHES, *(["--no-sandbox"] if root else [])]
        browser = playwright.chromium.launch(executable_path=_chromium(), args=options)
        try:
            yield browser
        finally:
            browser.close()


class Shown:
    """A page in the browser: what it complained of, and what it asked the network for."""

    def __init__(self, browser: Any, path: Path, *, width: int, scheme: str, height: int = 900) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self._context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._requested)
        self.page.goto(path.resolve().as_uri(), wait_until="load")

    def _requested(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.requests.append(request.url)

    def close(self) -> None:
        """Close the page."""
        self._context.close()
