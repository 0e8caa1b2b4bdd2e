"""The page at ``/ui`` in a real browser: before a real server, and before one that tells of a
hundred models."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.server.state import State
from support.browser import Browser
from support.fleet import FLAGS
from support.http_app import http_app
from support.large_fleet import LargeFleet
from support.served_app import served
from support.server import TINY_MODELS, Server

WIDTHS = {360: 740, 800: 1000, 1400: 900}
THEMES = ("light", "dark")
SERIOUS = ("serious", "critical")
MODEL = TINY_MODELS[0]
KEY = "the key of the admin"
HOSTILE = "<img src=x onerror=document.title='hostile'>"
ROWS = "document.querySelectorAll('#models tr').length"
AXE = """return axe.run(document, {resultTypes: ["violations"]}).then(({violations}) =>
    violations.map(({id, impact, nodes}) => [id, impact, nodes.map((node) => node.html)]))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.close()


@pytest.fixture(scope="module")
def keyed_server(packed: Path) -> Iterator[Server]:
    """Serves the three bundled models, which can sleep, to those who have the key."""
    flags = ["--admin-api-key", KEY, "--packed-cache-dir", str(packed)]
    with Server([*FLAGS, *flags]) as running:
        yield running


@pytest.fixture
def page(keyed_server: Server, browser: Browser) -> Iterator[Browser]:
    """The server's page. Its console has no message in the end."""
    enter(browser, keyed_server.url, len(TINY_MODELS))
    yield browser
    assert browser.messages() == []


@contextlib.contextmanager
def large_fleet(admin_api_key: str | None) -> Iterator[str]:
    """The address of a server with a hundred models, and without anything behind it."""
    names = [HOSTILE, *(f"org/model-{number:02}" for number in range(99))]
    deployment = Deployment(
        models={n: ModelConfig(name=name, path="/nowhere") for n, name in enumerate(names)},
        next_model=len(names),
        kv_pool_devices=(Device("cpu"),),
        weight_pool_devices=(Device("cpu"),),
        kv_pool_bytes=1,
        weight_pool_bytes=1,
        sglang={"admin_api_key": admin_api_key},
    )
    models = {name: SimpleNamespace(name=name, context_length=16) for name in names}
    state = State(models=cast("Any", models), ready=True)
    with served(http_app(deployment, state, LargeFleet(names))) as url:
        yield url


@pytest.fixture(scope="module")
def fleet() -> Iterator[str]:
    with large_fleet(KEY) as url:
        yield url


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots stay: in $CROSSPOOL_ARTIFACTS, if that is set."""
    kept = os.environ.get("CROSSPOOL_ARTIFACTS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("shots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_looks(page: Browser, shots: Path, name: str, *, audited: Collection[int]) -> None:
    """In all sizes and themes the page is no wider than the window, and axe finds nothing that is
    serious in it where its width is one of the ``audited``."""
    page.run((files("axe_core_python") / "axe.min.js").read_text())
    for (width, height), theme in itertools.product(WIDTHS.items(), THEMES):
        page.look(width, height, theme)
        page.photograph(shots / f"{name}-{width}-{theme}.png")
        assert page.run("return document.documentElement.scrollWidth") == width
        if width in audited:
            found = [one for one in page.run(AXE) if one[1] in SERIOUS]
            assert not found, (width, theme, found)


def enter(browser: Browser, url: str, models: int) -> None:
    """Opens the page of a server with its key."""
    browser.look(1400, 900, "light")
    browser.open(f"{url}/ui/icon.svg")
    browser.run("sessionStorage.setItem('crosspool-key', arguments[0])", KEY)
    browser.messages()
    browser.open(f"{url}/ui")
    browser.wait_for(f"{ROWS} === {models}")


def press(page: Browser, order: str, model: str) -> None:
    button = f'[aria-label="{order} {model}"][aria-disabled="false"]'
    page.wait_for("document.querySelector(arguments[0])", button)
    page.click(button)


def test_a_chat_answers_and_is_timed(page: Browser, shots: Path) -> None:
    page.run("document.querySelector('#chat-tokens').value = 24")
    page.run("document.querySelector('#chat-model').value = arguments[0]", MODEL)
    page.type("#prompt", "What does import do?\n")
    figures = "document.querySelector('#chat-figures').textContent"
    page.wait_for(f"{figures}.includes('tokens')")
    told = page.run(f"return {figures}")
    assert "TTFT" in told and "tokens/s" in told
    assert page.run("return document.querySelector('.assistant .said').textContent.length") > 0
    page.wait_for("document.querySelectorAll('#kv-chart .area').length > 0")
    check_looks(page, shots, "server", audited=(360, 1400))


def test_what_lanes_do_is_recorded(page: Browser, keyed_server: Server) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1000, "ignore_eos": True}
    seen = threading.Event()

    def generate() -> None:
        while not seen.is_set():
            assert keyed_server.post("/v1/completions", body)[0] == 200

    with ThreadPoolExecutor() as pool:
        generating = pool.submit(generate)
        try:
            page.click("#record")
            spans = "document.querySelectorAll('#timeline .span').length"
            page.wait_for(f"{spans} || (document.querySelector('#record').click(), 0)")
        finally:
            seen.set()
        generating.result(60)


def test_buttons_have_models_sleep_and_wake(page: Browser, keyed_server: Server) -> None:
    for order, state in (("Sleep", "asleep"), ("Wake", "resident")):
        press(page, order, MODEL)
        shown = "document.querySelector(arguments[0]).closest('tr').cells[1].innerText"
        page.wait_for(f"{shown} === arguments[1]", f'[aria-label="Unload {MODEL}"]', state)
        headers = {"Authorization": f"Bearer {KEY}"}
        told = httpx.get(f"{keyed_server.url}/crosspool/models", headers=headers).json()
        assert [model["state"] for model in told if model["name"] == MODEL] == [state]
    told_events = page.run("return document.querySelector('#events').textContent")
    assert f"{MODEL} is asleep" in told_events and f"{MODEL} woke in" in told_events


def test_who_is_no_admin_is_told_so(browser: Browser) -> None:
    with large_fleet(None) as url:
        browser.open(f"{url}/ui")
        press(browser, "Wake", "org/model-01")
        browser.wait_for("document.querySelector('#notice').textContent.includes('no admin key')")
        (message,) = browser.messages()
        assert "403" in message
        browser.open("about:blank")


def test_a_key_is_asked_for_and_stays_in_the_tab(fleet: str, browser: Browser) -> None:
    browser.messages()
    browser.open(f"{fleet}/ui")
    problem = "document.querySelector('#key-problem').textContent"
    browser.wait_for(f"{problem} === 'The server asks for a key.'")
    browser.type("#key-input", "another")
    browser.click("#key-form .main")
    browser.wait_for(f"{problem} === 'The server does not take this key.'")
    browser.type("#key-input", KEY)
    browser.click("#key-form .main")
    browser.wait_for(f"{ROWS} === 100")
    assert browser.run("return Object.values(sessionStorage)") == [KEY]
    assert browser.run("return [...Object.values(localStorage), document.cookie]") == ["auto", ""]
    assert all("401" in message for message in browser.messages())


def test_a_hundred_models_stay_in_their_rows(fleet: str, browser: Browser, shots: Path) -> None:
    """A look changes the texts that differ and no row, so that focus and place stay."""
    enter(browser, fleet, 100)
    assert browser.run("return [document.title, document.images.length]") == ["CrossPool", 0]
    assert HOSTILE in browser.run("return document.querySelector('#models').textContent")
    browser.run(
        """
        const rows = document.querySelector("#models");
        window.rows = [...rows.children];
        window.changes = 0;
        window.looks = 0;
        rows.rows[50].querySelector("button").focus();
        window.focused = document.activeElement;
        new MutationObserver((seen) => (window.changes += seen.length)).observe(
            rows, {subtree: true, childList: true, characterData: true, attributes: true});
        new PerformanceObserver((seen) => (window.looks += seen.getEntries().filter(
            (entry) => entry.name.endsWith("crosspool/status")).length)).observe(
            {type: "resource"});
        """
    )
    browser.wait_for("window.looks >= 3")
    assert browser.run("return window.rows.every((row, i) => rows[i].isConnected)")
    assert browser.run("return document.activeElement === window.focused")
    # Ten models have sampled tokens, and the ages of some end in another ten seconds.
    changes, looks = browser.run("return [window.changes, window.looks]")
    assert 0 < changes <= 40 * (looks + 1)

    browser.type("#filter", "model-7")
    browser.wait_for(f"{ROWS} === 10")
    assert browser.run("return document.querySelector('#fleet-count').textContent") == "10 of 100"
    browser.type("#filter", "x")
    browser.wait_for("!document.querySelector('#no-models').hidden")
    browser.run(
        "const filter = document.querySelector('#filter'); filter.value = '';"
        "filter.dispatchEvent(new Event('input'))"
    )
    check_looks(browser, shots, "many", audited=())
    press(browser, "Wake", "org/model-01")
    browser.wait_for("document.querySelector('#notice').textContent.includes('is not there')")
    assert all("503" in message for message in browser.messages())


def test_looks_are_a_second_apart(fleet: str, browser: Browser) -> None:
    """The page asks for one status a second, and for nothing else."""
    enter(browser, fleet, 100)
    began = time.monotonic()
    browser.run("performance.clearResourceTimings()")
    browser.wait_for("performance.getEntriesByType('resource').length >= 3")
    names = browser.run("return performance.getEntriesByType('resource').map((one) => one.name)")
    passed = time.monotonic() - began
    assert set(names) == {f"{fleet}/crosspool/status"}
    assert len(names) <= passed + 2
