"""Draws docs/page.png: the chat page of `pixtral serve --model-path tiny`, asked twice about a picture.

python docs/page.py          needs the test extra, and Debian's chromium and chromium-driver
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.chat_page import Page, start_chromium  # noqa: E402

PORT = 8471
QUESTIONS = ("Describe the picture.", "What colour is the triangle?")


def main() -> None:
    command = [sys.executable, "-m", "pixtral_cli", "serve", "--model-path", "tiny", "--port", str(PORT), "--quiet"]
    server = subprocess.Popen(command, cwd=ROOT)
    try:
        with tempfile.TemporaryDirectory() as profile:
            draw(f"http://127.0.0.1:{PORT}", profile)
    finally:
        server.terminate()
        server.wait()


def draw(url: str, profile: str) -> None:
    wait_for(f"{url}/ready")
    browser = start_chromium(profile)
    try:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 900, "height": 760, "deviceScaleFactor": 1.5, "mobile": False},
        )
        page = Page(browser, url)
        page.open()
        page.until(lambda: page.text("#model").startswith("tiny"))
        page.choose(ROOT / "examples" / "shapes.png")
        page.until(lambda: page.text("#pictures .cost").endswith(" tokens"))
        for turn, question in enumerate(QUESTIONS, 1):
            page.ask(question, turn)
        browser.save_screenshot(str(ROOT / "docs" / "page.png"))
    finally:
        browser.quit()


def wait_for(url: str) -> None:
    for _ in range(600):
        try:
            urlopen(url)
            return
        except URLError:
            time.sleep(0.1)
    raise SystemExit(f"{url} does not answer")


if __name__ == "__main__":
    main()
