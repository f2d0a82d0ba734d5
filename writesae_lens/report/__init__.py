"""Self-contained HTML pages: the report of an SAE, two SAEs side by side, the atlas of a sweep's cells."""

from writesae_lens.report.atlas import make_atlas
from writesae_lens.report.page import make_report, saved_results
from writesae_lens.report.side_by_side import make_side_by_side

__all__ = ["make_atlas", "make_report", "make_side_by_side", "saved_results"]
