"""Rows of runs -> summary, answers, tables and plots. Pure: nothing here reads or writes a file, or knows a model."""

from atp.report.answers import answers
from atp.report.markdown import markdown
from atp.report.plots import PlotsUnavailableError, size_plot, sparsity_plot
from atp.report.summary import Cell, Spread, by_sparsity, summarise
from atp.report.tables import TABLE_COLUMNS, spread, table_rows

__all__ = [
    "TABLE_COLUMNS",
    "Cell",
    "PlotsUnavailableError",
    "Spread",
    "answers",
    "by_sparsity",
    "markdown",
    "size_plot",
    "sparsity_plot",
    "spread",
    "summarise",
    "table_rows",
]
