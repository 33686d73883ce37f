"""The report as a page: one self-contained HTML file that needs no network."""

from iobs_onnx.report.page.comparison import Comparison
from iobs_onnx.report.page.render import render_comparison, render_report, write_page

__all__ = ["Comparison", "render_comparison", "render_report", "write_page"]
