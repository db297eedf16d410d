"""The report of a run, from its folder alone: report.json, report.png, and one HTML file for a colleague."""

from rft.metrics import mean_ci95
from rft.report.numbers import final_table, write_report

__all__ = ["final_table", "mean_ci95", "write_report"]
