"""One HTML page about a finished run: self-contained, safe to open whatever the images are called."""

from spice_dist.report.compare import write_comparison
from spice_dist.report.gallery import read_images
from spice_dist.report.page import PAGE_MB, write_report

__all__ = ["PAGE_MB", "read_images", "write_comparison", "write_report"]
