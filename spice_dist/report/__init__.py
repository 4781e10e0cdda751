"""One HTML page about a finished run: self-contained, without scripts, safe to open whatever the images are called."""

from spice_dist.report.gallery import read_images
from spice_dist.report.page import write_report

__all__ = ["read_images", "write_report"]
