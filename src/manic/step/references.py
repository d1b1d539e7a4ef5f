"""The move of references after a step: those that follow x go a share of what is left of the way.

It knows captures and shares, and no tuner. What a reference is made of is in optimizer/references.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manic.step.capture import Capture
from manic.step.chunks import Scratch
from manic.step.kernels import working_dtype
from manic.step.position import place_of

__all__ = ["follow"]


def follow(captures: Sequence[Capture], shares: Sequence[Tensor | None], *, is_finite: bool) -> None:
    """Move each reference by its share towards x. A parameter that keeps its place keeps its references.

    If this is interrupted, some references have moved and others have not, and x stays where it is.

    Args:
        captures: Of a step that is committed.
        shares: 0-dim, in [0, 1], of each reference; ``None``: it stays.
        is_finite: Whether x is known to be finite. If not, a reference with a share of 0 takes in no nan of x.
    """
    if all(share is None for share in shares):
        return
    moved = [capture for capture in captures if capture.first.has_state and not capture.first.keeps_place]
    scratch, known = Scratch(), dict[tuple[torch.device, torch.dtype], list[Tensor | None]]()
    try:
        for capture in moved:
            x = capture.first.x
            key = x.device, working_dtype(x)
            if key not in known:
                known[key] = [None if share is None else share.to(*key) for share in shares]
            _follow(capture, known[key], scratch, is_finite)
    except BaseException:
        for capture in moved if shares[0] is not None else ():
            _keep_place(capture)
        raise


def _follow(capture: Capture, shares: Sequence[Tensor | None], scratch: Scratch, is_finite: bool) -> None:
    shares_of = {name: share for name, share in zip(capture.references, shares) if share is not None}
    is_stored = capture.is_stored
    names = list(dict.fromkeys([*(("x_ref", "delta") if is_stored else ("x",)), *shares_of]))
    written = [index for index, name in enumerate(names) if name in shares_of or name == "delta"]
    for row in capture.of_sample(*names, written=written, in_place=not is_stored):
        piece = dict(zip(names, row))
        place = place_of(piece, scratch)
        for name, share in shares_of.items():
            reference = piece[name]
            reference.lerp_(place if is_finite else torch.where(share > 0, place, reference), share)
            if is_stored and name == "x_ref":
                torch.sub(place, reference, out=piece["delta"])
                # Rounded: at a share of 1, the other references are exactly where x will be taken to be.
                place = place_of(piece, scratch)


def _keep_place(capture: Capture) -> None:
    """Let x_ref + Delta be x after an error between the moves of both; what x lost to rounding stays where it can."""
    for x, x_ref, delta in capture.pieces("x", "x_ref", "delta", written=(2,)):
        if delta is not None:
            fits = (x_ref + delta).to(x.dtype) == x
            delta.copy_(torch.where(fits, delta, x.to(delta.dtype) - x_ref))
