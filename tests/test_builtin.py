"""The built-in model: small, whole, the same in ComfyUI as in diffusers, better than what it is
given, never mixed with another.
"""

from __future__ import annotations

import importlib.util
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from osdface_core.diffusers.builtin import load_backbone as load_in_diffusers
from osdface_core.faces.detect import DetectOptions
from osdface_core.faces.files import BUILTIN_DETECTOR, BUILTIN_PARSER
from osdface_core.faces.find import find_faces
from osdface_core.faces.paste import PasteOptions, paste
from osdface_core.faces.retinaface import build_retinaface
from osdface_core.ldm.builtin import load_backbone
from osdface_core.osdface import builtin
from osdface_core.osdface.builtin.autoencoder import Autoencoder
from osdface_core.osdface.restore import restore
from osdface_core.weights.reading import read_tensors
from tests import photographs

# Of every file of the built-in model together.
MOST_BYTES = 24 * 1024**2


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.inference_mode():
        yield


def test_it_is_small() -> None:
    files = [*builtin.FOLDER.glob("*.safetensors"), BUILTIN_DETECTOR, BUILTIN_PARSER]
    assert {file.name for file in files} == {
        "autoencoder.safetensors",
        "detector.safetensors",
        "parser.safetensors",
        "unet.safetensors",
        "vre.safetensors",
    }
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES


def bad(picture: Image.Image, blur: float, shrink: int, quality: int) -> Image.Image:
    """By PIL alone."""
    size = picture.width // shrink, picture.height // shrink
    file = io.BytesIO()
    picture.filter(ImageFilter.GaussianBlur(blur)).resize(size, Image.Resampling.BOX).save(
        file, "JPEG", quality=quality
    )
    return Image.open(file).convert("RGB").resize(picture.size, Image.Resampling.BICUBIC)


def tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    """One that training never saw."""
    return photographs.astronaut()


@pytest.fixture(scope="module")
def close_up() -> Image.Image:
    """As sharp as a crop of a face commonly is."""
    return photographs.portrait().resize((512, 512))


@pytest.fixture(scope="module")
def backbone() -> Any:
    load = load_in_diffusers if importlib.util.find_spec("diffusers") else load_backbone
    return load(torch.device("cpu"), torch.float32)


def restored(crops: torch.Tensor, backbone: Any) -> torch.Tensor:
    return restore(crops, builtin.embedder()(crops.movedim(-1, 1)), backbone).pictures


def error(given: torch.Tensor, right: torch.Tensor) -> float:
    return float((given - right).square().mean())


def detail(picture: torch.Tensor) -> float:
    return float(picture.diff(dim=1).square().mean() + picture.diff(dim=2).square().mean())


@pytest.mark.parametrize("shrink", [4, 8])
def test_a_bad_portrait_comes_out_sharper_and_no_further_from_the_original(
    shrink: int, portrait: Image.Image, backbone: Any
) -> None:
    original, given = tensor(portrait), tensor(bad(portrait, shrink / 2.5, shrink, 60))
    result = restored(given, backbone)
    # At most half a decibel, which sharpness costs.
    assert error(result, original) < 10**0.05 * error(given, original)
    assert detail(result) > 1.5 * detail(given)
    assert detail(result) < 1.2 * detail(original)


def test_the_autoencoder_gives_a_picture_back(close_up: Image.Image) -> None:
    pixels = tensor(close_up).movedim(-1, 1)
    network = builtin.autoencoder()
    latents = network.encode(pixels * 2 - 1)
    assert latents.shape == (1, builtin.CHANNELS, 64, 64)
    assert 0.4 < float(latents.std()) < 2.5
    assert error(network.decode(latents) / 2 + 0.5, pixels) < 10 ** (-2.9)


def test_the_encoder_cleans_a_bad_portrait_at_a_quarter_of_its_size_and_leaves_a_good_one(
    portrait: Image.Image, close_up: Image.Image
) -> None:
    denoiser = builtin.autoencoder().encoder.denoiser

    def quarter(picture: Image.Image) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(tensor(picture).movedim(-1, 1) * 2 - 1, 4)

    for shrink, share in ((8, 0.9), (4, 1.0)):
        good, given = quarter(portrait), quarter(bad(portrait, shrink / 2.5, shrink, 60))
        assert error(given + denoiser(given), good) < share * error(given, good)
    good = quarter(close_up)
    assert float(denoiser(good).square().mean()) < 1e-4
    # Sides that its levels do not divide are taken with their edges repeated.
    part = good[..., :90, :106]
    wide = torch.nn.functional.pad(part, [0, 6, 0, 6], mode="replicate")
    assert torch.equal(denoiser(part), denoiser(wide)[..., :90, :106])


def test_a_new_denoiser_changes_nothing() -> None:
    assert not Autoencoder().encoder.denoiser(torch.rand(1, 3, 32, 32)).any()


def test_grain_is_the_same_wherever_a_part_of_the_latents_begins_at_its_repeat() -> None:
    network = Autoencoder()
    torch.manual_seed(0)
    network.start(torch.rand(4, 3, 64, 64))
    assert float(network.decoder.grain.std()) == pytest.approx(1, abs=1e-3)
    network.decoder.conv_grain.bias.fill_(0.1)
    latents = torch.randn(1, builtin.CHANNELS, 24, 24)
    latents[:, 0] = 1
    whole, part = network.decode(latents), network.decode(latents[..., 8:, 8:])
    network.decoder.conv_grain.bias.zero_()
    plain = network.decode(latents)
    assert float((whole - plain).std()) == pytest.approx(0.1, rel=0.05)
    # away from the part's own edges, where convolutions see zeros
    assert (whole[..., 96:, 96:] - part[..., 32:, 32:]).abs().max() < 1e-3


def test_a_face_comes_out_the_same_alone_and_in_a_batch(
    portrait: Image.Image, backbone: Any
) -> None:
    one = tensor(bad(portrait, 2, 4, 70))
    other = one.flip(2)
    together = restored(torch.cat([one, other]), backbone)
    assert (restored(other, backbone) - together[1:]).abs().max() < 1e-4


def test_any_crop_size_is_taken(backbone: Any) -> None:
    assert restored(torch.rand(1, 130, 90, 3), backbone).shape == (1, 130, 90, 3)


def test_a_face_cut_out_at_256_px_comes_back_at_512_and_to_its_place(
    group: torch.Tensor, backbone: Any
) -> None:
    """The pasted face is nearer to the picture where it was than anywhere beside."""
    detector = build_retinaface(read_tensors(BUILTIN_DETECTOR))
    faces = find_faces(group, detector, DetectOptions(crop_size=256)).faces
    assert faces.crops.shape == (2, 256, 256, 3)
    result = restored(faces.crops, backbone)
    assert result.shape == (2, 512, 512, 3)
    after, mask = paste(group, faces, result, PasteOptions(mask_type="ellipse"))
    assert torch.equal(after[mask == 0], group[mask == 0])
    inside = mask[0] > 0.9
    here = error(after[0][inside], group[0][inside])
    assert 0 < here < 0.01
    for shift, axis in ((-2, 0), (2, 0), (-2, 1), (2, 1)):
        assert here < error(after[0].roll(shift, axis)[inside], group[0][inside])


# In ComfyUI


@pytest.fixture(scope="module")
def given(host: Any) -> SimpleNamespace:
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args[:2]
    return SimpleNamespace(model=model, vae=vae)


def run(host: Any, node: str, **inputs: Any) -> Any:
    return host.nodes[node].execute(**inputs).args[0]


def step(host: Any, **inputs: Any) -> torch.Tensor:
    return run(
        host,
        "OSDFaceOneStep",
        **{"lora_name": "none", "lora_strength": 1.0, "timestep": 399, "faces_per_batch": 0}
        | inputs,
    )


@pytest.mark.host
def test_comfyui_and_diffusers_agree(
    host: Any, given: Any, backbone: Any, portrait: Image.Image
) -> None:
    pixels = tensor(bad(portrait, 2, 4, 70)).movedim(-1, 1)
    prompts = builtin.embedder()(pixels)
    ours = host.backbone.HostBackbone(given.model, given.vae, {host.base_model.BUILTIN_MARK: True})
    latents = backbone.encode(pixels)
    assert (ours.encode(pixels) - latents).abs().max() < 1e-5
    x0 = backbone.denoise(latents, prompts, 399)
    assert (ours.denoise(latents, prompts, 399) - x0).abs().max() < 1e-4
    assert (ours.decode(x0) - backbone.decode(x0)).abs().max() < 1e-5


@pytest.mark.host
def test_the_nodes_restore_with_nothing_downloaded(
    host: Any, given: Any, backbone: Any, portrait: Image.Image
) -> None:
    crops = tensor(bad(portrait, 2, 4, 70))
    conditioning = run(host, "OSDFaceVRE", crops=crops, vre_name="builtin")
    result = step(host, model=given.model, vae=given.vae, crops=crops, conditioning=conditioning)
    assert (result - restored(crops, backbone)).abs().max() < 1e-4


@pytest.mark.host
def test_cores_own_vae_nodes_take_the_vae(host: Any, given: Any, close_up: Image.Image) -> None:
    pixels = tensor(close_up)
    latent = host.nodes["VAEEncode"]().encode(given.vae, pixels)[0]
    picture = host.nodes["VAEDecode"]().decode(given.vae, latent)[0]
    tiled = host.nodes["VAEDecodeTiled"]().decode(given.vae, latent, 256, 64)[0]
    assert error(picture, pixels) < 10 ** (-2.9)
    assert error(tiled, picture) < 1e-4


@pytest.mark.host
def test_a_core_sampler_takes_the_model(host: Any, given: Any) -> None:
    latent = {"samples": torch.zeros(1, builtin.CHANNELS, 16, 16)}
    prompts = [[torch.zeros(1, 77, 1024), {}]]
    made = host.nodes["KSampler"]().sample(
        given.model, 1, 2, 1.0, "euler", "simple", prompts, prompts, latent
    )[0]["samples"]
    assert made.shape == (1, builtin.CHANNELS, 16, 16)
    assert bool(made.isfinite().all())


@pytest.mark.host
def test_nothing_is_read_anew_from_run_to_run(host: Any, given: Any) -> None:
    again = host.nodes["OSDFaceBuiltinModel"].execute().args
    assert again[0] is given.model
    assert again[1] is given.vae


@pytest.mark.host
@pytest.mark.parametrize(
    ("what", "wants"), [("prompts", "vre_name"), ("lora", "lora_name"), ("vae", "vae")]
)
def test_mixing_is_refused(
    what: str,
    wants: str,
    host: Any,
    given: Any,
    portrait: Image.Image,
) -> None:
    crops = tensor(portrait)
    conditioning = run(host, "OSDFaceVRE", crops=crops, vre_name="builtin")
    inputs = {"model": given.model, "vae": given.vae, "crops": crops, "conditioning": conditioning}
    if what == "prompts":
        inputs["conditioning"] = [[conditioning[0][0], {}]]
    if what == "lora":
        inputs["lora_name"] = "pytorch_lora_weights.safetensors"
    if what == "vae":
        small = host.comfy.taesd.taesd.TAESD(latent_channels=4).state_dict()
        inputs["vae"] = host.comfy.sd.VAE(sd=small)
    with pytest.raises(host.error, match=wants) as raised:
        step(host, **inputs)
    assert "built-in" in str(raised.value)


@pytest.mark.host
def test_builtin_is_the_detector_where_no_other_is(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def default() -> str:
        return next(
            i for i in host.nodes["FaceDetectAlign"].define_schema().inputs if i.id == "detector"
        ).default

    assert default() == "retinaface_resnet50"
    monkeypatch.setattr(host.folder_paths, "get_full_path", lambda *_: None)
    assert default() == "builtin"


@pytest.mark.host
@pytest.mark.full
def test_it_does_not_go_with_a_real_model(
    host: Any, given: Any, checkpoint: tuple[Any, Any], portrait: Image.Image
) -> None:
    crops = tensor(portrait)
    conditioning = run(host, "OSDFaceVRE", crops=crops, vre_name="builtin")
    with pytest.raises(host.error, match="built-in"):
        step(host, model=checkpoint[0], vae=checkpoint[1], crops=crops, conditioning=conditioning)


def test_training_starts_where_the_step_changes_nothing(close_up: Image.Image) -> None:
    pytest.importorskip("diffusers", reason="no diffusers: pip install -r requirements-dev.txt")
    from osdface_core.sd21.schedule import x0_of
    from osdface_core.training.networks import UNetConfig, load_unet

    unet, network = load_unet(UNetConfig(kind="builtin")), builtin.autoencoder()
    latents = network.encode(tensor(close_up).movedim(-1, 1) * 2 - 1)
    for timestep in (0, 399, 900):
        x0 = x0_of(latents, unet(latents, timestep, torch.rand(1, 77, 1024)).sample, timestep)
        assert (network.decode(x0.float()) - network.decode(latents)).abs().max() < 1e-3
