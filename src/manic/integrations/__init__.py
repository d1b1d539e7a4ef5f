"""What some frameworks need beyond an optimizer: each module imports its framework, and none is imported by manic."""
