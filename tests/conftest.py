"""Fixtures that tests of several rooms share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, for modules marked with `browsing.NEEDS_CHROMIUM`."""
    from browsing import CHROMIUM, playwright

    with playwright.sync_playwright() as driver:
        # the sandbox needs user namespaces, which containers as a rule do not have; the page is our own
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()
