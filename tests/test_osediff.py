"""OSEDiff without a host: its files, and the work around the networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from osdface_core.catalogue import CATALOGUE
from osdface_core.errors import OSDFaceError
from osdface_core.osediff.convert import convert
from osdface_core.osediff.upscale import (
    DEFAULT,
    UpscaleOptions,
    match_color,
    resized,
    steps,
    upscale,
)
from osdface_core.osediff.weights import Weights, parse_weights
from osdface_core.weights.reading import read_tensors
from osdface_core.weights.store import State, Store, judge
from tests.test_weights_reading import MALICIOUS

CPU = torch.device("cpu")
TEXT = torch.randn(1, 77, 1024, generator=torch.Generator().manual_seed(0))
PLAIN = UpscaleOptions(color_match="none")


# The files


@pytest.fixture(scope="session")
def converted(osediff_pickle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(osediff_pickle, tmp_path_factory.mktemp("osediff") / "osediff.safetensors")


def weights_of(path: Path) -> Weights:
    return parse_weights(read_tensors(path), path.name)


def test_the_converted_file_holds_what_the_pickle_holds(
    osediff_pickle: Path, converted: Path
) -> None:
    released = torch.load(osediff_pickle, weights_only=True)
    found = weights_of(converted)
    assert (len(found.unet), len(found.encoder)) == (258, 32)
    for lora, part in ((found.unet, "state_dict_unet"), (found.encoder, "state_dict_vae")):
        given = dict(released[part])
        for name, adapter in lora.items():
            # peft's alpha is 8 where nobody sets it, the rank 4.
            assert adapter.scale == 2.0
            for half, tensor in (("A", adapter.down), ("B", adapter.up)):
                (key,) = (key for key in given if key.startswith(f"{name}.lora_{half}."))
                assert torch.equal(given.pop(key), tensor)
        if part == "state_dict_unet":
            assert torch.equal(given.pop("conv_in.base_layer.weight"), found.first_weight)
            assert torch.equal(given.pop("conv_in.base_layer.bias"), found.first_bias)
        assert not given


def test_the_pickle_itself_is_read_the_same(osediff_pickle: Path, converted: Path) -> None:
    one, other = weights_of(osediff_pickle), weights_of(converted)
    for mine, theirs in ((one.unet, other.unet), (one.encoder, other.encoder)):
        assert mine.keys() == theirs.keys()
        for name, adapter in mine.items():
            assert torch.equal(adapter.down, theirs[name].down)
            assert (adapter.ldm, adapter.scale) == (theirs[name].ldm, theirs[name].scale)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda t: t.pop("state_dict_unet.conv_in.base_layer.bias"), "also have conv_in.base_laye"),
        (
            lambda t: t.update({"state_dict_unet.conv_in.base_layer.weight": torch.zeros(3)}),
            r"wrong shape at conv_in.base_layer.weight: \(3,\) instead of \(320, 4, 3, 3\)",
        ),
        (
            lambda t: t["state_dict_unet.conv_in.base_layer.weight"].fill_(torch.nan),
            "not finite at conv_in.base_layer.weight",
        ),
        (
            lambda t: t.pop("state_dict_unet.conv_out.lora_B.default_decoder.weight"),
            r"also has conv_out \(up\)",
        ),
        (
            lambda t: t.pop("state_dict_vae.quant_conv.lora_A.default_encoder.weight"),
            r"OSEDiff's LoRA for the VAE's encoder also has quant_conv \(down\)",
        ),
        (
            lambda t: t.update(
                {"state_dict_unet.time_embedding.linear_1.lora_A.weight": torch.zeros(4, 320)}
            ),
            r"belong to no adapted layer \(time_embedding.linear_1",
        ),
        (lambda t: t.update({"state_dict_clip.a": torch.zeros(1)}), "state_dict_clip.a belongs to"),
    ],
)
def test_what_is_missing_or_left_over_is_named(
    harm: Callable[[dict[str, Tensor]], Any], says: str, osediff_pickle: Path
) -> None:
    tensors = {name: tensor.clone() for name, tensor in read_tensors(osediff_pickle).items()}
    harm(tensors)
    with pytest.raises(OSDFaceError, match=says):
        parse_weights(tensors, "osediff.pkl")


def test_another_lora_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"lora_unet_conv.lora_down.weight": torch.zeros(4, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(OSDFaceError, match=r"x\.safetensors does not hold OSEDiff's weights"):
        weights_of(tmp_path / "x.safetensors")


@pytest.mark.parametrize("make", MALICIOUS, ids=lambda make: make.__name__)
def test_a_malicious_pickle_is_not_converted_and_runs_nothing(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    path = tmp_path / "osediff.pkl"
    make(path)
    with pytest.raises(OSDFaceError, match=r"osediff\.pkl"):
        convert(path, tmp_path / "osediff.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


class RunsCode:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("place", ["rank_unet", "unet_lora_encoder_modules", "state_dict_unet"])
def test_code_in_any_part_of_the_pickle_is_not_run(
    place: str, osediff_pickle: Path, tmp_path: Path
) -> None:
    content = torch.load(osediff_pickle, weights_only=True)
    armed = RunsCode(tmp_path / "mark")
    if place == "state_dict_unet":
        content[place]["conv_in.base_layer.bias"] = armed
    else:
        content[place] = [armed]
    torch.save(content, tmp_path / "osediff.pkl")
    with pytest.raises(OSDFaceError):
        convert(tmp_path / "osediff.pkl", tmp_path / "osediff.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["osediff.pkl"]


def test_both_released_files_are_told_apart_by_their_names(
    osediff_pickle: Path, converted: Path, tmp_path: Path
) -> None:
    """They hold the same layers."""
    store = Store(CATALOGUE, {})
    for name in ("osediff.pkl", "osediff_face.pkl"):
        (tmp_path / name).symlink_to(osediff_pickle)
        (found,) = [store.recognise(tmp_path / name)]
        assert found is CATALOGUE.by_name[name]
        assert judge(found, tmp_path / name).state is State.ACCEPTED
    (tmp_path / "download (1)").symlink_to(osediff_pickle)
    assert store.recognise(tmp_path / "download (1)") is None
    assert judge(CATALOGUE.by_name["osediff.safetensors"], converted).usable


# The work


class OutOfMemory(RuntimeError):
    pass


@dataclass
class Pixels:
    """A Backbone without networks: what goes in comes out, 64 values of each channel a latent.

    Memory holds `room` latents.
    """

    room: int = 10**9
    half: bool = False
    seen: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    texts: list[Tensor] = field(default_factory=list)

    def note(self, stage: str, size: tuple[int, ...]) -> None:
        if size[0] * size[1] > self.room:
            raise OutOfMemory
        self.seen.setdefault(stage, []).append((size[0], size[1]))

    def encode(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[0] == 1
        assert pixels.shape[2] % 8 == pixels.shape[3] % 8 == 0
        self.note("encode", (pixels.shape[2] // 8, pixels.shape[3] // 8))
        return F.pixel_unshuffle(pixels, 8)

    def denoise(self, latents: Tensor, prompts: Tensor, timestep: int) -> Tensor:
        assert len(latents) == len(prompts)
        assert timestep == 999
        self.texts.append(prompts[0])
        self.note("denoise", tuple(latents.shape[2:]))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        self.note("decode", tuple(latents.shape[2:]))
        return F.pixel_shuffle(latents, 8)

    def max_batch(self, height: int, width: int) -> int:
        return 1

    @contextmanager
    def fp32_fallback(self) -> Iterator[bool]:
        self.half, half = False, self.half
        yield half
        self.half = half

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, OutOfMemory)


def pictures(count: int, height: int, width: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(count + height)
    return torch.rand(count, height, width, channels, generator=generator)


@pytest.mark.parametrize("scale", [1.0, 1.25, 4.0, 8.0])
@pytest.mark.parametrize("size", [(200, 160), (130, 513), (7, 90), (1, 1), (3, 700)])
def test_the_result_is_exactly_the_size_asked_for(size: tuple[int, int], scale: float) -> None:
    given = pictures(1, *size)
    found = upscale(given, TEXT, Pixels(), replace(PLAIN, scale=scale)).pictures
    assert found.shape == (1, round(size[0] * scale), round(size[1] * scale), 3)
    # Networks that change nothing give the picture, enlarged as Pillow does it.
    picture = given[0].numpy()
    wide = [
        np.asarray(Image.fromarray(picture[..., c]).resize(found.shape[2:0:-1], Image.BICUBIC))
        for c in range(3)
    ]
    wanted = torch.from_numpy(np.stack(wide, -1)).clamp(0, 1)
    # A result under 512 px is made larger and shrunk again.
    limit = 1e-5 if min(found.shape[1:3]) >= 512 else 0.1
    assert (found[0] - wanted).abs().mean() < limit


def test_what_is_not_enlarged_passes_bit_for_bit() -> None:
    given = pictures(1, 513, 700)
    assert torch.equal(upscale(given, TEXT, Pixels(), replace(PLAIN, scale=1)).pictures, given)


def test_a_small_result_is_made_at_512() -> None:
    backbone = Pixels()
    upscale(pictures(1, 100, 150), TEXT, backbone, replace(PLAIN, scale=1.0))
    assert backbone.seen["denoise"] == [(64, 96)]


@pytest.mark.parametrize("tile", [256, 512, 768, 0])
def test_tiles_show_no_seam(tile: int) -> None:
    given, backbone = pictures(1, 900, 1101), Pixels()
    options = replace(PLAIN, scale=1.0, tile=tile)
    done: list[int] = []
    found = upscale(
        given, TEXT, backbone, options, progress=lambda n, picture=None: done.append(n)
    ).pictures
    assert (found - given).abs().max() < 1e-5
    side = tile // 8 or 10**9
    assert all(rows <= side and columns <= side for rows, columns in backbone.seen["denoise"])
    assert sum(done) == steps(900, 1101, options) == sum(map(len, backbone.seen.values()))


def test_the_preview_is_the_picture_as_far_as_it_is() -> None:
    given, seen = pictures(1, 1024, 1024) * 0.5, []

    class Brighter(Pixels):
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents) + 0.5

    def see(done: int, picture: Tensor | None = None) -> None:
        if picture is not None:
            seen.append(picture.clone())

    upscale(given, TEXT, Brighter(), replace(PLAIN, scale=1.0, tile=512), progress=see)
    assert {tuple(picture.shape) for picture in seen} == {(3, 512, 512)}
    shares = [float((picture > 0.5).float().mean()) for picture in seen]
    assert shares == sorted(shares)
    assert shares[0] < 0.3
    assert shares[-1] > 0.99


def test_pictures_at_once_are_each_alone() -> None:
    given, texts = pictures(18, 96, 130), torch.randn(18, 77, 1024)
    backbone = Pixels()
    found = upscale(given, texts, backbone, DEFAULT).pictures
    assert torch.equal(torch.stack(backbone.texts), texts)
    for i in (0, 17):
        alone = upscale(given[i : i + 1], texts[i : i + 1], Pixels(), DEFAULT).pictures
        assert torch.equal(alone[0], found[i])


def test_no_pictures_give_no_pictures() -> None:
    assert upscale(pictures(0, 40, 50), TEXT, Pixels()).pictures.shape == (0, 160, 200, 3)


@pytest.mark.parametrize("tile", [768, 0])
def test_memory_that_runs_out_halves_the_tile_and_loses_nothing(tile: int) -> None:
    given, backbone = pictures(2, 600, 700), Pixels(room=40 * 40)
    found = upscale(given, TEXT, backbone, replace(PLAIN, scale=1.0, tile=tile)).pictures
    assert (found - given).abs().max() < 1e-5
    assert set(backbone.seen) == {"encode", "denoise", "decode"}


def test_memory_that_does_not_hold_the_smallest_tile_is_told() -> None:
    with pytest.raises(OutOfMemory):
        upscale(pictures(1, 600, 700), TEXT, Pixels(room=20 * 20))


def test_stopping_ends_the_job_at_once() -> None:
    class Stop(Exception):
        pass

    def stop(done: int, picture: Tensor | None = None) -> None:
        if done and backbone.seen.get("denoise"):
            raise Stop

    backbone = Pixels()
    options = replace(PLAIN, scale=1.0, tile=256)
    with pytest.raises(Stop):
        upscale(pictures(1, 600, 700), TEXT, backbone, options, progress=stop)
    assert len(backbone.seen["denoise"]) == 1


@dataclass
class Narrow(Pixels):
    """Half precision that has no number for dark pictures; `mends` says whether fp32 has."""

    half: bool = True
    mends: bool = True

    def decode(self, latents: Tensor) -> Tensor:
        out = super().decode(latents)
        is_broken = out.max() < 0.5 and (self.half or not self.mends)
        return out * torch.nan if is_broken else out


@pytest.mark.parametrize("mends", [True, False])
def test_a_picture_that_comes_out_as_nan_is_computed_again_or_left(mends: bool) -> None:
    given = pictures(3, 520, 520)
    given[1] *= 0.25
    options = replace(PLAIN, scale=1.0)
    result = upscale(given, TEXT, Narrow(mends=mends), options)
    assert torch.equal(result.pictures, given)
    assert (result.failed, result.recomputed) == (((), (1,)) if mends else ((1,), ()))


def test_alpha_is_enlarged_and_comes_along() -> None:
    given = pictures(1, 200, 300, 4)
    found = upscale(given, TEXT, Pixels(), replace(PLAIN, scale=4.0)).pictures
    wanted = resized(given[..., 3:].movedim(-1, 1), 800, 1200)
    assert torch.equal(found[..., 3:].movedim(-1, 1), wanted)
    alone = upscale(given[..., :3], TEXT, Pixels(), replace(PLAIN, scale=4.0)).pictures
    assert torch.equal(found[..., :3], alone)


class Tinted(Pixels):
    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents) * torch.tensor([0.9, 0.5, 0.1])[:, None, None]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_black_and_white_stays_so(channels: int) -> None:
    given = pictures(1, 520, 520, 1).expand(-1, -1, -1, channels).clone()
    found = upscale(given, TEXT, Tinted(), replace(PLAIN, scale=1.0)).pictures
    assert found.shape == given.shape
    colours = 1 if channels < 3 else 3
    assert torch.equal(found[..., :colours], found[..., :1].expand(-1, -1, -1, colours))
    assert not torch.equal(found[..., 0], given[..., 0])
    assert torch.equal(found[..., colours:], given[..., colours:])


@pytest.mark.parametrize("method", ["adain", "wavelet", "none"])
def test_colours_are_matched_as_the_released_code_does_it(method: str, more_golden: Path) -> None:
    """Its pictures have 8 bits before and after."""
    truth = load_file(more_golden / "osediff" / "golden.safetensors")
    found = match_color(truth["small.image"], truth["small.lq8"].float() / 255, method)
    wanted = truth["small.image"] if method == "none" else truth[f"small.{method}8"].float() / 255
    assert (found - wanted).abs().max() < (1e-6 if method == "none" else 2.5 / 255)
    assert (found - wanted).abs().mean() < 0.7 / 255


def test_colour_comes_from_the_picture() -> None:
    given = pictures(1, 520, 520)
    for method in ("adain", "wavelet"):
        options = UpscaleOptions(1.0, color_match=method)
        found = upscale(given, TEXT, Tinted(), options).pictures
        assert (found.mean((0, 1, 2)) - given.mean((0, 1, 2))).abs().max() < 0.02


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (torch.randn(1, 77, 768), r"`conditioning` is \(1, 77, 768\); a text for Stable Diffusion"),
        (torch.randn(1, 50, 1024), r"`conditioning` is \(1, 50, 1024\)"),
        (torch.rand(1, 77, 1024), "holds OSDFace's visual prompts and OSEDiff wants a text"),
        (torch.randn(3, 77, 1024), "holds 3 texts and `image` 2 pictures"),
        (torch.full((1, 77, 1024), torch.nan), "holds values that are not numbers"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts: Tensor, says: str) -> None:
    with pytest.raises(OSDFaceError, match=says):
        upscale(pictures(2, 16, 16), prompts, Pixels())


def test_a_long_text_is_taken_whole() -> None:
    backbone, text = Pixels(), torch.randn(1, 154, 1024)
    upscale(pictures(1, 16, 16), text, backbone, PLAIN)
    assert torch.equal(backbone.texts[0], text[0])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.zeros(16, 16, 3), "`image` has 3 dimensions"),
        (torch.zeros(1, 16, 16, 0), "holds no colour channel"),
        (torch.zeros(1, 0, 16, 3), "holds no pixel"),
        (torch.full((1, 16, 16, 3), torch.nan), "`image` number 0 holds values that are not"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(given: Tensor, says: str) -> None:
    with pytest.raises(OSDFaceError, match=says):
        upscale(given, TEXT, Pixels())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (UpscaleOptions(scale=0.5), "`upscale` is 0.5; 1 to 8 is wanted"),
        (UpscaleOptions(tile=100), "`tile` is 100; 256 or more, or 0"),
        (UpscaleOptions(overlap=-8), "`overlap` is -8; 0 or more"),
        (UpscaleOptions(color_match="mean-std"), "`color_match` is mean-std; adain or wavelet or"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: UpscaleOptions, says: str) -> None:
    with pytest.raises(OSDFaceError, match=says):
        upscale(pictures(1, 16, 16), TEXT, Pixels(), options)


# The released numbers, on diffusers


def golden_picture(folder: Path, name: str, times: int) -> Tensor:
    """(1,H,W,3), enlarged as the released code does it."""
    picture = Image.open(folder / "osediff" / "inputs" / name).convert("RGB")
    size = picture.width * times, picture.height * times
    array = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    return torch.from_numpy(array.copy()).float()[None] / 255


@pytest.mark.full
def test_diffusers_gives_the_released_numbers(
    more_golden: Path, converted: Path, stand_ins: Path
) -> None:
    pytest.importorskip("diffusers", reason="no diffusers: pip install -r requirements-dev.txt")
    pytest.importorskip("peft", reason="no peft: pip install -r requirements-dev.txt")
    from osdface_core.diffusers.osediff import load_osediff

    truth = load_file(more_golden / "osediff" / "golden.safetensors")
    checkpoint = stand_ins / "v2-1_512-seeded.safetensors"
    backbone = load_osediff(checkpoint, weights_of(converted), device=CPU, dtype=torch.float32)
    options = UpscaleOptions(1.0, color_match="none")
    given = golden_picture(more_golden, "portrait_256x160.png", 4)
    with torch.inference_mode():
        found = upscale(given, truth["prompt"], backbone, options).pictures[0]
    assert (found.movedim(-1, 0) - truth["tiled.image"].float()).abs().max() < 1e-3


def test_a_picture_is_enlarged_as_the_released_code_does_it(more_golden: Path) -> None:
    """Which rounds to 8 bits in between, and cuts off there what overshoots."""
    truth = load_file(more_golden / "osediff" / "golden.safetensors")
    given = golden_picture(more_golden, "astronaut_128.png", 1).movedim(-1, 1)
    difference = (resized(given, 512, 512)[0] * 255 - truth["small.lq8"].float()).abs()
    assert difference.mean() < 0.3
    assert difference.flatten().quantile(0.999) < 1.1
