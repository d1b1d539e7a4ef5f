"""Replacement of a checkpoint's entries, with a matching manifest."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from manic.checkpoint.manifest import MANIFEST, render


def seal(folder: Path) -> None:
    """Update the manifest to the files' current content."""
    path = folder / MANIFEST
    content = json.loads(path.read_bytes())
    content.pop("sha256")
    for name in content["files"]:
        whole = (folder / name).read_bytes()
        content["files"][name] = {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    path.write_bytes(render(content))


def saved(thing: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(thing, stream)
    return stream.getvalue()


def put(folder: Path, key: str, content: bytes) -> None:
    """Replace one entry of a checkpoint."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    found = [index for index in metadata.storage_data if index.fqn == key]
    assert found, key
    for index in found:
        where = metadata.storage_data[index]
        with (folder / where.relative_path).open("ab") as stream:
            where.offset, where.length = stream.tell(), len(content)
            stream.write(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
