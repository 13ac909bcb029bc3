"""Headless Chromium: what a page measures, logs and looks like."""

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path
from urllib.parse import quote

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
_PROBE = """<script>window.addEventListener("load", () => {
  const videos = [...document.querySelectorAll("video")];
  const boxes = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest(".scroll") && !e.closest("pre")).map(e => e.tagName + "." + e.className);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  parent.postMessage(JSON.stringify({inner: innerWidth, dark,
    scroll: document.documentElement.scrollWidth, outside: boxes, videos: videos.map(v => v.error && v.error.message),
    page: getComputedStyle(document.body).backgroundColor}), "*");
});</script>"""
# Chromium's own window is never narrower than 500 pixels; a frame is as narrow as it is told.
_FRAME = """<!DOCTYPE html><iframe src="{source}" style="border:0;width:{width}px;height:900px"></iframe><script>
addEventListener("message", event => {{ document.documentElement.dataset.probe = event.data; }});</script>"""


def browse(page: Path, *options: str, width: int = 1200, height: int = 900) -> tuple[str, str]:
    """Runs Chromium on a file; returns what it printed and its log of the page's console."""
    program = shutil.which("chromium")
    assert program, "these tests need Chromium; scripts/setup.sh installs it"
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [program, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}",
             "--enable-logging=stderr", *options, page.as_uri()],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)


def measure(page: Path, width: int) -> dict:
    """Widths and errors of a page in a frame; the copy measured has a probe, which the page's policy would forbid."""
    text = page.read_text(encoding="utf-8")
    assert _POLICY.search(text)
    probed = page.with_name(f"probed_{page.name}")
    probed.write_text(_POLICY.sub("", text).replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
    frame = page.with_name(f"frame_{page.name}")
    frame.write_text(_FRAME.format(source=quote(probed.name), width=width), encoding="utf-8")
    dom, console = browse(frame, "--dump-dom", "--virtual-time-budget=4000", width=width + 20)
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found, dom[:500]
    return {**json.loads(unescape(found[1])), "console": console}


def screenshot(page: Path, picture: Path, width: int, height: int) -> str:
    """Takes a picture of the page as it is; returns the console's log."""
    return browse(page, f"--screenshot={picture}", width=width, height=height)[1]
