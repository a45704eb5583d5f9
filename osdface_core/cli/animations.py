"""Restores animated pictures (GIF, WebP, APNG, AVIF) as the videos that they are.

Each frame is taken as it is shown. Number, times and repetition of the frames and their
transparency stay.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import OSDFaceError
from ..faces.choose import CHOSEN, describe_faces
from ..faces.face import Face
from ..faces.track import thumbnails
from . import pictures
from .enhancer import Enhancer
from .frames import (
    Around,
    Frame,
    png_chunks,
    windows,
    write_apng,
    write_avif,
    write_gif,
    write_webp,
)
from .restorer import Restorer
from .upscaler import Upscaler
from .video import scaled

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF", "FLI")


@dataclass(frozen=True)
class Animation:
    """An animated picture.

    path: the file.
    format: as Pillow names it.
    count: of its frames.
    size: width and height, which a later frame of a GIF may make larger.
    """

    path: Path
    format: str
    count: int
    size: tuple[int, int]

    def frames(self) -> Iterator[tuple[np.ndarray, Fraction]]:
        """The frames (H,W,4) uint8 as they are shown, each with its time in seconds."""
        with pictures.opened(self.path) as image:
            for number in range(self.count):
                pictures.check_size(self.path, self.size)
                image.seek(number)
                shown = image.convert("RGBA")
                if shown.size != self.size:
                    shown = shown.crop((0, 0, *self.size))
                time = Fraction(str(image.info.get("duration") or 0)) / 1000
                yield np.asarray(shown), time

    def around(self, times: list[Fraction]) -> Around:
        """What it has beside its frames. times: of the frames."""
        with pictures.opened(self.path) as image:
            info = image.info
            loop = info.get("loop")
            # A GIF counts the repetitions after the first time.
            plays = (1 if loop is None else loop + 1 if loop else 0) if self.format == "GIF" else 0
            still_first = False
            chunks: tuple[tuple[bytes, bytes], ...] = ()
            if self.format == "PNG":
                data = list(png_chunks(self.path.read_bytes()))
                chunks = tuple(one for one in data if one[0] in pictures.PNG_KEPT)
                still_first = bool(info.get("default_image"))
                controls = [content for kind, content in data if kind == b"fcTL"]
                parts = [struct.unpack_from(">HH", content, 20) for content in controls]
                exact = [Fraction(number, whole or 100) for number, whole in parts]
                times = times[: len(times) - len(exact)] + exact
            xmp, comment = info.get("xmp"), info.get("comment")
            return Around(
                times,
                plays if self.format == "GIF" else int(loop or 0),
                self.format == "GIF"
                or image.mode not in ("RGB", "L")
                or image.has_transparency_data,
                still_first,
                info.get("icc_profile"),
                info.get("exif"),
                xmp.encode() if isinstance(xmp, str) else xmp,
                comment.encode() if isinstance(comment, str) else comment,
                chunks,
            )


def look(path: Path) -> Animation | None:
    """The animation that a file holds; None for another picture and for what cannot be read."""
    with suppress(Exception), pictures.opened(path) as image:  # the reader says what is wrong
        count = getattr(image, "n_frames", 1)
        if image.format in ANIMATED and count > 1:
            with suppress(Exception):
                image.seek(count - 1)
            return Animation(path, image.format, count, image.size)
    return None


def restore(
    animation: Animation,
    target: Path,
    kind: str,
    job: Restorer | Upscaler | Enhancer,
    quality: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Restores or enlarges an animation into `target` and returns its part of the report.

    Where no face is chosen the file is copied. Raises OSDFaceError for one that is damaged, and
    where the target's kind holds no animation.

    animation: what is read.
    target: the file.
    kind: its extension.
    job: the networks.
    quality: of AVIF, 1..100.
    progress: called with the steps just done and the steps in all, two for a frame.
    """
    same = kind == animation.path.suffix.lower()
    name = animation.format if same else pictures.FORMATS.get(kind)
    writers: dict[str | None, Callable[[Path, Iterator[Frame], Around], None]] = {
        "GIF": write_gif,
        "WEBP": write_webp,
        "PNG": write_apng,
        "AVIF": partial(write_avif, quality=quality),
    }
    if name not in writers and not same:
        raise _no_writer(animation, kind)
    finder = job if isinstance(job, Restorer) else job.restorer
    found: list[list[Any]] = []
    small, times = [], []
    total = 2 * animation.count
    size = 0, 0
    everyone: tuple[Face, ...] = ()
    verdicts: tuple[str, ...] = ()
    for window in _windows(animation):
        times += [time for _, time in window]
        size = window[0][0].shape[:2]
        if finder is not None:
            pixels = torch.stack([_tensor(shown)[..., :3] for shown, _ in window])
            found += finder.detect(pixels)
            small.append(thumbnails(pixels))
        progress(len(window), total)
    if finder is not None:
        everyone, verdicts = finder.place_faces(found, torch.cat(small), size[1], size[0])
    chosen = [face for face, verdict in zip(everyone, verdicts, strict=True) if verdict == CHOSEN]
    notes: dict[tuple[int, int], str] = {}
    after_size = size
    if isinstance(job, Restorer) and not chosen and same:
        shutil.copyfile(animation.path, target)
        progress(animation.count, total)
    elif name not in writers:
        raise _no_writer(animation, kind)
    else:

        def restored() -> Iterator[Frame]:
            nonlocal after_size
            start = 0
            for window in _windows(animation):
                shown = [one for one, _ in window]
                here = [
                    replace(face, frame=face.frame - start)
                    for face in chosen
                    if start <= face.frame < start + len(window)
                ]
                if isinstance(job, Restorer):
                    given = _restored(shown, here, job, start, notes)
                else:
                    given = _enlarged(shown, here, job, start, notes)
                for picture, changed in given:
                    after_size = picture.shape[:2]
                    yield picture, changed
                start += len(window)
                progress(len(window), total)

        writers[name](target, restored(), animation.around(times))
    return {
        "frames": animation.count,
        "width": after_size[1],
        "height": after_size[0],
        "faces": describe_faces(everyone, verdicts, notes),
    }


def _no_writer(animation: Animation, kind: str) -> OSDFaceError:
    return OSDFaceError(
        f"{animation.path} holds {animation.count} frames, which {kind} cannot: name a .gif, "
        ".webp, .png or .avif as the output."
    )


def _windows(animation: Animation) -> Iterator[list[tuple[np.ndarray, Fraction]]]:
    return windows(_checked(animation), lambda one: one[0][..., 0].size)


def _checked(animation: Animation) -> Iterator[tuple[np.ndarray, Fraction]]:
    try:
        yield from animation.frames()
    except OSDFaceError:
        raise
    except Exception as error:  # each of Pillow's readers raises its own errors
        says = " ".join(str(error).split()) or type(error).__name__
        raise OSDFaceError(
            f"{animation.path} cannot be read as an animation ({says}): it is damaged or of "
            "another kind."
        ) from error


def _tensor(shown: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(shown.astype(np.float32) / 255)


def _bytes(picture: torch.Tensor) -> np.ndarray:
    return np.asarray((picture * 255).round().clamp(0, 255).numpy().astype(np.uint8))


def _restored(
    shown: list[np.ndarray],
    here: list[Face],
    restorer: Restorer,
    start: int,
    notes: dict[tuple[int, int], str],
) -> Iterator[Frame]:
    """The frames with the faces `here` restored."""
    if not here:
        yield from ((one, np.zeros(one.shape[:2], bool)) for one in shown)
        return
    pixels = torch.stack([_tensor(one)[..., :3] for one in shown])
    after, mask, said = restorer.frames(pixels, here)
    notes.update({(frame + start, number): note for (frame, number), note in said.items()})
    for one, picture, weight in zip(shown, after, mask, strict=True):
        changed = (weight > 0).numpy()
        fresh = one.copy()
        fresh[..., :3] = np.where(changed[..., None], _bytes(picture), one[..., :3])
        yield fresh, changed


def _enlarged(
    shown: list[np.ndarray],
    here: list[Face],
    job: Upscaler | Enhancer,
    start: int,
    notes: dict[tuple[int, int], str],
) -> Iterator[Frame]:
    """The frames enlarged or filled, with the faces `here` restored in them."""
    for number, one in enumerate(shown):
        picture = job.enlarge(_tensor(one)[None])
        height, width = picture.shape[1:3]
        faces = [
            scaled(replace(face, frame=0), width / one.shape[1], height / one.shape[0])
            for face in here
            if face.frame == number
        ]
        if job.restorer is not None and faces:
            after, _, said = job.restorer.frames(picture[..., :3], faces)
            picture = torch.cat([after, picture[..., 3:]], -1)
            notes.update({(start + number, person): note for (_, person), note in said.items()})
        yield _bytes(picture[0]), np.ones((height, width), bool)
