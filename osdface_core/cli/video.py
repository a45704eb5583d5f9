"""Restores or enlarges a video, with a window of its frames in memory at a time.

The first pass finds the faces of all frames, which are then followed through the whole video at
once, so that no window's border splits a person in two. The second restores and encodes. Sound and
subtitles are copied; size, rate and time of each frame stay.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from ..errors import OSDFaceError
from ..faces.choose import CHOSEN
from ..faces.face import Face
from ..faces.track import thumbnails
from ..osediff.upscale import result_size
from ..pictures.geometry import compose, scaling
from .enhancer import Enhancer
from .restorer import Restorer, describe_faces
from .upscaler import Upscaler

log = logging.getLogger(__name__)


# Most pixels and most frames of a window.
WINDOW, MAX_FRAMES = 24 * 1024**2, 64
# The encoder for each codec. Any other codec is encoded as H.264, or as the container prefers.
ENCODERS = {
    "h264": "libx264",
    "hevc": "libx265",
    "vp9": "libvpx-vp9",
    "vp8": "libvpx-vp9",
    "av1": "libsvtav1",
    "ffv1": "ffv1",
    "prores": "prores_ks",
}
FALLBACK = "libx264"
COPIED = ("audio", "subtitle")
QUARTER = 90


def restore(
    source: Path,
    target: Path,
    restorer: Restorer,
    crf: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Restores the video `source` into `target` and returns its part of the report.

    Raises OSDFaceError for a file that is no video, and av.FFmpegError for one that is damaged.

    source: the video.
    target: its extension names the container.
    restorer: the networks.
    crf: the encoder's constant rate factor, 0..51; less is better and larger.
    progress: called with the steps just done and the steps in all, two for a frame, 0 where
        unknown.
    """
    first, size, count, everyone, verdicts = _find(source, restorer, progress)
    chosen = [face for face, verdict in zip(everyone, verdicts, strict=True) if verdict == CHOSEN]
    notes: dict[tuple[int, int], str] = {}
    start = 0

    def restored(window: list[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        nonlocal start
        stop = start + len(window)
        here = [replace(face, frame=face.frame - start) for face in _between(chosen, start, stop)]
        if here:
            pixels = torch.stack([_pixels(frame) for frame in window])
            after, mask, said = restorer.frames(pixels, here)
            notes.update({(frame + start, number): note for (frame, number), note in said.items()})
            for frame, picture, changed in zip(window, after, mask, strict=True):
                yield (
                    _replace_pixels(frame, picture, changed > 0)
                    if bool((changed > 0).any())
                    else frame
                )
        else:
            yield from window
        start = stop
        progress(len(window), 2 * count)

    with av.open(str(source)) as container, av.open(str(target), "w") as out:
        stream = _stream(container, source)
        encoded = _encoder(out, stream, first, (first.width, first.height), crf)
        codec = _transcode(container, out, encoded, stream, restored)
    _check_count(source, count, start)
    return {
        "frames": start,
        "codec": codec,
        "width": size[1],
        "height": size[0],
        "faces": describe_faces(everyone, verdicts, notes),
    }


def upscale(
    source: Path,
    target: Path,
    upscaler: Upscaler | Enhancer,
    crf: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Enlarges the video `source` into `target` and returns its part of the report.

    Faces, where they are wanted, are found in the frames as they were, followed through the whole
    video, and restored in the enlarged frames. Raises as `restore` does. A side that would be odd,
    which most encoders do not take, loses its last row or column.

    source: the video.
    target: its extension names the container.
    upscaler: the networks.
    crf: as for `restore`.
    progress: as for `restore`.
    """
    restorer = upscaler.restorer
    everyone: tuple[Face, ...] = ()
    verdicts: tuple[str, ...] = ()
    if restorer is not None:
        first, size, count, everyone, verdicts = _find(source, restorer, progress)
    else:
        first, size, count = _measure(source)
    chosen = [face for face, verdict in zip(everyone, verdicts, strict=True) if verdict == CHOSEN]
    scale = upscaler.options.scale
    height, width = result_size(*size, scale)
    across, down = (side - side % 2 for side in result_size(first.width, first.height, scale))
    notes: dict[tuple[int, int], str] = {}
    start = 0

    def enlarged(window: list[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        nonlocal start
        for frame in window:
            picture = upscaler.enlarge(_pixels(frame)[None])
            here = [
                _scaled(replace(face, frame=0), width / size[1], height / size[0])
                for face in _between(chosen, start, start + 1)
            ]
            if restorer is not None and here:
                picture, _, said = restorer.frames(picture, here)
                notes.update({(start, number): note for (_, number), note in said.items()})
            yield _new_frame(frame, picture[0, : height - height % 2, : width - width % 2])
            start += 1
            progress(1 if restorer is not None else 2, 2 * count)

    with av.open(str(source)) as container, av.open(str(target), "w") as out:
        stream = _stream(container, source)
        encoded = _encoder(out, stream, first, (across, down), crf)
        codec = _transcode(container, out, encoded, stream, enlarged)
        says = {"frames": start, "codec": codec}
        turned = first.rotation // QUARTER % 2
        sides = (encoded.height, encoded.width) if turned else (encoded.width, encoded.height)
    if count:
        _check_count(source, count, start)
    return says | {
        "width": sides[0],
        "height": sides[1],
        "faces": describe_faces(everyone, verdicts, notes),
    }


def _between(faces: Sequence[Face], start: int, stop: int) -> Sequence[Face]:
    """The faces of the frames from `start` to before `stop`; they are in order of frames."""
    first, last = (
        bisect.bisect_left(faces, at, key=lambda face: face.frame) for at in (start, stop)
    )
    return faces[first:last]


def _scaled(face: Face, across: float, down: float) -> Face:
    """The face in a picture that was enlarged so."""
    x1, y1, x2, y2 = face.box
    return replace(
        face,
        box=(x1 * across, y1 * down, x2 * across, y2 * down),
        landmarks=tuple((x * across, y * down) for x, y in face.landmarks),
        matrix=compose(face.matrix, scaling(1 / across, 1 / down)),
    )


def _new_frame(frame: av.VideoFrame, picture: Tensor) -> av.VideoFrame:
    """The picture (H,W,3) in [0,1], upright, as a frame in the place of `frame`."""
    layout = _layout(frame)
    most = 65535 if layout == "rgb48le" else 255
    array = (picture * most).round().clamp(0, most).numpy()
    array = array.astype(np.uint16 if most > 255 else np.uint8)
    array = np.rot90(array, -(frame.rotation // QUARTER))
    drawn = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=layout)
    new = drawn.reformat(
        format=frame.format.name, dst_colorspace=frame.colorspace, dst_color_range=frame.color_range
    )
    new.pts, new.duration = frame.pts, frame.duration
    new.colorspace, new.color_range = frame.colorspace, frame.color_range
    return new


def _find(
    source: Path, restorer: Restorer, progress: Callable[[int, int], None]
) -> tuple[av.VideoFrame, tuple[int, int], int, tuple[Face, ...], tuple[str, ...]]:
    """The first pass: the first frame, height and width as it is shown, the number of frames, and
    all faces, each with a verdict. Arguments as for `restore`.
    """
    found: list[list[Any]] = []
    small = []
    first = None
    with av.open(str(source)) as container:
        stream = _stream(container, source)
        total = 2 * stream.frames
        size = 0, 0
        for window in _windows(container.decode(stream)):
            pixels = torch.stack([_pixels(frame) for frame in window])
            if size not in ((0, 0), pixels.shape[1:3]):
                raise OSDFaceError(
                    f"{source} changes its size midway; one size is wanted: take it apart."
                )
            size = pixels.shape[1], pixels.shape[2]
            first = first or window[0]
            found += restorer.detect(pixels)
            small.append(thumbnails(pixels))
            progress(len(window), total)
    if first is None:
        raise OSDFaceError(f"{source} holds no frames: it is damaged or of another kind.")
    everyone, verdicts = restorer.place_faces(found, torch.cat(small), size[1], size[0])
    return first, size, len(found), everyone, verdicts


def _measure(source: Path) -> tuple[av.VideoFrame, tuple[int, int], int]:
    """The first frame, height and width as it is shown, and the number of frames, 0 if unknown."""
    with av.open(str(source)) as container:
        stream = _stream(container, source)
        first = next(container.decode(stream), None)
        if first is None:
            raise OSDFaceError(f"{source} holds no frames: it is damaged or of another kind.")
        height, width = _pixels(first).shape[:2]
        return first, (height, width), stream.frames


def _check_count(source: Path, expected: int, count: int) -> None:
    if count != expected:
        raise OSDFaceError(
            f"{source} gave {expected} frames at first and {count} the second time: it is damaged."
        )


def _stream(container: Any, source: Path) -> Any:
    streams = [
        s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        raise OSDFaceError(f"{source} holds no video.")
    streams[0].thread_type = "AUTO"
    return streams[0]


def _windows(frames: Iterable[av.VideoFrame]) -> Iterator[list[av.VideoFrame]]:
    window: list[av.VideoFrame] = []
    for frame in frames:
        window.append(frame)
        pixels = len(window) * frame.width * frame.height
        if len(window) >= MAX_FRAMES or pixels >= WINDOW:
            yield window
            window = []
    if window:
        yield window


def _transcode(
    container: Any,
    out: Any,
    encoded: Any,
    stream: Any,
    restored: Callable[[list[av.VideoFrame]], Iterable[av.VideoFrame]],
) -> str:
    """Encodes the frames of `stream` as `restored` gives them, and copies the other streams.

    container: the video read.
    out: the video written.
    encoded: the stream of `out` that the frames go to.
    stream: the stream of `container` that they come from.
    restored: takes a window of frames and gives them restored.
    """
    out.metadata.update(container.metadata)
    copies = {}
    for other in container.streams:
        if other.type in COPIED:
            try:
                copies[other.index] = out.add_stream_from_template(other)
                copies[other.index].metadata.update(other.metadata)
            except ValueError:
                log.warning(
                    "%s: its %s track cannot be kept in this kind of file.",
                    container.name,
                    other.type,
                )
    time_base = stream.time_base

    def frames() -> Iterator[av.VideoFrame]:
        """Decodes the frames, and copies the packets of other streams that lie between them."""
        for packet in container.demux(stream, *(container.streams[index] for index in copies)):
            if packet.stream.index not in copies:
                yield from packet.decode()
            elif packet.dts is not None:
                packet.stream = copies[packet.stream.index]
                out.mux(packet)

    for window in _windows(frames()):
        for frame in restored(window):
            frame.time_base = time_base
            frame.pict_type = 0
            fits = (
                frame
                if frame.format.name == encoded.pix_fmt
                else frame.reformat(format=encoded.pix_fmt)
            )
            for packet in encoded.encode(fits):
                out.mux(packet)
    for packet in encoded.encode(None):
        out.mux(packet)
    return str(encoded.codec_context.name)


def _encoder(
    out: Any,
    stream: Any,
    first: av.VideoFrame,
    size: tuple[int, int],
    crf: int,
) -> Any:
    """The stream of `out` that takes frames like `first`, of this width and height.

    out: the video written.
    stream: of the video read.
    first: its first frame.
    size: width and height of the frames.
    crf: as for `restore`.
    """
    name = stream.codec_context.codec.canonical_name
    encoder = ENCODERS.get(name, FALLBACK)
    if av.codec.Codec(encoder, "w").canonical_name not in out.supported_codecs:
        encoder = (
            FALLBACK
            if "h264" in out.supported_codecs
            else ENCODERS.get(out.default_video_codec, out.default_video_codec)
        )
    options = {} if encoder in ("ffv1", "prores_ks") else {"crf": str(crf)}
    if encoder == "libvpx-vp9":
        options |= {"b": "0", "row-mt": "1"}
    encoded = out.add_stream(
        encoder, rate=stream.average_rate or stream.guessed_rate or Fraction(25), options=options
    )
    context = encoded.codec_context
    context.width, context.height = size
    known = [str(f.name) for f in av.codec.Codec(encoder, "w").video_formats or ()]
    context.pix_fmt = first.format.name if first.format.name in known else "yuv420p"
    context.time_base = encoded.time_base = stream.time_base
    if stream.sample_aspect_ratio:
        context.sample_aspect_ratio = stream.sample_aspect_ratio
    for attribute in ("color_range", "colorspace", "color_primaries", "color_trc"):
        setattr(context, attribute, getattr(stream.codec_context, attribute))
    encoded.metadata.update(stream.metadata)
    if first.rotation:
        if not hasattr(encoded, "set_display_rotation"):
            raise OSDFaceError(
                "The video is to be shown turned, which this PyAV cannot write down: update it "
                "(pip install -U av)."
            )
        encoded.set_display_rotation(first.rotation)
    return encoded


def _layout(frame: av.VideoFrame) -> str:
    return "rgb48le" if frame.format.components[0].bits > 8 else "rgb24"


def _pixels(frame: av.VideoFrame) -> Tensor:
    """The frame as it is shown, (H,W,3) fp32 in [0,1]."""
    array = frame.to_ndarray(format=_layout(frame))
    array = np.rot90(array, frame.rotation // QUARTER)
    return torch.from_numpy(array.astype(np.float32) / (65535 if array.dtype == np.uint16 else 255))


def _replace_pixels(frame: av.VideoFrame, picture: Tensor, changed: Tensor) -> av.VideoFrame:
    """`frame` with `picture` (H,W,3) where `changed` (H,W) is true.

    Its other values stay, untouched by any conversion.
    """
    layout = _layout(frame)
    most = 65535 if layout == "rgb48le" else 255
    turns = -(frame.rotation // QUARTER)
    array = (
        (picture * most)
        .round()
        .clamp(0, most)
        .numpy()
        .astype(np.uint16 if most > 255 else np.uint8)
    )
    drawn = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(array, turns)), format=layout)
    new = drawn.reformat(
        format=frame.format.name, dst_colorspace=frame.colorspace, dst_color_range=frame.color_range
    )
    where = np.rot90(changed.numpy(), turns)
    components = frame.format.components
    for index, (before, after) in enumerate(zip(frame.planes, new.planes, strict=True)):
        inside = [c for c in components if c.plane == index]
        pixel = sum((c.bits + 7) // 8 for c in inside)
        if before.width * pixel > min(before.line_size, after.line_size):
            break  # a packed format in which a component has no bytes of its own
        if any(c.is_alpha for c in inside) and len(inside) == 1:
            after.update(bytes(before))
            continue
        old = np.frombuffer(memoryview(before), np.uint8).reshape(before.height, before.line_size)[
            :, : before.width * pixel
        ]
        fresh = (
            np.frombuffer(memoryview(after), np.uint8).reshape(after.height, after.line_size).copy()
        )
        keep = ~_pool_mask(where, before.height, before.width)
        visible = fresh[:, : before.width * pixel].reshape(before.height, before.width, pixel)
        visible[keep] = old.reshape(before.height, before.width, pixel)[keep]
        after.update(fresh.tobytes())
    new.pts, new.duration = frame.pts, frame.duration
    new.colorspace, new.color_range = frame.colorspace, frame.color_range
    return new


def _pool_mask(where: np.ndarray, height: int, width: int) -> np.ndarray:
    """`where` at a plane's resolution: true where any pixel of a sample is."""
    down, across = -(-where.shape[0] // height), -(-where.shape[1] // width)
    padded = np.pad(
        where, ((0, height * down - where.shape[0]), (0, width * across - where.shape[1]))
    )
    return np.any(padded.reshape(height, down, width, across), axis=(1, 3))
