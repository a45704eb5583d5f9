# ruff: noqa: F811  (fixtures of tests/test_training.py are arguments here)
"""DiffIR's training: one step of the released code, and small networks that learn by heart."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip(
    "accelerate", reason="training needs accelerate: pip install -r requirements-dev.txt"
)

from osdface_core.diffir.network import build_network
from osdface_core.diffir.weights import is_diffir, read_weights
from osdface_core.errors import OSDFaceError
from osdface_core.training.__main__ import main
from osdface_core.training.config import read_config
from osdface_core.training.data import Pictures, Samples
from osdface_core.training.degradation import Degradation, generator_for
from osdface_core.training.diffir import (
    MASKS,
    DiffIRConfig,
    Losses,
    Masks,
    Student,
    Tasks,
    distance,
    drawn_mask,
    load_teacher,
    noised,
    pixel_loss,
)
from osdface_core.training.loop import Optimiser, checkpoints
from tests.test_diffir import released, tensors_of  # noqa: F401
from tests.test_training import (  # noqa: F401
    CONFIGS,
    QUIET,
    faces,
    fresh,
    logged,
    run,
    weights,
    write,
)

# The families of golden outputs and the configurations of their networks.
FAMILIES = {"realsr_x4": "diffir_upscale", "deblur": "diffir_deblur", "inpaint": "diffir_inpaint"}
SMALL: dict[str, Any] = {"width": 8, "blocks": [1, 1, 1, 1], "refinement": 1, "residuals": 1}


# One step of the released code


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(family: str) -> DiffIRConfig:
    return read_config(DiffIRConfig, CONFIGS / f"{FAMILIES[family]}.yaml")


@pytest.fixture
def step(family: str, released: dict[str, Tensor]) -> dict[str, Tensor]:
    """The golden outputs of a family, without its name."""
    prefix = f"train_{family.removesuffix('_x4')}."
    return {k.removeprefix(prefix): v for k, v in released.items() if k.startswith(prefix)}


def pictures(pixels: Tensor) -> Tensor:
    return pixels.movedim(-1, 1).float() / 255


def given(step: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The network's input and the picture that it is to make."""
    hq = pictures(step["gt"])
    if "mask" not in step:
        return pictures(step["lq"]), hq
    hole = (step["mask"] > 0).float()[:, None]
    return torch.cat([hq * (1 - hole), hole], 1), hq


def norms(network: nn.Module, names: list[str]) -> Tensor:
    held = dict(network.named_parameters())
    grads = [held[name].grad for name in names]
    return torch.stack([torch.zeros(()) if g is None else g.norm() for g in grads])


def names_of(more_golden: Path, model: str) -> list[str]:
    """The parameters' names in the order of the golden norms."""
    every = json.loads((more_golden / "diffir" / "shapes.json").read_text())[model]
    return [name for name in every if not name.startswith("diffusion.")]


def assert_norms(found: Tensor, wanted: Tensor, family: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-3 if family == "deblur" else 5e-4, atol=1e-8)


@pytest.mark.parametrize("stage", ["teacher", "joint", "prior"])
def test_a_step_has_the_released_codes_losses_and_gradients(
    stage: str,
    family: str,
    config: DiffIRConfig,
    step: dict[str, Tensor],
    diffir_maker: ModuleType,
    more_golden: Path,
    tmp_path: Path,
) -> None:
    (lq, hq), losses, shape = given(step), config.losses, config.network.shape()
    if stage == "teacher":
        # Two copies of the same numbers, of which the averaged ones are the network.
        save_file(tensors_of(diffir_maker, f"{family}_s1"), tmp_path / "s1.safetensors")
        teacher = load_teacher(tmp_path / "s1.safetensors", shape).requires_grad_(True)
        made, (prior,) = teacher(lq, hq)
        loss = pixel_loss(made, hq, lq, losses)
        loss.backward()
        torch.testing.assert_close(prior, step["s1_ipr"], atol=1e-5, rtol=0)
        torch.testing.assert_close(made[0], step["s1_out"], atol=2e-5, rtol=0)
        torch.testing.assert_close(loss, step["s1_loss"], atol=3e-7, rtol=1e-6)
        found = norms(teacher, names_of(more_golden, f"{family}_s1"))
        assert_norms(found, step["s1_grad_norms"], family)
        return
    inner = build_network(tensors_of(diffir_maker, f"{family}_s2")).train().requires_grad_(True)
    assert inner.shape == shape
    student = Student(inner, with_picture=stage == "joint")
    made, priors = student(lq, noised(step["s1_ipr"], step["noise"]))
    torch.testing.assert_close(torch.stack(priors), step["ipr"], atol=1e-5, rtol=0)
    apart = distance(priors, step["s1_ipr"])
    torch.testing.assert_close(apart, step["l_abs"], atol=3e-7, rtol=1e-6)
    loss = losses.distance * apart
    if stage == "joint":
        pixels = pixel_loss(made, hq, lq, losses)
        torch.testing.assert_close(made[0], step["s2_out"], atol=2e-5, rtol=0)
        torch.testing.assert_close(pixels, step["l_pix"], atol=3e-7, rtol=1e-6)
        loss = loss + pixels
    wanted = "joint" if stage == "joint" else "warmup"
    torch.testing.assert_close(loss, step[f"{wanted}_loss"], atol=3e-7, rtol=1e-6)
    loss.backward()
    found = norms(inner, names_of(more_golden, f"{family}_s2"))
    assert_norms(found, step[f"{wanted}_grad_norms"], family)


def test_the_loss_of_holes_is_weighted_by_itself(step: dict[str, Tensor], family: str) -> None:
    """Of an error of 1 everywhere; the released one leaves holes out."""
    lq, hq = given(step)
    share = float(lq[:, 3:].mean()) if family == "inpaint" else 0.0
    for known, hole in ((10.0, 0.0), (1.0, 6.0)):
        loss = pixel_loss(hq + 1, hq, lq, Losses(l1=known, l1_hole=hole))
        assert float(loss) == pytest.approx(known * (1 - share) + hole * share, rel=1e-5)


def test_rates_are_held_and_halved_where_they_are_to_be() -> None:
    held = Optimiser(2.0, schedule="cosine", hold=10, end=0.25)
    found = [held.rate(step, 30) for step in (0, 10, 20, 30)]
    assert found == pytest.approx([2, 2, 1.25, 0.5])
    halved = Optimiser(2.0, halved_at=(5, 7))
    assert [halved.rate(step, 30) for step in (4, 5, 6, 7, 29)] == [2, 1, 1, 0.5, 0.5]


def test_only_the_released_deblurs_rate_rises_and_ours_does_not() -> None:
    config = read_config(DiffIRConfig, CONFIGS / "diffir_deblur.yaml")
    rates = [config.optimiser.rate(step, 300_000) for step in range(0, 300_001, 1000)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[92], rates[-1]) == pytest.approx((2e-4, 2e-4, 1e-6))
    released = read_config(
        DiffIRConfig,
        CONFIGS / "diffir_deblur.yaml",
        ["optimiser.end=1.425", "optimiser.hold=0"],
    ).optimiser
    assert (released.rate(0, 92_000), released.rate(92_000, 92_000)) == pytest.approx(
        (2e-4, 2.85e-4)
    )


# Small networks


def small(faces: Path, folder: Path, job: str = "inpaint", **changes: Any) -> Path:
    return write(
        folder / "diffir.yaml",
        {
            "run": {"folder": str(folder / "run"), "steps": 4, "batch": 4, **QUIET},
            "data": {"folder": str(faces), "size": 32, "flip": False},
            "network": {"job": job, "centred": True, "expansion": 1.5, **SMALL},
            "optimiser": {"learning_rate": 3e-3, "weight_decay": 0.0},
            "masks": {"kinds": {"boxes": 1.0}, "boxes": [1, 1], "sides": [8, 14], "margin": 2},
            "losses": {"l1": 1.0, "l1_hole": 5.0},
            **changes,
        },
    )


@pytest.fixture(scope="module")
def teacher(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    return run(small(faces, folder), "diffir", "run.steps=2") / "DiffIRS1.safetensors"


def test_eight_pictures_are_learned_by_heart(
    faces: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    # A higher rate learns faster, with leaps back that come and go with the rounding.
    extra = ("run.batch=8", "run.log_every=10", "run.samples=4", "optimiser.learning_rate=2.0e-3")
    config = small(faces, tmp_path)
    first = run(config, "diffir", "run.steps=40", f"run.folder={tmp_path / 's1'}", *extra)
    file = first / "DiffIRS1.safetensors"
    learned = logged(caplog, "l1")
    assert learned[-1] < learned[0] / 2
    caplog.clear()
    run(config, "diffir", "part=joint", f"teacher={file}", "run.steps=40", *extra)
    pixels, distance = logged(caplog, "l1"), logged(caplog, "distance")
    # The transformer knows what the teacher's knew; the prior is guessed anew.
    assert pixels[0] < learned[0] / 2
    assert pixels[-1] < learned[-1]
    assert distance[-1] < distance[0] / 2
    assert Image.open(tmp_path / "run" / "samples" / "0000040.png").size == (4 * 32, 3 * 32)
    shown = [r.getMessage() for r in caplog.records if "held out" in r.getMessage()]
    psnr, lq_psnr = (float(shown[-1].split(f" {k} ")[1].split(",")[0]) for k in ("psnr", "lq_psnr"))
    assert psnr > lq_psnr + 5


@pytest.mark.parametrize("part", ["teacher", "prior", "joint"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    part: str, faces: Path, teacher: Path, tmp_path: Path
) -> None:
    config = small(faces, tmp_path, losses={"l1": 1.0, "l1_hole": 1.0, "gan": 0.1})
    extra = [f"part={part}", "run.accumulate=2", "run.batch=2", "run.checkpoint_every=2"]
    extra += [f"teacher={teacher}"] if part != "teacher" else []
    whole = weights(run(config, "diffir", f"run.folder={tmp_path / 'whole'}", *extra))
    stopped = run(config, "diffir", f"run.folder={tmp_path / 'stopped'}", *extra)
    checkpoints(stopped)[-1].unlink()
    again = weights(run(config, "diffir", f"run.folder={stopped}", *extra))
    assert whole.keys() == again.keys()
    assert any("discriminator" in name for name in whole) is (part != "prior")
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_the_prior_alone_leaves_the_transformer_and_joint_goes_on_from_it(
    faces: Path, teacher: Path, tmp_path: Path
) -> None:
    config, before = small(faces, tmp_path), load_file(teacher)
    first = run(config, "diffir", "part=prior", f"teacher={teacher}")
    found = load_file(first / "DiffIRS2.safetensors")
    assert all(torch.equal(found[k], before[k]) for k in before if k.startswith("G."))
    start = first / "DiffIRS2.safetensors"
    where = f"run.folder={tmp_path / 'joint'}"
    settings = (
        f"teacher={teacher}",
        f"start={start}",
        "run.steps=1",
        "run.ema=0",
        "run.ema_rise=0",
    )
    # At a rate of almost nothing the file shows what training began with.
    tiny = run(config, "diffir", "part=joint", *settings, where, "optimiser.learning_rate=1.0e-12")
    begun = load_file(tiny / "DiffIRS2.safetensors")
    assert all(torch.allclose(begun[k], found[k], atol=1e-7) for k in found)
    moved = run(config, "diffir", "part=joint", *settings, f"run.folder={tmp_path / 'moved'}")
    learned = load_file(moved / "DiffIRS2.safetensors")
    assert all(
        any(not torch.equal(learned[k], found[k]) for k in found if k.startswith(part))
        for part in ("G.", "condition.", "denoise.")
    )


@pytest.mark.parametrize(
    ("job", "scale"),
    [
        ("inpaint", 1),
        ("prefilled", 1),
        ("deblur", 1),
        ("upscale", 1),
        ("upscale", 2),
        ("upscale", 4),
    ],
)
def test_what_is_written_is_what_the_product_reads(
    job: str, scale: int, faces: Path, tmp_path: Path
) -> None:
    network = {"job": job, "scale": scale, "centred": job != "upscale", "expansion": 1.5, **SMALL}
    if job == "prefilled":
        job = "inpaint"
        network |= {"job": job, "prefilled": True}
    config = small(faces, tmp_path, network=network)
    first = run(config, "diffir", "run.steps=1", f"run.folder={tmp_path / 's1'}", "run.samples=1")
    teacher = first / "DiffIRS1.safetensors"
    with pytest.raises(OSDFaceError, match="is of DiffIR's first stage"):
        read_weights(teacher)
    extra = ("part=joint", f"teacher={teacher}", "half=true", "run.samples=1", "run.steps=1")
    file = run(config, "diffir", *extra) / "DiffIRS2.safetensors"
    assert is_diffir(file)
    tensors = read_weights(file)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    shape = build_network(tensors).shape
    assert shape == read_config(DiffIRConfig, config).network.shape()
    assert (shape.job, shape.scale) == (job, scale)


def test_training_begins_with_the_smooth_fill_where_holes_come_prefilled(
    faces: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    network = {"job": "inpaint", "centred": True, "expansion": 1.5, "prefilled": True, **SMALL}
    masks = {"kinds": {"scratches": 1.0}, "scratch": [1, 2]}
    config = small(faces, tmp_path, network=network, masks=masks)
    run(config, "diffir", "run.steps=1", "run.log_every=1")
    begun = logged(caplog, "l1")[0]
    caplog.clear()
    network["prefilled"] = False
    (tmp_path / "b").mkdir()
    plain = small(faces, tmp_path / "b", network=network, masks=masks)
    run(plain, "diffir", "run.steps=1", "run.log_every=1")
    assert begun < logged(caplog, "l1")[0] / 5


def test_a_released_teacher_is_read(faces: Path, teacher: Path, tmp_path: Path) -> None:
    """As BasicSR writes it, whose averaged weights are the network."""
    held = load_file(teacher)
    content = {"params": {k: t + 1 for k, t in held.items()}, "params_ema": held}
    torch.save(content, tmp_path / "S1.pth")
    shape = read_config(DiffIRConfig, small(faces, tmp_path)).network.shape()
    found = load_teacher(tmp_path / "S1.pth", shape).state_dict()
    assert found.keys() == held.keys()
    assert all(torch.equal(found[name], held[name]) for name in held)


# Samples


@pytest.mark.parametrize("kind", MASKS)
def test_holes_are_of_their_kind(kind: str) -> None:
    masks = Masks(sides=(20, 40), margin=10, thickness=(6.0, 12.0), scratch=(1.0, 3.0))
    made = [drawn_mask(masks, kind, 128, generator_for(0, n)) for n in range(40)]
    for mask in made:
        assert mask.shape == (1, 128, 128)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
    shares = [float(mask.mean()) for mask in made]
    assert sum(share > 0 for share in shares) >= 38
    assert len(set(shares)) > 30
    if kind == "boxes":
        assert not any(mask[0, :10].any() or mask[0, :, -10:].any() for mask in made)
        assert max(shares) <= 4 * 40**2 / 128**2
        assert min(shares) >= 20**2 / 128**2
    # What is left when a square of 9 px must fit: of scratches nothing but crossings.
    thick = [float(1 - torch.nn.functional.max_pool2d(1 - m, 9, 1, 4).mean()) for m in made]
    assert bool(np.mean(thick) < 0.002) is (kind == "scratches")


def test_a_hole_is_blanked_and_marked_and_depends_on_the_number_alone(
    faces: Path, tmp_path: Path
) -> None:
    config = read_config(DiffIRConfig, small(faces, tmp_path))
    plain = Samples(
        sorted(faces.iterdir()), config.data, Degradation(()), 0, still=True, with_face=False
    )
    samples = Tasks(plain, config.network.shape(), config.masks, 0)
    one, again, other = samples[3], samples[3], samples[11]
    hole = one["lq"][3:]
    assert 0 < float(hole.mean()) < 0.5
    assert not one["lq"][:3][hole.expand(3, -1, -1) > 0].any()
    assert torch.equal((one["lq"][:3] + hole * one["hq"]), one["hq"])
    assert torch.equal(one["lq"], again["lq"])
    assert not torch.equal(hole, other["lq"][3:])


def test_small_pictures_are_the_large_ones_shrunk(faces: Path, tmp_path: Path) -> None:
    network = {"job": "upscale", "scale": 4, **SMALL}
    config = read_config(DiffIRConfig, small(faces, tmp_path, network=network))
    files = sorted(faces.iterdir())
    plain = Samples(files, config.data, Degradation(()), 0, still=True, with_face=False)
    lq = Tasks(plain, config.network.shape(), config.masks, 0)[2]["lq"]
    with Image.open(files[2]) as image:
        large = image.resize((32, 32), Image.Resampling.LANCZOS)
    # Pillow's bicubic filter is the antialiased one.
    wanted = np.asarray(large.resize((8, 8), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(lq.movedim(0, -1).numpy(), wanted, atol=1.01 / 255)


def test_pairs_are_cut_turned_and_mirrored_alike(faces: Path, tmp_path: Path) -> None:
    dark = tmp_path / "dark"
    dark.mkdir()
    for path in faces.iterdir():
        with Image.open(path) as image:
            pixels = np.asarray(image)
        Image.fromarray(pixels // 2).save(dark / path.name)
    of = Pictures(
        faces, 32, crop=16, zoom=(0.5, 1.0), turned=20.0, tinted=0.5, grey=0.5, degraded=dark
    )
    samples = Samples(sorted(faces.iterdir()), of, Degradation(), 0, with_face=False)
    found = [samples[n] for n in range(16)]
    for sample in found:
        torch.testing.assert_close(2 * sample["lq"], sample["hq"], atol=5 / 255, rtol=0)
    grey = [bool((x["hq"] == x["hq"][:1]).all()) for x in found]
    assert 2 < sum(grey) < 14


def test_a_tint_exchanges_colours_and_darkens_each(faces: Path) -> None:
    files, still = sorted(faces.iterdir()), Pictures(faces, 32, flip=False)
    plain, tinted = (
        Samples(files, of, Degradation(()), 0, with_face=False)
        for of in (still, replace(still, tinted=1.0))
    )
    seen = set()
    for n in range(12):
        colours, found = plain[n]["hq"].flatten(1), tinted[n]["hq"].flatten(1)
        # Gain and error of each colour of the result for each of the picture.
        gains = found @ colours.T / (colours.square().sum(1))
        errors = (found[:, None] - gains[..., None] * colours).abs().amax(-1)
        order = errors.argmin(1)
        assert float(errors.amin(1).max()) < 1e-5
        taken = gains[torch.arange(3), order]
        assert bool(((taken > 0.49) & (taken < 1.01)).all())
        seen.add(tuple(order.tolist()))
    assert len(seen) > 3


def test_a_turn_turns_by_so_many_degrees(tmp_path: Path) -> None:
    """Against Pillow's rotation about the middle, away from the corners."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    picture = coarse.resize((64, 64), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "a.png")
    of = Pictures(tmp_path, 64, flip=False, turned=30.0)
    found = Samples([tmp_path / "a.png"], of, Degradation(()), 0, with_face=False)[5]["hq"]
    middle = slice(20, 44)
    best = min(
        float(np.abs(np.asarray(turned)[middle, middle] / 255 - seen).mean())
        for seen in [found.movedim(0, -1).numpy()[middle, middle]]
        for degrees in np.arange(-30, 30.25, 0.25)
        for turned in [picture.rotate(float(degrees), Image.Resampling.BICUBIC)]
    )
    still = np.abs(
        np.asarray(picture)[middle, middle] / 255 - found.movedim(0, -1).numpy()[middle, middle]
    )
    assert best < 0.01 < float(still.mean())


# Mistakes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["part=joint"], "`teacher` is missing for part=joint"),
        (["part=joint", "teacher={}", "network.width=16"], "does not hold a teacher of this"),
        (["part=joint", "teacher={}", "start={}"], "is of DiffIR's first stage"),
        (["data.size=40", "data.crop=24", "network.job=upscale"], "multiples of 32 are wanted"),
        (["network.scale=2"], "`network.scale` is 2 for the job inpaint; 1 is wanted"),
        (["network.prefilled=true", "network.job=deblur"], "`network.prefilled` is true for the"),
        (["network.width=9"], "`network.width` is 9; an even number is wanted"),
        (["network.heads=[1, 2, 3, 8]"], "`network.heads` has 3 for 32 channels"),
        (["network.blocks=[1, 0, 1, 1]"], "`network.blocks` is"),
        (["masks.kinds={holes: 1}"], "`masks.kinds` is .*lines, boxes, scratches are wanted"),
    ],
)
def test_a_mistake_is_one_sentence(
    changes: list[str],
    says: str,
    faces: Path,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    config = small(faces, tmp_path)
    given = [change.format(teacher) if "{}" in change else change for change in changes]
    assert main(["diffir", "--config", str(config), *given]) == 1
    assert re.search(says, capsys.readouterr().err)
