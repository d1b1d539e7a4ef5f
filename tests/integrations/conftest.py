"""The marker of the tests with real packages, and ``--write-frameworks``, which writes their outcomes into the docs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from manic.testing import shutdown
from support import frameworks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-frameworks", action="store_true", help="write the outcomes into docs/appendix/frameworks-tested.md"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "framework(name, promise, limit=None): a row of docs/appendix/frameworks-tested.md"
    )
    if config.getoption("--write-frameworks", default=False) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Table())


class _Table:
    def __init__(self) -> None:
        self.outcomes: dict[str, list[tuple[str, str]]] = defaultdict(list)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._add(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._add(report)

    def _add(self, report: Any) -> None:
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.outcome == "skipped" else ""
        self.outcomes[report.nodeid.partition("[")[0].rpartition("/")[2]].append((report.outcome, reason))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        try:
            frameworks.write(frameworks.rows_of(frameworks.promises(), self.outcomes))
        except ValueError as error:
            terminalreporter.write_line(str(error), red=True)
            return
        terminalreporter.write_line(f"wrote the table of {frameworks.PAGE.name}")


@pytest.fixture
def processes_of_its_own() -> Iterator[None]:
    """Processes of its own for a test: DeepSpeed keeps process groups in its modules, Accelerate one state."""
    shutdown()
    yield
    shutdown()


@pytest.fixture(scope="module")
def new_processes() -> Iterator[None]:
    """Processes of its own for a test module: frameworks keep state in their modules and in the environment."""
    shutdown()
    yield
    shutdown()
