"""Shared by the tests: models in every layout, runs, faults, jobs and reference values."""
