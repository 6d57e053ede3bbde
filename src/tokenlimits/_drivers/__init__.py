"""What sends calls: each file has its sync and its async half side by side."""
