"""The report's page in a real browser: it draws, complains of nothing, asks for nothing, fits a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_runs import encode, lines, tiny, write_restarted_run, write_run
from repository import load_script

from gpt2.report.content import report
from gpt2.report.runs import open_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")

# Put into a copy of the page: what the browser complains of, and how wide the page turned out.
LISTEN = """<script>
window.complaints = [];
window.addEventListener("error", (event) => complaints.push(String(event.message)));
window.addEventListener("securitypolicyviolation", (event) => complaints.push("policy: " + event.blockedURI));
for (const level of ["error", "warn"]) console[level] = (...args) => complaints.push(args.join(" "));
</script>
"""
MEASURE = """<script>
const before = {complaints, width: innerWidth, content: document.documentElement.scrollWidth,
  paths: document.querySelectorAll(".plot svg path").length, ready: document.body.dataset.ready,
  background: getComputedStyle(document.body).backgroundColor, color: getComputedStyle(document.body).color,
  title: document.title,
  smallest: Math.min(...[...document.querySelectorAll(".plot svg text")]
    .map((text) => parseFloat(getComputedStyle(text).fontSize))),
  injected: document.querySelectorAll("blockquote b").length,
  // Text of a chart that leaves its picture is cut off.
  cut: [...document.querySelectorAll(".plot svg text")].filter((text) => {
    const box = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }).map((text) => text.textContent)};
for (const box of document.querySelectorAll("input[type=checkbox]")) box.click();
const plot = document.querySelector(".plot svg");
if (plot) {
  const frame = plot.getBoundingClientRect();
  const at = {clientX: frame.left + frame.width * 0.85, clientY: frame.top + 50};
  plot.dispatchEvent(new PointerEvent("pointermove", at));
}
const tip = document.querySelector(".tip");
parent.postMessage({...before, tip: tip && !tip.hidden ? tip.textContent : null}, "*");
</script>
"""


OWN = (None, "not an origin")
CONTROL = "http://control.invalid/seen"
# A window has a smallest width; a frame in it has none. The picture shows that the log of requests sees requests.
FRAME = """<!doctype html><link rel="icon" href="data:,"><img src="http://control.invalid/seen">
<iframe src="page.html" width="{width}" height="900"
style="border: 0"></iframe><script>window.addEventListener("message", (event) => {{
const findings = document.createElement("pre");
findings.id = "findings";
findings.textContent = JSON.stringify(event.data);
document.body.append(findings);
}})</script>"""


def browse(page: Path, width: int, *, dark: bool, log: Path | None = None) -> dict[str, object]:
    """Open the page `width` pixels wide and return its findings."""
    assert CHROMIUM is not None
    outside = page.with_name("frame.html")
    outside.write_text(FRAME.format(width=width))
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={page.parent / 'profile'}",
        "--window-size=1400,1000",
        "--virtual-time-budget=2000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *([f"--log-net-log={log}"] if log else []),
        "--dump-dom",
        outside.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = re.search(r'<pre id="findings">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found is not None, result.stdout[-500:] + result.stderr[-500:]
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    findings: dict[str, object] = json.loads(text)
    return findings


def page_of(directory: Path, *runs: Path) -> Path:
    content = report([open_run(run) for run in runs], price=2.0)
    html = load_script("scripts/report.py").render(content)
    page = directory / "page.html"
    assert html.count("</title>") == 1
    html = html.replace("</title>", "</title>" + LISTEN)
    page.write_text(html.replace("</body>", MEASURE + "</body>"))
    return page


def requests_of_pages(log: Path) -> set[str]:
    """Addresses that pages asked the network for; the browser's own calls home have no origin."""
    try:
        events = json.loads(log.read_text())["events"]
    except ValueError:  # the browser was gone before it closed the list
        events = json.loads(log.read_text().rstrip().rstrip(",") + "]}")["events"]
    asked = [event.get("params", {}) for event in events]
    return {params["url"] for params in asked if "url" in params and params.get("initiator") not in OWN}


def check_page(findings: dict[str, object], width: int) -> None:
    assert findings["complaints"] == []
    assert findings["ready"] == "yes"
    assert findings["width"] == width
    assert findings["content"] == width  # nothing sticks out sideways
    assert findings["injected"] == 0  # a sample's <b> is text
    assert findings["cut"] == []


def test_two_runs_on_a_desktop_in_the_light(tmp_path: Path) -> None:
    one = write_restarted_run(tmp_path / "one")
    two = write_run(tmp_path / "two", dataset="fineweb", until=1200, learning_rate=1e-3, seed=2)
    log = tmp_path / "net.json"
    findings = browse(page_of(tmp_path, one, two), 1280, dark=False, log=log)
    check_page(findings, 1280)
    assert findings["title"] == "one · two"
    assert isinstance(findings["paths"], int)
    assert findings["paths"] > 15
    assert findings["smallest"] == 12
    assert isinstance(findings["tip"], str)
    assert "one: validation" in findings["tip"]
    assert "two: validation" in findings["tip"]
    assert requests_of_pages(log) == {CONTROL}


def test_a_phone_in_the_dark(tmp_path: Path) -> None:
    findings = browse(
        page_of(tmp_path, write_run(tmp_path / "a-run-with-a-name-that-is-long", until=1200)), 390, dark=True
    )
    check_page(findings, 390)
    assert findings["smallest"] == 12
    background, ink = (
        [int(part) for part in re.findall(r"\d+", str(findings[name]))] for name in ("background", "color")
    )
    assert max(background) < 64
    assert min(ink) > 190


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(encode(lines(**tiny())[:1]))
    check_page(browse(page_of(tmp_path, run), 800, dark=False), 800)


@pytest.mark.slow
def test_more_runs_than_colours(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{index}", **tiny(seed=index)) for index in range(8)]
    for width in (390, 1280):
        check_page(browse(page_of(tmp_path, *runs), width, dark=width == 390), width)
