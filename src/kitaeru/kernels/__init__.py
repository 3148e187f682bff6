"""One operation per file: reference and fast version side by side."""
