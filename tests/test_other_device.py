"""The whole chain on a device that the machine does not have (tests/fake_device.py): nothing is
left behind on the CPU, and the device is waited for no more often than needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from osdface_core.diffir.enhance import EnhanceOptions, enhance
from osdface_core.diffir.inpaint import InpaintOptions, inpaint
from osdface_core.diffusers.builtin import load_backbone
from osdface_core.faces.detect import DetectOptions
from osdface_core.faces.face_parser import ParseNet, parse_faces
from osdface_core.faces.files import BUILTIN_DETECTOR
from osdface_core.faces.find import Found, find_faces
from osdface_core.faces.mask import mask_to_crops
from osdface_core.faces.paste import PasteOptions, paste
from osdface_core.faces.preview import before_after, draw_faces
from osdface_core.faces.retinaface import build_retinaface
from osdface_core.ldm import layers
from osdface_core.ldm.backbone import LdmBackbone
from osdface_core.ldm.builtin import load_unet
from osdface_core.osdface import builtin
from osdface_core.osdface.restore import restore
from osdface_core.osdface.vre import embed
from osdface_core.osediff.upscale import UpscaleOptions, upscale
from osdface_core.weights.reading import read_tensors
from tests.conftest import DEVICE as REAL
from tests.fake_device import DEVICE, elsewhere
from tests.test_diffir import is_out, small

CPU = torch.device("cpu")
OTHER = torch.device(REAL or DEVICE)


class Chain:
    """The networks of the built-in model and a parser of random weights on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.manual_seed(0)
        with torch.inference_mode(False):
            self.detector = build_retinaface(read_tensors(BUILTIN_DETECTOR)).to(device)
            self.embedder = builtin.embedder().to(device)
            self.parser = ParseNet().eval().to(device)
            self.backbone = load_backbone(device, torch.float32)

    def find(self, picture: Tensor, **options: Any) -> Found:
        return find_faces(picture, self.detector, DetectOptions(**options))

    def restore(self, crops: Tensor) -> Tensor:
        prompts = embed(crops, lambda _: (self.embedder, self.device), at_once=16)
        return restore(crops, prompts, self.backbone, faces_per_batch=16).pictures

    def paste(self, picture: Tensor, found: Found, restored: Tensor, **options: Any) -> Any:
        return paste(
            picture,
            found.faces,
            restored,
            PasteOptions(**{"mask_type": "ellipse"} | options),
            parser=lambda crops: parse_faces(crops, self.parser),
            device=self.device,
        )


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of TF32, which would hide what is compared here, nothing."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def here() -> Chain:
    return Chain(CPU)


def there(work: Callable[[Chain], Any], forbidden: dict[Any, str] | None = None) -> Any:
    """What `work` gives with the chain elsewhere, and the counts of copies and waits."""
    if REAL:
        return work(Chain(OTHER)), Counter()
    with elsewhere(forbidden) as counts:
        chain = Chain(OTHER)
        counts.clear()
        return work(chain), Counter(counts)


OPTIONS = [
    {},
    {"mask_type": "parsing", "color_match": "mean-std"},
    {"mask_type": "box", "color_match": "wavelet", "keep_detail": 0.5},
]


@pytest.mark.parametrize(
    ("picture_is_there", "options"), [(True, {}), *((False, options) for options in OPTIONS)]
)
def test_a_picture_is_restored_as_on_the_cpu(
    here: Chain, group: Tensor, picture_is_there: bool, options: dict[str, Any]
) -> None:
    found = here.find(group)
    restored = here.restore(found.faces.crops)
    wanted, mask = here.paste(group, found, restored, **options)
    assert len(found.faces) == 2
    assert not torch.equal(wanted, group)

    def work(chain: Chain) -> Any:
        picture = group.to(OTHER) if picture_is_there else group
        seen = chain.find(picture)
        made = chain.restore(seen.faces.crops)
        result = chain.paste(picture, seen, made, **options)
        home = {tensor.device.type for tensor in (seen.faces.crops, made, *result)}
        return [tensor.cpu() for tensor in (seen.faces.crops, made, *result)], home

    (results, home), _ = there(work)
    assert home == {OTHER.type if picture_is_there else "cpu"}
    for ours, theirs in zip(results, (found.faces.crops, restored, wanted, mask), strict=True):
        assert (ours - theirs).abs().max() < 1e-4
    assert torch.equal(results[2][0][results[3][0] == 0], group[0][results[3][0] == 0])


@pytest.mark.parametrize("lent", [True, False])
def test_weights_on_the_cpu_serve_the_networks_in_plain_torch(lent: bool, group: Tensor) -> None:
    """As a host keeps them there that is short of memory; own ones are moved."""
    pixels = group[:, :128, :192].movedim(-1, 1).contiguous()
    prompts = torch.rand(1, 77, 1024, generator=torch.Generator().manual_seed(0))

    def step(device: torch.device) -> list[Tensor]:
        with torch.inference_mode(False):
            backbone = LdmBackbone(
                load_unet(),
                builtin.autoencoder(layers),
                device=device,
                dtype=torch.float32,
                owned=not lent,
                scaling=builtin.SCALING,
            )
        latents = backbone.encode(pixels)
        x0 = backbone.denoise(latents, prompts, 399)
        found = [latents, x0, backbone.decode(x0)]
        assert {tensor.device.type for tensor in found} == {device.type}
        home = {p.device.type for p in backbone.unet.parameters()}
        assert home == {"cpu" if lent else device.type}
        return [tensor.cpu() for tensor in found]

    found, _ = there(lambda chain: step(OTHER))
    for ours, wanted in zip(found, step(CPU), strict=True):
        assert (ours - wanted).abs().max() < 1e-4


def test_faces_that_lie_are_found_as_on_the_cpu(here: Chain, group: Tensor) -> None:
    lying = group.rot90(1, (1, 2)).contiguous()
    wanted = here.find(lying, any_angle=True)
    found, _ = there(lambda chain: chain.find(lying, any_angle=True))
    assert [face.angle for face in found.everyone] == [face.angle for face in wanted.everyone]
    assert len(found.faces) == 2
    assert (found.faces.crops - wanted.faces.crops).abs().max() < 1e-2


def test_previews_of_pictures_that_are_there(here: Chain, group: Tensor) -> None:
    found = here.find(group)
    wanted = draw_faces(group, found.everyone, found.verdicts), before_after(group, 1 - group)

    def work(_: Chain) -> Any:
        picture = group.to(OTHER)
        return (
            draw_faces(picture, found.everyone, found.verdicts),
            before_after(picture, 1 - picture),
        )

    made, _ = there(work)
    assert all(torch.equal(*pair) for pair in zip(made, wanted, strict=True))


@pytest.mark.parametrize("picture_is_there", [True, False])
@pytest.mark.parametrize("color_match", ["adain", "wavelet"])
def test_a_whole_picture_is_enlarged_as_on_the_cpu(
    here: Chain, group: Tensor, picture_is_there: bool, color_match: str
) -> None:
    """In tiles, with alpha."""
    alpha = group[..., :1] * 0.5
    picture = torch.cat([group, alpha], -1)[:, :180, :260]
    text = torch.randn(1, 77, 1024, generator=torch.Generator().manual_seed(0))
    options = UpscaleOptions(2.9, tile=384, overlap=128, color_match=color_match)
    wanted = upscale(picture, text, here.backbone, options).pictures
    assert wanted.shape == (1, 522, 754, 4)

    def work(chain: Chain) -> Any:
        given = picture.to(OTHER) if picture_is_there else picture
        made = upscale(given, text, chain.backbone, options).pictures
        return made.cpu(), made.device.type

    (made, home), _ = there(work)
    assert home == (OTHER.type if picture_is_there else "cpu")
    assert (made - wanted).abs().max() < 1e-4


def a_diffir(kind: str, precision: torch.dtype, device: torch.device) -> Any:
    """A small network of random weights on a device, which holds only so many pixels."""
    with torch.inference_mode(False):
        return small(kind).to(device, precision)


PLENTY, LITTLE = 10**9, 25_000


@pytest.mark.parametrize(
    ("kind", "precision", "room", "picture_is_there"),
    [
        ("x2", torch.float32, PLENTY, True),
        ("x2", torch.float16, LITTLE, False),
        ("deblur", torch.float32, LITTLE, True),
        ("deblur", torch.float16, PLENTY, False),
        ("inpaint", torch.float32, PLENTY, False),
        ("inpaint", torch.float32, LITTLE, True),
        ("inpaint", torch.float16, LITTLE, True),
    ],
)
def test_diffirs_networks_work_as_on_the_cpu(
    kind: str, precision: torch.dtype, room: int, picture_is_there: bool
) -> None:
    """With alpha; in little memory, which the device runs out of, too."""
    picture = torch.rand(1, 160, 200, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 160, 200)
    mask[:, 40:60, 30:100] = 1

    def work(device: torch.device, given: Tensor, holes: Tensor) -> Tensor:
        network = a_diffir(kind, precision, device)
        network.room = room

        def load(memory: int) -> Any:
            return network, device

        if kind == "inpaint":
            options = InpaintOptions("256", feather=3)
            return inpaint(given, holes, load, options, out_of_memory=is_out).pictures
        return enhance(given, load, EnhanceOptions(0), out_of_memory=is_out).pictures

    wanted = work(CPU, picture, mask)

    def there_is(_: Any) -> Any:
        home = OTHER if picture_is_there else CPU
        made = work(OTHER, picture.to(home), mask.to(home))
        return made.cpu(), made.device.type

    (made, home), _ = there(there_is)
    assert home == (OTHER.type if picture_is_there else "cpu")
    assert made.isfinite().all()
    assert (made - wanted).abs().max() < (1e-4 if precision == torch.float32 else 1e-2)


@pytest.mark.parametrize("mask_is_there", [True, False])
def test_a_mask_is_carried_into_crops_as_on_the_cpu(
    here: Chain, group: Tensor, mask_is_there: bool
) -> None:
    faces = here.find(group).faces
    mask = torch.zeros(1, *group.shape[1:3])
    mask[:, ::40] = 1
    wanted = mask_to_crops(mask, faces)
    assert 0 < wanted.mean() < 1

    def work(_: Any) -> Any:
        made = mask_to_crops(mask.to(OTHER) if mask_is_there else mask, faces)
        return made.cpu(), made.device.type

    (made, home), _ = there(work)
    assert home == (OTHER.type if mask_is_there else "cpu")
    assert torch.equal(made, wanted)


@pytest.mark.processor
def test_the_device_is_waited_for_no_more_often_than_needed(here: Chain, group: Tensor) -> None:
    """A wait costs a GPU the work that it could have begun; each copy down is one, too."""
    frames = 2
    batch = group.expand(frames, -1, -1, -1).contiguous()
    found = here.find(batch)
    crops = found.faces.crops
    assert len(crops) == 2 * frames
    restored = here.restore(crops)

    _, counts = there(lambda chain: chain.find(batch))
    # Two passes' candidates and those of the windows, thumbnails, and each crop.
    assert counts["wait"] <= 2
    assert counts["down"] <= 3 + len(crops)

    _, counts = there(lambda chain: chain.restore(crops))
    # The prompts and the pictures, whatever their number.
    assert counts["wait"] == 0
    assert counts["down"] == 2
    assert counts["up"] <= 5

    _, counts = there(lambda chain: chain.paste(batch, found, restored, color_match="wavelet"))
    # Of each face, the place that it changes, and its pixels.
    assert counts["wait"] == 0
    assert counts["down"] <= 2 * len(crops)


@pytest.mark.processor
def test_a_picture_is_pasted_here_where_the_device_has_no_memory_left(
    here: Chain, group: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    found = here.find(group)
    restored = here.restore(found.faces.crops)
    wanted, mask = here.paste(group, found, restored)
    full = {torch.ops.aten.grid_sampler_2d.default: "elsewhere: out of memory"}
    (made, its_mask), _ = there(lambda chain: chain.paste(group, found, restored), full)
    assert torch.equal(made, wanted)
    assert torch.equal(its_mask, mask)
    assert "Out of memory on elsewhere:0; going on on cpu" in caplog.text


# Operators that Apple's MPS lacked up to torch 2.10.
LACKING = {
    torch.ops.aten.grid_sampler_2d.default: "not implemented for this device",
    torch.ops.aten._upsample_bilinear2d_aa.default: "not implemented for this device",
    torch.ops.aten._upsample_bicubic2d_aa.default: "not implemented for this device",
}


@pytest.mark.processor
def test_a_device_that_lacks_operators_does_them_on_the_cpu(here: Chain, group: Tensor) -> None:
    """The picture is larger than what the detector sees, and lies, so that all of them are used."""
    lying = torch.nn.functional.interpolate(
        group.movedim(-1, 1), scale_factor=1.2, mode="bilinear"
    ).movedim(1, -1)
    lying = lying.rot90(1, (1, 2)).contiguous()
    found = here.find(lying, any_angle=True)
    restored = here.restore(found.faces.crops)
    wanted, _ = here.paste(lying, found, restored)

    def work(chain: Chain) -> Any:
        seen = chain.find(lying, any_angle=True)
        made = chain.restore(seen.faces.crops)
        result, _ = chain.paste(lying, seen, made)
        small = chain.find(lying)
        return seen, result.cpu(), len(small.everyone)

    (seen, result, _), _ = there(work, LACKING)
    assert len(seen.faces) == len(found.faces) == 2
    assert (seen.faces.crops.cpu() - found.faces.crops).abs().max() < 1e-2
    assert (result - wanted).abs().max() < 1e-2


@pytest.mark.processor
def test_pictures_are_enlarged_on_a_device_that_lacks_operators() -> None:
    from osdface_core.osediff.upscale import resized

    picture = torch.rand(1, 3, 40, 50)
    made, _ = there(lambda _: resized(picture.to(OTHER), 30, 90), LACKING)
    assert made.device == OTHER
    assert torch.equal(made.cpu(), resized(picture, 30, 90))
