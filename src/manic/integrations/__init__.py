"""Callbacks and functions that log S and the effective learning rate in frameworks.

Each module needs the framework of its name, and is imported by itself: ``from manic.integrations.transformers import
MechanicCallback``.
"""
