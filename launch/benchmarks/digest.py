"""Digests of code, so that results of other code do not count."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

__all__ = ["code_digest", "package_version"]


@cache
def code_digest(*modules: str) -> str:
    """Eight hexadecimal digits of the modules' code, without comments, docstrings and format."""
    found = hashlib.sha256()
    for module in modules:
        spec = find_spec(module)
        assert spec is not None, module
        assert spec.origin is not None, module
        found.update(_code(Path(spec.origin).read_text()).encode())
    return found.hexdigest()[:8]


def _code(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def package_version(name: str) -> str:
    """The version of an installed distribution, or ``""``."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
