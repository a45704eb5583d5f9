"""A folder of pictures as training samples: each a good picture and the same one degraded, made
anew for every sample's number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ..errors import OSDFaceError
from ..pictures.color import LUMA
from ..sd21.backbone import STRIDE
from .degradation import Degradation, drawn, generator_for

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# Decoded pictures that are kept in memory.
CACHED = 512


@dataclass(frozen=True)
class Folder:
    """Which pictures are trained on.

    folder: searched with its subfolders, in the order of the names.
    size: pixels a side to which a picture's middle square is resized.
    held_out: pictures whose file name ends in one of these numbers are measured, never trained on.
    limit: the first so many training pictures only; 0 for all.
    """

    folder: Path
    size: int = 512
    held_out: tuple[int, ...] = ()
    limit: int = 0


@dataclass(frozen=True)
class Pictures(Folder):
    """Which pictures are trained on, and which part of each.

    crop: pixels a side of the random part that is restored, a multiple of 8; 0 for the whole.
    flip: whether half of the samples are mirrored.
    zoom: range of the side of the square that is taken, as a share of the middle square's side. Its
        side and place are drawn evenly. It is never enlarged.
    turned: largest rotation, in degrees; what comes in at the corners is mirrored.
    tinted: chance that a sample's colours are exchanged and each darkened by up to a half.
    grey: chance that a sample is black-and-white.
    faded: chance that a sample is pale, and if it is black-and-white also toned.
    degraded: folder with the same pictures, degraded, under the same names: taken as they are
        instead of what `degradation` makes.
    """

    crop: int = 0
    flip: bool = True
    zoom: tuple[float, float] = (1.0, 1.0)
    turned: float = 0.0
    tinted: float = 0.0
    grey: float = 0.0
    faded: float = 0.0
    degraded: Path | None = None


def picture_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def number_of(path: Path) -> int | None:
    """The last number in a file's name: female_012.jpg -> 12."""
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else None


def split(pictures: Folder) -> tuple[list[Path], list[Path]]:
    """(files to train on, files held out). Raises OSDFaceError where none is left to train on."""
    files = picture_files(pictures.folder)
    kept = [path for path in files if number_of(path) not in pictures.held_out]
    out = [path for path in files if number_of(path) in pictures.held_out]
    if not kept:
        raise OSDFaceError(
            f"{pictures.folder} holds no pictures to train on: give a folder of "
            f"{', '.join(sorted(SUFFIXES))} files."
        )
    return (kept[: pictures.limit] if pictures.limit else kept), out


def read_square(path: Path, size: int) -> Tensor:
    """The middle square of a picture at `size` pixels a side, (3,size,size) bytes."""
    return _tensor(_square(path, size, size))


def read_part(
    path: Path, size: int, zoom: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """A random square within a picture's middle square, (3,size,size) bytes.

    It is cut out of the full-size picture and then shrunk, so that it stays sharp.
    """
    if zoom == (1.0, 1.0):
        return read_square(path, size)
    # Not kept at more than twice the size, to save memory.
    square = _square(path, size, 2 * size)
    side = max(float(size), square.width * min(1.0, drawn(zoom, generator)))
    left, top = (drawn((0, square.width - side), generator) for _ in range(2))
    return _tensor(
        square.resize(
            (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
    )


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).movedim(-1, 0).contiguous()


@lru_cache(CACHED)
def _square(path: Path, least: int, most: int) -> Image.Image:
    """The middle square of a picture, upright, at a side between `least` and `most` pixels."""
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise OSDFaceError(
            f"{path} cannot be read as a picture ({error}): mend it, or take it out of the folder."
        ) from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    size = min(max(side, least), most)
    return picture.resize(
        (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )


class Numbered(Protocol):
    """Samples by number, from 0 without end. What is random about one depends on its number alone,
    so that a stopped run goes on with the same samples, however many processes share them.
    """

    def __len__(self) -> int:
        """How many pictures the samples are made of."""

    def __getitem__(self, n: int) -> dict[str, Tensor]: ...


class Samples:
    """Pairs of a good and a degraded picture. The order of the pictures is shuffled anew in each
    epoch.
    """

    def __init__(
        self,
        files: Sequence[Path],
        pictures: Pictures,
        degradation: Degradation,
        seed: int,
        *,
        still: bool = False,
        with_face: bool = True,
    ) -> None:
        """Raises OSDFaceError for a size that is no multiple of the latents' block.

        files: the pictures.
        pictures: which part of each is taken.
        degradation: how the degraded picture is made.
        seed: of all that is random.
        still: in the order of the files, whole and not mirrored, for measuring.
        with_face: gives the whole degraded picture beside the crop; without it the crop alone is
            degraded, which is faster.
        """
        if pictures.crop % STRIDE or pictures.size % STRIDE or pictures.crop > pictures.size:
            raise OSDFaceError(
                f"`data.crop` is {pictures.crop} and `data.size` {pictures.size}; multiples of "
                f"{STRIDE} are wanted, the crop no larger: set them."
            )
        self.files, self.pictures, self.degradation = list(files), pictures, degradation
        self.seed, self.still, self.with_face = seed, still, with_face

    def __len__(self) -> int:
        return len(self.files)

    def file(self, n: int) -> Path:
        """The picture that sample n is made of."""
        epoch, place = divmod(n, len(self.files))
        return self.files[place if self.still else _order(self.seed, epoch, len(self.files))[place]]

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        """`hq` and `lq` (3,crop,crop), `face` the whole degraded picture (3,size,size), all in
        [0,1], and `number`, n.
        """
        pictures, generator = self.pictures, generator_for(self.seed, n)
        hq, lq = self._read(self.file(n), generator), None
        if pictures.degraded:
            twin = pictures.degraded / self.file(n).relative_to(pictures.folder)
            lq = self._read(twin, generator_for(self.seed, n))
        crop = 0 if self.still else pictures.crop
        if not self.with_face:
            if crop:
                part = _part(pictures.size, crop, generator)
                hq, lq = hq[part].contiguous(), None if lq is None else lq[part].contiguous()
            lq = self.degradation(hq, generator) if lq is None else lq
            return {"hq": hq, "lq": lq, "number": torch.tensor(n)}
        lq = face = self.degradation(hq, generator) if lq is None else lq
        if crop:
            part = _part(pictures.size, crop, generator)
            hq, lq = hq[part].contiguous(), lq[part].contiguous()
        return {"hq": hq, "lq": lq, "face": face, "number": torch.tensor(n)}

    def _read(self, path: Path, generator: torch.Generator) -> Tensor:
        """A picture's part (3,size,size) in [0,1], mirrored, turned and grey by chance."""
        pictures = self.pictures
        if self.still:
            return read_square(path, pictures.size).float() / 255
        x = read_part(path, pictures.size, pictures.zoom, generator).float() / 255
        if pictures.flip and bool(torch.rand((), generator=generator) < 0.5):
            x = x.flip(-1)
        # A range or chance of 0 draws nothing, so that it changes no number of the other draws.
        if pictures.turned:
            x = _rotated(x, drawn((-pictures.turned, pictures.turned), generator))
        if pictures.tinted and bool(torch.rand((), generator=generator) < pictures.tinted):
            gains = [drawn((0.5, 1), generator) for _ in range(3)]
            x = x[torch.randperm(3, generator=generator)] * x.new_tensor(gains)[:, None, None]
        if pictures.grey and bool(torch.rand((), generator=generator) < pictures.grey):
            x = torch.tensordot(x.new_tensor(LUMA), x, 1).expand_as(x).contiguous()
        if pictures.faded and bool(torch.rand((), generator=generator) < pictures.faded):
            x = _faded(x, generator)
        return x


def _faded(x: Tensor, generator: torch.Generator) -> Tensor:
    """(3,S,S) in [0,1] with less contrast; paler in blue, as prints turn brown."""
    low, high = drawn((0, 0.25), generator), drawn((0.7, 1), generator)
    x = low + (high - low) * x
    brown = drawn((0, 0.35), generator)
    return x * x.new_tensor([1.0, 1 - 0.45 * brown, 1 - brown])[:, None, None]


def _rotated(x: Tensor, degrees: float) -> Tensor:
    """(3,S,S) in [0,1], turned about its middle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]])
    places = F.affine_grid(turn, [1, *x.shape], align_corners=False)
    return F.grid_sample(
        x[None], places, mode="bicubic", padding_mode="reflection", align_corners=False
    )[0].clamp(0, 1)


def _part(size: int, crop: int, generator: torch.Generator) -> tuple[slice, ...]:
    """A random part of `crop` px of a picture (3,size,size), aligned with the latents' blocks."""
    places = torch.randint(0, (size - crop) // STRIDE + 1, (2,), generator=generator)
    top, left = (places * STRIDE).tolist()
    return slice(None), slice(top, top + crop), slice(left, left + crop)


@lru_cache(4)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=generator_for(seed, -1, epoch)).tolist()


def training_and_held_out(
    pictures: Pictures,
    degradation: Degradation,
    seed: int,
    shown: int,
    *,
    with_face: bool = True,
) -> tuple[Samples, Samples]:
    """(samples to train on, samples to measure): the latter are the pictures held out, or the first
    `shown` training pictures where none is.
    """
    files, out = split(pictures)
    return (
        Samples(files, pictures, degradation, seed, with_face=with_face),
        Samples(
            out or files[:shown],
            pictures,
            degradation,
            seed,
            still=True,
            with_face=with_face,
        ),
    )


def batches(
    samples: Numbered,
    *,
    batch: int,
    accumulate: int,
    process: int,
    processes: int,
    first_step: int,
    workers: int,
) -> Iterator[dict[str, Tensor]]:
    """The batches of one process, without end; `accumulate` of them make a step.

    Which samples a step sees does not depend on how many processes share them, as long as batch x
    accumulate x processes stays the same.

    samples: where they come from.
    batch: samples in a batch.
    accumulate: batches in a step.
    process: number of this process, from 0.
    processes: how many there are.
    first_step: the step to begin with, from 0.
    workers: processes that make samples, 0 for this one.
    """

    class Numbers(Sampler[list[int]]):
        def __iter__(self) -> Iterator[list[int]]:
            turn = first_step * accumulate
            while True:
                start = (turn * processes + process) * batch
                yield list(range(start, start + batch))
                turn += 1

    source: Any = samples
    return iter(
        DataLoader(
            source, batch_sampler=Numbers(), num_workers=workers, persistent_workers=workers > 0
        )
    )
