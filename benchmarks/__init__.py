"""Measurements: every rival and ours in the same run, in turns, as ratios."""
