"""What training did to the weights: figures and tables of what `rankwise analysis` measured, beside the papers."""

from rankwise.reports.analysis.measured import read
from rankwise.reports.analysis.page import write

__all__ = ["read", "write"]
