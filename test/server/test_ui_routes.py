"""The files of the page at ``/ui``: what they name is there, and nothing of them needs what the
Content-Security-Policy forbids."""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.server.state import State
from crosspool.server.ui_routes import FOLDER
from support.http_app import Answer, call, http_app

FILES = sorted(FOLDER.iterdir())
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
LARGEST = 100_000
"""Bytes of all files together, at most."""


def ask(path: str, method: str = "GET") -> Answer:
    """The answer of a server that does not serve yet, and that lets nobody in without a key."""
    deployment = Deployment(
        models={0: ModelConfig(name="a", path="/nowhere")},
        next_model=1,
        kv_pool_devices=(Device("cpu"),),
        weight_pool_devices=(Device("cpu"),),
        kv_pool_bytes=1,
        weight_pool_bytes=1,
        sglang={"api_key": "ordinary", "admin_api_key": "admin"},
    )
    scheduler: Any = None
    return asyncio.run(call(http_app(deployment, State(), scheduler), method, path))


class Page(HTMLParser):
    """Notes elements and attributes that refer to files, and those that a strict policy forbids."""

    def __init__(self) -> None:
        super().__init__()
        self.named: set[str] = set()
        self.forbidden: list[Any] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href") and value and not value.startswith("#"):
                self.named.add(value)
            if name == "id" and value:
                self.ids.append(value)
            if name == "style" or name.startswith("on"):
                self.forbidden.append((tag, name))
        if tag == "style" or (tag == "script" and "src" not in dict(attrs)):
            self.forbidden.append(tag)


@pytest.fixture(scope="module")
def page() -> Page:
    made = Page()
    made.feed((FOLDER / "index.html").read_text())
    return made


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.name))
def test_a_file_comes_without_a_key_and_under_a_strict_policy(file: Any) -> None:
    path = "/ui" if file.name == "index.html" else f"/ui/{file.name}"
    answer = ask(path)
    assert (answer.status, answer.body) == (200, file.read_bytes())
    assert answer.headers["content-type"].split(";")[0] == TYPES[file.suffix[1:]]
    policy = answer.headers["content-security-policy"].split("; ")
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert ask(path, "HEAD").status == 200


@pytest.mark.parametrize(
    "path", ["/ui/", "/ui/nothing.js", "/ui/index.html", "/ui/../app.py", "/ui/a/b", "/ui/%2e%2e"]
)
def test_no_other_path_has_a_file(path: str) -> None:
    answer = ask(path)
    assert (answer.status, answer.content["error"]["code"]) == (404, "no_such_route")


def test_the_page_names_files_that_there_are(page: Page) -> None:
    assert page.named == {"ui/icon.svg", "ui/style.css", "ui/main.js"}
    assert not page.forbidden
    imported = {"main.js"}
    for file in FILES:
        if file.suffix == ".js":
            found = set(re.findall(r'^import .*?"\./(.+?)";$', file.read_text(), re.M))
            assert found <= {other.name for other in FILES}, file.name
            imported |= found
    assert imported == {file.name for file in FILES if file.suffix == ".js"}
    assert sum(len(file.read_bytes()) for file in FILES) < LARGEST


def test_scripts_name_elements_that_there_are(page: Page) -> None:
    assert len(set(page.ids)) == len(page.ids)
    for file in FILES:
        if file.suffix == ".js":
            assert set(re.findall(r'byId\("([^"]+)"\)', file.read_text())) <= set(page.ids)


def test_nothing_comes_from_elsewhere() -> None:
    for file in FILES:
        urls = re.findall(r"\w+://[^\s\"'<>)]+", file.read_text())
        assert set(urls) <= {"http://www.w3.org/2000/svg"}, file.name


def test_no_script_makes_code_or_html_of_text() -> None:
    for file in FILES:
        if file.suffix == ".js":
            text = file.read_text()
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|\beval\b|Function\(", text)
