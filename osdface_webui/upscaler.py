"""OSEDiff among the host's upscalers: in Extras, img2img and hires fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from modules import errors, modelloader, scripts, shared, upscaler
from PIL import Image

from osdface_core.errors import OSDFaceError
from osdface_core.osediff.upscale import MAX_SCALE, UpscaleOptions, upscale

from . import backbone, files, host, networks
from .job import readable, to_image, to_tensor

NAME = "OSEDiff"
LANCZOS = Image.Resampling.LANCZOS


class UpscalerOSEDiff(upscaler.Upscaler):
    """The host's interface. AUTOMATIC1111 and Forge find the class by its parent.

    What goes wrong is reported by the host, and the picture is enlarged without OSEDiff.
    """

    name = NAME

    def __init__(self, dirname: str | None = None) -> None:
        super().__init__()
        self.scalers = [
            upscaler.UpscalerData(name, str(path), self)
            for name, path in (files.osediff() if _has_base() else {}).items()
        ]

    def upscale(
        self, img: Image.Image, scale: float, selected_model: str | None = None
    ) -> Image.Image:
        """The picture enlarged in one step, whose sides are multiples of 8 as the host wants them.

        selected_model: OSEDiff's weights.
        """
        self.scale = scale
        # In a second step, as the host would take it, OSEDiff would see its own picture.
        width, height = (int(side * scale) // 8 * 8 for side in img.size)
        done = self.do_upscale(img, selected_model) if scale >= 1 else img
        return done if done.size == (width, height) else done.resize((width, height), LANCZOS)

    def do_upscale(self, img: Image.Image, selected_model: str | None = None) -> Image.Image:
        """The picture enlarged by `scale`, or as far as OSEDiff goes; itself if that fails."""
        try:
            if not selected_model:
                raise OSDFaceError("No weights of OSEDiff are named: reload the page.")
            return enlarge(img, Path(selected_model), min(float(self.scale), MAX_SCALE))
        except host.Stopped:
            return img
        except Exception as error:
            errors.report(f"{NAME}: {error}", exc_info=True)
            return img

    def load_model(self, path: str) -> None:
        """Nothing: the networks are loaded when they are needed."""


@torch.inference_mode()
@networks.job
def enlarge(image: Image.Image, weights: Path, scale: float) -> Image.Image:
    """A picture enlarged and restored by OSEDiff. Its mode stays, and alpha is enlarged.

    One of 16 bits comes back with 8.

    Raises OSDFaceError for what is missing or came out as NaN, Stopped when the user asks to stop.

    image: of any mode.
    weights: OSEDiff's file.
    scale: of the result's sides, 1..8.
    """
    host.stop_if_asked()
    image = readable(image)
    networks_of_it, prompts, _ = backbone.osediff(weights)
    result = upscale(
        to_tensor(image)[None],
        prompts,
        networks_of_it,
        UpscaleOptions(scale),
        progress=host.stop_if_asked,
    )
    if result.failed:
        raise OSDFaceError(
            "The picture came out as NaN: choose fp32 as precision under Settings, OSDFace."
        )
    return to_image(result.pictures[0], image.mode)


def _has_base() -> bool:
    """Whether there may be a Stable Diffusion 2.1-base when it is needed."""
    try:
        return backbone.base() is not None or (host.loads_sd2() and bool(host.checkpoints()))
    except OSDFaceError:
        return False


def register() -> None:
    """Puts our upscalers among those of a host that does not look for them, which is Forge-Neo.

    It makes its list anew when the page's button is pressed: ours join in that, too.
    """
    _join()
    extras = getattr(scripts, "postprocessing_scripts_data", ())
    for holder in (modelloader, *(data.module for data in extras)):
        load = getattr(holder, "load_upscalers", None)
        if load is not None and not getattr(load, "joined_by_osediff", False):
            holder.load_upscalers = _joined(load)


def _joined(load: Any) -> Any:
    def load_upscalers() -> None:
        load()
        _join()

    load_upscalers.joined_by_osediff = True  # type: ignore[attr-defined]
    return load_upscalers


def _join() -> None:
    known = getattr(shared, "sd_upscalers", None)
    if known is not None:
        others = [data for data in known if getattr(data.scaler, "name", "") != NAME]
        known[:] = [*others, *UpscalerOSEDiff().scalers]
