"""What some frameworks need beyond an optimizer, and what logs S and the effective learning rate in them.

Each module needs the framework of its name, and is imported by itself: ``from manic.integrations.transformers import
MechanicCallback``.
"""
