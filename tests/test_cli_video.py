"""The command line on videos of every container: codec, size, fields, times, tracks, chapters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers", reason="no diffusers: pip install -r requirements-dev.txt")
pytest.importorskip("av", reason="no PyAV: pip install -r requirements-dev.txt")
pytest.importorskip("imagecodecs", reason="no imagecodecs: pip install -r requirements-dev.txt")
pytest.importorskip("tifffile", reason="no tifffile: pip install -r requirements-dev.txt")

import av

from osdface_core import cli
from osdface_core.cli import video
from osdface_core.errors import OSDFaceError
from tests.test_cli import entries

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("away_from_home")
Run = Callable[..., int]
NTSC = Fraction(30000, 1001)


@pytest.fixture
def run() -> Run:
    """`restore` by the built-in model."""
    options = ["--model", "builtin", "--device", "cpu"]
    return lambda *arguments: cli.main(["restore", *map(str, arguments), *options])


@pytest.fixture(scope="session")
def portrait(photographs: Path) -> np.ndarray:
    """(236,256,3) with one face in it."""
    whole = Image.open(photographs / "astronaut.png").convert("RGB")
    return np.asarray(whole.crop((100, 12, 356, 248)))


def made(
    path: Path,
    pictures: list[np.ndarray],
    codec: str,
    pix_fmt: str,
    rate: Fraction = Fraction(25),
    options: dict[str, str] | None = None,
    container: str | None = None,
    sound: str = "",
    fields: str = "",
    chapters: list[Any] | None = None,
) -> None:
    """Makes a video. fields: `tff` or `bff`, as which frames are marked."""
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        track = out.add_stream(sound, rate=48000) if sound else None
        if track:
            track.layout = "stereo"
        if chapters:
            out.set_chapters(chapters)
        graph = None
        if fields:
            graph = av.filter.Graph()
            size = {"width": stream.width, "height": stream.height}
            form = av.VideoFormat(pix_fmt, stream.width, stream.height)
            source = graph.add_buffer(**size, format=form, time_base=1 / rate)
            marked, sink = graph.add("setfield", fields), graph.add("buffersink")
            source.link_to(marked)
            marked.link_to(sink)
            graph.configure()
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = i, 1 / rate
            if graph:
                graph.vpush(frame)
                frame = graph.vpull()
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if track:
            size = track.codec_context.frame_size or 1024
            for i in range(6):
                wave = np.sin(np.arange(size) / 20).astype(np.float32)
                form = track.codec_context.format.name
                both = np.stack([wave, wave])
                if form != "fltp":
                    both = (both.T.reshape(1, -1) * 9000).astype(np.int16)
                samples = av.AudioFrame.from_ndarray(both, format=form, layout="stereo")
                samples.sample_rate, samples.pts = 48000, size * i
                samples.time_base = Fraction(1, 48000)
                out.mux(track.encode(samples))
            out.mux(track.encode(None))


def seen(path: Path) -> tuple[dict[str, Any], list[np.ndarray], list[float]]:
    """What a video says of itself, its frames and their times from the first."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        says = {
            "container": container.format.name,
            "codec": stream.codec_context.codec.canonical_name,
            "size": (stream.width, stream.height),
            "interlaced": frames[0].interlaced_frame,
            "order": stream.codec_context.field_order,
            "tracks": sorted(one.type for one in container.streams),
            "rate": stream.average_rate,
        }
        times = [float((frame.pts - frames[0].pts) * stream.time_base) for frame in frames]
        return says, [frame.to_ndarray(format="rgb24").astype(int) for frame in frames], times


def moving(portrait: np.ndarray, width: int, height: int, count: int = 3) -> list[np.ndarray]:
    return [portrait[:height, 2 * i : 2 * i + width] for i in range(count)]


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "rate", "options"),
    [
        ("a.mpg", "mpeg2video", "yuv420p", 25, {"b": "4M"}),
        ("a.mpeg", "mpeg1video", "yuv420p", 25, {"b": "4M"}),
        ("a.vob", "mpeg2video", "yuv420p", NTSC, {"b": "4M"}),
        ("a.ts", "mpeg2video", "yuv422p", 50, {"b": "8M"}),
        ("a.ts", "libx264", "yuv420p", 25, {}),
        ("a.m2ts", "libx264", "yuv420p", 24, {}),
        ("a.ts", "libx265", "yuv420p", 25, {"x265-params": "log-level=none"}),
        ("a.avi", "mpeg4", "yuv420p", 25, {"b": "4M"}),
        ("a.wmv", "wmv2", "yuv420p", 25, {"b": "4M"}),
        ("a.mov", "prores_ks", "yuv422p10le", 25, {}),
        ("a.ogv", "libvpx", "yuv420p", 25, {"b": "4M"}),
    ],
)
def test_a_codec_stays_where_its_container_holds_it(
    name: str,
    codec: str,
    pix_fmt: str,
    rate: Any,
    options: dict[str, str],
    portrait: np.ndarray,
    run: Run,
    tmp_path: Path,
) -> None:
    source, target = tmp_path / f"in_{name}", tmp_path / f"out_{name}"
    container = "vob" if name.endswith(("mpg", "vob")) else None
    # The rate of a transport stream is an estimate.
    count = 6 if name.endswith("ts") else 3
    frames = moving(portrait, 208, 208, count)
    made(source, frames, codec, pix_fmt, Fraction(rate), options, container)
    assert run(source, target, "--report", tmp_path / "r.json") == 0
    faces = entries(tmp_path / "r.json")[source.name]["faces"]
    assert {one["frame"] for one in faces if one["verdict"] == "chosen"} == set(range(count))
    before, old, when = seen(source)
    after, new, when_after = seen(target)
    assert after == before
    assert when_after == pytest.approx(when, abs=2e-3)
    for one, other in zip(old, new, strict=True):
        difference = np.abs(one - other).max(-1)
        assert difference.max() > 24, "no face was restored"
        assert difference[-12:].mean() < 6, "what is no face has changed"


@pytest.mark.parametrize("stamped", [True, False])
def test_a_transport_stream_keeps_its_packets_sizes(
    stamped: bool, portrait: np.ndarray, run: Run, tmp_path: Path
) -> None:
    """Cameras write the time of arrival before each packet, television does not."""
    name = "a.m2ts" if stamped else "a.ts"
    made(tmp_path / name, moving(portrait, 128, 128, 4), "libx264", "yuv420p")
    assert run(tmp_path / name, tmp_path / f"out_{name}") == 0
    start = (tmp_path / f"out_{name}").read_bytes()
    first, step = (4, 192) if stamped else (0, 188)
    assert start[first : first + 3 * step : step] == b"GGG"


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "same"),
    [
        ("a.avi", "mjpeg", "yuvj420p", True),
        ("a.mkv", "libx264", "yuv444p", True),
        ("a.mpg", "mpeg2video", "yuv420p", True),
        ("a.avi", "rawvideo", "bgr24", True),
        # There is no encoder for it, and H.264 takes odd sizes without shared colours.
        ("a.avi", "cinepak", "rgb24", False),
    ],
)
def test_odd_sizes_stay(
    name: str,
    codec: str,
    pix_fmt: str,
    same: bool,
    portrait: np.ndarray,
    run: Run,
    tmp_path: Path,
) -> None:
    size = (204, 208) if codec == "cinepak" else (207, 205)
    source, target = tmp_path / f"in_{name}", tmp_path / f"out_{name}"
    container = "vob" if name.endswith("mpg") else None
    quality = {"b": "6M"} if codec in ("mjpeg", "mpeg2video") else {}
    made(source, moving(portrait, *size), codec, pix_fmt, options=quality, container=container)
    assert run(source, target) == 0
    before, old, _ = seen(source)
    after, new, _ = seen(target)
    assert after["size"] == before["size"] == size
    assert (after["codec"] == before["codec"]) is same
    assert len(new) == len(old)
    assert np.abs(np.stack(old) - np.stack(new)).max() > 24


def test_what_a_container_cannot_hold_is_said_before_a_frame_is_searched(
    portrait: np.ndarray,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made(tmp_path / "in.mkv", moving(portrait, 64, 64, 2), "ffv1", "yuv420p", sound="pcm_s16le")
    assert run(tmp_path / "in.mkv", tmp_path / "out.webm") == 0
    assert "in.mkv: its audio track (pcm_s16le) cannot be kept in a .webm file" in caplog.text
    assert seen(tmp_path / "out.webm")[0]["tracks"] == ["video"]
    monkeypatch.setattr(video, "_find", lambda *_: pytest.fail("frames are searched"))
    # H.263 has five sizes, none of them this one, and its container here no other codec.
    made(tmp_path / "wide.mkv", [np.zeros((16, 16, 3), np.uint8)] * 2, "ffv1", "bgr0")
    monkeypatch.setattr("osdface_core.cli.encoding.FALLBACK", "h263")
    monkeypatch.setattr("osdface_core.cli.encoding.LAST_RESORTS", ())
    assert run(tmp_path / "wide.mkv", tmp_path / "out.3gp") == 1
    assert "cannot be encoded into a .3gp file of 16 x 16 px" in caplog.text
    assert not (tmp_path / "out.3gp").exists()


def woven(portrait: np.ndarray, i: int, first: str) -> np.ndarray:
    """A frame of 208 px whose fields are two moments of a face that moves 6 px between them."""
    early, late = (portrait[:208, x : x + 208] for x in (12 * i, 12 * i + 6))
    frame = (early if first == "tff" else late).copy()
    frame[1::2] = (late if first == "tff" else early)[1::2]
    return frame


@pytest.mark.parametrize(
    ("first", "name", "codec", "options", "container"),
    [
        ("tff", "a.mkv", "libx264", {"crf": "8"}, None),
        ("bff", "a.mp4", "libx264", {"crf": "8"}, None),
        ("tff", "a.mpg", "mpeg2video", {"flags": "+ildct+ilme", "b": "12M"}, "vob"),
        ("bff", "a.mkv", "ffv1", {}, None),
    ],
)
def test_fields_are_restored_as_the_moments_they_are(
    first: str,
    name: str,
    codec: str,
    options: dict[str, str],
    container: str | None,
    portrait: np.ndarray,
    run: Run,
    tmp_path: Path,
) -> None:
    pictures = [woven(portrait, i, first) for i in range(3)]
    options = options | ({"x264-params": f"{first}=1"} if codec == "libx264" else {})
    source, target = tmp_path / f"in_{name}", tmp_path / f"out_{name}"
    made(source, pictures, codec, "yuv420p", Fraction(25), options, container, fields=first)
    assert run(source, target, "--report", tmp_path / "r.json") == 0
    before, old, when = seen(source)
    after, new, when_after = seen(target)
    assert before["interlaced"]
    assert after == before, "the fields' order, the codec or the rate has changed"
    assert when_after == pytest.approx(when, abs=2e-3)
    faces = [one for one in entries(tmp_path / "r.json")[source.name]["faces"]]
    order = ["top", "bottom"] if first == "tff" else ["bottom", "top"]
    assert [(one["frame"], one["field"]) for one in faces] == [
        (i, field) for i in range(3) for field in order
    ]
    # The face moves to the left by 6 px from each moment to the next.
    places = [(one["box"][0] + one["box"][2]) / 2 for one in faces]
    assert np.diff(places) == pytest.approx([-6] * 5, abs=2.5)
    for one, other in zip(old, new, strict=True):
        assert np.abs(one - other).max() > 24
        # Between the fields there is as much movement as before, not a mixture.
        combs = [np.abs(np.diff(f[40:160, 60:150].mean(-1), axis=0)).mean() for f in (one, other)]
        assert combs[1] > 0.7 * combs[0]


def test_interlaced_is_refused_where_it_cannot_be_kept(
    portrait: np.ndarray, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = [woven(portrait, i, "tff") for i in range(2)]
    made(tmp_path / "in.mkv", pictures, "ffv1", "yuv420p", fields="tff")
    assert run(tmp_path / "in.mkv", tmp_path / "out.webm") == 1
    assert "in.mkv is interlaced" in caplog.text
    assert "deinterlace it first" in caplog.text
    from osdface_core.cli.enhancer import Enhancer

    class Larger(Enhancer):
        def __init__(self) -> None:
            self.options = type("Options", (), {"scale": 2.0})()

    with pytest.raises(OSDFaceError, match="is interlaced"):
        video.upscale(
            tmp_path / "in.mkv", tmp_path / "out.mkv", Larger(), 16, lambda done, total: None
        )


@pytest.mark.parametrize(("fields", "wanted"), [("bff", "yuv422p"), ("", "yuv420p")])
def test_a_tapes_colours_stay_those_of_their_fields(
    fields: str, wanted: str, portrait: np.ndarray, tmp_path: Path
) -> None:
    """A tape's colours (4:1:1) have all lines. A format of half of them, which is right for a
    progressive video, would mix those of both fields.
    """
    from osdface_core.cli import encoding

    pictures = [woven(portrait, i, "bff") for i in range(2)]
    made(tmp_path / "in.mkv", pictures, "ffv1", "yuv411p", fields=fields)
    way = encoding.choose(tmp_path / "in.mkv", tmp_path / "out.mpg", 16)
    assert (way.pix_fmt, way.fields) == (wanted, fields)


def test_tracks_that_are_left_out_are_named(
    portrait: np.ndarray, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A second video, and sound that the container cannot hold."""
    with av.open(str(tmp_path / "in.mkv"), "w") as out:
        streams = [out.add_stream("ffv1", rate=25) for _ in range(2)]
        track = out.add_stream("pcm_s16le", rate=48000, layout="stereo")
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i, picture in enumerate(moving(portrait, 64, 64, 2)):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 25)
                out.mux(stream.encode(frame))
        for stream in streams:
            out.mux(stream.encode(None))
        silence = np.zeros((1, 2 * 1024), np.int16)
        samples = av.AudioFrame.from_ndarray(silence, format="s16", layout="stereo")
        samples.sample_rate, samples.pts, samples.time_base = 48000, 0, Fraction(1, 48000)
        out.mux(track.encode(samples))
        out.mux(track.encode(None))
    assert run(tmp_path / "in.mkv", tmp_path / "out.webm") == 0
    assert "in.mkv: its other video track is left out" in caplog.text
    assert "its audio track (pcm_s16le) cannot be kept in a .webm file" in caplog.text
    assert seen(tmp_path / "out.webm")[0]["tracks"] == ["video"]


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_chapters_titles_and_sound_stay(
    name: str, portrait: np.ndarray, run: Run, tmp_path: Path
) -> None:
    base = Fraction(1, 1000)
    chapters = [
        {"id": 1, "start": 0, "end": 40, "time_base": base, "metadata": {"title": "Wedding"}},
        {"id": 2, "start": 40, "end": 80, "time_base": base, "metadata": {"title": "Party"}},
    ]
    source, target = tmp_path / name, tmp_path / f"out_{name}"
    made(
        source,
        moving(portrait, 64, 64, 2),
        "libx264",
        "yuv420p",
        sound="aac",
        chapters=chapters,
    )
    assert run(source, target) == 0
    with av.open(str(target)) as after:
        told = [
            (
                float(one["start"] * one["time_base"]),
                float(one["end"] * one["time_base"]),
                one["metadata"]["title"],
            )
            for one in after.chapters()
        ]
        assert told == [(0, 0.04, "Wedding"), (0.04, 0.08, "Party")]
        assert [one.type for one in after.streams] in (
            ["video", "audio"],
            ["video", "audio", "data"],
        )


@pytest.mark.parametrize("begins", [0, 10_000])
@pytest.mark.parametrize("ending", ["mkv", "mp4", "avi"])
def test_what_a_broadcast_recorded_begins_at_nought_elsewhere(
    begins: int, ending: str, portrait: np.ndarray, run: Run, tmp_path: Path
) -> None:
    """A transport stream starts at whatever hour it was; picture and sound stay together."""
    made(tmp_path / "0.ts", moving(portrait, 208, 208), "libx264", "yuv420p", sound="mp2")
    with av.open(str(tmp_path / "0.ts")) as whole, av.open(str(tmp_path / "in.ts"), "w") as out:
        copies = {one.index: out.add_stream_from_template(one) for one in whole.streams}
        for packet in whole.demux():
            if packet.dts is not None:
                late = round(begins / packet.time_base)
                packet.pts, packet.dts = packet.pts + late, packet.dts + late
                packet.stream = copies[packet.stream.index]
                out.mux(packet)
    assert run(tmp_path / "in.ts", tmp_path / f"out.{ending}") == cli.OK
    with av.open(str(tmp_path / f"out.{ending}")) as container:
        starts = [one.start_time * one.time_base for one in container.streams]
    assert all(-0.2 < start < 0.2 for start in starts), starts


@pytest.mark.parametrize("codec", ["libx265", "libsvtav1"])
def test_encoders_say_nothing_to_the_terminal(
    codec: str, portrait: np.ndarray, tmp_path: Path
) -> None:
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    # Of two frames x265 writes times that no container takes.
    made(tmp_path / "in.mp4", moving(portrait, 208, 208, 5), codec, "yuv420p", options=quiet)
    command = [sys.executable, "-m", "osdface_core", "restore", "in.mp4", "out.mp4"]
    path = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, "--model", "builtin", "--device", "cpu"],
        cwd=tmp_path,
        env=path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1 done\n"
    assert not done.stderr


def test_a_video_of_crops_is_restored_whole(portrait: np.ndarray, run: Run, tmp_path: Path) -> None:
    frames = [
        np.asarray(Image.fromarray(one).resize((96, 96))) for one in moving(portrait, 208, 208)
    ]
    made(tmp_path / "in.mkv", frames, "ffv1", "bgr0")
    report = tmp_path / "r.json"
    assert run(tmp_path / "in.mkv", tmp_path / "out.mkv", "--aligned", "--report", report) == 0
    assert [one["frame"] for one in entries(report)["in.mkv"]["faces"]] == [0, 1, 2]
    _, old, _ = seen(tmp_path / "in.mkv")
    _, new, _ = seen(tmp_path / "out.mkv")
    for one, other in zip(old, new, strict=True):
        assert (one != other).any(-1).mean() > 0.6
