"""Our own networks: read once for each state of their files, kept by the host's rules."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from osdface_core.faces.detector_check import build_detector
from osdface_core.faces.face_parser import build_parser, parse_faces
from osdface_core.faces.files import BUILTIN_DETECTOR, BUILTIN_PARSER, BUILTIN_PARSER_USED
from osdface_core.faces.retinaface import RetinaFace, build_retinaface
from osdface_core.ldm.backbone import LdmBackbone
from osdface_core.osdface import builtin
from osdface_core.osdface.vre import (
    VisualEmbedder,
    build_embedder,
    embed,
    embedder_files,
    read_embedder,
)
from osdface_core.weights.reading import read_tensors

from . import files, host

log = logging.getLogger(__name__)

# Faces that the embedder takes at once on an accelerator, at 450 MB each.
EMBEDDED_AT_ONCE = 4

P = ParamSpec("P")
T = TypeVar("T")

_kept: dict[str, tuple[object, Any]] = {}


def kept(what: str, state: object, make: Callable[[], T]) -> T:
    """The result of `make`, made again when `state` is another than the last time for `what`."""
    if what not in _kept or _kept[what][0] != state:
        _kept.pop(what, None)
        _kept[what] = state, make()
    result: T = _kept[what][1]
    return result


def state_of(*paths: Path) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of change of each file."""
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


def job(work: Callable[P, T]) -> Callable[P, T]:
    """Decorates what is done for one picture: `release` comes after it, however it ends.

    Within it, the networks that it uses would still be held, and their memory not come back.
    """

    @wraps(work)
    def done(*args: P.args, **given: P.kwargs) -> T:
        try:
            return work(*args, **given)
        finally:
            release()

    return done


def release() -> None:
    """After a job: what the host wants back leaves the device, or is dropped."""
    if not host.option("keep_loaded", True):
        _kept.clear()
    elif host.leaves_device():
        for _, thing in _kept.values():
            if isinstance(thing, nn.Module):
                thing.to("cpu")
            elif isinstance(thing, LdmBackbone):
                thing.place(torch.device("cpu"))
    host.collect()


def detector(name: str) -> RetinaFace:
    """The face detector of a name in the menu."""
    path = files.detector(name)
    build = build_retinaface if path == BUILTIN_DETECTOR else build_detector
    network = kept("detector", state_of(path), lambda: build(read_tensors(path)))
    return network.to(host.device())


def embed_crops(crops: Tensor, path: Path | None) -> Tensor:
    """The prompts (N,77,1024) of crops (N,H,W,3) in [0,1].

    path: of the embedder; None for the built-in one.
    """
    device = host.device()

    def network(count: int) -> tuple[VisualEmbedder, torch.device]:
        host.stop_if_asked()
        if path is None:
            found = kept("embedder", None, builtin.embedder)
        else:
            state = state_of(*embedder_files(path))
            found = kept(
                "embedder", state, lambda: build_embedder(read_embedder(path), source=path.name)
            )
        return found.to(device), device

    at_once = 1 if device.type == "cpu" else EMBEDDED_AT_ONCE
    return embed(crops, network, at_once=at_once, progress=host.stop_if_asked)


def parse_crops(crops: Tensor) -> Tensor:
    """The face maps (N,512,512) in [0,1] of crops (N,S,S,3) in [0,1]."""
    path = files.parser()

    def make() -> nn.Module:
        if path == BUILTIN_PARSER:
            log.warning("%s: `python install.py` fetches it.", BUILTIN_PARSER_USED)
        return build_parser(read_tensors(path))

    network: Any = kept("parser", state_of(path), make)
    return parse_faces(crops, network.to(host.device()))
