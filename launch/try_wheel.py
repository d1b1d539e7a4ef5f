"""Run the README's first lines of Python with the installed manic, and see that it trains; for package.sh."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

import manic


def main(readme: Path, source: Path) -> None:
    assert source not in Path(str(manic.__file__)).parents, "this is the clone's manic, not the wheel's"
    match = re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert match is not None
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    names = {"torch": torch, "model": model, "steps": 10}
    exec(match[1], names)
    optimizer, scheduler = names["optimizer"], names["scheduler"]
    assert isinstance(optimizer, manic.Mechanic)
    losses = []
    for _ in range(10):
        loss = (model(torch.ones(3, 4)) - 1.0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()  # type: ignore[attr-defined]
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    print(f"manic {manic.__version__} from {manic.__file__}: S = {optimizer.scale.item():.3g} after 10 steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
