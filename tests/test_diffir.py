"""DiffIR without a host: its networks against the released code's outputs, and its files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from osdface_core.catalogue import CATALOGUE
from osdface_core.diffir.convert import convert, recognise_all
from osdface_core.diffir.files import ENHANCERS, INPAINTERS, missing
from osdface_core.diffir.network import (
    DEBLUR,
    INPAINT,
    UPSCALE,
    DiffIR,
    build_network,
    posterior,
    start_vector,
)
from osdface_core.diffir.weights import read_weights
from osdface_core.errors import OSDFaceError
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
def maker(more_golden: Path) -> ModuleType:
    """The maker of DiffIR's stand-in weights, beside the golden outputs."""
    path = more_golden / "diffir" / "make_weights.py"
    spec = importlib.util.spec_from_file_location("diffir_make_weights", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def released(more_golden: Path) -> dict[str, Tensor]:
    return load_file(more_golden / "diffir" / "golden.safetensors")


def tensors_of(maker: ModuleType, model: str, seed_as: str | None = None) -> dict[str, Tensor]:
    state: dict[str, Tensor] = maker.state_dict(model, seed_as=seed_as)
    return {name: tensor for name, tensor in state.items() if not name.startswith("diffusion.")}


@pytest.fixture(scope="session")
def network_of(maker: ModuleType) -> Callable[[str], DiffIR]:
    """The network of a family, on its stand-in weights."""
    kept: dict[str, DiffIR] = {}

    def of(family: str) -> DiffIR:
        if family not in kept:
            kept[family] = build_network(tensors_of(maker, *FAMILIES[family]))
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
    condition = network.condition(given, lambda: None, network.at_once)
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


def test_the_schedule_is_that_of_the_released_files(maker: ModuleType) -> None:
    schedule = maker.schedule()
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
    harm: Callable[[dict[str, Tensor]], None], says: str, maker: ModuleType
) -> None:
    state = tensors_of(maker, "realsr_x4_s2")
    harm(state)
    with pytest.raises(OSDFaceError, match=says):
        build_network(state)


# The files


@pytest.fixture(scope="module")
def downloaded(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with released files of each layout, as a user may have it."""
    folder = tmp_path_factory.mktemp("downloaded")
    for name in ("realsr_x2", "srgan_x4", "deblur", "inpaint", "deblur_s1"):
        maker.FILES[name](folder, "")
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
    name: str, found: dict[str, Path], maker: ModuleType, tmp_path: Path
) -> None:
    """Not the plain weights beside the averaged ones, not the teacher, not the optimiser."""
    from osdface_core.weights.fetching import sha256_of

    seed_as = "srgan_x4_s2" if name.startswith("SISR") else None
    wanted = tensors_of(maker, NAMES[name], seed_as)
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
    harm: Callable[[dict[str, Tensor]], None], says: str, maker: ModuleType, tmp_path: Path
) -> None:
    state = dict(maker.state_dict("inpaint_s2"))
    harm(state)
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(OSDFaceError, match=says):
        read_weights(tmp_path / "own.pth")


@pytest.mark.parametrize("wrapper", ["params.", "params.module.", "module."])
def test_other_layouts_are_unwrapped(wrapper: str, maker: ModuleType, tmp_path: Path) -> None:
    """Training without averages leaves `params` alone; several GPUs put `module.` before names."""
    wanted = tensors_of(maker, "inpaint_s2")
    outer, _, inner = wrapper.rpartition("params.")
    state = {inner + name: tensor for name, tensor in maker.state_dict("inpaint_s2").items()}
    torch.save({"params": state} if "params" in wrapper else state, tmp_path / "own.pth")
    held = read_weights(tmp_path / "own.pth")
    assert held.keys() == wanted.keys()
    assert not outer


def test_two_files_of_one_name_are_told(maker: ModuleType, tmp_path: Path) -> None:
    for folder, salt in (("a", ""), ("b", "held")):
        path = tmp_path / folder / "last.ckpt"
        path.parent.mkdir()
        torch.save(maker.state_dict("inpaint_s2", salt), path)
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
