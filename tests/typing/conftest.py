"""The cases are read by a type checker alone."""

collect_ignore = ["holds.py"]
