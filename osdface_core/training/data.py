"""A folder of pictures as training samples: each a good face and the same face degraded, made anew
for every sample's number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import OSDFaceError
from .degradation import Degradation, drawn, generator_for

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CACHED = 512


@dataclass(frozen=True)
class Pictures:
    """folder: searched through, in the order of the names. size: pixels a side that a picture is
    worked at; its middle square is taken. crop: pixels a side of the random part that is restored,
    0 for the whole; a multiple of 8. held_out: pictures whose file name ends in one of these
    numbers are for measuring alone. limit: the first so many only, 0 for all. flip: mirror at
    random. zoom: the side of the square that is taken, as a share of the middle one's, drawn
    evenly, and its place too; it is never enlarged.
    """

    folder: Path
    size: int = 512
    crop: int = 0
    held_out: tuple[int, ...] = ()
    limit: int = 0
    flip: bool = True
    zoom: tuple[float, float] = (1.0, 1.0)


def picture_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def number_of(path: Path) -> int | None:
    """The last number in a file's name: female_012.jpg -> 12."""
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else None


def split(pictures: Pictures) -> tuple[list[Path], list[Path]]:
    """(files to train on, files held out). Raises OSDFaceError where none is to train on."""
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
    """A square somewhere in a picture's middle one, (3,size,size) bytes. Cut out before it is
    shrunk, so that it stays sharp.
    """
    if zoom == (1.0, 1.0):
        return read_square(path, size)
    # More than twice the size is not kept, for the sake of memory.
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


class Samples(Dataset[dict[str, Tensor]]):
    """Sample number n: a picture by an order that is shuffled anew each time round, and what is
    random about it by n alone.
    """

    def __init__(
        self,
        files: Sequence[Path],
        pictures: Pictures,
        degradation: Degradation,
        seed: int,
        *,
        still: bool = False,
    ) -> None:
        """still: every picture in its turn, whole and not mirrored, for measuring."""
        if pictures.crop % 8 or pictures.size % 8 or pictures.crop > pictures.size:
            raise OSDFaceError(
                f"`data.crop` is {pictures.crop} and `data.size` {pictures.size}; multiples of 8 "
                f"are wanted, the crop no larger: set them."
            )
        self.files, self.pictures, self.degradation, self.seed, self.still = (
            list(files),
            pictures,
            degradation,
            seed,
            still,
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        """`hq` and `lq` (3,crop,crop), `face` (3,size,size): the whole degraded face; all in [0,1].
        `number`: n.
        """
        generator = generator_for(self.seed, n)
        turn, place = divmod(n, len(self.files))
        index = place if self.still else _order(self.seed, turn, len(self.files))[place]
        zoom = (1.0, 1.0) if self.still else self.pictures.zoom
        hq = read_part(self.files[index], self.pictures.size, zoom, generator).float() / 255
        if (
            self.pictures.flip
            and not self.still
            and bool(torch.rand((), generator=generator) < 0.5)
        ):
            hq = hq.flip(-1)
        lq = face = self.degradation(hq, generator)
        if self.pictures.crop and not self.still:
            top, left = (
                torch.randint(
                    0, (self.pictures.size - self.pictures.crop) // 8 + 1, (2,), generator=generator
                )
                .mul(8)
                .tolist()
            )
            part = (
                slice(None),
                slice(top, top + self.pictures.crop),
                slice(left, left + self.pictures.crop),
            )
            hq, lq = hq[part].contiguous(), lq[part].contiguous()
        return {"hq": hq, "lq": lq, "face": face, "number": torch.tensor(n)}


@lru_cache(4)
def _order(seed: int, turn: int, count: int) -> list[int]:
    return torch.randperm(count, generator=generator_for(seed, -1, turn)).tolist()


def batches(
    samples: Samples,
    *,
    batch: int,
    accumulate: int,
    process: int,
    processes: int,
    first_step: int,
    workers: int,
) -> Iterator[dict[str, Tensor]]:
    """The batches of one process from `first_step` on, without end; `accumulate` of them make a
    step.

    Which samples a step sees does not depend on how many processes share it, as long as batch x
    accumulate x processes stays.
    """

    def numbers() -> Iterator[list[int]]:
        turn = first_step * accumulate
        while True:
            start = (turn * processes + process) * batch
            yield list(range(start, start + batch))
            turn += 1

    class Endless(torch.utils.data.Sampler[list[int]]):
        def __iter__(self) -> Iterator[list[int]]:
            return numbers()

    return iter(
        DataLoader(
            samples,
            batch_sampler=Endless(),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=False,
        )
    )
