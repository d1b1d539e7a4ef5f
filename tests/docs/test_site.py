"""The pages as a site, in a real browser: each opens without an error, no link is broken, and search finds things."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

for package in ("sphinx", "myst_parser", "furo", "sphinx_copybutton", "selenium"):
    pytest.importorskip(package, reason=f"{package} is missing: pip install -e '.[site]' -c constraints.txt")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("Chromium or its driver is missing: apt-get install chromium chromium-driver", allow_module_level=True)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-b", "html"]
    done = subprocess.run([*command, "-d", site / "doctrees", ROOT / "docs", site / "html"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return site / "html"


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    # Names other than the local address do not resolve: what a page loads from the network is an error in the console.
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900", offline):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(60)  # seconds that an element may take to appear, on a busy machine
    yield driver
    driver.quit()


def pages(folder: Path) -> list[str]:
    return sorted(str(page.relative_to(folder)) for page in folder.rglob("*.html") if "_" not in page.parts[0][0])


def errors(browser: Any) -> list[str]:
    """What the console has as errors since the last call: of scripts, and of files that were not found."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_every_page_opens_without_an_error_and_its_links_lead_somewhere(
    folder: Path, address: str, browser: Any
) -> None:
    expected = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}
    assert expected <= {Path(page) for page in pages(folder)}
    targets: dict[str, set[str]] = {}
    for page in pages(folder):
        browser.get(address + page)
        assert page == "search.html" or browser.find_elements("css selector", "h1"), page
        assert not errors(browser), page
        sizes = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
        assert all(sizes), page
        found = "return [...document.querySelectorAll('a[href]')].map(link => link.getAttribute('href'))"
        targets[page] = {urljoin(address + page, target) for target in browser.execute_script(found)}
        identifiers = browser.execute_script("return [...document.querySelectorAll('[id]')].map(each => each.id)")
        targets[page] -= {f"{address}{page}#{name}" for name in identifiers} | {f"{address}{page}#"}
    broken = [
        f"{page}: {target}"
        for page, found in targets.items()
        for target in found
        if target.startswith(address) and not leads_somewhere(folder, target.removeprefix(address))
    ]
    assert not broken, "\n".join(broken)


def leads_somewhere(folder: Path, target: str) -> bool:
    path, anchor = urldefrag(target)
    file = folder / (path or "index.html")
    return file.is_file() and (not anchor or f'id="{anchor}"' in file.read_text())


def test_search_finds_the_checkpointer(address: str, browser: Any) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get(address + "search.html?q=Checkpointer")
    results = browser.find_elements("css selector", "ul.search li a")
    found = {urldefrag(link.get_attribute("href"))[0].removeprefix(address) for link in results}
    assert {"reference.html", "checkpoints.html"} & found
    browser.find_element("css selector", "ul.search li a").click()
    WebDriverWait(browser, 60).until(lambda page: "Checkpointer" in page.find_element("css selector", "body").text)
    assert not errors(browser)
