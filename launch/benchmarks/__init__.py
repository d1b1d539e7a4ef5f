"""The benchmarks of launch/benchmark.py: one module for each subcommand, and shared ones."""
