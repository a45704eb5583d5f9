"""OSDFace in the Extras tab, with the options of the node OSDFace Restore."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr
from modules import errors, scripts_postprocessing, ui_components
from PIL import Image

from osdface_core.faces.choose import BY_INDEX
from osdface_core.faces.stream import FaceStream
from osdface_core.pictures.color import COLOR_MATCHES

from . import host
from .job import DEFAULT, MENUS, NAMES, Options, look, restore_picture

SOURCE = "extras_image"
# The component with the picture of the Extras tab, which is made before the scripts' own.
_source: Any = None


def forget_source() -> None:
    """Before the page is made, at the start and after Reload UI."""
    global _source  # noqa: PLW0603
    _source = None


def note_source(component: Any, elem_id: str | None = None, **_: Any) -> None:
    """For on_after_component: notes the picture of the Extras tab."""
    global _source  # noqa: PLW0603
    if (elem_id or getattr(component, "elem_id", None)) == SOURCE:
        _source = component


def options_of(values: dict[str, Any]) -> Options:
    """Options by their names; None, which the API gives, is the default."""
    given = {name: values[name] for name in NAMES if values.get(name) is not None}
    for name in ("max_faces", "min_size", "max_size", "crop_size"):
        if name in given:
            given[name] = int(given[name])
    return Options(**given)


class ScriptPostprocessingOSDFace(scripts_postprocessing.ScriptPostprocessing):
    """The accordion of the Extras tab, and what it does to a picture."""

    name = host.NAME
    order = 3500  # after GFPGAN and CodeFormer
    # Of Forge-Neo's present video: the job and the options that it is for, and its faces so far.
    _video: tuple[Any, FaceStream] | None = None

    def ui(self) -> dict[str, Any]:
        accordion = getattr(ui_components, "InputAccordion", None)
        with accordion(False, label=host.NAME) if accordion else gr.Group() as box:
            enable = box if accordion else gr.Checkbox(False, label=host.NAME)
            with gr.Row():
                strength = gr.Slider(0, 1, DEFAULT.strength, step=0.01, label="Strength")
                mask_type = _menu("mask_type", "Mask")
                color_match = gr.Dropdown(
                    list(COLOR_MATCHES), value=DEFAULT.color_match, label="Colour match"
                )
            with gr.Row():
                select = _menu("select", "Faces")
                indices = gr.Textbox(DEFAULT.indices, label=f"Numbers ({BY_INDEX}): 0,2-4")
                order = _menu("order", "Numbered")
            inputs = self._more()
            inputs |= {
                "strength": strength,
                "mask_type": mask_type,
                "color_match": color_match,
                "select": select,
                "indices": indices,
                "order": order,
            }
            if _source is not None:
                _add_preview(_source, inputs)
        return {"enable": enable, **inputs}

    def _more(self) -> dict[str, Any]:
        """The rarer inputs."""
        with gr.Accordion("More", open=False):
            with gr.Row():
                detector = _menu("detector", "Detector")
                confidence = gr.Slider(
                    0.05, 0.999, DEFAULT.confidence, step=0.01, label="Confidence"
                )
                any_angle = gr.Checkbox(DEFAULT.any_angle, label="Any angle (slow)")
            with gr.Row():
                max_faces = gr.Number(DEFAULT.max_faces, label="At most (0: all)", precision=0)
                min_size = gr.Number(DEFAULT.min_size, label="Smallest face (px)", precision=0)
                max_size = gr.Number(
                    DEFAULT.max_size, label="Largest face (px, 0: any)", precision=0
                )
            with gr.Row():
                crop_size = gr.Slider(512, 1024, DEFAULT.crop_size, step=64, label="Crop size")
                feather = gr.Slider(0, 0.5, DEFAULT.feather, step=0.01, label="Feather")
                keep_detail = gr.Slider(
                    0, 1, DEFAULT.keep_detail, step=0.05, label="Keep fine detail"
                )
            smoothing = gr.Slider(
                0, 1, DEFAULT.smoothing, step=0.05, label="Smoothing (frames of a video)"
            )
            keep = gr.Image(
                label="Keep: white where the picture must stay", type="pil", image_mode="L"
            )
        return {
            "detector": detector,
            "confidence": confidence,
            "any_angle": any_angle,
            "max_faces": max_faces,
            "min_size": min_size,
            "max_size": max_size,
            "crop_size": crop_size,
            "feather": feather,
            "keep_detail": keep_detail,
            "smoothing": smoothing,
            "keep": keep,
        }

    def process(self, pp: Any, enable: bool | None = None, keep: Any = None, **values: Any) -> None:
        """Restores the faces of a picture. None, which the API gives for all, is off."""
        if not enable or pp.image is None:
            return
        try:
            options = options_of(values)
            stream = self._stream(options) if _is_video(pp) else None
            result = restore_picture(pp.image, options, keep, stream=stream)
        except host.Stopped:
            return
        except Exception as error:
            errors.report(f"{host.NAME}: {error}", exc_info=True)
            pp.info[host.NAME] = f"failed: {error}"
            return
        pp.image = result.image
        # One line: it is written into the file with the picture's other parameters.
        pp.info[host.NAME] = result.report.partition("\n")[0]
        if result.source:
            pp.info[f"{host.NAME} model"] = result.source

    def _stream(self, options: Options) -> FaceStream:
        """The faces of the video whose frames come one by one in the host's present job."""
        which = host.job_start(), options
        if self._video is None or self._video[0] != which:
            self._video = which, FaceStream(options.detection)
        return self._video[1]


def _is_video(pp: Any) -> bool:
    """Whether a picture is a frame of a video, as Forge-Neo says."""
    return bool(getattr(getattr(pp, "shared", None), "is_video", False))


def _menu(name: str, label: str) -> Any:
    return gr.Dropdown(list(MENUS[name]), value=getattr(DEFAULT, name), label=label)


def _add_preview(source: Any, inputs: dict[str, Any]) -> None:
    """A button that shows the picture's faces with their numbers."""
    names = [name for name in NAMES if name in inputs]
    button = gr.Button("Number the faces")
    picture = gr.Image(label="Faces and their numbers", interactive=False)
    report = gr.HTML()

    def show(image: Any, *values: Any) -> tuple[Any, str]:
        if not isinstance(image, Image.Image):
            return None, "Put a picture in first."
        try:
            with host.own_job():
                found = look(image, options_of(dict(zip(names, values, strict=True))))
        except host.Stopped:
            return None, "Stopped."
        except Exception as error:
            errors.report(f"{host.NAME}: {error}", exc_info=True)
            return None, html.escape(str(error))
        return found.image, html.escape(found.report).replace("\n", "<br>")

    button.click(
        show,
        inputs=[source, *(inputs[name] for name in names)],
        outputs=[picture, report],
    )
