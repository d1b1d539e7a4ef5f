"""The Python blocks of the pages about frameworks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def run_section(title: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a section's blocks one after the other, with what it takes for granted; returns all names that there are."""
    text = "".join(f"\n{page.read_text()}" for page in sorted(DOCS.glob("frameworks*.md")))
    _, rest = text.split(f"\n## {title}\n")
    section, _, _ = rest.partition("\n## ")
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL)):
        exec(compile(block, f"{title}, block {index}", "exec"), names)
    return names
