"""OSDFaceRestore in a real ComfyUI, with small networks in place of the embedder, the UNet and the
VAE; detection is the real one.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from osdface_core.faces.preview import before_after, draw_faces
from tests.widgets import CHOICE, RESTORE

pytestmark = [pytest.mark.host, pytest.mark.full]

VRE, LORA, PARSER = "associate_2.ckpt", "pytorch_lora_weights.safetensors", "parsing_parsenet.pth"
WIDGETS = RESTORE | {"vre_name": VRE, "lora_name": LORA}


class Model:
    """Stands for a MODEL: the graph only hands it on."""

    patches_uuid = 0


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    """ComfyUI runs every node so."""
    with torch.inference_mode():
        yield


@pytest.fixture
def small(host: Any, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Networks of a few operations that see the whole crop and the prompts; `calls` says which ran,
    `broken` which crop comes out NaN.
    """
    seen = SimpleNamespace(
        calls=[], broken=None, half=False, model=Model(), vae=Model(), hook=lambda name: None
    )

    def ran(name: str) -> None:
        seen.calls.append(name)
        seen.hook(name)

    class Embedder:
        def __call__(self, pixels: Tensor) -> Tensor:
            ran("embed")
            return F.interpolate(pixels.mean(1, keepdim=True), (77, 1024))[:, 0].clamp(0, 1)

    class Backbone:
        def __init__(
            self,
            model: Any,
            vae: Any,
            options: Any,
            lora_name: str,
            strength: float = 1.0,
        ) -> None:
            assert (model, vae) == (seen.model, seen.vae)
            self.strength = strength

        def encode(self, pixels: Tensor) -> Tensor:
            ran("encode")
            return F.pixel_unshuffle(pixels, 8)

        def denoise(self, latents: Tensor, prompts: Tensor, timestep: int) -> Tensor:
            ran("denoise")
            return (
                latents.flip(1) * 0.7
                + prompts.mean((1, 2))[:, None, None, None] * self.strength * timestep / 999
            )

        def decode(self, latents: Tensor) -> Tensor:
            ran("decode")
            out = F.pixel_shuffle(latents, 8).clamp(0, 1)
            return out * torch.nan if seen.calls.count("decode") - 1 == seen.broken else out

        def max_batch(self, height: int, width: int) -> int:
            return 1

        def fp32_fallback(self) -> Any:
            return contextlib.nullcontext(seen.half)

        def out_of_memory(self, error: BaseException) -> bool:
            return False

    monkeypatch.setattr(
        host.networks, "load_embedder", lambda name, faces: (Embedder(), torch.device("cpu"))
    )
    monkeypatch.setattr(host.backbone, "HostBackbone", Backbone)
    return seen


@pytest.fixture
def portrait(photographs: Path, load_picture: Callable[[Path], Tensor]) -> Tensor:
    return load_picture(photographs / "astronaut.png")


@pytest.fixture
def parser(host: Any, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A face parser's file of noise; in place of its minutes on a CPU, what is bright is taken for
    face.
    """
    with torch.inference_mode(False):
        torch.save(
            host.networks.ParseNet().state_dict(),
            path := host.base / "models" / "facedetection" / PARSER,
        )

    def bright(crops: Tensor, network: Any, out_of_memory: Any) -> Tensor:
        assert isinstance(network, host.networks.ParseNet)
        assert len(crops) == 1, "on a CPU a stop would wait for several faces"
        small.calls.append("parse")
        small.hook("parse")
        return crops.mean(-1)

    monkeypatch.setattr(host.networks, "parse_faces", bright)
    yield path
    path.unlink()


def restore(host: Any, small: SimpleNamespace, image: Tensor, **changed: Any) -> Any:
    return host.nodes["OSDFaceRestore"].execute(
        image=image, model=small.model, vae=small.vae, **WIDGETS | changed
    )


def four_nodes(
    host: Any, small: SimpleNamespace, image: Tensor, **changed: Any
) -> tuple[Tensor, Tensor, str]:
    widgets = WIDGETS | changed

    def some(*names: str) -> dict[str, Any]:
        return {name: widgets[name] for name in names}

    found = host.nodes["FaceDetectAlign"].execute(
        image=image,
        max_size=0,
        **some(*CHOICE, "detector", "confidence", "any_angle", "crop_size", "smoothing"),
    )
    faces, crops, _, _, report = found.args
    prompts = host.nodes["OSDFaceVRE"].execute(crops=crops, vre_name=widgets["vre_name"]).args[0]
    step = host.nodes["OSDFaceOneStep"].execute(
        model=small.model,
        vae=small.vae,
        crops=crops,
        conditioning=prompts,
        lora_name=widgets["lora_name"],
        lora_strength=1.0,
        timestep=399,
        faces_per_batch=0,
    )
    pasted = host.nodes["FacePasteBack"].execute(
        image=image,
        faces=faces,
        restored=step.args[0],
        keep=widgets.get("keep"),
        **some("strength", "mask_type", "feather", "color_match"),
    )
    return (*pasted.args, report)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {
            "select": "by index",
            "indices": "1",
            "crop_size": 576,
            "strength": 0.6,
            "feather": 0.3,
            "color_match": "wavelet",
        },
        {
            "order": "largest first",
            "max_faces": 1,
            "min_size": 60,
            "mask_type": "box",
            "color_match": "mean-std",
        },
        {"mask_type": "parsing", "confidence": 0.5},
    ],
)
def test_the_picture_is_that_of_the_four_nodes(
    changed: dict[str, Any],
    host: Any,
    small: Any,
    group: Tensor,
    parser: Path,
) -> None:
    """A video of three frames with an alpha channel, part of which is kept."""
    alpha = torch.rand(3, *group.shape[1:3], 1, generator=torch.Generator().manual_seed(1))
    image = torch.cat(
        [group.expand(3, -1, -1, -1) * torch.tensor([1.0, 0.9, 0.8])[:, None, None, None], alpha],
        -1,
    )
    changed = changed | {
        "smoothing": 0.5,
        "keep": (torch.arange(group.shape[2]) % 64 < 20).float().expand(1, *group.shape[1:3]),
    }
    image_out, mask, both, report = restore(host, small, image, **changed).args
    wanted_image, wanted_mask, wanted_report = four_nodes(host, small, image, **changed)
    assert torch.equal(image_out, wanted_image)
    assert torch.equal(mask, wanted_mask)
    assert report == wanted_report
    assert not torch.equal(image_out, image)
    assert both.shape[0] == 3


def test_the_built_in_model_does_the_same_in_one_node_and_in_four(
    host: Any, portrait: Tensor
) -> None:
    """No stand-ins: ComfyUI's own sampler, VAE and memory management."""
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args
    real, changed = (
        SimpleNamespace(model=model, vae=vae),
        {"vre_name": "builtin", "lora_name": "none"},
    )
    image, mask, _, report = restore(host, real, portrait, **changed).args
    wanted_image, wanted_mask, wanted_report = four_nodes(host, real, portrait, **changed)
    assert torch.equal(image, wanted_image)
    assert torch.equal(mask, wanted_mask)
    assert report == wanted_report
    assert (image - portrait)[mask == 1].abs().mean() > 0.01


def test_without_a_face_the_very_picture_comes_back_and_no_file_is_asked_for(
    host: Any, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    find = host.files.find
    monkeypatch.setattr(
        host.networks, "find", lambda name, kind: asked.append(name) or find(name, kind)
    )
    image = torch.rand(1, 6, 8, 3).repeat_interleave(40, 1).repeat_interleave(40, 2)
    out, mask, both, report = restore(host, small, image, mask_type="parsing").args
    assert out is image
    assert not mask.any()
    assert mask.shape == (1, 240, 320)
    assert report.startswith("0 faces found in 1 picture, 0 chosen.")
    assert asked == ["detection_mobilenet0.25_Final.pth"]
    assert not small.calls
    assert torch.equal(both[0, :240], image[0])


def test_at_no_strength_nothing_is_restored(host: Any, small: Any, portrait: Tensor) -> None:
    assert restore(host, small, portrait, strength=0.0).args[0] is portrait
    assert not small.calls


def test_a_face_that_half_precision_fails_on_is_restored_and_named(
    host: Any, small: Any, group: Tensor
) -> None:
    small.broken, small.half = 1, True
    out, mask, _, report = restore(host, small, group).args
    small.broken = None
    whole = restore(host, small, group.clone()).args
    assert torch.equal(out, whole[0])
    assert torch.equal(mask, whole[1])
    assert (
        "\npicture 0, face 1 came out as NaN in half precision and was computed again in fp32"
        in report
    )
    assert "came out as NaN" not in whole[3]


def test_a_face_that_fails_is_left_and_named(host: Any, small: Any, group: Tensor) -> None:
    small.broken = 1
    result = restore(host, small, group)
    out, mask, _, report = result.args
    half = group.shape[2] // 2
    assert not mask[..., half:].any()
    assert torch.equal(out[:, :, half:], group[:, :, half:])
    assert mask[..., :half].any()
    assert (
        "\npicture 0, face 1 came out as NaN and is left as it was: start ComfyUI with --fp32-vae"
        in report
    )
    assert "face 0 came out" not in report
    assert result.ui.as_dict()["text"] == (report,)


def test_values_that_are_no_numbers_are_laid_to_the_picture(
    host: Any, small: Any, portrait: Tensor
) -> None:
    broken = portrait.clone()
    broken[0, 115, 222] = torch.nan
    with pytest.raises(
        host.error, match=r"^`image` number 0 holds values that are not numbers .* at face 0"
    ):
        restore(host, small, broken)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"keep": torch.zeros(2, 512, 512)}, r"^`keep` is \(2, 512, 512\) for 1 pictures"),
        (
            {"detector": "retinaface_resnet50"},
            "^`detector`: detection_Resnet50_Final.pth is missing",
        ),
        ({"select": "by index", "indices": "one"}, '^`indices` is "one"'),
    ],
)
def test_what_does_not_fit_is_named_before_a_network_runs(
    changed: dict[str, Any],
    says: str,
    host: Any,
    small: Any,
    portrait: Tensor,
) -> None:
    with pytest.raises(host.error, match=says):
        restore(host, small, portrait, **changed)
    assert not small.calls


@pytest.fixture
def bar(host: Any) -> Iterator[list[tuple[float, float, Any]]]:
    """What ComfyUI is told of progress: value, maximum and preview."""
    import comfy.utils

    told: list[tuple[float, float, Any]] = []
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, **_: told.append((value, total, preview))
    )
    yield told
    comfy.utils.set_progress_bar_global_hook(before)


def test_one_bar_runs_over_all_stages_and_shows_each_crop(
    host: Any, small: Any, group: Tensor, bar: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.progress, "PREVIEW_INTERVAL", 0)
    restore(host, small, group.expand(2, -1, -1, -1))
    values = [value for value, _, _ in bar]
    assert values == sorted(values)
    assert {total for _, total, _ in bar} == {100}
    assert values[-1] == 100
    shown = [preview[1].size for _, _, preview in bar if preview]
    assert shown == [(512, 512)] * 12  # four faces as they were, restored, and pasted


def test_crops_are_shown_only_to_somebody_and_only_as_often_as_the_eye_follows(
    host: Any, group: Tensor, bar: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(host.progress, "time", SimpleNamespace(monotonic=lambda: now))
    report = host.progress.progress_bar(100)
    shown = []
    for i in range(100):
        now = 0.03 * i
        report(1, group[0].movedim(-1, 0))
        # Newer hosts leave out steps that show nothing.
        shown += [i for _, _, preview in bar if preview]
        bar.clear()
    assert shown == list(range(0, 100, 4))
    listeners = SimpleNamespace(sockets={})
    monkeypatch.setattr(host.progress, "_server", lambda: listeners)
    report(1, group[0].movedim(-1, 0))
    listeners.sockets["a page"] = object()
    host.progress.progress_bar(1)(1, group[0].movedim(-1, 0))
    assert [preview is not None for _, _, preview in bar] == [False, True]


@pytest.mark.parametrize("stage", ["embed", "encode", "denoise", "decode", "parse"])
def test_a_stop_is_heeded_within_a_face_and_the_next_run_works(
    stage: str,
    host: Any,
    small: Any,
    group: Tensor,
    parser: Path,
) -> None:
    management = host.comfy.model_management
    image = group.expand(2, -1, -1, -1).clone()

    def stop(name: str) -> None:
        if name == stage and not stopped:
            stopped.append(len(small.calls))
            management.interrupt_current_processing(True)

    stopped: list[int] = []
    small.hook = stop
    with pytest.raises(management.InterruptProcessingException):
        restore(host, small, image, mask_type="parsing")
    assert stopped == [len(small.calls)], "a network ran after the stop"
    assert torch.equal(
        restore(host, small, image, mask_type="parsing").args[0],
        four_nodes(host, small, image, mask_type="parsing")[0],
    )


def test_a_stop_is_heeded_between_pictures_that_are_searched(
    host: Any, small: Any, portrait: Tensor, bar: list[Any]
) -> None:
    import comfy.utils

    management = host.comfy.model_management

    def stop(*_: Any, **__: Any) -> None:
        bar.append((0, 0, None))
        management.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(stop)
    with pytest.raises(management.InterruptProcessingException):
        restore(host, small, portrait.expand(4, -1, -1, -1))
    assert len(bar) == 1
    assert not small.calls


def test_a_turned_widget_runs_anew_only_what_depends_on_it(
    host: Any, small: Any, portrait: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    find_faces = host.module("osdface_core.faces.find").find_faces
    for node in ("face_detect_align", "osdface_restore"):
        monkeypatch.setattr(
            host.module(f"nodes.{node}"),
            "find_faces",
            lambda *given, **named: looks.append(1) or find_faces(*given, **named),
        )
    first = restore(host, small, portrait)
    ran = list(small.calls)
    assert ran == ["embed", "encode", "denoise", "decode"]
    softer = restore(host, small, portrait, strength=0.5, feather=0.3)
    assert small.calls == ran
    assert not torch.equal(softer.args[0], first.args[0])
    assert torch.equal(
        softer.args[0], four_nodes(host, small, portrait, strength=0.5, feather=0.3)[0]
    )
    small.calls.clear()
    assert len(looks) == 2  # this node's and that of the four
    restore(host, small, portrait, crop_size=576)
    assert (len(looks), small.calls) == (3, ran)
    small.model = Model()
    restore(host, small, portrait, crop_size=576)
    assert (len(looks), small.calls) == (3, ran * 2)
    restore(host, small, portrait.clone(), crop_size=576)
    assert (len(looks), small.calls) == (4, ran * 3)


def test_a_picture_that_was_written_into_is_looked_at_anew(
    host: Any, small: Any, portrait: Tensor
) -> None:
    image = portrait.clone()
    restore(host, small, image)
    image.copy_(image.flip(2))
    out, mask, _, _ = restore(host, small, image).args
    truth = restore(host, small, image.clone()).args
    assert torch.equal(out, truth[0])
    assert torch.equal(mask, truth[1])


def test_two_nodes_on_one_picture_do_not_drive_each_other_out(
    host: Any, small: Any, portrait: Tensor
) -> None:
    for crop_size in (512, 576, 512, 576):
        restore(host, small, portrait, crop_size=crop_size)
    assert small.calls.count("denoise") == 2


def test_if_every_face_fails_the_node_says_so_as_one_step_does(
    host: Any, small: Any, portrait: Tensor
) -> None:
    small.broken = 0
    with pytest.raises(
        host.error, match=r"^Every face \(crops 0\) came out as NaN: start ComfyUI with --fp32-vae"
    ):
        restore(host, small, portrait)


def test_nothing_is_kept_longer_than_the_picture(host: Any, small: Any, portrait: Tensor) -> None:
    image = portrait.clone()
    kept = host.module("nodes.comfy.picture_cache")._cache
    restore(host, small, image)
    crops = weakref.ref(kept[id(image)]["found"][0][1].faces.crops)
    del image
    gc.collect()
    assert crops() is None


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((1, 300, 200, 3), (1, 300, 402, 3)),
        ((1, 200, 300, 4), (1, 402, 300, 3)),
        ((1, 64, 64, 1), (1, 64, 130, 3)),
        ((3, 2048, 1024, 3), (3, 1024, 1029, 3)),
        ((0, 64, 64, 3), (0, 64, 130, 3)),
    ],
)
def test_before_and_after_are_seen_at_once(shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    before, after = torch.full(shape, 0.25), torch.full(shape, 0.75)
    both = before_after(before, after)
    assert both.shape == wanted
    assert both[:, :10, :10].allclose(torch.tensor(0.25))
    assert both[:, -10:, -10:].allclose(torch.tensor(0.75))


@pytest.mark.parametrize(
    "work", [lambda x, step: before_after(x, x, step), lambda x, step: draw_faces(x, [], [], step)]
)
def test_a_stop_is_heeded_at_each_picture_that_is_drawn(work: Callable[..., Tensor]) -> None:
    seen = []

    def stop(done: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        work(torch.zeros(9, 8, 8, 3), stop)
    assert seen == [0, 0, 0]


def test_without_its_file_the_small_parser_finds_the_face_and_says_so(
    host: Any, small: Any, portrait: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    assert not (host.base / "models" / "facedetection" / PARSER).exists()
    mask = restore(host, small, portrait, mask_type="parsing").args[1]
    assert "by the small built-in parser" in caplog.text
    ellipse = restore(host, small, portrait, mask_type="ellipse").args[1]
    # The astronaut's face and hair are pasted; her suit and the wall beside her jaw, of which an
    # ellipse takes some, are not.
    assert mask[0, 90:150, 205:245].mean() > 0.9
    assert mask[0, 200:].max() < 0.05
    for wall in (slice(170, 180), slice(268, 278)):
        assert mask[0, 140:160, wall].max() < 0.05
        assert ellipse[0, 140:160, wall].mean() > 0.3
    node = host.nodes["FacePasteBack"]
    assert not node.fingerprint_inputs(mask_type="parsing")


def test_a_changed_file_is_noticed(host: Any, parser: Path) -> None:
    node = host.nodes["OSDFaceRestore"]
    before = (
        node.fingerprint_inputs(**WIDGETS),
        node.fingerprint_inputs(**WIDGETS | {"mask_type": "parsing"}),
    )
    parser.write_bytes(parser.read_bytes() + b" ")
    after = (
        node.fingerprint_inputs(**WIDGETS),
        node.fingerprint_inputs(**WIDGETS | {"mask_type": "parsing"}),
    )
    assert before[0] == after[0]
    assert before[1] != after[1]
    assert before[0] != node.fingerprint_inputs(**WIDGETS | {"lora_name": "none"})
    paste = host.nodes["FacePasteBack"]
    assert str(parser.stat().st_size) in paste.fingerprint_inputs(mask_type="parsing")
    assert not paste.fingerprint_inputs(mask_type="ellipse")
