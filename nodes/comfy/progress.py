"""ComfyUI's progress bar, previews and texts on nodes."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import comfy.utils
from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

PREVIEW_SIDE = 512
# Seconds between two previews: more than the eye follows would only cost time.
PREVIEW_INTERVAL = 0.1


def progress_bar(total: int) -> Callable[..., None]:
    """A Progress of `total` steps on ComfyUI's bar.

    It shows the picture (3,H,W) or (1,H,W), and raises ComfyUI's own error when the user has asked
    to stop.
    """
    return staged_progress(all=total)("all", total)


def staged_progress(**shares: int) -> Callable[[str, int], Callable[..., None]]:
    """One bar over the stages of a job, each with its share.

    Returns a function that takes a stage and its number of steps and gives the stage's Progress.
    The bar never goes back, even if a stage has more steps than announced or is left out.
    """
    bar = comfy.utils.ProgressBar(sum(shares.values()))
    starts = dict(zip(shares, itertools.accumulate(shares.values(), initial=0), strict=False))

    def begin(stage: str, total: int) -> Callable[..., None]:
        steps, next_preview = 0, 0.0

        def report(done: int = 1, picture: Tensor | None = None) -> None:
            nonlocal steps, next_preview
            mm.throw_exception_if_processing_interrupted()
            if done:
                steps += done
                preview = None
                if picture is not None and _somebody_looks() and time.monotonic() >= next_preview:
                    preview = "JPEG", _pil(picture), PREVIEW_SIDE
                    next_preview = time.monotonic() + PREVIEW_INTERVAL
                bar.update_absolute(
                    starts[stage] + shares[stage] * min(steps, total) // max(total, 1),
                    bar.total,
                    preview,
                )

        return report

    return begin


def stop_if_interrupted(done: int = 1, picture: Tensor | None = None) -> None:
    """A Progress without a bar: raises ComfyUI's own error when the user has asked to stop."""
    mm.throw_exception_if_processing_interrupted()


def show_text(text: str) -> ui.PreviewText:
    """Shows a text on the running node, as its output and as progress text.

    Pages show the latter on any node.
    """
    instance, context = _server(), get_executing_context()
    if context is not None and instance is not None:
        instance.send_progress_text(text, context.node_id, instance.client_id)
    return ui.PreviewText(text)


def _server() -> Any:
    """ComfyUI's server, or None where there is none."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _somebody_looks() -> bool:
    """Whether a page or a program listens: without one, the host sends previews nowhere."""
    if comfy.utils.PROGRESS_BAR_HOOK is None:
        return False
    instance = _server()
    return instance is None or bool(instance.sockets)


def _pil(picture: Tensor) -> Image.Image:
    pixels = (picture.detach().float().clamp(0, 1) * 255).byte().movedim(0, -1).cpu().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])
