"""Restores a video in two passes over its frames, with a window of them in memory at a time.

The first pass finds the faces of all frames, which are then followed through the whole video at
once, so that no window's border splits a person in two. The second restores and encodes. Sound and
subtitles are copied; size, rate and time of each frame stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
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
from ..faces.track import thumbnails
from .restorer import Restorer, describe_faces

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
    chosen = [face for face, verdict in zip(everyone, verdicts, strict=True) if verdict == CHOSEN]
    notes: dict[tuple[int, int], str] = {}
    start = 0

    def restored(window: list[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        nonlocal start
        stop = start + len(window)
        here = [
            replace(face, frame=face.frame - start) for face in chosen if start <= face.frame < stop
        ]
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
        progress(len(window), 2 * len(found))

    with av.open(str(source)) as container, av.open(str(target), "w") as out:
        stream = _stream(container, source)
        codec = _transcode(container, out, _encoder(out, stream, first, crf), stream, restored)
    if start != len(found):
        raise OSDFaceError(
            f"{source} gave {len(found)} frames at first and {start} the second time: it is "
            "damaged."
        )
    return {
        "frames": start,
        "codec": codec,
        "width": size[1],
        "height": size[0],
        "faces": describe_faces(everyone, verdicts, notes),
    }


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


def _encoder(out: Any, stream: Any, first: av.VideoFrame, crf: int) -> Any:
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
    context.width, context.height = first.width, first.height
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
