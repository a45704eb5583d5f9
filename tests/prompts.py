"""Prompts to a real ComfyUI server over HTTP, for those who want their end and no more."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch


@dataclass
class Prompts:
    """address: of a server over the base directory `base`, with the nodes of
    benchmarks/fuzz_nodes.py.
    """

    address: str
    base: Path

    def queue(self, prompt: dict[str, Any]) -> str:
        answer = requests.post(f"{self.address}/prompt", json={"prompt": prompt}, timeout=60)
        assert answer.ok, answer.text
        return answer.json()["prompt_id"]

    def finished(self, mine: str) -> None:
        """Waits for the prompt's end, and forgets it. Raises RuntimeError where it was not a
        success.
        """
        while not (known := requests.get(f"{self.address}/history/{mine}", timeout=60).json()):
            time.sleep(0.03)
        requests.post(f"{self.address}/history", json={"delete": [mine]}, timeout=60)
        status = known[mine]["status"]
        if status["status_str"] != "success":
            raise RuntimeError(
                next(
                    (
                        m[1]["exception_message"]
                        for m in status["messages"]
                        if m[0] == "execution_error"
                    ),
                    status,
                )
            )

    def run(self, prompt: dict[str, Any]) -> None:
        self.finished(self.queue(prompt))

    def kept(self, name: str) -> torch.Tensor:
        """What a FuzzKeep has written."""
        return torch.load(self.base / "output" / name, weights_only=True)
