"""Draws boxes, landmarks and numbers of faces on pictures, and before beside after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..chunks import Progress
from ..pictures.picture import finite, rgb_of
from ..pictures.resampling import antialiased
from .choose import CHOSEN
from .face import Face

# Side of a preview in pixels: at full size, the preview of a video would take as much memory as the
# video.
LONGEST_SIDE = 1024
CHOSEN_COLOUR = (80, 255, 120)
OTHER_COLOUR = (255, 90, 70)


def draw_faces(
    images: Tensor, faces: Sequence[Face], verdicts: Sequence[str], progress: Progress | None = None
) -> Tensor:
    """Pictures (B,H,W,C) in [0,1] -> (B,h,w,3) at most 1024 px a side, with the faces drawn.

    Chosen faces are green, the rest red. verdicts: of each face. progress: called with 0 for each
    picture; what it raises ends the job.
    """
    height, width = images.shape[1:3]
    scale = min(1.0, LONGEST_SIDE / max(height, width, 1))
    out = torch.zeros(drawn_size(images))
    size = out.shape[1], out.shape[2]
    frames: dict[int, list[tuple[Face, str]]] = {}
    for face, verdict in zip(faces, verdicts, strict=True):
        frames.setdefault(face.frame, []).append((face, verdict))
    if not height or not width:
        return out
    for i, image in enumerate(images):
        if progress:
            progress(0)
        pixels = _resize(image, size)
        if i in frames:
            canvas = Image.frombytes(
                "RGB",
                size[::-1],
                bytes((pixels * 255).round().byte().cpu().contiguous().flatten().numpy()),
            )
            for face, verdict in frames[i]:
                _draw_face(
                    ImageDraw.Draw(canvas),
                    face,
                    scale,
                    CHOSEN_COLOUR if verdict == CHOSEN else OTHER_COLOUR,
                )
            pixels = (
                torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(*size, 3)
                / 255
            )
        out[i] = pixels
    return out


def before_after(before: Tensor, after: Tensor, progress: Progress | None = None) -> Tensor:
    """Pictures (B,H,W,C) in [0,1] and their results -> (B,h,w,3) with both, parted by a white line.

    Left and right, or above and below where a picture is wider than high. A single picture keeps
    its size, so that every pixel can be looked at; the frames of a video are at most 1024 px a
    side. progress: as for `draw_faces`.
    """
    count, height, width = before.shape[:3]
    size = _preview_size(height, width) if count > 1 else (height, width)
    out = torch.ones(before_after_size(before))
    for i in range(count if height and width else 0):
        if progress:
            progress(0)
        out[i, : size[0], : size[1]] = _resize(before[i], size)
        out[i, -size[0] :, -size[1] :] = _resize(after[i], size)
    return out


def before_after_size(before: Tensor) -> tuple[int, ...]:
    """The shape of what `before_after` gives for these pictures."""
    count, height, width = before.shape[:3]
    size = _preview_size(height, width) if count > 1 else (height, width)
    line = max(2, max(size) // 200)
    if width > height:
        return count, 2 * size[0] + line, size[1], 3
    return count, size[0], 2 * size[1] + line, 3


def drawn_size(images: Tensor) -> tuple[int, ...]:
    """The shape of what `draw_faces` gives for these pictures."""
    return len(images), *_preview_size(*images.shape[1:3]), 3


def _preview_size(height: int, width: int) -> tuple[int, int]:
    scale = min(1.0, LONGEST_SIDE / max(height, width, 1))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """(H,W,C) -> (h,w,3) in [0,1]; NaN becomes 0."""
    pixels = finite(rgb_of(picture))
    if pixels.shape[:2] == size:
        return pixels
    return antialiased(pixels.movedim(-1, 0)[None], size, "bilinear")[0].movedim(0, -1)


def _label(text: str, size: int) -> Image.Image:
    """The mask of a text in Pillow's own font.

    That font has one size, of 10 px, before Pillow 10.1 and where FreeType is missing: there the
    text is enlarged, or nobody could read a number on a large picture.
    """
    font: Any
    try:
        font, scale = ImageFont.load_default(size=size), 1.0
    except (TypeError, ImportError):
        font, scale = ImageFont.load_default(), size / 10
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top, right, bottom = measure.textbbox((0, 0), text, font=font)
    mask = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font)
    mask = mask.crop(mask.getbbox())
    return mask.resize((round(mask.width * scale), round(mask.height * scale)))


def _draw_face(
    canvas: ImageDraw.ImageDraw, face: Face, scale: float, ink: tuple[int, int, int]
) -> None:
    box = [c * scale for c in face.box]
    side = max(box[2] - box[0], box[3] - box[1])
    stroke = max(1, round(side / 100))
    canvas.rectangle(box, outline=ink, width=stroke)
    dot = max(1.0, side / 60)
    for x, y in face.landmarks:
        canvas.ellipse(
            [x * scale - dot, y * scale - dot, x * scale + dot, y * scale + dot], fill=ink
        )
    label = _label(str(face.number), min(48, max(12, round(side / 6))))
    x, y = round(max(0.0, box[0])), round(max(0.0, box[1] - label.height - 4))
    canvas.rectangle([x, y, x + label.width + 4, y + label.height + 4], fill=ink)
    canvas.bitmap((x + 2, y + 2), label, fill=(0, 0, 0))
