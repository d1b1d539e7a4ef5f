"""python -m manic.inspect DIR: describe a checkpoint from its files alone.

Follows the naming of DCP and Checkpointer, builds no model, and reads no tensors except those of param groups.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from manic.checkpoint.directory import Directory
from manic.checkpoint.files import Files
from manic.checkpoint.flat_state import split
from manic.checkpoint.manifest import MANIFEST, DamagedCheckpointError, Manifest, Verify
from manic.checkpoint.safe_pickle import SafePlanner
from manic.tuners.registry import identify, name_of
from manic.tuners.state import HEADER, SCHEMA

__all__ = ["inspect", "main"]

# Settings of a param group to report; flat as "param_groups.<name>.lr", nested as "param_groups.<i>.lr".
_SETTING = re.compile(r"(?P<group>.*param_groups\..+)\.(?P<setting>lr|initial_lr|weight_decay|mechanic)")
_STATE = re.compile(r"(^|.*\.)state\.(?P<path>.+)")


def inspect(path: str | os.PathLike[str], verify: Verify = "full") -> dict[str, Any]:
    """Describe one checkpoint.

    Args:
        path: The checkpoint's folder, a local path or a URL. Also accepts checkpoints that
            ``torch.distributed.checkpoint`` wrote without :class:`~manic.checkpoint.Checkpointer`; they have no
            manifest to check against.
        verify: How much to check: every byte of every file (``"full"``, the default), every file's length
            (``"size"``), or nothing (``"off"``).

    Returns:
        Data that JSON can hold: ``path``; ``integrity``, with ``verified`` (``"full"``, ``"size"``, ``"off"`` or
        ``"no manifest"``) and ``problems``, a list of texts; ``manifest`` without its files, or ``None``; ``files``,
        their number; and ``bytes``. Without problems also ``tensors``, by purpose: number, elements, bytes and dtypes;
        ``tuners``, one for each S, with ``scale``, ``updates``, ``nonfinite_steps``, ``variant`` and ``fields``;
        ``groups``, one for each distinct set of settings: ``number`` of parameters or groups that share it, ``lr``,
        ``effective_lr`` and so on.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if a newer manic wrote it.
    """
    files = Files(path)
    try:
        names = {os.path.basename(name) for name in files.fs.ls(files.root, detail=False)}
    except (FileNotFoundError, NotADirectoryError):
        names = set()
    if not names & {".metadata", MANIFEST}:
        raise FileNotFoundError(
            f"{os.fspath(path)} is not a checkpoint: no .metadata and no {MANIFEST}. For a file of metrics "
            "pass --plot FILE"
        )
    verified: str = verify
    problems: list[str] = []
    manifest = None
    if MANIFEST not in names:
        verified = "no manifest"
    else:
        try:
            manifest = Manifest.read(files)
            problems = [] if verify == "off" else manifest.problems(files, verify, manifest.files)
        except DamagedCheckpointError as error:
            problems = [str(error)]
    found: dict[str, Any] = {
        "path": os.fspath(path),
        "integrity": {"verified": verified, "problems": problems},
        "manifest": manifest and {key: value for key, value in vars(manifest).items() if key != "files"},
        "files": len(names),
        "bytes": sum(files.fs.size(f"{files.root}/{name}") or 0 for name in names),
    }
    # Do not unpickle files that are known to differ from what was written.
    if not problems:
        try:
            found |= _content(files)
        except CheckpointException as error:
            ((reason, _),) = error.failures.values()  # one rank reads
            problems.append(f"cannot be read: {reason}")
        except Exception as error:  # a damaged file without a manifest may raise any type
            problems.append(f"cannot be read: {error!r}")
    return found


def _content(files: Files) -> dict[str, Any]:
    metadata = files.reader().read_metadata().state_dict_metadata
    parameters = {key.removeprefix("model.") for key in metadata if key.startswith("model.")}
    tensors: dict[str, dict[str, Any]] = defaultdict(lambda: {"number": 0, "elements": 0, "bytes": 0, "dtypes": []})
    settings: dict[str, Any] = {}
    for key, entry in metadata.items():
        if _SETTING.fullmatch(key):
            settings[key] = _placeholder(entry)
        if isinstance(entry, TensorStorageMetadata):
            kind = tensors[_kind(key, parameters)]
            elements, dtype = math.prod(entry.size), entry.properties.dtype
            kind["number"] += 1
            kind["elements"] += elements
            kind["bytes"] += elements * dtype.itemsize
            name = str(dtype).removeprefix("torch.")
            if name not in kind["dtypes"]:
                kind["dtypes"].append(name)
    if settings:
        planner = SafePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(settings, storage_reader=files.reader(), planner=planner, no_dist=True)
    return {"tensors": dict(sorted(tensors.items()))} | _groups(settings)


def _placeholder(entry: TensorStorageMetadata | BytesStorageMetadata) -> Any:
    if isinstance(entry, TensorStorageMetadata):
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
    return None


def _kind(key: str, parameters: set[str]) -> str:
    """A tensor's purpose: model, a kind of optimizer state, or the first part of its name."""
    match = _STATE.fullmatch(key)
    if match and not key.startswith("model."):
        name, state = split(match["path"], parameters)
        return f"optimizer {state or name.rsplit('.', 1)[-1]}"
    return "settings" if "param_groups." in key else key.split(".", 1)[0]


def _groups(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The distinct tuners, and the distinct param groups with the index of their tuner."""
    by_group: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in settings.items():
        match = cast(re.Match[str], _SETTING.fullmatch(key))
        by_group[match["group"]][match["setting"]] = value
    tuners: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    for group in by_group.values():
        line = {key: float(value) for key, value in group.items() if key != "mechanic" and value is not None}
        if "mechanic" in group:
            tuner = _tuner(group["mechanic"])
            if tuner not in tuners:
                tuners.append(tuner)
            line["tuner"] = tuners.index(tuner)
            if "lr" in line and not math.isnan(tuner["scale"]):
                line["effective_lr"] = tuner["scale"] * line["lr"]
        same = next((each for each in groups if {**each, "number": 0} == {**line, "number": 0}), None)
        if same is None:
            groups.append({"number": 1, **line})
        else:
            same["number"] += 1
    return {"tuners": tuners, "groups": groups}


def _tuner(state: torch.Tensor) -> dict[str, Any]:
    """A saved tuner by the names of its rows; see :mod:`manic.tuners.state`."""
    rows = state.tolist()
    if rows[0][0] != SCHEMA:
        return {"scale": math.nan, "updates": 0, "nonfinite_steps": 0, "variant": "of another version", "fields": {}}
    header = {name: row[0] for name, row in zip(HEADER, rows)}
    tuner = identify(int(header["tuner"]))
    known = () if tuner is None else tuner[0].fields
    names = [*known, *(f"row {index}" for index in range(len(HEADER) + len(known), len(rows)))]
    fields = dict(zip(names, rows[len(HEADER) :]))
    return {
        "scale": sum(fields["s"]) if "s" in fields else math.nan,
        "updates": max(0, int(header["updates"])),
        "nonfinite_steps": int(header["nonfinite"]),
        "variant": name_of(int(header["tuner"])),
        "fields": fields,
    }


def _describe(found: Mapping[str, Any]) -> str:
    manifest, integrity = found["manifest"], found["integrity"]
    lines = [found["path"]]

    def line(name: str, text: str) -> None:
        lines.append(f"  {name:<11}{text}")

    if manifest:
        line("step", f"{manifest['step']}, saved {manifest['time']} in {manifest['seconds']:.2f} s")
        line("written by", f"manic {manifest['manic']}, torch {manifest['torch']}, on {manifest['world_size']} rank(s)")
        line("layout", "; ".join(f"{count} x {what}" for what, count in manifest["layout"].items()))
    line("files", f"{found['files']}, {_size(found['bytes'])}")
    line("integrity", _verdict(integrity))
    for index, tuner in enumerate(found.get("tuners", [])):
        line("tuner", f"{index}: scale {_scale(tuner)} after {tuner['updates']} updates, variant {tuner['variant']}")
        for name, row in tuner["fields"].items():
            line("", f"{name:<18}" + "  ".join(f"{value:.7g}" for value in row))
    for group in found.get("groups", []):
        values = ", ".join(
            f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in group.items()
            if key != "number"
        )
        line("group", f"{group['number']} parameter(s) or group(s): {values}")
    for kind, entry in found.get("tensors", {}).items():
        line("tensors", f"{kind}: {entry['number']} of {', '.join(entry['dtypes'])}, {_size(entry['bytes'])}")
    return "\n".join(lines)


def _scale(tuner: Mapping[str, Any]) -> str:
    """S in words: of a tuner that manic does not know, nobody does."""
    return "unknown" if math.isnan(tuner["scale"]) else f"{tuner['scale']:.6g}"


def _row(found: Mapping[str, Any]) -> str:
    """One checkpoint of several as one line."""
    manifest = found["manifest"]
    scales = ", ".join(map(_scale, found.get("tuners", []))) or "-"
    when = f"{manifest['time']}  {manifest['world_size']} rank(s)" if manifest else "-"
    return f"{found['path']}  {when}  {_size(found['bytes'])}  scale {scales}  {_verdict(found['integrity'])}"


def _verdict(integrity: Mapping[str, Any]) -> str:
    if integrity["problems"]:
        return "DAMAGED: " + "; ".join(integrity["problems"])
    return {
        "full": "every byte is as written",
        "size": "all files exist with the length written; their content was not checked",
        "off": "not checked",
        "no manifest": f"unknown: there is no {MANIFEST}",
    }[integrity["verified"]]


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _inspect_one_of_many(path: str, verify: Verify) -> dict[str, Any]:
    """As :func:`inspect`, but report an empty folder as a damaged checkpoint."""
    try:
        return inspect(path, verify)
    except FileNotFoundError as error:
        integrity = {"verified": verify, "problems": [str(error)]}
        return {"path": path, "integrity": integrity, "manifest": None, "files": 0, "bytes": 0}


def _draw(source: str, file: str) -> int:
    from manic import report

    try:
        run = report.read(source)
        report.draw(run, file)
    except (FileNotFoundError, ValueError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join((f"wrote {file}", *(f"warning: {each}" for each in report.warnings(run)))))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 0 if no checkpoint is damaged, 1 if one is, 2 if there is none or its format is newer.

    With ``--plot`` it is 0 if a run was drawn, and 2 if there is none.
    """
    parser = argparse.ArgumentParser(
        prog="python -m manic.inspect", description="Describe a checkpoint from its files alone, or draw a run."
    )
    parser.add_argument(
        "directory", metavar="DIR",
        help="a checkpoint, or a directory of checkpoints: a local path or a URL; with --plot also a file of metrics",
    )  # fmt: skip
    parser.add_argument(
        "--plot", metavar="FILE",
        help="draw loss, S and S * lr over the steps to FILE (.html, .png, .svg or .pdf), and print warnings; DIR is a "
        "directory of checkpoints, or a file of metrics as JSON lines",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verify", choices=("full", "size", "off"), default="full", help="how much to check")
    options = parser.parse_args(arguments)
    if options.plot:
        return _draw(options.directory, options.plot)
    try:
        directory = Directory(options.directory)
        paths = [directory.path(step) for step in directory.steps()]
        found = [_inspect_one_of_many(path, options.verify) for path in paths] or [
            inspect(options.directory, options.verify)
        ]
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found if paths else found[0], indent=1))
    else:
        print("\n".join(map(_row, found)) if paths else _describe(found[0]))
    return 1 if any(each["integrity"]["problems"] for each in found) else 0
