"""ComfyUI's real frontend in Chromium, and the real server that it talks to: what test_browser.py
and make_workflows.py stand on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

CHROMIUM = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZE = {"width": 1600, "height": 1000}
# The newest frontend's, where it is looked at in place of the host's own: tests/newer_host.sh.
FRONTEND = os.environ.get("OSDFACE_FRONTEND")
DIALOG = ".p-dialog:visible, [role=dialog]:visible"
READY = (
    "() => !!(window.app?.graph && window.app.canvas"
    " && window.LiteGraph?.registered_node_types.FaceDetectAlign)"
)


def over(base: Path) -> list[str]:
    """Arguments of a ComfyUI on the CPU that keeps everything in the folder."""
    return [
        "--cpu",
        "--disable-api-nodes",
        *("--base-directory", str(base)),
        *("--user-directory", str(base / "user")),
        *("--database-url", f"sqlite:///{base}/user/t.db"),
    ]


@contextmanager
def server(
    comfyui: Path, base: Path, seconds: float = 120, arguments: Sequence[str] = ()
) -> Iterator[str]:
    """ComfyUI over a base directory, on the CPU and a free port; its address. Its output goes to
    log.txt in that directory, its process id to pid.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "main.py",
        "--disable-auto-launch",
        "--listen",
        "127.0.0.1",
        "--port",
        str(port),
        *over(base),
        *arguments,
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    address = f"http://127.0.0.1:{port}"
    with (base / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=comfyui, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        (base / "pid").write_text(str(process.pid))
        try:
            end = time.monotonic() + seconds
            while True:
                assert process.poll() is None and time.monotonic() < end, (
                    base / "log.txt"
                ).read_text()
                try:
                    requests.get(f"{address}/system_stats", timeout=5)
                    break
                except requests.ConnectionError:
                    time.sleep(0.25)
            yield address
        finally:
            process.terminate()
            process.wait(60)


class Frontend:
    """A page that shows ComfyUI. `errors` gathers what the page's own scripts throw."""

    def __init__(self, browser: Any, address: str) -> None:
        self.address = address
        # A person's own clicks and words, not an English reader's guess of them.
        self.context = browser.new_context(viewport=SIZE, locale="en-US")
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(error.stack or str(error)))
        self.open()

    def open(self) -> None:
        known = len(self.errors)
        self.page.goto(self.address)
        self.page.wait_for_function(READY, timeout=60_000)
        # The graph of last time is opened after the nodes are known.
        self.page.wait_for_function(
            "() => app.extensionManager.workflow?.activeWorkflow?.changeTracker", timeout=60_000
        )
        self.page.wait_for_timeout(500)
        # The frontend of 0.3.64 always throws one of its own while it starts.
        del self.errors[known:]
        version = self.js("() => window.__COMFYUI_FRONTEND_VERSION__")
        # Its lists, dialogs and panels were made anew after 0.3.64.
        self.newer = tuple(map(int, version.split("."))) >= (1, 49)

    def js(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def load(self, workflow: dict[str, Any]) -> None:
        """As dropping the file onto the canvas does."""
        self.js("workflow => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_timeout(300)

    def saved(self) -> dict[str, Any]:
        """What File > Save writes."""
        return json.loads(self.js("() => JSON.stringify(app.graph.serialize())"))

    def prompt(self) -> dict[str, Any]:
        """What File > Export (API) writes, which is what Run sends."""
        return json.loads(self.js("async () => JSON.stringify((await app.graphToPrompt()).output)"))

    def complaints(self) -> list[str]:
        """What open dialogs say, and newer frontends' box of errors."""
        shown = self.page.locator(f"{DIALOG}, [data-testid=error-overlay]:visible")
        return [text for text in shown.all_inner_texts() if text]

    def press_library(self) -> None:
        """Opens the node library, or closes it."""
        self.page.get_by_role("button", name=re.compile("^Node Library|^Nodes")).first.click()

    def search(self, words: str) -> Any:
        """The nodes that the search box offers for the words."""
        self.js("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        box = ".comfy-vue-node-search-container input, [role=dialog] input[role=combobox]"
        self.page.locator(box).first.fill(words)
        return self.page.locator(".option-container, [data-testid=result-item]")

    def close(self) -> None:
        self.context.close()


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
