"""Losses, degradation, data and quantiser of the training, against their authors' code or closed
forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from osdface_core.errors import OSDFaceError
from osdface_core.faces.files import BUILTIN_DETECTOR
from osdface_core.faces.retinaface import build_retinaface
from osdface_core.osdface.vre import Shape
from osdface_core.training import degradation as d
from osdface_core.training import losses
from osdface_core.training.data import (
    Folder,
    Pictures,
    Samples,
    batches,
    number_of,
    picture_files,
    read_part,
    read_square,
    split,
)
from osdface_core.training.degradation import Degradation, Stage, generator_for
from osdface_core.weights.reading import read_tensors
from tests import photographs

pytest.importorskip("accelerate", reason="training needs it: pip install -r requirements-dev.txt")

from benchmarks import train_on_gpu
from benchmarks.quality import weave
from osdface_core.training import detector, face_parser
from osdface_core.training.loop import Average, Optimiser, Run


def pictures(seed: int, size: int = 48) -> torch.Tensor:
    noise = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (size, size), mode="bicubic").clamp(0, 1)


def test_edges_are_sobels() -> None:
    ramp = (
        torch.arange(8.0).expand(1, 3, 8, 8) / 8
    )  # rises by 1/8 a pixel to the right: gx = 8/8, gy = 0
    inside = losses.edges(ramp)[0, 0, 1:-1, 1:-1]
    assert inside.sub(math.sqrt(1 + 1e-6)).abs().max() < 1e-6
    ndimage = pytest.importorskip("scipy.ndimage")
    x = pictures(1)
    grey = x.mean(1).numpy()
    theirs = [
        np.sqrt(
            ndimage.sobel(g, 0, mode="constant") ** 2
            + ndimage.sobel(g, 1, mode="constant") ** 2
            + 1e-6
        )
        for g in grey
    ]
    assert np.abs(losses.edges(x)[:, 0].numpy() - np.stack(theirs)).max() < 1e-5


def test_an_old_print_has_the_screen_it_was_asked_for() -> None:
    flat = torch.full((1, 3, 240, 240), 0.4)
    for seed in range(4):
        old = d.Print(1.0, halftone=1.0, pitch=(5.0, 5.0), grain=(0.0, 0.0), scratches=0)
        x = d.printed(flat, old, torch.Generator().manual_seed(seed))
        assert float(x.min()) >= 0 and float(x.max()) <= 1
        assert (x == x[:, :1]).all(), "ink has no colour"
        spectrum = torch.fft.fft2(x[0, 0] - x[0, 0].mean()).abs()
        rows, columns = np.unravel_index(int(spectrum.argmax()), spectrum.shape)
        frequency = np.hypot(*(min(v, 240 - v) / 240 for v in (rows, columns)))
        # The product of two waves of half a period a pitch: dots lie on its diagonals.
        assert frequency == pytest.approx(math.sqrt(0.5) / 5, rel=0.03)


def test_an_old_photograph_has_grain_and_scratches_and_no_colour() -> None:
    flat = torch.full((1, 3, 200, 200), 0.5)
    old = d.Print(1.0, halftone=0.0, grain=(10.0, 10.0), coarse=(0.5, 0.5), scratches=0)
    grain = d.printed(flat, old, torch.Generator().manual_seed(1))
    assert float(grain.std()) * 255 == pytest.approx(10, rel=0.02)
    assert (grain == grain[:, :1]).all()
    old = d.Print(1.0, halftone=0.0, grain=(0.0, 0.0), scratches=6)
    lines = [d.printed(flat, old, torch.Generator().manual_seed(n)) for n in range(10)]
    hit = [float((x != 0.5).float().mean()) for x in lines]
    assert max(hit) > 0.005
    assert max(hit) < 0.2, "the most of the picture stays"


def test_faded_pictures_are_pale_and_brown_in_both_of_a_pair(tmp_path: Path) -> None:
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    samples = Samples(
        [tmp_path / "ramp.png"], Pictures(tmp_path, 64, faded=1.0), Degradation(()), 0
    )
    for n in range(6):
        sample = samples[n]
        assert torch.allclose(sample["hq"], sample["lq"], atol=1 / 255)
        red, green, blue = sample["hq"].flatten(1)
        assert (red >= green).all() and (green >= blue).all()
        assert float(red.max() - red.min()) <= 1


def test_shaken_pictures_are_shaken_alike_and_never_the_same_way_twice() -> None:
    one = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    seen = set()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        first, second, blank = losses.shaken([one, one + 1, one * 0], generator)
        assert torch.allclose(first + 1, second, atol=1e-5)
        assert not blank.any()
        # by up to 7 px, then to 0.7 to 1.2 of the size
        assert 0.69 * 57 <= first.shape[-2] <= 1.2 * 64
        seen.add(round(float(first[0, 0, 0, 0]), 6))
    assert len(seen) == 8


def vgg_file(folder: Path, vgg: torch.nn.Module) -> Path:
    path = folder / "vgg16.pth"
    torch.save(vgg.state_dict(), path)
    return path


def test_dists_is_its_authors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs_module = pytest.importorskip(
        "DISTS_pytorch", reason="no reference for DISTS: pip install --no-deps dists-pytorch"
    )
    import torchvision

    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None)
    monkeypatch.setattr(torchvision.models, "vgg16", lambda *_, **__: vgg)
    file = vgg_file(tmp_path, vgg)
    theirs = theirs_module.DISTS()
    ours = losses.load_dists([file, Path(theirs_module.__file__).with_name("weights.pt")])
    x, y = pictures(1), pictures(2)
    assert torch.allclose(
        ours(x, y), theirs(x, y, require_grad=True, batch_average=True), atol=1e-5
    )
    assert abs(float(ours(x, x))) < 1e-5
    ex, ey = (losses.edges(v).expand(-1, 3, -1, -1) for v in (x, y))
    wanted = theirs(x, y, batch_average=True) + theirs(ex, ey, batch_average=True)
    assert torch.allclose(losses.edge_aware_dists(ours, x, y), wanted, atol=1e-5)
    given = x.clone().requires_grad_()
    losses.edge_aware_dists(ours, given, y).backward()
    assert (
        given.grad is not None
        and bool(given.grad.isfinite().all())
        and float(given.grad.abs().sum()) > 0
    )


@pytest.mark.parametrize("network", ["vgg", "alex"])
def test_lpips_is_its_authors(network: str, tmp_path: Path) -> None:
    lpips = pytest.importorskip(
        "lpips", reason="no reference for LPIPS: pip install --no-deps lpips"
    )
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net=network, pnet_rand=True, verbose=False).eval()
    file = tmp_path / "features.pth"
    slices = {
        k: v for i in range(1, 6) for k, v in getattr(theirs.net, f"slice{i}").state_dict().items()
    }
    torch.save({f"features.{key}": value for key, value in slices.items()}, file)
    linear = Path(lpips.__file__).with_name("weights") / "v0.1" / f"{network}.pth"
    ours = losses.load_lpips([file, linear])
    x, y = pictures(1), pictures(2)
    assert torch.allclose(ours(x, y), theirs(x * 2 - 1, y * 2 - 1).mean(), atol=1e-5)


def test_identity_is_arcfaces(tmp_path: Path) -> None:
    theirs_module = pytest.importorskip(
        "facexlib.recognition.arcface_arch", reason="no reference for ArcFace: facexlib is absent"
    )
    torch.manual_seed(0)
    theirs = theirs_module.Backbone(50, 0.6, "ir_se").eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    file = tmp_path / "arcface.pth"
    torch.save(theirs.state_dict(), file)
    ours = losses.load_identity([file])
    x, y = pictures(1, 256), pictures(2, 256)
    part = [
        F.interpolate(v[..., 35:223, 32:220], (112, 112), mode="bilinear", antialias=True) * 2 - 1
        for v in (x, y)
    ]
    with torch.no_grad():
        wanted = 1 - F.cosine_similarity(theirs(part[0]), theirs(part[1])).mean()
        assert torch.allclose(losses.identity(ours, x, y), wanted, atol=1e-5)
        assert abs(float(losses.identity(ours, x, x))) < 1e-5


def test_identity_can_be_dlibs(tmp_path: Path) -> None:
    """Without its weights: the file is known, the face is what is looked at, and it teaches."""
    torch.manual_seed(0)
    network = losses.DlibFace()
    torch.nn.init.normal_(network.fc)
    save_file(network.state_dict(), tmp_path / "identity.safetensors")
    ours = losses.load_identity([tmp_path / "identity.safetensors"])
    assert isinstance(ours, losses.DlibFace)
    x, y = pictures(1, 256), pictures(2, 256)
    assert ours.of_crops(x).shape == (len(x), 128)
    assert abs(float(losses.identity(ours, x, x))) < 1e-5
    given = x.clone().requires_grad_()
    losses.identity(ours, given, y).backward()
    assert given.grad is not None
    seen = given.grad.abs().sum((0, 1)) > 0
    # Brows to chin, cheek to cheek, of a crop that is aligned as FFHQ is; strides leave the last
    # few pixels out.
    for axis, first, last in ((1, 72, 233), (0, 47, 208)):
        found = seen.any(axis).nonzero()
        assert int(found.min()) == first and last - 6 <= int(found.max()) <= last


def test_a_wrong_network_is_refused_in_a_sentence(tmp_path: Path) -> None:
    torch.save({"alpha": torch.zeros(1, 1475, 1, 1)}, tmp_path / "weights.pt")
    with pytest.raises(
        OSDFaceError,
        match=r"files given for DISTS do not fit it .* is missing .*give vgg16-397923af\.pth",
    ):
        losses.load_dists([tmp_path / "weights.pt"])


def test_adversarial_losses_are_closed_forms() -> None:
    fake, real = torch.tensor([0.5, -2.0]), torch.tensor([0.25, 3.0])
    assert float(losses.gan_losses("hinge", fake, real)) == pytest.approx(
        ((1.5 + 0) / 2 + (0.75 + 0) / 2) / 2
    )
    assert float(losses.gan_losses("hinge", fake)) == pytest.approx(0.75)
    bce = F.binary_cross_entropy_with_logits
    wanted = (bce(fake, torch.zeros(2)) + bce(real, torch.ones(2))) / 2
    assert torch.allclose(losses.gan_losses("softplus", fake, real), wanted)
    assert torch.allclose(losses.gan_losses("softplus", fake), bce(fake, torch.ones(2)))


def test_association_is_clips() -> None:
    from osdface_core.training.vq import association

    hq, lq = (torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    a, b = (v.permute(0, 2, 3, 1).reshape(24, 5) for v in (hq, lq))
    logits = torch.tensor([[float(F.cosine_similarity(p, q, dim=0)) / 0.07 for q in b] for p in a])
    wanted = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    assert torch.allclose(association(hq, lq, 1 / 0.07), wanted, atol=1e-4)
    assert association(hq, hq, 1 / 0.07) < association(hq, lq, 1 / 0.07)


def test_the_quantiser_takes_the_nearest_code_and_lets_the_gradient_through() -> None:
    from osdface_core.training.vq import Quantizer

    quantizer = Quantizer(Shape(features=4, codes=6))
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    out, commitment, codebook, codes = quantizer(z)
    flat = z.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    nearest = torch.cdist(flat, quantizer.embedding.weight.detach()).argmin(1)
    assert torch.equal(codes.flatten(), nearest)
    assert torch.allclose(
        out.detach().permute(0, 2, 3, 1).reshape(-1, 4),
        quantizer.embedding.weight[nearest],
        atol=1e-6,
    )
    error = (flat - quantizer.embedding.weight[nearest]).square().mean()
    assert torch.allclose(commitment, error) and torch.allclose(codebook, error)
    (gradient,) = torch.autograd.grad(out.sum(), z, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(z))
    assert torch.autograd.grad(
        commitment, quantizer.embedding.weight, allow_unused=True, retain_graph=True
    ) == (None,)
    assert torch.autograd.grad(codebook, z, allow_unused=True) == (None,)


def test_kernels_are_what_their_names_say() -> None:
    steps = torch.arange(-10.0, 11.0)
    bell = torch.exp(-(steps**2) / (2 * 2.0**2))
    wanted = torch.outer(bell, bell)
    assert torch.allclose(d.gaussian_kernel(21, 2, 2, 0.3), wanted / wanted.sum(), atol=1e-6)
    # along the axis that is turned by 90 degrees the other deviation rules
    turned = d.gaussian_kernel(21, 1, 3, math.pi / 2)
    assert torch.allclose(turned, d.gaussian_kernel(21, 3, 1, 0), atol=1e-6)
    row = turned[10]
    assert float(row[10] / row[13]) == pytest.approx(math.exp(0.5), rel=1e-4)
    assert torch.allclose(
        d.gaussian_kernel(21, 2, 3, 0.3, "generalized", 1.0),
        d.gaussian_kernel(21, 2, 3, 0.3),
        atol=1e-6,
    )
    plateau = d.gaussian_kernel(21, 2, 2, 0, "plateau", 2.0)
    assert float(plateau[10, 10] / plateau[10, 12]) == pytest.approx(2.0)
    special = pytest.importorskip("scipy.special")
    sinc = d.sinc_kernel(13, math.pi / 3)
    y, x = np.mgrid[-6:7, -6:7]
    r = np.hypot(x, y)
    with np.errstate(invalid="ignore"):
        theirs = np.where(
            r == 0,
            (math.pi / 3) ** 2 / (4 * math.pi),
            math.pi / 3 * special.j1(math.pi / 3 * r) / (2 * math.pi * r),
        )
    assert np.abs(sinc.numpy() - theirs / theirs.sum()).max() < 1e-6


def test_blurring_is_a_correlation_with_mirrored_edges() -> None:
    weights = d.gaussian_kernel(9, 1, 3, 0.5) * torch.linspace(0.5, 1.5, 81).view(9, 9)
    weights /= weights.sum()
    x = pictures(3)[:1]
    wanted = F.conv2d(F.pad(x, [4] * 4, mode="reflect"), weights.expand(3, 1, 9, 9), groups=3)
    assert torch.allclose(d.blurred(x, weights), wanted.clamp(0, 1), atol=1e-5)


def test_what_is_drawn_stays_within_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[float]] = {"sigma": [], "shrink": [], "jpeg": [], "noise": []}

    def watch(name: str, function: Callable, pick: Callable) -> None:
        def watched(*given, **named):  # type: ignore[no-untyped-def]
            seen[name] += pick(*given, **named)
            return function(*given, **named)

        monkeypatch.setattr(d, function.__name__, watched)

    watch("sigma", d.gaussian_kernel, lambda size, across, along, *_: [across, along])
    watch("jpeg", d.compressed, lambda x, quality: [quality])
    watch(
        "shrink",
        d.resized,
        lambda x, size, mode: [x.shape[-1] / size[-1]] if size[-1] != 64 else [],
    )
    x = pictures(4, 64)[0]
    stage = Stage(kernel_size=(5, 15), enlarge=False)
    for n in range(150):
        out = Degradation((stage,))(x, generator_for(0, n))
        assert out.shape == x.shape and float(out.min()) >= 0 and float(out.max()) <= 1
        assert torch.equal((out * 255).round() / 255, out)
    # ends of the ranges, to the size's rounding to whole pixels
    for name, low, high in (("sigma", 0.1, 10), ("jpeg", 40, 95), ("shrink", 0.79, 16.1)):
        assert low <= min(seen[name]) < low + 0.1 * (high - low), name
        assert high - 0.1 * (high - low) < max(seen[name]) <= high, name
    grey = torch.full((1, 3, 200, 200), 0.5)
    deviations = [float(d.noisy(grey, Stage(), generator_for(1, n)).std()) * 255 for n in range(30)]
    assert max(deviations) < 15.2 and min(deviations) < 2 and max(deviations) > 12
    shot = d.noisy(grey, Stage(noises={"poisson": 1}, poisson=(1, 1), grey=1.0), generator_for(2))
    assert torch.equal(shot[:, 0], shot[:, 2])
    # one level in the picture: 2 photons at white, so the mean stays and the variance is 0.5 / 2
    assert float(shot.mean()) == pytest.approx(0.5, abs=0.01) and float(
        shot.var()
    ) == pytest.approx(0.25, rel=0.05)


def test_the_same_number_gives_the_same_picture_and_another_another() -> None:
    x, chain = (
        pictures(5, 64)[0],
        Degradation((Stage(kernel_size=(5, 15)), Stage(kernel_size=(5, 15))), sinc=0.5),
    )
    again = [chain(x, generator_for(3, n)) for n in (0, 1, 0)]
    assert torch.equal(again[0], again[2]) and not torch.equal(again[0], again[1])
    assert not torch.equal(again[0], chain(x, generator_for(4, 0)))


def test_some_pictures_stay_undegraded_where_the_chance_is_less_than_1() -> None:
    x = (pictures(5, 64)[0] * 255).round() / 255
    stage = Stage(kernel_size=(5, 15), sigma=(2, 4), jpeg_chance=0.0)
    some = [Degradation((stage,), chance=0.3)(x, generator_for(0, n)) for n in range(200)]
    assert 0.2 < sum(not torch.equal(y, x) for y in some) / len(some) < 0.4


def test_a_mistaken_kind_is_named() -> None:
    with pytest.raises(
        OSDFaceError, match=r"`kernels` of a degradation is \{'round': 1\}; chances of none, iso"
    ):
        Stage(kernels={"round": 1})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(10):
        Image.fromarray(np.full((40, 60, 3), 20 * i, np.uint8)).save(tmp_path / f"male_{i:03d}.png")
    return tmp_path


def test_held_out_pictures_are_never_sampled(folder: Path) -> None:
    chosen = Pictures(folder, size=32, crop=16, held_out=(0, 6))
    kept, out = split(chosen)
    assert [number_of(p) for p in out] == [0, 6] and len(kept) == 8
    samples = Samples(kept, chosen, Degradation(()), seed=0)
    for turn in (0, 1):
        found = [samples[turn * 8 + n] for n in range(8)]
        assert sorted(round(float(s["hq"].mean()) * 255 / 20) for s in found) == [
            1,
            2,
            3,
            4,
            5,
            7,
            8,
            9,
        ]
    assert found[0]["hq"].shape == (3, 16, 16) and found[0]["face"].shape == (3, 32, 32)
    orders = [
        [round(float(samples[t * 8 + n]["hq"].mean()) * 255) for n in range(8)] for t in (0, 1)
    ]
    assert orders[0] != orders[1]


def test_without_the_whole_face_the_crop_alone_is_degraded(folder: Path) -> None:
    chosen = Pictures(folder, size=32, crop=16)
    alone = Samples(split(chosen)[0], chosen, Degradation(()), seed=0, with_face=False)[3]
    assert alone.keys() == {"hq", "lq", "number"}
    assert torch.equal(
        alone["hq"], Samples(split(chosen)[0], chosen, Degradation(()), seed=0)[3]["hq"]
    )
    assert alone["lq"].shape == (3, 16, 16)


def test_a_picture_is_taken_upright(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[274] = 6  # to be shown a quarter turn to the right
    Image.fromarray(pixels).save(tmp_path / "turned_1.png", exif=exif)
    square = read_square(tmp_path / "turned_1.png", 32)
    assert bool((square[..., 24:] == 255).all()) and not bool(square[..., :24].any())


def test_a_zoomed_part_is_a_part_and_never_enlarged(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:128, :128]
    Image.fromarray(np.stack([2 * rows, 2 * columns, 0 * rows], -1).astype(np.uint8)).save(
        tmp_path / "ramps_1.png"
    )
    seen = []
    for n in range(40):
        part = read_part(tmp_path / "ramps_1.png", 64, (0.25, 0.75), generator_for(0, n)).float()
        (top, bottom), (left, right) = (
            part[0, [3, -4]].mean(1).tolist(),
            part[1][:, [3, -4]].mean(0).tolist(),
        )
        seen.append((bottom - top, top, left))
        assert abs((bottom - top) - (right - left)) < 3
    heights, tops, lefts = zip(*seen, strict=True)
    # 57 steps of the part are 57 pixels of the picture where it is not shrunk, half as many again
    # at three quarters of it.
    assert 2 * 57 - 4 < min(heights) < 2 * 57 + 4 and 2 * 57 * 1.3 < max(heights) < 2 * 57 * 1.5 + 4
    assert max(tops) - min(tops) > 60 and max(lefts) - min(lefts) > 60
    small = read_part(tmp_path / "ramps_1.png", 128, (0.25, 0.75), generator_for(0, 0))
    assert torch.equal(small, read_square(tmp_path / "ramps_1.png", 128))


def test_processes_share_out_the_samples_of_one(folder: Path) -> None:
    samples = Samples(
        split(Pictures(folder, size=32))[0], Pictures(folder, size=32), Degradation(()), seed=0
    )

    def numbers(processes: int, batch: int, first: int) -> list[set[int]]:
        plan = {
            "batch": batch,
            "accumulate": 2,
            "processes": processes,
            "first_step": first,
            "workers": 0,
        }
        feeds = [batches(samples, process=p, **plan) for p in range(processes)]
        return [
            {int(n) for feed in feeds for _ in range(2) for n in next(feed)["number"]}
            for _ in range(3)
        ]

    assert (
        numbers(1, 4, 0)
        == numbers(2, 2, 0)
        == [set(range(8)), set(range(8, 16)), set(range(16, 24))]
    )
    assert numbers(2, 2, 1)[0] == set(range(8, 16))


def test_the_adapted_layers_are_the_278_of_the_released_file() -> None:
    diffusers = pytest.importorskip("diffusers")
    from osdface_core.osdface.lora import adapted_layers, is_adapted
    from osdface_core.training.networks import adapted_in

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
    assert set(adapted_in(unet)) == set(adapted_layers())
    assert not is_adapted("time_embedding.linear_1")


def test_the_average_covers_batch_norms_statistics_and_forgets_its_beginning() -> None:
    norm = torch.nn.BatchNorm2d(3)
    average = Average(norm, decay=0.9, rise=9)
    norm.running_mean.fill_(1.0)
    norm.num_batches_tracked.fill_(7)
    wanted = 0.0
    for step in range(1, 200):
        average.update(step)
        wanted += (1 - wanted) * (1 - min(0.9, (step + 1) / (step + 10)))
    with average.in_place():
        assert norm.running_mean.tolist() == pytest.approx([wanted] * 3, rel=1e-5)
        assert int(norm.num_batches_tracked) == 7
    assert norm.running_mean.tolist() == [1.0] * 3


def test_a_learning_rate_rises_and_falls_to_its_end() -> None:
    optimiser = Optimiser(2.0, warmup=9, schedule="cosine", end=0.01)
    rates = [optimiser.rate(step, 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == pytest.approx(2.0, rel=1e-3)
    assert rates[500] == pytest.approx(2 * 0.505) and rates[1000] == pytest.approx(0.02)


def test_an_old_portrait_comes_into_the_middle_of_its_window(tmp_path: Path) -> None:
    """Wherever its face is, and mirrored or not."""
    network = build_retinaface(read_tensors(BUILTIN_DETECTOR))
    photographs.astronaut().crop((80, 0, 400, 320)).save(tmp_path / "old_001.png")
    found = detector.places([tmp_path / "old_001.png"], network)
    place = found[tmp_path / "old_001.png"]
    # Her face lies at 225 px from the left and 110 from the top of the whole picture.
    assert (place.x, place.y) == pytest.approx((145 / 320, 110 / 320), abs=0.03)
    portraits = detector.Portraits([], 320, found, old_chance=1.0)
    for seed in range(6):
        window = detector.window(portraits, generator_for(seed))
        boxes, confidences, _ = network(detector.network_input(window[None]))
        x1, y1, x2, y2 = boxes[0, int(confidences[0].argmax())].tolist()
        assert (x1 + x2) / 2 == pytest.approx(detector.WINDOW / 2, abs=30)
        assert (y1 + y2) / 2 == pytest.approx(detector.WINDOW / 2, abs=30)
        assert y2 - y1 == pytest.approx(detector.BEST_SIZE, rel=0.35)


def test_a_picture_that_is_aged_has_one_tone() -> None:
    picture = torch.rand(3, 64, 64, generator=generator_for(0))
    for seed in range(5):
        aged = detector.aged(picture, generator_for(1, seed))
        assert float(aged.min()) >= 0 and float(aged.max()) <= 1
        inside = aged.flatten(1).T[((aged > 0) & (aged < 1)).all(0).flatten()]
        # All colours lie on a line between ink and paper.
        spread = torch.linalg.svdvals(inside - inside.mean(0))
        assert float(spread[1]) < 1e-3 * float(spread[0])


def test_whatever_is_drawn_before_a_face_is_no_face(tmp_path: Path) -> None:
    for kind in ("faces", "masks"):
        (tmp_path / kind).mkdir()
    photographs.portrait().save(tmp_path / "faces" / "one_001.png")
    Image.new("L", (256, 256), 255).save(tmp_path / "masks" / "one_001.png")
    config = face_parser.ParserConfig(
        run=Run(tmp_path, 1),
        data=Folder(tmp_path / "faces", 256),
        masks=tmp_path / "masks",
        optimiser=Optimiser(1e-3),
        front=face_parser.Front(hand=1, thing=1),
    )
    samples = face_parser.MaskedFaces(picture_files(tmp_path / "faces"), config, still=True)
    bare = read_square(tmp_path / "faces" / "one_001.png", 256).float() / 255
    for n in range(6):
        sample = samples[n]
        changed = (sample["pictures"] - bare).abs().amax(0) > 0.5
        assert 0 < float(changed.float().mean()) < 0.95
        # A hand's shadow darkens a face by less.
        assert not bool((sample["masks"][0][changed] > 0.9).any())
        hidden = sample["masks"][0] < 0.1
        assert bool((sample["weights"][0][hidden] > 3).all())


def test_tones_are_the_shades_of_blocks_and_not_what_is_in_them() -> None:
    right = torch.full((2, 3, 16, 24), 0.5)
    checks = (torch.arange(16)[:, None] + torch.arange(24)) % 2 - 0.5
    assert losses.tones(right + 0.6 * checks, right) < 1e-12
    # One of six blocks is redder by 0.3: 0.09 of one channel of three.
    blotch = right.clone()
    blotch[:, 0, 8:, 16:] += 0.3
    assert losses.tones(blotch + 0.2 * checks, right) == pytest.approx(0.09 / 3 / 6, rel=1e-5)


def test_the_weave_is_what_repeats_from_block_to_block() -> None:
    right = pictures(2, 128)
    lines = (torch.arange(128) % 8 == 3).float() * torch.tensor([0.04, 0.0, 0.0])[:, None, None]
    # A line of 0.04 in one of eight columns and one of three channels, less its own mean.
    assert losses.weave(right + lines, right) == pytest.approx(
        0.04**2 / 3 * (1 / 8 - 1 / 64), rel=1e-4
    )
    assert losses.weave(right + 0.2, right) < 1e-12
    # As strong, but of a period that blocks of 8 px do not have, or of none.
    other = (torch.arange(128) % 7 == 3).float() * torch.tensor([0.04, 0.0, 0.0])[:, None, None]
    assert losses.weave(right + other, right) < 1e-6
    noise = torch.randn(right.shape, generator=torch.Generator().manual_seed(0)) * 0.04
    assert losses.weave(right + noise, right) == pytest.approx(0.04**2 / 64, rel=0.1)
    # Two blocks are fewer than a window: each is taken by itself.
    few = right[..., :8, :16]
    assert losses.weave(few + lines[..., :16], few) == pytest.approx(
        0.04**2 / 3 * (1 / 8 - 1 / 64), rel=1e-4
    )


def test_a_weave_of_8_px_is_measured_and_no_other() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = 0.5 + 0.02 * torch.randn(256, 256, 3, generator=generator)
    assert abs(weave(picture)) < 0.5
    assert abs(weave(picture * 0.5)) < 0.5

    def lines(period: int) -> torch.Tensor:
        at = torch.arange(256) % period == 3
        return 0.05 * (at[:, None] & at).float()[..., None]

    assert abs(weave(picture + lines(7))) < 1
    faint, plain = weave(picture + lines(8)), weave(picture + 4 * lines(8))
    assert 3 < faint < plain - 8
    assert weave(torch.full((128, 128, 3), 0.25)) == 0


@pytest.mark.parametrize("lean", [1.0, 3.0])
def test_gradients_lean_to_what_is_spoilt_and_values_do_not(lean: float) -> None:
    right = torch.full((4, 3, 8, 8), 0.5)
    # Mean squared errors of 0.0001, 0.005, 0.01 and 0.04, where 0.01 counts as 1.
    degraded = right + torch.tensor([0.01, 0.005**0.5, 0.1, 0.2]).view(4, 1, 1, 1)
    given = pictures(3, 8).repeat(2, 1, 1, 1).requires_grad_()
    seen = losses.leaning(given, degraded, right, 0.01, lean)
    assert torch.equal(seen, given)
    seen.sum().backward()
    assert given.grad is not None
    shares = torch.tensor([0.25, 0.5, 1, 2]).view(4, 1, 1, 1) ** lean
    assert (given.grad - shares).abs().max() < 1e-4
    assert losses.leaning(given, degraded, right, 0.0, lean) is given


def test_what_travels_to_a_gpu_is_the_loss_networks_and_no_face_held_out(tmp_path: Path) -> None:
    (tmp_path / "faces" / "portraits").mkdir(parents=True)
    for number in (1, 6, 7, 30):
        image = Image.fromarray(np.full((64, 64, 3), number * 8, np.uint8))
        image.save(tmp_path / "faces" / "portraits" / f"female_{number:03d}.png")
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, 3, 3, generator=draw) * torch.logspace(-3, 1, 8).view(8, 1, 1, 1)
    bias = torch.randn(8, generator=draw)
    for name in ("vgg16", "lpips_vgg", "dists"):
        save_file({"weight": weight, "bias": bias}, tmp_path / f"{name}.safetensors")
    train_on_gpu.pack(tmp_path / "faces", tmp_path, tmp_path / "kit")
    # 6 is shown, never trained on: its number stays in its name.
    names = {path.stem for path in (tmp_path / "kit" / "faces").iterdir()}
    assert names == {"portraits_female_001", "portraits_female_007", "portraits_female_006"}
    kept, shown = split(Folder(tmp_path / "kit" / "faces", held_out=(0, 6, 30)))
    assert [number_of(path) for path in (*kept, *shown)] == [1, 7, 6]
    packed = tmp_path / "kit" / "vgg16.safetensors"
    assert packed.stat().st_size < weight.numel() * 4
    found = train_on_gpu.from_eight_bits(read_tensors(packed))
    # Each output is as exact as its own largest weight allows, however small that is.
    largest = weight.flatten(1).abs().amax(1).view(8, 1, 1, 1)
    assert ((found["weight"] - weight).abs() / largest).max() <= 0.5 / 127 + 1e-6
    assert (found["bias"] - bias).abs().max() < 2e-3
