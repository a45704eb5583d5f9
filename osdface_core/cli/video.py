"""Restores or enlarges a video, with a window of its frames in memory at a time.

The first pass finds the faces of all frames, which are then followed through the whole video at
once, so that no window's border splits a person in two. The second restores and encodes. Sound and
subtitles are copied; size, rate and time of each frame stay. A frame of an interlaced video is two
moments: each of its fields is searched and restored as the picture that it is, and woven in again.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from ..errors import OSDFaceError
from ..faces.choose import CHOSEN, describe_faces
from ..faces.face import Face
from ..faces.track import thumbnails
from ..osediff.upscale import result_size
from ..pictures.geometry import compose, scaling
from .encoding import Encoding, FieldMarker, choose, lines_of
from .enhancer import Enhancer
from .frames import windows
from .restorer import Restorer
from .upscaler import Upscaler

log = logging.getLogger(__name__)


QUARTER = 90
TOP, BOTTOM = 0, 1
# Containers whose times go on from what was broadcast before.
PROGRAMS = ("mpegts", "mpeg", "vob", "dvd", "svcd")


@dataclass(frozen=True)
class _Moment:
    """What a video shows at one time: a frame, or a field of an interlaced one.

    frame: the frame, or the field's lines alone, at half its height.
    number: of the frame in the video, from 0.
    parity: TOP or BOTTOM of a field, whose lines are every second one from there.
    rotation: how the frame is to be shown turned, in degrees.
    """

    frame: av.VideoFrame
    number: int
    parity: int | None = None
    rotation: int = 0

    def pixels(self) -> Tensor:
        """As it is shown, (H,W,3) fp32 in [0,1]; between a field's lines stands their mean."""
        lines = _unturned_pixels(self.frame)
        if self.parity is not None:
            lines = _both_fields(lines, self.parity)
        turned = torch.rot90(lines, self.rotation // QUARTER, (0, 1))
        return turned.contiguous()

    def replaced(self, picture: Tensor, changed: Tensor) -> av.VideoFrame:
        """The frame or field with `picture` (H,W,3) where `changed` (H,W) is true."""
        turns = -(self.rotation // QUARTER)
        picture, changed = (torch.rot90(one, turns, (0, 1)) for one in (picture, changed))
        if self.parity is not None:
            picture, changed = picture[self.parity :: 2], changed[self.parity :: 2]
        return _replace_pixels(self.frame, picture.contiguous(), changed.contiguous())


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
    encoding = choose(source, target, crf)
    seen = _find(source, restorer, encoding, progress)
    if seen.interlaced and not encoding.fields:
        encoding = choose(source, target, crf, fields="tff")
    chosen = [
        face
        for face, verdict in zip(seen.everyone, seen.verdicts, strict=True)
        if verdict == CHOSEN
    ]
    notes: dict[tuple[int, int], str] = {}
    start = frames = 0

    def restored(window: list[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        nonlocal start, frames
        moments = list(_moments(window, frames, encoding.fields))
        stop = start + len(moments)
        here = [replace(face, frame=face.frame - start) for face in _between(chosen, start, stop)]
        fresh = [moment.frame for moment in moments]
        if here:
            pixels = torch.stack([moment.pixels() for moment in moments])
            after, mask, said = restorer.frames(pixels, here)
            notes.update({(frame + start, number): note for (frame, number), note in said.items()})
            fresh = [
                moment.replaced(picture, changed > 0) if bool((changed > 0).any()) else moment.frame
                for moment, picture, changed in zip(moments, after, mask, strict=True)
            ]
        given = iter(zip(moments, fresh, strict=True))
        for frame in window:
            moment, one = next(given)
            if moment.parity is None:
                yield one
            else:
                _, other = next(given)
                yield _woven(frame, *((one, other) if moment.parity == TOP else (other, one)))
        start = stop
        frames += len(window)
        progress(len(window), 2 * seen.frames)

    with av.open(str(source)) as container, encoding.open(str(target)) as out:
        codec = _transcode(container, out, encoding, source, seen.first, restored)
    _check_count(source, seen.frames, frames)
    return {
        "frames": frames,
        "codec": codec,
        "width": seen.size[1],
        "height": seen.size[0],
        **({"interlaced": encoding.fields} if encoding.fields else {}),
        "faces": seen.describe(notes),
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
    first, size, count = _measure(source)
    scale = upscaler.options.scale
    across, down = (side - side % 2 for side in result_size(first.width, first.height, scale))
    encoding = choose(source, target, crf, (across, down))
    seen = _Seen(first, size, count)
    if restorer is not None:
        seen = _find(source, restorer, encoding, progress)
        count = seen.frames
    _check_progressive(source, seen.interlaced or first.interlaced_frame)
    chosen = [
        face
        for face, verdict in zip(seen.everyone, seen.verdicts, strict=True)
        if verdict == CHOSEN
    ]
    height, width = result_size(*size, scale)
    notes: dict[tuple[int, int], str] = {}
    start = 0

    def enlarged(window: list[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        nonlocal start
        for frame in window:
            _check_progressive(source, frame.interlaced_frame)
            picture = upscaler.enlarge(
                _Moment(frame, start, rotation=frame.rotation).pixels()[None]
            )
            here = [
                scaled(replace(face, frame=0), width / size[1], height / size[0])
                for face in _between(chosen, start, start + 1)
            ]
            if restorer is not None and here:
                picture, _, said = restorer.frames(picture, here)
                notes.update({(start, number): note for (_, number), note in said.items()})
            yield _new_frame(frame, picture[0, : height - height % 2, : width - width % 2])
            start += 1
            progress(1 if restorer is not None else 2, 2 * count)

    with av.open(str(source)) as container, encoding.open(str(target)) as out:
        codec = _transcode(container, out, encoding, source, first, enlarged)
    if count:
        _check_count(source, count, start)
    turned = first.rotation // QUARTER % 2
    return {
        "frames": start,
        "codec": codec,
        "width": down if turned else across,
        "height": across if turned else down,
        "faces": seen.describe(notes),
    }


def _check_progressive(source: Path, interlaced: bool) -> None:
    if interlaced:
        raise OSDFaceError(
            f"{source} is interlaced, of which only faces are restored: deinterlace it first "
            "(ffmpeg -i IN -vf bwdif OUT)."
        )


def _between(faces: Sequence[Face], start: int, stop: int) -> Sequence[Face]:
    """The faces of the frames from `start` to before `stop`; they are in order of frames."""
    first, last = (
        bisect.bisect_left(faces, at, key=lambda face: face.frame) for at in (start, stop)
    )
    return faces[first:last]


def scaled(face: Face, across: float, down: float) -> Face:
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


@dataclass(frozen=True)
class _Seen:
    """What the first pass saw.

    first: the first frame.
    size: height and width as it is shown.
    frames: their number, 0 if unknown.
    interlaced: whether any frame is.
    everyone: all faces, by moment.
    verdicts: for each of them "chosen", or why not.
    moments: the frame of each moment, and which of its fields it is.
    """

    first: av.VideoFrame
    size: tuple[int, int]
    frames: int
    interlaced: bool = False
    everyone: tuple[Face, ...] = ()
    verdicts: tuple[str, ...] = ()
    moments: tuple[tuple[int, int | None], ...] = ()

    def describe(self, notes: dict[tuple[int, int], str]) -> list[dict[str, Any]]:
        """The faces for the report, by frame; of an interlaced video with their field."""
        faces = describe_faces(self.everyone, self.verdicts, notes)
        for face in faces:
            face["frame"], parity = self.moments[face["frame"]]
            if parity is not None:
                face["field"] = ("top", "bottom")[parity]
        return faces


def _find(
    source: Path,
    restorer: Restorer,
    encoding: Encoding,
    progress: Callable[[int, int], None],
) -> _Seen:
    """The first pass. Arguments as for `restore`; encoding: tells which field comes first."""
    found: list[list[Any]] = []
    small = []
    first = None
    numbers: list[tuple[int, int | None]] = []
    frames, interlaced = 0, False
    with av.open(str(source)) as container:
        stream = video_stream(container, source)
        total = 2 * stream.frames
        size = 0, 0
        for window in _windows(container.decode(stream)):
            first = first or window[0]
            interlaced = interlaced or any(frame.interlaced_frame for frame in window)
            fields = encoding.fields or ("tff" if interlaced else "")
            moments = list(_moments(window, frames, fields))
            seen = [moment.pixels() for moment in moments]
            for one in seen:
                if size not in ((0, 0), one.shape[:2]):
                    raise OSDFaceError(
                        f"{source} changes its size midway; one size is wanted: take it apart."
                    )
                size = one.shape[0], one.shape[1]
            pixels = torch.stack(seen)
            numbers += [(moment.number, moment.parity) for moment in moments]
            frames += len(window)
            found += restorer.detect(pixels)
            small.append(thumbnails(pixels))
            progress(len(window), total)
    if first is None:
        raise OSDFaceError(f"{source} holds no frames: it is damaged or of another kind.")
    everyone, verdicts = restorer.place_faces(found, torch.cat(small), size[1], size[0])
    return _Seen(first, size, frames, interlaced, everyone, verdicts, tuple(numbers))


def _moments(window: list[av.VideoFrame], start: int, fields: str) -> Iterator[_Moment]:
    """The moments of frames: two of an interlaced one, in the order in which they are shown.

    start: the first one's number. fields: which field comes first, `tff` or `bff`.
    """
    for number, frame in enumerate(window, start):
        if not (fields and frame.interlaced_frame):
            yield _Moment(frame, number, rotation=frame.rotation)
            continue
        for parity in (TOP, BOTTOM) if fields == "tff" else (BOTTOM, TOP):
            yield _Moment(_field(frame, parity), number, parity, frame.rotation)


def _field(frame: av.VideoFrame, parity: int) -> av.VideoFrame:
    """The field's lines of a frame, in each of its planes."""
    field = av.VideoFrame(frame.width, (frame.height + 1) // 2, frame.format.name)
    for whole, half in zip(frame.planes, field.planes, strict=True):
        lines = lines_of(whole)[parity::2]
        width = min(whole.line_size, half.line_size)
        fresh = np.zeros((half.height, half.line_size), np.uint8)
        # The lower field of an odd height has a line less.
        fresh[:, :width] = lines[np.minimum(np.arange(half.height), len(lines) - 1), :width]
        half.update(fresh.tobytes())
    field.pts, field.time_base = frame.pts, frame.time_base
    field.colorspace, field.color_range = frame.colorspace, frame.color_range
    return field


def _woven(frame: av.VideoFrame, top: av.VideoFrame, bottom: av.VideoFrame) -> av.VideoFrame:
    """`frame` with the lines of these fields."""
    woven = av.VideoFrame(frame.width, frame.height, frame.format.name)
    for whole, *halves in zip(woven.planes, top.planes, bottom.planes, strict=True):
        fresh = np.zeros((whole.height, whole.line_size), np.uint8)
        for parity, half in enumerate(halves):
            place = fresh[parity::2]
            width = min(whole.line_size, half.line_size)
            place[:, :width] = lines_of(half)[: len(place), :width]
        whole.update(fresh.tobytes())
    woven.pts, woven.time_base = frame.pts, frame.time_base
    woven.colorspace, woven.color_range = frame.colorspace, frame.color_range
    return woven


def _both_fields(lines: Tensor, parity: int) -> Tensor:
    """A field (h,W,3) at its frame's height, (2h,W,3)."""
    whole = lines.repeat_interleave(2, 0)
    if parity == TOP:
        whole[1:-1:2] = (lines[:-1] + lines[1:]) / 2
    else:
        whole[2::2] = (lines[:-1] + lines[1:]) / 2
    return whole


def _measure(source: Path) -> tuple[av.VideoFrame, tuple[int, int], int]:
    """The first frame, height and width as it is shown, and the number of frames, 0 if unknown."""
    with av.open(str(source)) as container:
        stream = video_stream(container, source)
        first = next(container.decode(stream), None)
        if first is None:
            raise OSDFaceError(f"{source} holds no frames: it is damaged or of another kind.")
        height, width = _Moment(first, 0, rotation=first.rotation).pixels().shape[:2]
        return first, (height, width), stream.frames


def _check_count(source: Path, expected: int, count: int) -> None:
    if count != expected:
        raise OSDFaceError(
            f"{source} gave {expected} frames at first and {count} the second time: it is damaged."
        )


def video_stream(container: Any, source: Path) -> Any:
    """The stream of a video's frames. Raises OSDFaceError where there is none."""
    streams = [
        s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        raise OSDFaceError(f"{source} holds no video.")
    streams[0].thread_type = "AUTO"
    return streams[0]


def _windows(frames: Iterable[av.VideoFrame]) -> Iterator[list[av.VideoFrame]]:
    return windows(frames, lambda frame: frame.width * frame.height)


def _transcode(
    container: Any,
    out: Any,
    encoding: Encoding,
    source: Path,
    first: av.VideoFrame,
    restored: Callable[[list[av.VideoFrame]], Iterable[av.VideoFrame]],
) -> str:
    """Encodes the frames as `restored` gives them, and copies tracks and chapters.

    container: the video read.
    out: the video written.
    encoding: how.
    source: the file that is read.
    first: its first frame.
    restored: takes a window of frames and gives them restored.
    """
    stream = video_stream(container, source)
    encoded = encoding.add_to(out, stream, first)
    out.metadata.update(container.metadata)
    copies = encoding.add_copies(out, container)
    if hasattr(container, "chapters") and (chapters := container.chapters()):
        out.set_chapters(chapters)
    out.start_encoding()
    time_base = stream.time_base
    # Streams for broadcast begin at any hour, files of other kinds at 0.
    is_late = container.format.name in PROGRAMS and encoding.container not in PROGRAMS
    begin = Fraction(container.start_time or 0, av.time_base) if is_late else Fraction(0)
    mark = FieldMarker(encoding) if encoding.fields else None

    def frames() -> Iterator[av.VideoFrame]:
        """Decodes the frames, and copies the packets of other streams that lie between them."""
        for packet in container.demux(stream, *(container.streams[index] for index in copies)):
            if packet.stream.index not in copies:
                yield from packet.decode()
            elif packet.dts is not None:
                late = round(begin / packet.time_base)
                packet.dts -= late
                packet.pts = None if packet.pts is None else packet.pts - late
                packet.stream = copies[packet.stream.index]
                out.mux(packet)

    last = None
    for window in _windows(frames()):
        for frame in restored(window):
            frame.pict_type = 0
            fits = (
                frame
                if frame.format.name == encoding.pix_fmt
                else frame.reformat(format=encoding.pix_fmt)
            )
            if fits.pts is not None:
                fits.pts -= round(begin / time_base)
            fits = encoding.timed(fits, time_base, last)
            last = fits.pts
            for packet in encoded.encode(mark(fits) if mark else fits):
                out.mux(packet)
    for packet in encoded.encode(None):
        out.mux(packet)
    return str(encoded.codec_context.name)


def _layout(frame: av.VideoFrame) -> str:
    return "rgb48le" if frame.format.components[0].bits > 8 else "rgb24"


def _unturned_pixels(frame: av.VideoFrame) -> Tensor:
    """The frame as it is stored, (H,W,3) fp32 in [0,1]."""
    array = frame.to_ndarray(format=_layout(frame))
    return torch.from_numpy(array.astype(np.float32) / (65535 if array.dtype == np.uint16 else 255))


def _replace_pixels(frame: av.VideoFrame, picture: Tensor, changed: Tensor) -> av.VideoFrame:
    """`frame` with `picture` (H,W,3) where `changed` (H,W) is true, both as it is stored.

    Its other values stay, untouched by any conversion.
    """
    layout = _layout(frame)
    most = 65535 if layout == "rgb48le" else 255
    array = (
        (picture * most)
        .round()
        .clamp(0, most)
        .numpy()
        .astype(np.uint16 if most > 255 else np.uint8)
    )
    drawn = av.VideoFrame.from_ndarray(array, format=layout)
    new = drawn.reformat(
        format=frame.format.name, dst_colorspace=frame.colorspace, dst_color_range=frame.color_range
    )
    where = changed.numpy()
    components = frame.format.components
    for index, (before, after) in enumerate(zip(frame.planes, new.planes, strict=True)):
        inside = [c for c in components if c.plane == index]
        pixel = sum((c.bits + 7) // 8 for c in inside)
        if before.width * pixel > min(before.line_size, after.line_size):
            break  # a packed format in which a component has no bytes of its own
        if any(c.is_alpha for c in inside) and len(inside) == 1:
            after.update(bytes(before))
            continue
        old = lines_of(before)[:, : before.width * pixel]
        fresh = lines_of(after).copy()
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
