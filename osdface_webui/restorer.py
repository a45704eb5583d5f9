"""OSDFace among the host's face restorers, and on an axis of its X/Y/Z plot."""

from __future__ import annotations

from typing import Any

import numpy as np
from modules import errors, face_restoration, scripts, shared
from PIL import Image

from . import host
from .job import restore_picture

AXIS = "[OSDFace] Face restorer"


class FaceRestorerOSDFace(face_restoration.FaceRestoration):
    """The host's interface: pictures (H,W,3) uint8 RGB in and out.

    What goes wrong is reported by the host, and the picture comes back as it was.
    """

    # The picture's parameters, by the script that is told of each generation.
    parameters: dict[str, Any] | None = None

    def name(self) -> str:
        return host.NAME

    def restore(self, np_image: np.ndarray) -> np.ndarray:
        self._note(None)
        try:
            result = restore_picture(Image.fromarray(np_image, "RGB"))
        except host.Stopped:
            return np_image
        except Exception as error:
            errors.report(f"{host.NAME}: {error}", exc_info=True)
            return np_image
        self._note(result.source or None)
        return np.array(result.image)

    def _note(self, source: str | None) -> None:
        """Tells what restored the picture; None, which the hosts leave out, takes away what was
        told of the former one of a batch.
        """
        if self.parameters is not None:
            self.parameters[f"{host.NAME} model"] = source


class Parameters:
    """What a Script of the host does to put the networks' names among a picture's parameters."""

    def title(self) -> str:
        return f"{host.NAME} parameters"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def process(self, p: Any, *_: Any) -> None:
        for restorer in _ours():
            restorer.parameters = p.extra_generation_params

    def postprocess(self, p: Any, processed: Any, *_: Any) -> None:
        for restorer in _ours():
            restorer.parameters = None


def _ours() -> list[Any]:
    known = getattr(shared, "face_restorers", None) or []
    return [restorer for restorer in known if restorer.name() == host.NAME]


def register() -> None:
    """Puts one restorer of ours among the host's, and the axis into its plot.

    It is called at the start and after each Reload UI, which keep the list of restorers.
    """
    known = getattr(shared, "face_restorers", None)
    if known is None:  # a host without the slot
        return
    known[:] = [x for x in known if x.name() != host.NAME] + [FaceRestorerOSDFace()]
    for data in getattr(scripts, "scripts_data", ()):
        plot = data.module
        if getattr(data.script_class, "__module__", "") != "xyz_grid.py":
            continue
        if not any(option.label == AXIS for option in plot.axis_options):
            plot.axis_options.append(
                plot.AxisOption(
                    AXIS,
                    str,
                    _choose(plot),
                    choices=lambda: ["None", *(x.name() for x in shared.face_restorers)],
                )
            )


def _choose(plot: Any) -> Any:
    """What the plot does to a generation for a restorer's name; None restores nothing."""
    override = plot.apply_override("face_restoration_model")

    def apply(p: Any, name: str, names: Any) -> None:
        p.restore_faces = name != "None"
        override(p, name, names)

    return apply
