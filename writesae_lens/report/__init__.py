"""Self-contained HTML pages: the report of an SAE, and the atlas of a sweep over many cells."""

from writesae_lens.report.atlas import make_atlas
from writesae_lens.report.page import make_report, saved_results

__all__ = ["make_atlas", "make_report", "saved_results"]
