"""The Python blocks of the pages about single frameworks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def run_page(name: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a page's blocks one after the other, with what it takes for granted; returns all names that there are."""
    page = DOCS / f"{name}.md"
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
        exec(compile(block, f"{page.name}, block {index}", "exec"), names)
    return names
