"""Fixtures of the tests of what works with features."""

from __future__ import annotations

from tests.writesae_lens.experiments.conftest import gdn, without_type_checks

__all__ = ["gdn", "without_type_checks"]
