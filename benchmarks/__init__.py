"""Benchmarks: tokenlimits and each alternative in the same run, in turns, as ratios."""
