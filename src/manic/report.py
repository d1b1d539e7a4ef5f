"""A picture of a run: loss, S and S * lr over its steps, with a warning where S does not settle.

It reads metrics as JSON lines, or a folder of checkpoints, and needs matplotlib to draw. It knows no model.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LARGEST_CHANGE", "Run", "draw", "read", "warnings"]

LARGEST_CHANGE = 3.0
"""By how much S may change in the second half of a run without a warning: its largest value over its smallest."""

Series = dict[str, dict[int, float]]
"""By name, a value for each step."""

_LOSS = re.compile(r"loss")
_SCALE = re.compile(r"(^|/)scale(/\d+)?$")
_LR = re.compile(r"(^|/)effective_lr(/\d+)?$")
_SKIPPED = re.compile(r"(^|/)nonfinite_steps$")

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100% }}
table {{ border-collapse: collapse }}
td, th {{ padding: 0.2rem 1rem 0.2rem 0; text-align: left; border-bottom: 1px solid #ddd }}
.warning {{ background: #fff3cd; padding: 0.5rem 1rem; border-left: 4px solid #e0a800 }}
</style>
<h1>{title}</h1>
{warnings}
<img alt="loss, S and S times the learning rate over the steps" src="data:image/png;base64,{image}">
<table>
<tr><th></th><th>first</th><th>last</th><th>at step</th></tr>
{rows}
</table>
</html>
"""


@dataclass(frozen=True)
class Run:
    """What is known of a run, by step."""

    name: str
    losses: Series
    """Every value with "loss" in its name."""
    scales: Series
    """S, or that of each param group: ``scale``, ``scale/<i>``."""
    lrs: Series
    """S * lr of each param group: ``effective_lr/<i>``."""
    left_out: int
    """How many steps were left out, or not learned from, as far as the metrics say it."""


def read(source: str | os.PathLike[str]) -> Run:
    """Read a run.

    Args:
        source: A file of JSON lines, each with ``step`` and metrics, as ``optimizer.metrics(to_host=True)`` names them,
            with or without a prefix that ends with "/"; where there is an ``effective_lr/<i>``, S has its prefix. Lines
            that are incomplete are skipped, and the last value of a step counts. Or a folder of checkpoints: a local
            path or a URL.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if there is no S in it.
    """
    name = os.fspath(source)
    records = _lines(Path(name)) if Path(name).is_file() else _checkpoints(name)
    values: Series = {}
    for record in records:
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                values.setdefault(key, {})[int(record["step"])] = float(value)
    scales, lrs = _matching(values, _SCALE), _matching(values, _LR)
    if lrs:  # the prefix of Mechanic's own metrics: a loss scaler may log a scale, too
        prefixes = {_LR.sub(r"\1", each) for each in lrs}
        scales = {each: series for each, series in scales.items() if _SCALE.sub(r"\1", each) in prefixes}
    skipped = [count for series in _matching(values, _SKIPPED).values() for count in series.values()]
    run = Run(
        name,
        _matching(values, _LOSS),
        scales,
        lrs,
        int(max(filter(math.isfinite, skipped), default=0)),
    )
    if not run.scales:
        raise ValueError(
            f"{name} has no S: expected JSON lines with 'step' and 'scale' (or 'scale/0', ...), as "
            "optimizer.metrics(to_host=True) returns them, or checkpoints of a Mechanic with one of manic's tuners"
        )
    return run


def _matching(values: Series, pattern: re.Pattern[str]) -> Series:
    return {name: dict(sorted(series.items())) for name, series in values.items() if pattern.search(name)}


def _lines(path: Path) -> Iterable[Mapping[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict):
            continue
        step = record.get("step")
        if isinstance(step, int) or (isinstance(step, float) and step.is_integer()):
            yield record


def _checkpoints(url: str) -> Iterable[Mapping[str, Any]]:
    from manic.checkpoint.directory import Directory
    from manic.checkpoint.inspect import inspect

    directory = Directory(url)
    steps = directory.steps()
    if not steps:
        raise FileNotFoundError(f"{url} is neither a file of metrics nor a folder of checkpoints")
    for step in steps:
        found = inspect(directory.path(step), "off")
        tuners, groups = found.get("tuners", []), found.get("groups", [])
        names = ["scale"] if len(tuners) == 1 else [f"scale/{index}" for index in range(len(tuners))]
        yield {
            "step": step,
            **{name: tuner["scale"] for name, tuner in zip(names, tuners) if not math.isnan(tuner["scale"])},
            **{f"effective_lr/{i}": group["effective_lr"] for i, group in enumerate(groups) if "effective_lr" in group},
            **({"nonfinite_steps": max(each["nonfinite_steps"] for each in tuners)} if tuners else {}),
        }


def warnings(run: Run) -> list[str]:
    """What a person should look at, in sentences."""
    found = []
    for name, series in run.scales.items():
        last = max(series)
        late = [value for step, value in series.items() if 2 * step >= last and value != 0.0]
        if not late:
            found.append(f"{name} is 0 in the second half of the run: nothing has moved.")
        elif not all(map(math.isfinite, late)):
            found.append(f"{name} is not finite.")
        elif max(late) > LARGEST_CHANGE * min(late):
            found.append(
                f"{name} does not settle: in the second half of the run it is between {min(late):.3g} and "
                f"{max(late):.3g}. Compare the loss with a run at half and at twice the last S * lr."
            )
    for name, series in run.losses.items():
        if not math.isfinite(list(series.values())[-1]):
            found.append(f"{name} is not finite at the end.")
    if run.left_out:
        found.append(f"{run.left_out} step(s) were left out or not learned from: their gradients were not finite.")
    return found


def draw(run: Run, file: str | os.PathLike[str]) -> None:
    """Draw a run.

    Args:
        run: From :func:`read`.
        file: To write: ``.html``, one file that needs no other, with the warnings in it; or an image, of a format that
            matplotlib knows: ``.png``, ``.svg``, ``.pdf``.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if the file's name has no suffix.
    """
    path = Path(file)
    if not path.suffix:
        raise ValueError(f"{file} has no suffix: expected .html, .png, .svg, .pdf, or another format of matplotlib")
    if path.suffix.lower() not in (".html", ".htm"):
        _figure(run, path)
        return
    image = io.BytesIO()
    _figure(run, image)
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{values[0]:.6g}</td><td>{values[-1]:.6g}</td><td>{max(series)}</td></tr>"
        for part in (run.losses, run.scales, run.lrs)
        for name, series in part.items()
        if (values := list(series.values()))
    ]
    page = _PAGE.format(
        title=html.escape(run.name),
        warnings="\n".join(f'<p class="warning">{html.escape(each)}</p>' for each in warnings(run)),
        image=base64.b64encode(image.getvalue()).decode(),
        rows="\n".join(rows),
    )
    path.write_text(page, encoding="utf-8")


def _figure(run: Run, file: Path | io.BytesIO) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a screen
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a picture of a run needs matplotlib: pip install matplotlib") from error

    panels: list[tuple[str, Series, bool]] = [
        ("loss", run.losses, False), ("S", run.scales, True), ("S * lr", run.lrs, True),
    ]  # fmt: skip
    panels = [panel for panel in panels if panel[1]]
    figure = Figure(figsize=(8, 2.2 * len(panels) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, series, is_logarithmic) in zip(axes, panels):
        for name, values in series.items():
            is_sparse = 4 * len(values) < max(map(len, series.values()))  # a held-out loss among training losses
            axis.plot(list(values), list(values.values()), "o-" if is_sparse or len(values) < 3 else "-", label=name)
        if is_logarithmic and any(value > 0.0 for values in series.values() for value in values.values()):
            axis.set_yscale("log", nonpositive="mask")  # a schedule may end at 0
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(loc="best", fontsize="small")
    axes[-1].set_xlabel("step")
    write: Callable[..., Any] = figure.savefig
    write(file, dpi=120)
