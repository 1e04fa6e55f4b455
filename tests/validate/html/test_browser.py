"""In a browser: what only layout and a network stack can tell."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qwenport.validate.html import render

from .page import POLICY
from .reports import HOSTILE, extremes, failing, hostile, interrupted, passing


@pytest.fixture(scope="session")
def browser() -> str:
    """A Chromium, where there is one."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium on PATH")


def dumped(browser: str, page: Path, *options: str) -> str:
    """The page's DOM when it has loaded. Names of hosts lead nowhere, the browser's own requests included."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--window-size=1400,1000", *options]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, timeout=120, check=True
    )
    return done.stdout.decode()


MEASURE = """
addEventListener("load", () => {
  document.getElementById("result").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(f => {
    const d = f.contentDocument, w = f.clientWidth;
    const wide = [...d.querySelectorAll("main *")].filter(
      e => e.getBoundingClientRect().right > w + 0.5 && !e.closest(".scroll"));
    const root = d.documentElement;
    return [f.title, root.clientWidth, root.scrollWidth, wide.map(e => e.outerHTML.slice(0, 80))];
  }));
});
"""


def measured(browser: str, folder: Path, pages: dict[str, str]) -> dict[str, list[Any]]:
    """Each page as it is, in a frame of 1280 and one of 390 pixels: its width, what it needs, what sticks out."""
    frames = "".join(
        f'<iframe title="{html.escape(name)} at {width}" style="width:{width}px;height:900px;border:0"'
        f' srcdoc="{html.escape(source)}"></iframe>'
        for name, source in pages.items()
        for width in (1280, 390)
    )
    wrapper = folder / "frames.html"
    wrapper.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><script>{MEASURE}</script>{frames}<pre id="result"></pre>',
        encoding="utf-8",
    )
    result = re.search(r'<pre id="result">(.+?)</pre>', dumped(browser, wrapper), re.DOTALL)
    assert result
    return {each[0]: each[1:] for each in json.loads(html.unescape(result[1]))}


def test_in_a_browser_nothing_overflows(browser: str, tmp_path: Path) -> None:
    reports = {"passing": passing(), "failing": failing(), "interrupted": interrupted()}
    reports |= {"long words": hostile(failing(), "x" * 300), **extremes()}
    pages = {name: render(report) for name, report in reports.items()}
    wide = '<div style="width: 2000px">wide</div></main>'
    pages["control"] = pages["passing"].replace("</main>", wide)
    found = measured(browser, tmp_path, pages)
    for width in (1280, 390):
        (seen_as, needed, sticking_out) = found.pop(f"control at {width}")
        assert seen_as == width and needed > 2000 and sticking_out
    assert len(found) == 2 * len(reports)
    for name, (width, needed, sticking_out) in found.items():
        assert (name, needed, sticking_out) == (name, width, [])


def requests_of(browser: str, folder: Path, name: str, source: str) -> list[str]:
    """URLs that the page asked the network for, by the browser's own log."""
    page, log = folder / f"{name}.html", folder / f"{name}.json"
    page.write_text(source, encoding="utf-8")
    dumped(browser, page, f"--log-net-log={log}")
    events = [each.get("params", {}) for each in json.loads(log.read_text())["events"]]
    # What the browser asks for itself has no origin.
    return sorted(
        {
            each["url"]
            for each in events
            if each.get("initiator", "not an origin") != "not an origin"
            and not each["url"].startswith(("file:", "data:"))
        }
    )


def test_in_a_browser_nothing_is_requested(browser: str, tmp_path: Path) -> None:
    source = render(hostile(failing(), HOSTILE[1]))
    picture = "http://127.0.0.1:9/picture.png"
    tempted = source.replace("<main>", f'<main><img src="{picture}">')
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    assert requests_of(browser, tmp_path, "page", source) == []
    assert requests_of(browser, tmp_path, "tempted", tempted) == []  # the policy forbids it
    unguarded = tempted.replace(policy, "")
    assert requests_of(browser, tmp_path, "unguarded", unguarded) == [picture]  # and would be seen
