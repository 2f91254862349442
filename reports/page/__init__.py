"""The pages of a study: report.md, and report.html with its interactive charts."""

from rankwise.reports.page.report import section, write

__all__ = ["section", "write"]
