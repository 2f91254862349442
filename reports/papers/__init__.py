"""The papers' tables as data, our runs beside them, and what their recipes need.

from rankwise.reports import papers
table = papers.load("adalora-1")
table.value("AdaLoRA, 1.27M", "stsb")         # 91.84, n = 5, "AdaLoRA, Table 1"
table.average_gap("AdaLoRA, 1.27M")           # printed average - mean of the columns that it averages
"""

from rankwise.reports.papers.published import PrintedRow, Published, Value, load, names, printed, read

__all__ = ["PrintedRow", "Published", "Value", "load", "names", "printed", "read"]
