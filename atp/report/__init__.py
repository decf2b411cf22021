"""Rows of runs -> summary, answers, tables and plots. Pure: nothing here reads or writes a file, or knows a model."""

from atp.report.answers import answers
from atp.report.markdown import markdown
from atp.report.plots import PlotsUnavailableError, size_plot, sparsity_plot
from atp.report.summary import Cell, Spread, by_sparsity, summarise
from atp.report.tables import printed_table, spread

__all__ = [
    "Cell",
    "PlotsUnavailableError",
    "Spread",
    "answers",
    "by_sparsity",
    "markdown",
    "printed_table",
    "size_plot",
    "sparsity_plot",
    "spread",
    "summarise",
]
