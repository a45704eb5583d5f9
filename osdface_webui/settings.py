"""Our section of the host's settings."""

from __future__ import annotations

import gradio as gr
from modules import sd_models, shared

from . import backbone, host

SECTION = ("osdface", host.NAME)


def add_settings() -> None:
    """Adds the settings; for on_ui_settings, which hosts without a page never call."""

    def add(
        name: str, default: object, label: str, component: object, info: str, **given: object
    ) -> None:
        option = shared.OptionInfo(default, label, component, section=SECTION, **given)
        shared.opts.add_option(f"osdface_{name}", option.info(info))

    add(
        "base",
        host.AUTOMATIC,
        "Stable Diffusion 2.1-base checkpoint",
        gr.Dropdown,
        "of faces and of OSEDiff. automatic: the loaded checkpoint where it is that, else "
        "v2-1_512-ema-pruned.safetensors, else the small built-in model for faces",
        component_args=lambda: {
            "choices": [host.AUTOMATIC, backbone.BUILTIN, *sd_models.checkpoint_tiles()]
        },
        refresh=sd_models.list_models,
    )
    add(
        "folder",
        "",
        "Folder of OSDFace's weights",
        gr.Textbox,
        "searched before models/osdface and the folders of checkpoints, LoRAs and GFPGAN",
    )
    add(
        "precision",
        host.AUTOMATIC,
        "Precision",
        gr.Radio,
        "automatic: half where the device has it, fp32 with --no-half",
        component_args={"choices": [host.AUTOMATIC, *host.DTYPES]},
    )
    add(
        "keep_loaded",
        True,
        "Keep the networks in memory between pictures",
        gr.Checkbox,
        "off: they are read anew for each picture",
    )
    add(
        "download",
        False,
        "Download weights that are missing",
        gr.Checkbox,
        "up to 2 GB, when they are first needed",
    )
