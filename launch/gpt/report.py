"""Reports of a run on rank 0: a progress bar, metrics as JSON lines, TensorBoard events and a plot."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from manic.report import draw, read


class Report:
    """Progress bar, metrics and plot of a run.

    Args:
        steps: Steps of the whole run.
        done: Steps taken before this start.
        metrics: File to append JSON lines to; lines of steps after ``done`` are removed first.
        tensorboard: Folder for TensorBoard's events.
    """

    def __init__(self, steps: int, done: int, metrics: Path | None, tensorboard: Path | None) -> None:
        self._metrics = metrics
        self._bar: Any = None
        if importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, mininterval=1.0)
        self._events: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(tensorboard))
        if metrics is not None:
            metrics.parent.mkdir(parents=True, exist_ok=True)
            earlier = [record for record in read_records(metrics) if record["step"] <= done] if metrics.exists() else []
            # Replaced by a rename: a kill at this point must not lose the earlier records.
            temporary = metrics.with_name(f".{metrics.name}")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in earlier))
            temporary.replace(metrics)

    def advance(self) -> None:
        """Count a step."""
        if self._bar is not None:
            self._bar.update()

    def progress(self, what: str, done: int, total: int) -> None:
        """Show the progress of a checkpoint; called for every tensor, on any thread."""
        if self._bar is not None:
            share = f"{what} {100 * done // max(total, 1)}%"
            self._bar.set_description_str("" if done >= total else share, refresh=False)

    def record(self, record: dict[str, Any]) -> None:
        """Show and write the metrics of ``record["step"]``."""
        if self._metrics is not None:
            with self._metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")
        if self._events is not None:
            for name, value in record.items():
                self._events.add_scalar(name, value, record["step"])
        shown = {name: f"{record[name]:.4g}" for name in ("loss", "scale", "lr", "tokens_per_s") if name in record}
        if "eval_loss" in record:
            self.message(f"step {record['step']}: held-out loss {record['eval_loss']:.4f}")
        elif self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
        else:
            print(f"step {record['step']}", *(f"{name} {value}" for name, value in shown.items()), flush=True)

    def message(self, text: str) -> None:
        """Print ``text`` above the progress bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Close the bar, and plot the metrics if matplotlib is installed."""
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()
        if self._metrics is not None and importlib.util.find_spec("matplotlib") and read_records(self._metrics):
            run, pictures = read(self._metrics), [self._metrics.with_suffix(suffix) for suffix in (".png", ".html")]
            for picture in pictures:
                draw(run, picture)
            print("wrote", *pictures)


def read_records(metrics: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; incomplete lines are skipped."""
    records = []
    for line in metrics.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
