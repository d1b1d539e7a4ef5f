"""The promises of tests/integrations, by its markers, and the table of how they went: appendix/frameworks-tested.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "appendix" / "frameworks-tested.md"
BEGIN, END = "<!-- Written by pytest --write-frameworks -->\n", "<!-- End of what pytest writes -->\n"
HEADER = "| | version | what | |\n|---|---|---|---|\n"

# The package of a framework, where it is not the first word of its name in lower case.
_PACKAGES = {"hydra": "hydra-core", "lightningcli": "lightning"}


@dataclass(frozen=True)
class Promise:
    """A marker of a test: ``@pytest.mark.framework(framework, what, limit=...)``."""

    test: str
    framework: str
    what: str
    limit: str | None


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    framework: str
    version: str
    what: str
    outcome: str

    def __str__(self) -> str:
        return f"| {self.framework} | {self.version} | {self.what} | {self.outcome} |"


def promises(folder: Path = ROOT / "tests" / "integrations") -> list[Promise]:
    """The markers of all tests in ``folder``, read from the source: the packages need not be there."""
    return [each for file in sorted(folder.glob("test_*.py")) for each in _of_file(file)]


def _of_file(file: Path) -> Iterator[Promise]:
    for node in ast.parse(file.read_text()).body:
        body = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        for test in (each for each in body if isinstance(each, ast.FunctionDef)):
            for decorator in test.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.framework":
                    framework, what = (ast.literal_eval(each) for each in decorator.args)
                    options = {each.arg: ast.literal_eval(each.value) for each in decorator.keywords}
                    assert options.keys() <= {"limit"}, f"{file.name}: a framework marker has no option {options}"
                    yield Promise(f"{file.name}::{prefix}{test.name}", framework, what, options.get("limit"))


def rows_of(promised: Sequence[Promise], outcomes: Mapping[str, Sequence[tuple[str, str]]]) -> list[Row]:
    """The table's rows.

    Args:
        promised: The markers.
        outcomes: By test, or by file where it was skipped as a whole: each case's outcome, and the reason of a skip.

    Raises:
        ValueError: if a test has failed, or was not run.
    """
    found: dict[tuple[str, str, str | None], list[tuple[str, str]]] = {}
    for each in promised:
        cases = outcomes.get(each.test, outcomes.get(each.test.partition("::")[0], ()))
        if not cases or any(outcome == "failed" for outcome, _ in cases):
            raise ValueError(f"{each.test} {'has failed' if cases else 'was not run'}: the table is not written")
        found.setdefault((each.framework, each.what, each.limit), []).extend(cases)
    return [
        Row(framework, _version(framework), what, _outcome(limit, cases))
        for (framework, what, limit), cases in sorted(found.items(), key=lambda item: item[0][0].lower())
    ]


def _outcome(limit: str | None, cases: Sequence[tuple[str, str]]) -> str:
    skipped = sorted({reason for outcome, reason in cases if outcome == "skipped"})
    passed = any(outcome == "passed" for outcome, _ in cases)
    said = ([f"limit: {limit}" if limit else "works"] if passed else []) + [f"not run: {each}" for each in skipped]
    return "; ".join(said)


def _version(framework: str) -> str:
    name = framework.split()[0].lower()
    try:
        return version(_PACKAGES.get(name, name))
    except PackageNotFoundError:
        return "none"


def write(rows: Sequence[Row]) -> None:
    """Put the table into the page."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}{HEADER}{''.join(f'{row}' + chr(10) for row in rows)}{END}{after}")


def read() -> list[Row]:
    """The table in the page."""
    table = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    assert table.startswith(HEADER), f"{PAGE.name} has another table than {__name__} writes"
    lines = table.removeprefix(HEADER).splitlines()
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]
