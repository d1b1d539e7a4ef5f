"""What launch/benchmark.py measures: a module for each sub-command, and what they share."""
