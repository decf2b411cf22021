"""Rows of runs -> summary, answers, tables and plots; folders of runs -> records and `report.html`.

Nothing here knows a model, and only `record`, `sources` and `page` touch files.
"""

from atp.report.answers import answers
from atp.report.markdown import markdown
from atp.report.page import REPORT, Report, write_comparison, write_report
from atp.report.plots import PlotsUnavailableError, size_plot, sparsity_plot
from atp.report.summary import Cell, Spread, by_sparsity, summarise
from atp.report.tables import printed_table, spread

__all__ = [
    "REPORT",
    "Cell",
    "PlotsUnavailableError",
    "Report",
    "Spread",
    "answers",
    "by_sparsity",
    "markdown",
    "printed_table",
    "size_plot",
    "sparsity_plot",
    "spread",
    "summarise",
    "write_comparison",
    "write_report",
]
