"""What happened, for people: live view, trackers, the page."""
