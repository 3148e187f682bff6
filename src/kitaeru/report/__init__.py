"""What happened, for people: live view, trackers, the page."""

from kitaeru.report.closing import print_samples, print_summary
from kitaeru.report.live import live_view
from kitaeru.report.page import write_page
from kitaeru.report.trackers import trackers

__all__ = ["live_view", "print_samples", "print_summary", "trackers", "write_page"]
