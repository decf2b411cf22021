"""Runs -> `report.html`: one self-contained page, for one run or for several side by side."""

from atp.report.page.writing import REPORT, Report, write_comparison, write_record, write_report

__all__ = ["REPORT", "Report", "write_comparison", "write_record", "write_report"]
