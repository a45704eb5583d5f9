"""DiffIR without a host: its networks against the released code's outputs, and its files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from osdface_core.catalogue import CATALOGUE
from osdface_core.diffir.convert import convert, recognise_all
from osdface_core.diffir.enhance import EnhanceOptions, Load, enhance, steps
from osdface_core.diffir.files import ENHANCERS, INPAINTERS, missing
from osdface_core.diffir.inpaint import SIDES, InpaintOptions, inpaint
from osdface_core.diffir.network import (
    AT_ONCE,
    DEBLUR,
    INPAINT,
    UPSCALE,
    DiffIR,
    Shape,
    build_network,
    posterior,
    start_vector,
)
from osdface_core.diffir.weights import read_weights
from osdface_core.errors import OSDFaceError
from osdface_core.pictures.color import LUMA
from osdface_core.pictures.tone import tone_curve
from tests.conftest import FP16
from tests.test_weights_reading import MALICIOUS

# The families of golden outputs, and the stand-in weights that they were made with.
FAMILIES = {
    "srgan_x4": ("realsr_x4_s2", "srgan_x4_s2"),
    "x4": ("realsr_x4_s2", None),
    "x2": ("realsr_x2_s2", None),
    "x1": ("realsr_x1_s2", None),
    "deblur": ("deblur_s2", None),
    "inpaint_big": ("inpaint_big_s2", None),
    "inpaint": ("inpaint_s2", None),
}
CASES = (
    "deblur_101x75",
    "deblur_128",
    "deblur_136x120",
    "inpaint_149x203_grey",
    "inpaint_256_box",
    "inpaint_256_strokes",
    "inpaint_big_72x88",
    "srgan_x4_32",
    "x1_45x37",
    "x1_64x96",
    "x2_37x29",
    "x2_48x64",
    "x4_37x29",
    "x4_64",
    "x4_96x80",
)


@pytest.fixture(scope="session")
def released(more_golden: Path) -> dict[str, Tensor]:
    return load_file(more_golden / "diffir" / "golden.safetensors")


def tensors_of(
    diffir_maker: ModuleType, model: str, seed_as: str | None = None
) -> dict[str, Tensor]:
    state: dict[str, Tensor] = diffir_maker.state_dict(model, seed_as=seed_as)
    return {name: tensor for name, tensor in state.items() if not name.startswith("diffusion.")}


@pytest.fixture(scope="session")
def network_of(diffir_maker: ModuleType) -> Callable[[str], DiffIR]:
    """The network of a family, on its stand-in weights."""
    kept: dict[str, DiffIR] = {}

    def of(family: str) -> DiffIR:
        if family not in kept:
            kept[family] = build_network(tensors_of(diffir_maker, *FAMILIES[family]))
        return kept[family]

    return of


def family_of(case: str) -> str:
    return next(family for family in FAMILIES if case.startswith(f"{family}_"))


def network_input(case: str, released: dict[str, Tensor], multiple: int) -> Tensor:
    """(1,C,H,W), padded by numpy as the released scripts do it."""
    if case.startswith("inpaint"):
        picture = released[f"{case}.image"].numpy().astype(np.float32) / 255
        hole = (released[f"{case}.mask"].numpy() > 0).astype(np.float32)[..., None]
        given, mode = np.concatenate([picture * (1 - hole), hole], 2), "symmetric"
    else:
        given, mode = released[f"{case}.lq"].numpy().astype(np.float32) / 255, "reflect"
    height, width = given.shape[:2]
    padded = np.pad(given, ((0, -height % multiple), (0, -width % multiple), (0, 0)), mode=mode)  # type: ignore[call-overload]
    return torch.from_numpy(padded).movedim(-1, 0)[None]


# The network


def test_every_case_is_tested(released: dict[str, Tensor]) -> None:
    assert {key.partition(".")[0] for key in released if not key.startswith("train")} == set(CASES)


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_the_network_gives_the_released_numbers(
    case: str, released: dict[str, Tensor], network_of: Callable[[str], DiffIR]
) -> None:
    network = network_of(family_of(case))
    given = network_input(case, released, network.shape.multiple)
    condition = network.condition(given, lambda: None, AT_ONCE)
    priors = torch.cat(network.priors(condition, released[f"{case}.noise"]))
    assert (condition - released[f"{case}.condition"]).abs().max() < 1e-5
    assert (priors - released[f"{case}.ipr"]).abs().max() < 1e-5
    wanted = released[f"{case}.out"]
    found = network.restore(given, priors[-1:])[0, :, : wanted.shape[1], : wanted.shape[2]]
    assert (found - wanted).abs().max() < 2e-5


@torch.inference_mode()
def test_the_prior_from_a_start_of_zeros_is_the_released_codes(
    released: dict[str, Tensor], network_of: Callable[[str], DiffIR]
) -> None:
    found = network_of("x4").priors(released["x4_64.condition"], torch.zeros(1, 256))
    assert (torch.cat(found) - released["x4_64.ipr_from_zero"]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "job", "scale", "multiple"),
    [
        ("srgan_x4", UPSCALE, 4, 8),
        ("x4", UPSCALE, 4, 8),
        ("x2", UPSCALE, 2, 16),
        ("x1", UPSCALE, 1, 32),
        ("deblur", DEBLUR, 1, 8),
        ("inpaint", INPAINT, 1, 8),
        ("inpaint_big", INPAINT, 1, 8),
    ],
)
def test_size_and_job_are_read_off_the_tensors(
    family: str, job: str, scale: int, multiple: int, network_of: Callable[[str], DiffIR]
) -> None:
    shape = network_of(family).shape
    assert (shape.job, shape.scale, shape.multiple) == (job, scale, multiple)


def test_the_schedule_is_that_of_the_released_files(diffir_maker: ModuleType) -> None:
    schedule = diffir_maker.schedule()
    for name, of in (("posterior_mean_coef1", 0), ("posterior_mean_coef2", 1)):
        found = torch.tensor([posterior(step)[of] for step in range(4)])
        assert (found - schedule[name]).abs().max() < 1e-7


def test_the_start_is_the_released_codes_draw_after_its_seed() -> None:
    torch.manual_seed(7)
    assert torch.equal(start_vector(7), torch.randn(1, 256))
    assert torch.equal(start_vector(), start_vector())


@torch.inference_mode()
def test_a_large_picture_is_read_in_strips_as_it_is_read_whole(
    network_of: Callable[[str], DiffIR],
) -> None:
    network = network_of("x4")
    picture = torch.rand(1, 3, 120, 40, generator=torch.Generator().manual_seed(0))
    whole, strips = (
        network.condition(picture, lambda: None, pixels) for pixels in (120 * 40, 7 * 40)
    )
    assert (whole - strips).abs().max() < 1e-5


@torch.inference_mode()
def test_pictures_at_once_are_each_alone(network_of: Callable[[str], DiffIR]) -> None:
    network = network_of("inpaint_big")
    pair = torch.rand(2, 4, 40, 48, generator=torch.Generator().manual_seed(0))
    priors = network.prior(pair, start_vector())
    together = network.restore(pair, priors)
    for i in range(2):
        prior = network.prior(pair[i : i + 1], start_vector())
        assert (network.restore(pair[i : i + 1], prior)[0] - together[i]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "least"),
    [(torch.bfloat16, 38), pytest.param(torch.float16, 52, marks=FP16)],
)
@pytest.mark.parametrize("case", ["x2_37x29", "inpaint_big_72x88"])
def test_half_precision_is_near_the_released_numbers(
    case: str,
    dtype: torch.dtype,
    least: float,
    released: dict[str, Tensor],
    diffir_maker: ModuleType,
) -> None:
    """benchmarks/diffir_half.py measures all cases; least: PSNR in dB."""
    network = build_network(tensors_of(diffir_maker, *FAMILIES[family_of(case)])).to(dtype)
    start, wanted = released[f"{case}.noise"], released[f"{case}.out"].clamp(0, 1)
    if network.shape.job == INPAINT:
        given = released[f"{case}.image"][None].float() / 255
        mask = torch.ones(given.shape[:3])
        mask[released[f"{case}.mask"][None] == 0] = 0
        options = InpaintOptions("picture")
        found = inpaint(given, mask, loading(network), options, start=start).pictures[0]
        apart = (found - wanted.movedim(0, -1))[mask[0] > 0]
    else:
        given = released[f"{case}.lq"][None].float() / 255
        found = enhance(given, loading(network), start=start).pictures[0]
        apart = found - wanted.movedim(0, -1)
    assert apart.abs().max() > 1e-4
    assert -10 * apart.square().mean().log10() > least


@FP16
@torch.inference_mode()
def test_half_precision_holds_a_large_bright_picture() -> None:
    """Its sums over all pixels are beyond the range of fp16."""
    dtype = torch.float16
    network = small("x4")
    for name, parameter in network.named_parameters():
        if name.endswith("attn.qkv_dwconv.weight"):
            parameter.mul_(200)
        if name == "condition.E.7.bias":
            parameter.add_(3)
    given = pictures(1, 320, 320).movedim(-1, 1) * 0.2 + 0.8
    found = []
    for precision in (torch.float32, dtype):
        network.to(precision)
        prior = network.prior(given.to(precision), start_vector().to(precision))
        found.append((prior.float(), network.restore(given.to(precision), prior).float()))
    (prior, wanted), (of_half, half) = found
    epsilon = torch.finfo(dtype).eps
    assert (of_half - prior).abs().max() < 8 * epsilon * prior.abs().max()
    assert (half - wanted).abs().max() < 8 * epsilon


def without_a_layer(state: dict[str, Tensor]) -> None:
    del state["G.latent.0.attn.qkv.weight"]


def with_one_more(state: dict[str, Tensor]) -> None:
    state["G.extra.weight"] = torch.zeros(3)


def not_finite(state: dict[str, Tensor]) -> None:
    state["G.latent.0.attn.qkv.weight"] = torch.full((512 * 3, 512, 1, 1), torch.nan)


def with_an_odd_first_layer(state: dict[str, Tensor]) -> None:
    state["G.patch_embed.proj.weight"] = torch.zeros(64, 7, 3, 3)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (without_a_layer, r"G.latent.0.attn.qkv.weight is missing"),
        (with_one_more, r"G.extra.weight is left over"),
        (not_finite, r"G.latent.0.attn.qkv.weight is not finite"),
        (with_an_odd_first_layer, r"its first layer takes 7 channels"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    harm: Callable[[dict[str, Tensor]], None], says: str, diffir_maker: ModuleType
) -> None:
    state = tensors_of(diffir_maker, "realsr_x4_s2")
    harm(state)
    with pytest.raises(OSDFaceError, match=says):
        build_network(state)


# The files


@pytest.fixture(scope="module")
def downloaded(diffir_maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with released files of each layout, as a user may have it."""
    folder = tmp_path_factory.mktemp("downloaded")
    for name in ("realsr_x2", "srgan_x4", "deblur", "inpaint", "deblur_s1"):
        diffir_maker.FILES[name](folder, "")
    torch.save({"params": {"conv0.weight": torch.zeros(64, 3, 3, 3)}}, folder / "net_d.pth")
    (folder / "notes.txt").write_text("downloaded on Sunday")
    return folder


NAMES = {
    "DiffIRS2-GANx2.safetensors": "realsr_x2_s2",
    "SISR-DiffIRS2-GAN.safetensors": "realsr_x4_s2",
    "DiffIRS2-deblur.safetensors": "deblur_s2",
    "DiffIRS2-celeba.safetensors": "inpaint_s2",
}


@pytest.fixture(scope="module")
def found(downloaded: Path) -> dict[str, Path]:
    return recognise_all(downloaded)


def test_downloaded_files_are_recognised_by_content(found: dict[str, Path]) -> None:
    """Neither the teacher of stage 1 nor a discriminator is one."""
    assert found.keys() == NAMES.keys()
    assert found["DiffIRS2-celeba.safetensors"].name == "last.ckpt"


@pytest.mark.parametrize("name", NAMES)
def test_the_converted_file_is_the_network_that_inference_uses(
    name: str, found: dict[str, Path], diffir_maker: ModuleType, tmp_path: Path
) -> None:
    """Not the plain weights beside the averaged ones, not the teacher, not the optimiser."""
    from osdface_core.weights.fetching import sha256_of

    seed_as = "srgan_x4_s2" if name.startswith("SISR") else None
    wanted = tensors_of(diffir_maker, NAMES[name], seed_as)
    path = convert(found[name], tmp_path / name)
    held = load_file(path)
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[key], tensor) for key, tensor in wanted.items())
    assert path.stat().st_size < 114e6
    with safe_open(path, framework="np") as file:
        digest = file.metadata()[f"sha256 of {found[name].name}"]
    assert digest == sha256_of(found[name])
    again = read_weights(path)
    assert all(torch.equal(again[key], tensor) for key, tensor in wanted.items())


def test_nothing_foreign_is_imported_from_the_pickle(found: dict[str, Path]) -> None:
    read_weights(found["DiffIRS2-celeba.safetensors"])
    assert not {"omegaconf", "pytorch_lightning"} & set(sys.modules)


@pytest.mark.parametrize("make", MALICIOUS, ids=lambda make: make.__name__)
def test_a_malicious_file_runs_nothing_and_is_no_network(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    folder = tmp_path / "DiffIRS2-celeba" / "models"
    folder.mkdir(parents=True)
    make(folder / "last.ckpt")
    assert recognise_all(tmp_path) == {}
    with pytest.raises(OSDFaceError):
        read_weights(folder / "last.ckpt")
    assert not (tmp_path / "mark").exists()


def test_the_first_stage_is_refused(downloaded: Path) -> None:
    with pytest.raises(OSDFaceError, match=r"deblur-S1.pth is of DiffIR's first stage"):
        read_weights(downloaded / "S1" / "deblur-S1.pth")


def test_a_discriminator_is_refused(downloaded: Path) -> None:
    with pytest.raises(OSDFaceError, match=r"net_d.pth does not hold DiffIR's weights"):
        read_weights(downloaded / "net_d.pth")


def other_diffusion(state: dict[str, Tensor]) -> None:
    state["diffusion.posterior_mean_coef1"] = torch.linspace(1, 0.1, 4)


def other_copy(state: dict[str, Tensor]) -> None:
    state["diffusion.model.resmlp.0.bias"] = state["denoise.resmlp.0.bias"] + 1


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (other_diffusion, "was trained with another diffusion than the released 4 steps"),
        (other_copy, r"holds two different model.resmlp.0.bias"),
    ],
)
def test_what_the_network_could_not_honour_is_refused(
    harm: Callable[[dict[str, Tensor]], None], says: str, diffir_maker: ModuleType, tmp_path: Path
) -> None:
    state = dict(diffir_maker.state_dict("inpaint_s2"))
    harm(state)
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(OSDFaceError, match=says):
        read_weights(tmp_path / "own.pth")


@pytest.mark.parametrize("wrapper", ["params.", "params.module.", "module."])
def test_other_layouts_are_unwrapped(
    wrapper: str, diffir_maker: ModuleType, tmp_path: Path
) -> None:
    """Training without averages leaves `params` alone; several GPUs put `module.` before names."""
    wanted = tensors_of(diffir_maker, "inpaint_s2")
    outer, _, inner = wrapper.rpartition("params.")
    state = {inner + name: tensor for name, tensor in diffir_maker.state_dict("inpaint_s2").items()}
    torch.save({"params": state} if "params" in wrapper else state, tmp_path / "own.pth")
    held = read_weights(tmp_path / "own.pth")
    assert held.keys() == wanted.keys()
    assert not outer


def test_two_files_of_one_name_are_told(diffir_maker: ModuleType, tmp_path: Path) -> None:
    for folder, salt in (("a", ""), ("b", "held")):
        path = tmp_path / folder / "last.ckpt"
        path.parent.mkdir()
        torch.save(diffir_maker.state_dict("inpaint_s2", salt), path)
    with pytest.raises(OSDFaceError, match=r"would both become DiffIRS2-inpaint\.safetensors"):
        recognise_all(tmp_path)


def test_install_takes_them_from_a_folder(
    downloaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import install

    options = ["--from", str(downloaded), "--models-dir", str(tmp_path), "--offline"]
    install.main(options)
    assert {path.name for path in (tmp_path / "diffir").glob("*.safetensors")} == NAMES.keys()
    said = capsys.readouterr().out
    assert "CelebA-HQ" in said
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "diffir").iterdir()}
    install.main(options)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "diffir").iterdir()} == times


def test_a_missing_file_is_told_with_the_folder_that_holds_it() -> None:
    for name, address in (ENHANCERS | INPAINTERS).items():
        said = str(missing(name))
        assert f"{name} is missing: download it from {address}" in said
        assert "--from" in said
        assert "\n" not in said
    assert "diffir" in CATALOGUE.folders


# The work around the networks


SMALL = Shape(
    job=UPSCALE,
    scale=4,
    unshuffle=1,
    gather=1,
    channels=3,
    width=8,
    blocks=(1, 1, 1, 1),
    refinement=1,
    heads=(1, 2, 4, 8),
    hidden=(8, 8, 8, 8),
    centred=False,
    residuals=1,
)
KINDS = {
    "x4": SMALL,
    "x2": replace(SMALL, scale=2, unshuffle=2, gather=2),
    "x1": replace(SMALL, scale=1, unshuffle=4, gather=4),
    "deblur": replace(SMALL, job=DEBLUR, scale=1, gather=4, centred=True),
    "inpaint": replace(SMALL, job=INPAINT, scale=1, gather=4, channels=4, centred=True),
}


class OutOfMemory(Exception):
    pass


class Room(DiffIR):
    """A small network of random weights that holds only so many pixels of its input."""

    room = 10**9
    seen: list[tuple[int, int]]

    def restore(self, lq: Tensor, prior: Tensor, tick: Callable[[], None] = lambda: None) -> Tensor:
        self.seen.append((lq.shape[2], lq.shape[3]))
        if lq.shape[2] * lq.shape[3] > self.room:
            raise OutOfMemory
        return super().restore(lq, prior, tick)


def small(kind: str) -> Room:
    torch.manual_seed(0)
    network = Room(KINDS[kind])
    network.seen = []
    return network.eval().requires_grad_(False)


def loading(network: DiffIR) -> Load:
    return lambda memory: (network, torch.device("cpu"))


def never(memory: int) -> tuple[DiffIR, torch.device]:
    raise AssertionError("the network was loaded")


def is_out(error: BaseException) -> bool:
    return isinstance(error, OutOfMemory)


def pictures(count: int, height: int, width: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(count + height)
    return torch.rand(count, height, width, channels, generator=generator)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("inpaint")])
def test_enhancing_gives_the_released_picture(
    case: str, released: dict[str, Tensor], network_of: Callable[[str], DiffIR]
) -> None:
    given = released[f"{case}.lq"][None].float() / 255
    start, load = released[f"{case}.noise"], loading(network_of(family_of(case)))
    found = enhance(given, load, start=start).pictures[0].movedim(-1, 0)
    wanted = released[f"{case}.out"].clamp(0, 1)
    if tone_curve(given[0]) is not None:
        # A picture without colour, but for what JPEG adds: the released code colours it.
        wanted = torch.einsum("c,chw->hw", torch.tensor(LUMA), wanted)
    assert (found - wanted).abs().max() < 2e-5


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("inpaint")])
def test_filling_gives_the_released_picture(
    case: str, released: dict[str, Tensor], network_of: Callable[[str], DiffIR]
) -> None:
    """Soft and dim masks are holes too; known pixels stay bit for bit."""
    given = released[f"{case}.image"][None].float() / 255
    mask = released[f"{case}.mask"].float() / 255
    load, start = loading(network_of(family_of(case))), released[f"{case}.noise"]
    found = inpaint(given, mask, load, InpaintOptions("picture"), start=start).pictures[0]
    hole = released[f"{case}.mask"] > 0
    wanted = released[f"{case}.out"].clamp(0, 1).movedim(0, -1)
    assert (found - wanted)[hole].abs().max() < 2e-5
    assert torch.equal(found[~hole], given[0][~hole])
    if f"{case}.img8" in released:
        difference = (found * 255).int() - released[f"{case}.img8"].int()
        assert difference[hole].abs().max() <= 1
        assert difference[hole].abs().float().mean() < 0.01


@pytest.mark.parametrize(("kind", "scale"), [("x4", 4), ("x2", 2), ("x1", 1), ("deblur", 1)])
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (17, 5), (33, 50)])
def test_every_size_is_taken(kind: str, scale: int, size: tuple[int, int]) -> None:
    """Also one that reflection alone cannot pad."""
    found = enhance(pictures(1, *size), loading(small(kind))).pictures
    assert found.shape == (1, size[0] * scale, size[1] * scale, 3)
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", ["x4", "x2", "deblur"])
def test_tiles_are_steered_by_the_whole_picture_and_leave_no_hole(kind: str) -> None:
    network = small(kind)
    # Without attention, which a tile sees a part of, the tiles are the whole but for their edges.
    for name, parameter in network.named_parameters():
        if name.endswith("attn.project_out.weight"):
            parameter.zero_()
    given, done = pictures(1, 150, 170), []
    scale = network.shape.scale
    whole = enhance(given, loading(network), EnhanceOptions(0, 0)).pictures
    options = EnhanceOptions(128 * scale, 64 * scale)
    tiled = enhance(
        given,
        loading(network),
        options,
        progress=lambda total: lambda n=1, picture=None: done.append(n),
    ).pictures
    assert network.seen[0] == (whole.shape[1] // scale + -150 % network.shape.multiple, 176)
    assert len(network.seen) == 1 + 4
    assert sum(done) == steps(150, 170, network, options) == 5
    # A tile's outermost pixel, which sees an edge where there is none, counts for 0.5 / 64 at most.
    assert 0 < (tiled - whole).abs().max() < 4e-3
    # What one tile alone makes is the whole's.
    inside = 20 * scale
    assert (tiled - whole)[:, :inside, :inside].abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["x2", "deblur"])
def test_tiles_steered_by_themselves_would_differ(kind: str) -> None:
    """Where the prior counts for much, tiles with the whole picture's are the whole, and tiles that
    are each read alone are not.
    """
    network = small(kind)
    for name, parameter in network.named_parameters():
        if name.endswith("attn.project_out.weight"):
            parameter.mul_(0.1)
        if name.endswith("kernel.0.weight"):
            parameter.mul_(3)
        if name.startswith(("condition.", "denoise.")) and name.endswith("weight"):
            parameter.mul_(2.5)
    given = pictures(1, 150, 170)
    given[:, :, :85] *= 0.1
    scale = network.shape.scale
    options = EnhanceOptions(128 * scale, 64 * scale)
    whole = enhance(given, loading(network), EnhanceOptions(0, 0)).pictures
    shared = enhance(given, loading(network), options).pictures
    usual = network.restore

    def alone(lq: Tensor, prior: Tensor, tick: Any) -> Tensor:
        return usual(lq, network.prior(lq, start_vector()), tick)

    network.restore = alone  # type: ignore[method-assign]
    own = enhance(given, loading(network), options).pictures
    apart, apart_alone = ((made - whole).abs() for made in (shared, own))
    assert apart_alone.mean() > 5e-3
    assert apart.mean() < apart_alone.mean() / 10


def test_pictures_of_a_batch_are_each_alone_and_again_the_same() -> None:
    given, network = pictures(3, 20, 24), small("x2")
    together = enhance(given, loading(network)).pictures
    for i in range(3):
        assert torch.equal(enhance(given[i : i + 1], loading(network)).pictures[0], together[i])


def test_another_start_makes_another_picture() -> None:
    given, network = pictures(1, 20, 24), small("x2")
    one, other = (
        enhance(given, loading(network), start=start_vector(seed)).pictures for seed in (0, 1)
    )
    assert not torch.equal(one, other)
    assert torch.equal(one, enhance(given, loading(network)).pictures)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_black_and_white_stays_so_and_alpha_comes_along(channels: int) -> None:
    given = pictures(1, 24, 24, 1).expand(-1, -1, -1, channels).clone()
    if channels in (2, 4):
        given[..., -1] = pictures(1, 24, 24)[..., 0]
    found = enhance(given, loading(small("deblur"))).pictures
    colours = 3 if channels >= 3 else 1
    assert found.shape == given.shape
    assert torch.equal(found[..., :colours], found[..., :1].expand(-1, -1, -1, colours))
    assert not torch.equal(found[..., 0], given[..., 0])
    assert torch.equal(found[..., colours:], given[..., colours:])
    larger = enhance(given, loading(small("x4"))).pictures
    assert larger.shape == (1, 96, 96, channels)


@pytest.mark.parametrize("tile", [0, 1024])
def test_memory_that_runs_out_halves_the_tile_and_loses_nothing(tile: int) -> None:
    network, given = small("x4"), pictures(2, 100, 90)
    network.room = 64 * 64
    # It then adds nothing to the picture, which is enlarged by repeating pixels.
    network.G.tail[1].weight.zero_()
    network.G.tail[1].bias.zero_()
    found = enhance(given, loading(network), EnhanceOptions(tile, 64), out_of_memory=is_out)
    wanted = given.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert (found.pictures - wanted).abs().max() < 1e-5
    # The second picture starts at the size that has worked.
    assert sum(rows * columns > network.room for rows, columns in network.seen) < 4
    network.room = 8 * 8
    with pytest.raises(OutOfMemory):
        enhance(given, loading(network), out_of_memory=is_out)


def test_stopping_ends_the_job_within_a_tile() -> None:
    class Stop(Exception):
        pass

    said = []

    def stop(done: int = 1, picture: Tensor | None = None) -> None:
        said.append(done)
        if len(said) == 9:
            raise Stop

    with pytest.raises(Stop):
        enhance(pictures(1, 64, 64), loading(small("x4")), progress=lambda total: stop)
    assert sum(said) == 1, "a tile was finished"


def test_a_picture_that_comes_out_as_nan_is_named_and_the_rest_is_kept() -> None:
    network, given = small("deblur"), pictures(3, 24, 24)
    usual, calls = network.restore, []

    def restore(*inputs: Any) -> Tensor:
        calls.append(1)
        return usual(*inputs) * (torch.nan if len(calls) == 2 else 1)

    network.restore = restore  # type: ignore[method-assign]
    result = enhance(given, loading(network))
    assert result.failed == (1,)
    assert (result.pictures[1] - given[1]).abs().max() < 1e-6
    assert not torch.equal(result.pictures[2], given[2])


def a_mask(count: int = 1) -> Tensor:
    mask = torch.zeros(count, 60, 80)
    mask[:, 20:41, 30:61] = torch.linspace(0.01, 1, 31)
    return mask


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("feather", [0, 5])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_only_the_hole_is_changed(side: str, feather: int, channels: int) -> None:
    given = pictures(2, 60, 80, channels) * 3 - 1
    network = small("inpaint")
    found = inpaint(given, a_mask(), loading(network), InpaintOptions(side, feather)).pictures
    hole = a_mask()[0] > 0
    assert torch.equal(found[:, ~hole], given[:, ~hole])
    colours = 3 if channels >= 3 else 1
    assert torch.equal(found[..., colours:], given[..., colours:])
    assert not torch.equal(found[:, hole], given[:, hole])
    expected = {"256": (256, 344), "512": (512, 688), "picture": (64, 80)}
    assert set(network.seen) == {expected[side]}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("scale", [1, 9])
def test_what_was_in_the_hole_does_not_show(side: str, scale: int) -> None:
    """Not even where the picture is shrunk or enlarged for the network."""
    given = pictures(1, 60 * scale, 80 * scale)
    mask = a_mask().repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    other = torch.where(mask[..., None] > 0, 1 - given, given)
    one, two = (
        inpaint(picture, mask, loading(small("inpaint")), InpaintOptions(side)).pictures
        for picture in (given, other)
    )
    assert torch.equal(one, two)


def test_the_fill_fades_into_the_picture_inside_of_the_hole() -> None:
    given = torch.zeros(1, 60, 80, 3)
    white = small("inpaint")
    white.restore = lambda lq, prior, tick: torch.ones_like(lq[:, :3])  # type: ignore[method-assign]
    options = InpaintOptions("picture", 3)
    found = inpaint(given, a_mask(), loading(white), options).pictures[0, 30, 28:38, 0]
    assert torch.allclose(found, torch.tensor([0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]))
    to_the_edge = torch.ones(1, 60, 80)
    assert (inpaint(given, to_the_edge, loading(white), options).pictures == 1).all()


@pytest.mark.parametrize("mask", [torch.zeros(1, 64, 64), torch.zeros(60, 80)])
def test_without_a_hole_the_picture_passes_and_no_network_is_loaded(mask: Tensor) -> None:
    """Load Image gives an empty mask of 64 x 64 px for a picture without alpha."""
    given = pictures(2, 60, 80)
    assert torch.equal(inpaint(given, mask, never).pictures, given)


def test_each_picture_has_its_own_hole() -> None:
    given, masks, network = pictures(3, 60, 80), a_mask(3), small("inpaint")
    masks[1] = 0
    together = inpaint(given, masks, loading(network)).pictures
    assert len(network.seen) == 2
    assert torch.equal(together[1], given[1])
    for i in range(3):
        alone = inpaint(given[i : i + 1], masks[i], loading(network)).pictures[0]
        assert torch.equal(alone, together[i])


def test_a_filled_photograph_without_colour_stays_so() -> None:
    given = pictures(1, 60, 80, 1).expand(-1, -1, -1, 3)
    found = inpaint(given, a_mask(), loading(small("inpaint"))).pictures
    assert torch.equal(found, found[..., :1].expand_as(found))


def test_memory_that_runs_out_halves_the_size_at_which_it_fills() -> None:
    network = small("inpaint")
    network.room = 256 * 400
    inpaint(
        pictures(2, 60, 80), a_mask(), loading(network), InpaintOptions("512"), out_of_memory=is_out
    )
    assert network.seen == [(512, 688), (256, 344), (256, 344)]


@pytest.mark.parametrize(
    ("given", "mask", "says"),
    [
        (pictures(1, 60, 80), torch.ones(1, 64, 64), r"`mask` is 64 x 64 px and `image` 80 x 60"),
        (pictures(3, 60, 80), a_mask(2), "`mask` holds 2 masks and `image` 3 pictures"),
        (pictures(1, 60, 80), torch.ones(1, 1, 60, 80), r"`mask` is \(1, 1, 60, 80\)"),
        (pictures(1, 60, 80), a_mask() * torch.nan, "`mask` holds values that are not numbers"),
        (pictures(1, 60, 80)[0], a_mask(), "`image` has 3 dimensions"),
        (pictures(1, 60, 80) * torch.nan, a_mask(), "`image` number 0 holds values that are not"),
    ],
)
def test_masks_and_pictures_that_do_not_fit_are_refused(
    given: Tensor, mask: Tensor, says: str
) -> None:
    with pytest.raises(OSDFaceError, match=says):
        inpaint(given, mask, never)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (EnhanceOptions(tile=100), "`tile` is 100; 128 or more, or 0"),
        (EnhanceOptions(overlap=-8), "`overlap` is -8; 0 or more"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: EnhanceOptions, says: str) -> None:
    with pytest.raises(OSDFaceError, match=says):
        enhance(pictures(1, 16, 16), never, options)
    with pytest.raises(OSDFaceError, match="`working_size` is 300; 256, 512, picture is wanted"):
        inpaint(pictures(1, 60, 80), a_mask(), never, InpaintOptions("300"))


def test_the_network_of_another_job_is_refused() -> None:
    with pytest.raises(OSDFaceError, match="holds a network that fills holes"):
        enhance(pictures(1, 16, 16), loading(small("inpaint")))
    with pytest.raises(OSDFaceError, match="holds a network that enlarges or sharpens"):
        inpaint(pictures(1, 60, 80), a_mask(), loading(small("deblur")))
