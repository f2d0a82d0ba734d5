"""One self-contained HTML page about an SAE."""

from writesae_lens.report.page import make_report, saved_results

__all__ = ["make_report", "saved_results"]
