"""Fixtures of the tests of what works with features."""

from __future__ import annotations

from tests.writesae_lens.experiments.conftest import gdn, without_type_checks
from tests.writesae_lens.report.conftest import chromium

__all__ = ["chromium", "gdn", "without_type_checks"]
