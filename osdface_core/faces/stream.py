"""Faces of a video whose frames come one at a time, and are gone before the next one is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..chunks import Progress, is_out_of_memory
from ..pictures.geometry import Box
from ..pictures.picture import check_pictures
from .choose import choose, number_faces
from .detect import DEFAULT, Detection, DetectOptions, detect
from .face import Face
from .find import Found, cut_out, follow_faces
from .retinaface import RetinaFace
from .track import shots, thumbnails

# Frames that are remembered: more than a face that is not seen may be away (track.FORGOTTEN), and
# as many as smoothing feels.
REMEMBERED = 48


class FaceStream:
    """One video. A face is followed by what was before, and keeps its number until a cut.

    Numbers are given in `order` to those who are there first, then to whoever comes. Alignments are
    smoothed by what was before. A frame in which a face is missed stays without it, for what comes
    next is not known.

    options: how faces are found, chosen and cut out.
    """

    def __init__(self, options: DetectOptions = DEFAULT) -> None:
        self.options = options
        self._begin(0, 0)

    def _begin(self, height: int, width: int) -> None:
        self._size = height, width
        self._found: list[list[Detection]] = []
        self._small: list[Tensor] = []
        self._first = 0  # number in the video of the first frame that is remembered
        self._numbers: dict[tuple[int, Box], int] = {}

    def find(
        self,
        image: Tensor,
        network: RetinaFace,
        *,
        out_of_memory: Callable[[BaseException], bool] = is_out_of_memory,
        progress: Progress | None = None,
    ) -> Found:
        """The faces of the next frame (1,H,W,C) in [0,1], as `find_faces` gives those of a picture.

        A frame of another size begins another video. Raises OSDFaceError for an input that cannot
        be understood.

        image: the frame.
        network: the detector.
        out_of_memory: as in `find_faces`.
        progress: as in `find_faces`.
        """
        check_pictures(image)
        height, width = image.shape[1:3]
        if self._size != (height, width):
            self._begin(height, width)
        found = detect(
            image,
            network,
            self.options,
            out_of_memory=out_of_memory,
            progress=progress,
            faint=True,
        )
        self._found.append(found[0])
        self._small.append(thumbnails(image)[0])
        if len(self._found) > REMEMBERED:
            del self._found[0], self._small[0]
            self._first += 1
            self._numbers = {k: n for k, n in self._numbers.items() if k[0] >= self._first}
        everyone = self._numbered()
        verdicts = choose(everyone, self.options.choice, width, height)
        last = len(self._found) - 1
        here = [
            (replace(face, frame=0), verdict)
            for face, verdict in zip(everyone, verdicts, strict=True)
            if face.frame == last
        ]
        here.sort(key=lambda pair: pair[0].number)
        return cut_out(
            image,
            tuple(face for face, _ in here),
            tuple(verdict for _, verdict in here),
            network,
            self.options,
            out_of_memory=out_of_memory,
            progress=progress,
        )

    def _numbered(self) -> list[Face]:
        """The faces of all frames that are remembered, with the numbers of those they were."""
        faces = follow_faces(self._found, shots(torch.stack(self._small)), self.options)
        known: dict[int, int] = {}
        taken: dict[int, set[int]] = {}
        for face in faces:
            number = self._numbers.get((self._first + face.frame, face.box))
            if number is not None:
                number = known.setdefault(face.number, number)
                taken.setdefault(face.shot, set()).add(number)
        # Whoever is new is there in the last frame alone.
        new = [face for face in faces if face.number not in known]
        for face, ranked in zip(new, number_faces(new, self.options.choice.order), strict=True):
            known[face.number] = max(taken.get(face.shot, ()), default=-1) + 1 + ranked.number
        for face in faces:
            self._numbers[self._first + face.frame, face.box] = known[face.number]
        return [replace(face, number=known[face.number]) for face in faces]
