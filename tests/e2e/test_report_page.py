"""The report in a real browser: its script runs under its own policy, nothing overflows on a phone, and it prints."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from kitaeru.cli import main
from kitaeru.report.page import write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SYNTHETIC = Path(__file__).parents[1] / "unit" / "report" / "synthetic.py"
Browse = Callable[..., str]


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthetic_runs", SYNTHETIC)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """`browse(page, *options)`: what a headless browser says."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("there is no Chromium here")

    def call(page: Path, *options: str) -> str:
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        words += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        words += [f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr", *options, page.as_uri()]
        done = subprocess.run([browser, *words], capture_output=True, text=True, timeout=120, check=True)
        complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        assert complaints == [], "the page's script or policy complains"
        return done.stdout

    return call


def probe(page: Path, script: str) -> Path:
    """A copy of `page` that runs `script` at its end and keeps what it returns in <html data-answer>."""
    html = page.read_text(encoding="utf-8")
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    added = f"<script>document.documentElement.dataset.answer = (() => {{ {script} }})();</script></body>"
    copy = page.with_name("probe.html")
    copy.write_text(html.replace("</body>", added), encoding="utf-8")
    return copy


def answer(dom: str) -> str:
    found = re.search(r'data-answer="([^"]*)"', dom)
    assert found is not None
    return found[1]


def test_the_script_runs_under_the_policy(made: ModuleType, tmp_path: Path, browse: Browse) -> None:
    dom = browse(write_page(made.finished(tmp_path / "run")), "--dump-dom")
    assert '<button type="button" class="copy">Copy</button>' in dom


def test_the_tooltip_shows_step_and_values(made: ModuleType, tmp_path: Path, browse: Browse) -> None:
    page = write_page(made.finished(tmp_path / "run"))
    script = """
        const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
        plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right}));
        const text = plot.querySelector(".tip").innerText.replace(/\\n/g, "|");
        plot.dispatchEvent(new PointerEvent("pointerleave"));
        return text + (plot.querySelector(".tip") ? " stayed" : "");
    """
    text = answer(browse(probe(page, script), "--dump-dom"))
    assert re.fullmatch(r"step 60\|training \d\.\d{3}\|training, smoothed \d\.\d{3}\|validation 1\.977", text)


@pytest.mark.parametrize("name", ["finished", "resumed", "killed", "begun"])
def test_a_phone_does_not_scroll_sideways(made: ModuleType, tmp_path: Path, browse: Browse, name: str) -> None:
    _fits_a_phone(write_page(getattr(made, name)(tmp_path / name)), browse)


@pytest.mark.parametrize("language", ["en", "ja"])
def test_advice_fits_a_phone_and_prints(tmp_path: Path, browse: Browse, language: str) -> None:
    page = tmp_path / "advice.html"
    words = ["advise", "Qwen/Qwen3-14B", "--gpus", "2x RTX A5000", "--ram", "128GB", "-o", str(page)]
    assert main([*words, "--lang", language]) == 0
    assert '<button type="button" class="copy">' in browse(page, "--dump-dom")
    _fits_a_phone(page, browse)
    pdf = tmp_path / "advice.pdf"
    browse(page, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) <= 10


def _fits_a_phone(page: Path, browse: Browse) -> None:
    # A window cannot be as narrow as a phone; a frame can.
    script = """
        const frame = document.createElement("iframe");
        frame.style.cssText = "width:360px;height:640px;border:0";
        const copy = document.documentElement.cloneNode(true);
        document.body.replaceChildren(frame);
        const inner = frame.contentDocument;
        inner.replaceChild(inner.adoptNode(copy), inner.documentElement);
        const {scrollWidth, clientWidth} = inner.documentElement;
        return `${scrollWidth} of ${clientWidth}`;
    """
    # 360, less a scroll bar at the side.
    assert answer(browse(probe(page, script), "--dump-dom")) in ("345 of 345", "360 of 360")


def test_it_prints(made: ModuleType, tmp_path: Path, browse: Browse) -> None:
    pdf = tmp_path / "page.pdf"
    browse(write_page(made.finished(tmp_path / "run")), f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    assert pdf.read_bytes().startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
    assert 2 <= pages <= 6
