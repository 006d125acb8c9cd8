"""A real browser for tests: Chromium as it comes with PyQt6-WebEngine, in a process of its own, with no screen.

`python tests/browser.py PAGE PICTURE WIDTH light|dark` opens a page, takes a picture of the whole of it, and prints
what happened as JSON. HF_MULTITASK_BROWSER_PYTHON may name another Python, one that has PyQt6-WebEngine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_TALLEST = 16_000  # pixels of a picture
_PYTHON = os.environ.get("HF_MULTITASK_BROWSER_PYTHON", sys.executable)


@dataclass(frozen=True)
class Visit:
    """What happened when a page was opened: requests that it made, messages of its console, its size in pixels."""

    loaded: bool
    requests: list[str]
    messages: list[str]
    width: int
    height: int
    dark: bool


def why_there_is_none() -> str:
    """Return why there is no browser, or an empty text."""
    found = subprocess.run([_PYTHON, "-c", "import PyQt6.QtWebEngineWidgets"], capture_output=True, text=True)
    if found.returncode == 0:
        return ""
    last = found.stderr.strip().splitlines()[-1:]
    return f"no browser: pip install PyQt6-WebEngine ({' '.join(last)})"


def visit(page: Path, picture: Path, width: int = 1100, scheme: str = "light") -> Visit:
    """Open a page, and take a picture of it."""
    command = [_PYTHON, __file__, str(page), str(picture), str(width), scheme]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, f"the browser said nothing: {done.stderr[-2000:]}"
    return Visit(**json.loads(lines[-1]))


def main(page_file: str, picture: str, width: int, scheme: str) -> None:
    flags = f"--disable-gpu --blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    os.environ.update(QT_QPA_PLATFORM="offscreen", QTWEBENGINE_DISABLE_SANDBOX="1", QTWEBENGINE_CHROMIUM_FLAGS=flags)
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import (
        QWebEnginePage,
        QWebEngineProfile,
        QWebEngineSettings,
        QWebEngineUrlRequestInterceptor,
    )
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    app = QApplication(["browser"])
    requests: list[str] = []
    messages: list[str] = []

    class Interceptor(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info):
            requests.append(info.requestUrl().toString())

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):
            messages.append(message)

    profile, interceptor = QWebEngineProfile(), Interceptor()
    profile.setUrlRequestInterceptor(interceptor)
    view = QWebEngineView()
    page = Page(profile, view)
    # So that what a page asks of the network is seen, and not refused before.
    page.settings().setAttribute(QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls, True)
    view.setPage(page)
    view.resize(width, 900)
    view.show()
    measure = """[document.documentElement.scrollWidth, document.documentElement.scrollHeight,
        matchMedia('(prefers-color-scheme: dark)').matches]"""

    def take_picture(found, loaded):
        view.resize(width, min(int(found[1]), _TALLEST))

        def finish():
            view.grab().save(picture)
            happened = [loaded, requests, messages, int(found[0]), int(found[1]), bool(found[2])]
            print(json.dumps(dict(zip(Visit.__dataclass_fields__, happened, strict=True))), flush=True)
            app.quit()

        QTimer.singleShot(1000, finish)

    page.loadFinished.connect(lambda loaded: page.runJavaScript(measure, lambda found: take_picture(found, loaded)))
    page.load(QUrl.fromLocalFile(os.path.abspath(page_file)))
    QTimer.singleShot(60_000, app.quit)
    app.exec()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
