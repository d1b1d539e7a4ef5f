"""The file system bucket://, registered with fsspec: a disk without renames, like an object store."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Bucket(LocalFileSystem):
    """Files on a disk without atomic renames, like an object store."""

    protocol = "bucket"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        strip = super()._strip_protocol
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        return strip(str(path).removeprefix("bucket://"))


fsspec.register_implementation("bucket", Bucket, clobber=True)
