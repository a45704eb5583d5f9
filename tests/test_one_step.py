"""The restoration around the networks: sizes, chunks, memory, progress, and input that does not
fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from osdface_core.errors import OSDFaceError
from osdface_core.osdface.restore import restore
from osdface_core.sd21.schedule import alphas_cumprod


class OutOfMemory(RuntimeError):
    pass


@dataclass
class Pixels:
    """A Backbone without networks: what goes in comes out, as far as an eighth of the resolution
    lets it. Memory holds `room` faces.
    """

    room: int = 100
    fit: int = 8
    half: bool = False
    chunks: list[int] = field(default_factory=list)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    prompts: list[Tensor] = field(default_factory=list)

    def encode(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[2] % 8 == pixels.shape[3] % 8 == 0
        if len(pixels) > self.room:
            raise OutOfMemory
        self.chunks.append(len(pixels))
        self.sizes.add((pixels.shape[2], pixels.shape[3]))
        return F.pixel_unshuffle(pixels, 8)

    def denoise(self, latents: Tensor, prompts: Tensor, timestep: int) -> Tensor:
        assert len(latents) == len(prompts)
        self.prompts.extend(prompts)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, 8)

    def max_batch(self, height: int, width: int) -> int:
        return self.fit

    @contextmanager
    def fp32_fallback(self) -> Iterator[bool]:
        self.half, half = False, self.half
        yield half
        self.half = half

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, OutOfMemory)


def crops(count: int, height: int = 512, width: int = 512) -> Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(count))


def prompts(count: int) -> Tensor:
    return torch.rand(count, 77, 1024)


@pytest.mark.parametrize(
    "size", [(512, 512), (576, 576), (512, 640), (1000, 203), (513, 513), (8, 9)]
)
def test_a_crop_comes_back_at_its_own_size(size: tuple[int, int]) -> None:
    given = crops(2, *size)
    assert torch.equal(restore(given, prompts(2), Pixels()).pictures, given)


def test_a_small_square_comes_back_at_512_with_its_corners_aligned() -> None:
    """As the released code enlarges it: a ramp stays one ramp from edge to edge, where other
    conventions flatten both ends.
    """
    ramp = torch.linspace(0, 1, 64)[None, None, :, None].expand(1, 64, 64, 3)
    out = restore(ramp, prompts(1), Pixels()).pictures
    assert (out - torch.linspace(0, 1, 512)[None, None, :, None]).abs().max() < 1e-6
    assert out.shape == (1, 512, 512, 3)


def test_no_crops_give_no_crops() -> None:
    assert restore(crops(0, 576, 576), prompts(0), Pixels()).pictures.shape == (0, 576, 576, 3)


def test_the_chunk_is_what_fits_or_what_the_user_says() -> None:
    for faces_per_batch, chunks in ((0, [4, 4, 2]), (3, [3, 3, 3, 1]), (50, [10])):
        backbone = Pixels(fit=4)
        restore(crops(10, 16, 24), prompts(10), backbone, faces_per_batch=faces_per_batch)
        assert backbone.chunks == chunks


def test_each_crop_meets_its_own_prompts() -> None:
    backbone, wanted = Pixels(fit=2), prompts(5)
    restore(crops(5, 16, 24), wanted, backbone)
    assert torch.equal(torch.stack(backbone.prompts), wanted)


def test_out_of_memory_halves_the_chunk_and_loses_nothing() -> None:
    given, backbone = crops(11, 16, 24), Pixels(room=3, fit=8)
    assert torch.equal(restore(given, prompts(11), backbone).pictures, given)
    assert max(backbone.chunks) <= 3


def test_out_of_memory_with_one_face_is_raised() -> None:
    with pytest.raises(OutOfMemory):
        restore(crops(2, 16, 24), prompts(2), Pixels(room=0))


def test_each_face_is_reported_with_its_picture() -> None:
    given, seen = crops(5, 16, 24), []
    restore(
        given,
        prompts(5),
        Pixels(fit=2),
        progress=lambda done, picture=None: seen.append(picture) if done else None,
    )
    assert torch.equal(torch.stack(seen).movedim(1, -1), given)


def test_stopping_ends_the_job_at_once() -> None:
    class Stop(Exception):
        pass

    backbone = Pixels(fit=1)

    def stop(done: int, picture: Tensor | None = None) -> None:
        if done:
            raise Stop

    with pytest.raises(Stop):
        restore(crops(5, 16, 24), prompts(5), backbone, progress=stop)
    assert backbone.chunks == [1]


def test_a_face_that_comes_out_as_nan_is_left_as_it_was() -> None:
    class Broken(Pixels):
        def decode(self, latents: Tensor) -> Tensor:
            out = super().decode(latents)
            out[1, 0, 3, 3] = torch.nan
            return out * 0.5

    given = crops(3, 512, 512)
    result = restore(given, prompts(3), Broken())
    assert result.failed == (1,)
    assert torch.equal(result.pictures[1], given[1])
    assert torch.equal(result.pictures[[0, 2]], given[[0, 2]] * 0.5)


@dataclass
class Narrow(Pixels):
    """Half precision that has no number for the darkest crop; what `mends` says is whether fp32 has
    one.
    """

    half: bool = True
    mends: bool = True

    def decode(self, latents: Tensor) -> Tensor:
        out = super().decode(latents)
        dark = out.amax((1, 2, 3)) < 0.5
        return torch.where(
            (dark & (self.half or not self.mends))[:, None, None, None], torch.nan, out
        )


def test_a_face_that_half_precision_has_no_numbers_for_is_computed_again_in_fp32() -> None:
    given = crops(3, 512, 512)
    given[1] *= 0.25
    done: list[int] = []
    backbone = Narrow()
    result = restore(given, prompts(3), backbone, progress=lambda n, picture=None: done.append(n))
    assert torch.equal(result.pictures, given)
    assert (result.failed, result.recomputed) == ((), (1,))
    assert (backbone.chunks, sum(done), backbone.half) == ([3, 1], 3, True)


def test_a_face_without_numbers_in_fp32_either_is_left_as_it_was_and_told_apart() -> None:
    given = crops(3, 512, 512)
    given[1] *= 0.25
    result = restore(given, prompts(3), Narrow(mends=False))
    assert torch.equal(result.pictures, given)
    assert (result.failed, result.recomputed) == ((1,), ())


@pytest.mark.parametrize("where", ["on the way in", "at the face"])
def test_where_fp32_has_too_little_memory_that_face_is_left_and_all_others_are_done(
    where: str,
) -> None:
    class Full(Narrow):
        @contextmanager
        def fp32_fallback(self) -> Iterator[bool]:
            if where == "on the way in":
                raise OutOfMemory
            with super().fp32_fallback() as was_half:
                yield was_half

        def encode(self, pixels: Tensor) -> Tensor:
            if not self.half:
                raise OutOfMemory
            return super().encode(pixels) * 0.5

    given = crops(4, 512, 512)
    given[[1, 3]] *= 0.25
    backbone = Full()
    # 0.5 of a bright crop is as dark as the limit: its brightest pixel decides.
    given[[0, 2], 0, 0] = 1.0
    result = restore(given, prompts(4), backbone)
    assert torch.equal(result.pictures[[0, 2]], given[[0, 2]] * 0.5)
    assert torch.equal(result.pictures[[1, 3]], given[[1, 3]])
    assert (result.failed, result.recomputed, result.starved) == ((1, 3), (), (1, 3))
    assert backbone.half


def test_the_input_is_not_changed() -> None:
    given = crops(2)
    before = given.clone()
    restore(given, prompts(2), Pixels()).pictures.zero_()
    assert torch.equal(given, before)


def test_the_schedule_is_stable_diffusions() -> None:
    abar = alphas_cumprod()
    for step, wanted in ((199, 0.755238), (399, 0.426086), (999, 0.004660)):
        assert abs(float(abar[step]) - wanted) < 1e-6


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.zeros(2, 16, 16, 1), "`crops` has 1 colour channels; 3 .* are wanted"),
        (torch.zeros(2, 16, 16, 4), "`crops` has 4 colour channels; 3 .* are wanted"),
        (torch.zeros(16, 16, 3), r"`crops` has 3 dimensions \(16, 16, 3\); a batch of pictures"),
        (torch.zeros(2, 3, 16, 3), "`crops` are 16 x 3 px; at least 8 x 8 are wanted"),
        (
            torch.full((2, 16, 16, 3), torch.nan),
            "`crops` number 0 holds values that are not numbers",
        ),
        (
            torch.stack([torch.zeros(16, 16, 3), torch.full((16, 16, 3), torch.inf)]),
            "`crops` number 1 holds values",
        ),
    ],
)
def test_crops_that_do_not_fit_are_refused(given: Tensor, says: str) -> None:
    with pytest.raises(OSDFaceError, match=says):
        restore(given, prompts(2), Pixels())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.rand(3, 77, 1024), "prompts for 3 faces and `crops` holds 2"),
        (
            torch.rand(2, 77, 768),
            r"`conditioning` is \(2, 77, 768\); OSDFace's visual prompts \(N,77,1024\) are wanted",
        ),
        (torch.randn(2, 77, 1024), "`conditioning` was not made by OSDFace's visual embedder"),
        (
            torch.full((2, 77, 1024), torch.nan),
            "`conditioning` was not made by OSDFace's visual embedder",
        ),
    ],
)
def test_prompts_that_do_not_fit_are_refused(given: Tensor, says: str) -> None:
    with pytest.raises(OSDFaceError, match=says):
        restore(crops(2, 16, 24), given, Pixels())


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_timestep_outside_the_schedule_is_refused(timestep: int) -> None:
    with pytest.raises(
        OSDFaceError, match=f"`timestep` is {timestep}; a whole number from 0 to 999 is wanted"
    ):
        restore(crops(1, 16, 24), prompts(1), Pixels(), timestep=timestep)


def test_a_negative_number_of_faces_at_once_is_refused() -> None:
    with pytest.raises(
        OSDFaceError,
        match="`faces_per_batch` is -1; a number of faces, or 0 for as many as fit, is wanted",
    ):
        restore(crops(3, 16, 24), prompts(3), Pixels(), faces_per_batch=-1)
