"""Intervals, verdicts, and the files that hold them."""
