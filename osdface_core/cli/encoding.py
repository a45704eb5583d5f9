"""How a video is encoded again: the codec it has where the container holds it, tried beforehand.

What an encoder and a container take together (sizes, pixel formats, rates, fields, tracks) is known
to them alone. So a few frames are encoded into memory before the work begins, and the first way
that holds is taken.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from ..errors import OSDFaceError

log = logging.getLogger(__name__)

# SVT-AV1 and x265 write to the terminal by themselves.
os.environ.setdefault("SVT_LOG", "1")
_X265_QUIET = "log-level=none"

FALLBACK = "libx264"
# The encoder for each codec, by how it is told the quality: by its constant rate factor, by the
# quantiser of MPEG's older codecs, or not at all, since it loses nothing or has one rate.
RATED = {
    "h264": FALLBACK,
    "hevc": "libx265",
    "vp9": "libvpx-vp9",
    "vp8": "libvpx",
    "av1": "libsvtav1",
}
QUANTISED = {
    "mpeg1video": "mpeg1video",
    "mpeg2video": "mpeg2video",
    "mpeg4": "mpeg4",
    "msmpeg4v2": "msmpeg4v2",
    "msmpeg4v3": "msmpeg4",
    "wmv1": "wmv1",
    "wmv2": "wmv2",
    "flv1": "flv",
    "h263": "h263",
    "mjpeg": "mjpeg",
}
OWN_NAMES = (
    "ffv1",
    "huffyuv",
    "ffvhuff",
    "utvideo",
    "magicyuv",
    "qtrle",
    "rawvideo",
    "dvvideo",
    "png",
    "v210",
    "v410",
    "r210",
)
EXACT = {
    "prores": "prores_ks",
    **{name: name for name in OWN_NAMES},
}
ENCODERS = RATED | QUANTISED | EXACT
# Where neither the codec itself nor H.264 is held.
LAST_RESORTS = ("mpeg2video", "mpeg1video", "libvpx", "mpeg4")
# One step of an MPEG quantiser in the units of an encoder's global quality (FF_QP2LAMBDA).
QUANTISER = 118
# What decoders allow, by which sizes are told apart: only every second line belongs together.
INTERLACED = {
    FALLBACK: {},
    "mpeg2video": {"flags": "+ildct+ilme"},
    "mpeg4": {"flags": "+ildct+ilme"},
    "prores_ks": {"flags": "+ildct"},
    "dvvideo": {},
    "ffv1": {},
    "mjpeg": {},
    **{name: {} for name in ("huffyuv", "ffvhuff", "utvideo", "rawvideo", "v210")},
}
# Containers by extension where FFmpeg knows none by it, or another than is meant.
FORMATS = {
    ".vob": "vob",
    ".m2t": "mpegts",
    ".tod": "mpegts",
    ".mod": "vob",
    ".divx": "avi",
    ".m4v": "ipod",
    ".ogm": "ogg",
}
TRANSPORT, PROGRAM = "mpegts", ("mpeg", "vob", "dvd", "svcd")
# In these a frame has no time but its number.
COUNTED = ("avi", "dv", "mxf")
TRIAL_FRAMES, LOOKED_AT = 3, 500
COPIED = ("audio", "subtitle")
# FFmpeg's orders of fields in which the top one is shown first, and the bottom one; 1 is
# progressive and 0 unknown.
TOP_FIRST, BOTTOM_FIRST = (2, 5), (3, 4)


@dataclass(frozen=True)
class Encoding:
    """How the frames go into the new file.

    container: its format.
    container_options: of its muxer.
    encoder: its name.
    pix_fmt: the pixel format.
    options: of the encoder.
    rate: frames a second.
    time_base: of the encoder.
    size: width and height.
    fields: `tff` or `bff`, the field that comes first, or nothing for a progressive video.
    left_out: the indices of the tracks that the file cannot hold.
    """

    container: str
    container_options: dict[str, str]
    encoder: str
    pix_fmt: str
    options: dict[str, str]
    rate: Fraction
    time_base: Fraction
    size: tuple[int, int]
    fields: str = ""
    left_out: frozenset[int] = frozenset()

    def open(self, target: Any) -> Any:
        """The file `target` or a file object as a container to write into."""
        return av.open(target, "w", format=self.container, options=self.container_options)

    def add_to(self, out: Any, stream: Any, first: av.VideoFrame) -> Any:
        """Adds the stream that takes frames like `first` of `stream` to `out`, and returns it."""
        encoded = out.add_stream(self.encoder, rate=self.rate, options=dict(self.options))
        context = encoded.codec_context
        context.width, context.height = self.size
        context.pix_fmt = self.pix_fmt
        context.time_base = encoded.time_base = self.time_base
        if stream.sample_aspect_ratio:
            context.sample_aspect_ratio = stream.sample_aspect_ratio
        for attribute in ("color_range", "colorspace", "color_primaries", "color_trc"):
            setattr(context, attribute, getattr(stream.codec_context, attribute))
        encoded.metadata.update(stream.metadata)
        if first.rotation:
            if not hasattr(encoded, "set_display_rotation"):
                raise OSDFaceError(
                    "The video is to be shown turned, which this PyAV cannot write down: update "
                    "it (pip install -U av)."
                )
            encoded.set_display_rotation(first.rotation)
        return encoded

    def add_copies(self, out: Any, container: Any) -> dict[int, Any]:
        """Adds the tracks that are copied to `out`; by their indices in `container`."""
        copies = {}
        for other in container.streams:
            if other.type in COPIED and other.index not in self.left_out:
                copies[other.index] = out.add_stream_from_template(other)
                copies[other.index].metadata.update(other.metadata)
        return copies

    def timed(self, frame: av.VideoFrame, time_base: Fraction, last: int | None) -> av.VideoFrame:
        """The frame with its time in the encoder's own units, later than `last`."""
        if frame.pts is None:
            pts = 0 if last is None else last + max(1, round(1 / self.rate / self.time_base))
        else:
            pts = round(frame.pts * time_base / self.time_base)
        frame.pts = pts if last is None else max(pts, last + 1)
        frame.time_base = self.time_base
        return frame


class FieldMarker:
    """Marks frames as interlaced, which PyAV itself does not write."""

    def __init__(self, encoding: Encoding) -> None:
        self.graph = av.filter.Graph()
        width, height = encoding.size
        source = self.graph.add_buffer(
            width=width,
            height=height,
            format=av.VideoFormat(encoding.pix_fmt, width, height),
            time_base=encoding.time_base,
        )
        marked = self.graph.add("setfield", encoding.fields)
        sink = self.graph.add("buffersink")
        source.link_to(marked)
        marked.link_to(sink)
        self.graph.configure()

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        self.graph.vpush(frame)
        return self.graph.vpull()


def field_order(stream: Any, frames: list[av.VideoFrame]) -> str:
    """Which field comes first, `tff` or `bff`, or nothing for a progressive video."""
    interlaced = [frame for frame in frames if frame.interlaced_frame]
    if not interlaced:
        return ""
    # A container's word goes before the frames': encoders leave theirs at its default.
    told = stream.codec_context.field_order
    if told in (*TOP_FIRST, *BOTTOM_FIRST):
        return "tff" if told in TOP_FIRST else "bff"
    for frame in interlaced:
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25)
        )
        parted = graph.add("separatefields")
        sink = graph.add("buffersink")
        source.link_to(parted)
        parted.link_to(sink)
        graph.configure()
        pts, frame.pts = frame.pts, 0
        try:
            graph.vpush(frame)
            field = _first_plane(graph.vpull())
        finally:
            frame.pts = pts
        whole = _first_plane(frame)
        top, bottom = (np.array_equal(field, whole[start::2]) for start in (0, 1))
        if top != bottom:
            return "tff" if top else "bff"
    return "tff"


def lines_of(plane: Any) -> np.ndarray:
    """The lines of a frame's plane as bytes (height, line_size), with what pads them at the end."""
    return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)


def _first_plane(frame: av.VideoFrame) -> np.ndarray:
    """Its bytes without what lies between the lines, which is not the picture's."""
    plane = frame.planes[0]
    return lines_of(plane)[:, : plane.width].copy()


def choose(
    source: Path, target: Path, crf: int, size: tuple[int, int] | None = None, fields: str = ""
) -> Encoding:
    """How the video `source` is encoded into `target`, tried with its first frames.

    Warns of tracks that the container cannot hold. Raises OSDFaceError where no encoder fits.

    target: its extension names the container.
    crf: the constant rate factor, 0..51.
    size: width and height where they change.
    fields: `tff` or `bff` where it is known that the video is interlaced.
    """
    from .video import video_stream

    with av.open(str(source)) as container:
        stream = video_stream(container, source)
        frames: list[av.VideoFrame] = []
        packets: dict[int, Any] = {}
        for packet in itertools.islice(container.demux(), LOOKED_AT):
            if packet.stream.index == stream.index:
                if len(frames) < TRIAL_FRAMES:
                    frames += packet.decode()
            elif packet.dts is not None and packet.stream.type in COPIED:
                packets.setdefault(packet.stream.index, packet)
        if not frames:
            frames = list(itertools.islice(container.decode(stream), TRIAL_FRAMES))
        if not frames:
            raise OSDFaceError(f"{source} holds no frames: it is damaged or of another kind.")
        if size is None:
            fields = fields or field_order(stream, frames)
            size = frames[0].width, frames[0].height
        why = ""
        for way in _ways(source, target, container, stream, frames, crf, size, fields):
            try:
                _try(way, stream, frames)
            except (av.FFmpegError, ValueError, OSError) as error:
                why = why or " ".join(str(error).split())
                log.debug("%s: %s", way, error)
                continue
            return _with_tracks(way, source, target, container, stream, frames, packets)
    if fields:
        raise OSDFaceError(
            f"{source} is interlaced, as which nothing that {target.suffix} holds can be encoded "
            "here: deinterlace it first (ffmpeg -i IN -vf bwdif OUT)."
        )
    raise OSDFaceError(
        f"{source} cannot be encoded into a {target.suffix} file of {size[0]} x {size[1]} px "
        f"({why}): name an output that ends in .mkv or .mp4."
    )


def _ways(
    source: Path,
    target: Path,
    container: Any,
    stream: Any,
    frames: list[av.VideoFrame],
    crf: int,
    size: tuple[int, int],
    fields: str,
) -> Iterator[Encoding]:
    """The ways to encode, from the one that keeps most."""
    codec = stream.codec_context.codec.canonical_name
    suffix = target.suffix.lower()
    name = FORMATS.get(suffix)
    options: dict[str, str] = {}
    if name is None:
        name = _guess(suffix)
    if name == "mpeg" and codec != "mpeg1video":
        name = "vob"
    if name == TRANSPORT:
        options["mpegts_m2ts_mode"] = str(int(_has_time_codes(source, suffix)))
    start = stream.start_time or 0
    if name in (TRANSPORT, *PROGRAM) and start * stream.time_base >= Fraction(1, 5):
        # The file's own start leaves the room that the muxer would add.
        options["max_delay"] = "0"
    default = _guess_default(name)
    first = frames[0]
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    encoders = [ENCODERS.get(codec), FALLBACK, ENCODERS.get(default), *LAST_RESORTS]
    for encoder in dict.fromkeys(filter(None, encoders)):
        if encoder not in av.codecs_available or (fields and encoder not in INTERLACED):
            continue
        known = av.codec.Codec(encoder, "w")
        shared = _quality(encoder, crf)
        if encoder == "libx265" and len(frames) < TRIAL_FRAMES:
            # It never sets the delay of its B-frames in so short a video.
            shared["x265-params"] += ":bframes=0"
        if fields:
            shared |= INTERLACED[encoder]
            if "flags" in INTERLACED[encoder] and "flags" in _quality(encoder, crf):
                shared["flags"] = _quality(encoder, crf)["flags"] + INTERLACED[encoder]["flags"]
            if encoder == FALLBACK:
                shared["x264-params"] = f"{fields}=1"
        legal = _legal_rate(known, rate)
        bases = [1 / legal] if name in COUNTED else [stream.time_base, 1 / legal]
        formats = _formats(known, first.format, fields)
        for pix_fmt, base in itertools.product(formats, dict.fromkeys(bases)):
            yield Encoding(name, options, encoder, pix_fmt, shared, legal, base, size, fields)


class _Named(io.BytesIO):
    """A file in memory by whose name FFmpeg tells the container."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def _guess(suffix: str) -> str:
    try:
        with av.open(_Named(f"x{suffix}"), "w") as container:
            return str(container.format.name)
    except ValueError as error:
        raise OSDFaceError(
            f"{suffix} is no container that can be written: name an output that ends in .mkv or "
            ".mp4."
        ) from error


def _guess_default(name: str) -> str:
    with av.open(io.BytesIO(), "w", format=name) as container:
        return str(container.default_video_codec)


def _has_time_codes(source: Path, suffix: str) -> bool:
    """Whether a transport stream has the four bytes of time before each packet, as cameras and
    Blu-rays write it.
    """
    with source.open("rb") as file:
        start = file.read(197)
    if start[:1] == b"G" and start[188:189] == b"G":
        return False
    return start[4:5] + start[196:197] == b"GG" or suffix in (".m2ts", ".mts")


def _quality(encoder: str, crf: int) -> dict[str, str]:
    if encoder in QUANTISED.values():
        # H.264's quantiser doubles with each six steps.
        quantiser = min(31, max(1, round(2 ** ((crf - 10) / 6))))
        return {"flags": "+qscale", "global_quality": str(QUANTISER * quantiser)}
    if encoder in EXACT.values():
        return {}
    options = {"crf": str(crf)}
    if encoder == "libvpx-vp9":
        options |= {"b": "0", "row-mt": "1"}
    elif encoder == "libvpx":
        options |= {"crf": str(max(4, crf)), "b": "100M"}
    elif encoder == "libx265":
        options |= {"x265-params": _X265_QUIET}
    return options


def _legal_rate(encoder: Any, rate: Fraction) -> Fraction:
    """The rate, or of those that the encoder has the one that leaves each frame a place."""
    rates = sorted(Fraction(one.numerator, one.denominator) for one in encoder.frame_rates or ())
    if not rates:
        return rate.limit_denominator(1001)
    nearest = min(rates, key=lambda one: abs(one - rate))
    if abs(nearest - rate) <= rate / 200:
        return nearest
    return next((one for one in rates if one >= rate), rates[-1])


def _formats(encoder: Any, given: av.VideoFormat, fields: str) -> list[str]:
    """The encoder's pixel formats, from the one nearest to what is given."""
    if not encoder.video_formats:
        return [given.name]
    deep = max(component.bits for component in given.components)

    def loss(form: av.VideoFormat) -> tuple[bool, ...]:
        bits = max(component.bits for component in form.components)
        grey = len(form.components) < 3
        alpha = any(c.is_alpha for c in given.components)
        return (
            form.name != given.name,
            form.has_palette,
            bits < deep,
            grey and len(given.components) >= 3,
            alpha and not any(c.is_alpha for c in form.components),
            form.is_rgb != given.is_rgb,
            # Fewer lines of colour would mix those of both fields.
            bool(fields) and form.chroma_height(16) < given.chroma_height(16),
            _chroma(form) > _chroma(given),
            form.name.startswith("yuvj") != given.name.startswith("yuvj"),
            bits > deep,
            _chroma(form) < _chroma(given),
        )

    return [form.name for form in sorted(encoder.video_formats, key=loss)]


def _chroma(form: av.VideoFormat) -> int:
    """How many pixels share a colour: 1, 2, 4 ..."""
    return 16 * 16 // max(1, form.chroma_width(16) * form.chroma_height(16))


def _try(way: Encoding, stream: Any, frames: list[av.VideoFrame]) -> None:
    """Encodes a few frames and reads them again. Raises what PyAV raises, or ValueError."""
    file = io.BytesIO()
    with way.open(file) as out:
        encoded = way.add_to(out, stream, frames[0])
        out.start_encoding()
        _encode_trial(way, out, encoded, stream, frames)
    file.seek(0)
    with av.open(file) as again:
        streams = again.streams.video
        seen = next(again.decode(streams[0]), None) if streams else None
        if seen is None:
            raise ValueError("nothing of it could be read again")
        if (seen.width, seen.height) != way.size:
            raise ValueError(f"the size became {seen.width} x {seen.height}")
        if way.fields and not seen.interlaced_frame:
            raise ValueError("the fields were lost")


def _encode_trial(
    way: Encoding, out: Any, encoded: Any, stream: Any, frames: list[av.VideoFrame]
) -> None:
    mark = FieldMarker(way) if way.fields else None
    last = None
    for one in frames:
        frame = one.reformat(*way.size, format=way.pix_fmt)
        frame.pts = None if last is None else last + max(1, round(1 / way.rate / way.time_base))
        frame.pict_type = 0
        frame = way.timed(frame, way.time_base, last)
        last = frame.pts
        out.mux(encoded.encode(mark(frame) if mark else frame))
    out.mux(encoded.encode(None))


def _with_tracks(
    way: Encoding,
    source: Path,
    target: Path,
    container: Any,
    stream: Any,
    frames: list[av.VideoFrame],
    packets: dict[int, Any],
) -> Encoding:
    """`way` without the tracks that its container cannot hold, each of which is named."""
    left_out = set()
    others = [other for other in container.streams if other.type in COPIED]
    for other in container.streams:
        if other.index != stream.index and other.type not in COPIED:
            log.warning("%s: its other %s track is left out.", source, other.type)
    for other in others:
        rest = frozenset(one.index for one in others if one is not other)
        alone = replace(way, left_out=rest)
        try:
            with alone.open(io.BytesIO()) as out:
                encoded = alone.add_to(out, stream, frames[0])
                copy = alone.add_copies(out, container)[other.index]
                out.start_encoding()
                packet = packets.get(other.index)
                if packet is not None:
                    packet.stream = copy
                    out.mux(packet)
                _encode_trial(alone, out, encoded, stream, frames)
        except (av.FFmpegError, ValueError, OSError) as error:
            log.debug("%s", error)
            left_out.add(other.index)
            log.warning(
                "%s: its %s track (%s) cannot be kept in a %s file and is left out.",
                source,
                other.type,
                other.codec_context.name if other.codec_context else "unknown",
                target.suffix,
            )
    return replace(way, left_out=frozenset(left_out))
