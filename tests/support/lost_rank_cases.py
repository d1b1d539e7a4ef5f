"""Combinations of layouts, faults and lost ranks: all that are tested, and those of the default suite."""

from __future__ import annotations

from support.lost_ranks import FAULTS

LAYOUTS = [
    *((layout, world_size) for layout in ("single", "ddp", "fsdp2", "fsdp1-orig", "zero1") for world_size in (2, 4)),
    ("hsdp", 4), ("tp+fsdp2", 4),
]  # fmt: skip
MATRIX = [(fault, *layout, lost) for fault in FAULTS for layout in LAYOUTS for lost in ("first", "last")]
# Every fault and every layout at least once, where that is fast or necessary.
SHORT = [
    ("killed before its first step", "fsdp2", 2, "last"),
    ("killed before its backward", "ddp", 2, "last"),
    ("killed while others are in the all_reduce", "tp+fsdp2", 4, "first"),
    ("killed after it joined the all_reduce", "fsdp1-orig", 2, "last"),
    ("stopped before its backward", "hsdp", 4, "last"),
    ("stopped while others are in the all_reduce", "fsdp2", 2, "first"),
    ("exits before its step", "single", 2, "first"),
    ("raises before its step", "zero1", 2, "last"),
]
