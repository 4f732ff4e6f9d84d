"""What tests of pages need of a browser; the fixture `browser` is in the folder's conftest."""

from __future__ import annotations

import shutil

import pytest

__all__ = ["CHROMIUM", "NEEDS_CHROMIUM", "playwright"]

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS_CHROMIUM = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)
