"""Checks every node's inputs before it works: types, and the limits of numbers.

ComfyUI compares the values of widgets with their limits, but not a value that comes in through a
link, nor the menu of a V3 node; and an output that fits every input, as the switches of many packs
have it, may pass on anything.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ...osdface_core.errors import OSDFaceError
from ...osdface_core.faces.face import Faces

MAX_SHOWN = 60
KINDS: dict[str, tuple[type, str]] = {
    "IMAGE": (Tensor, "pictures are wanted: connect an IMAGE"),
    "MASK": (Tensor, "a mask is wanted: connect a MASK"),
    "OSDFACE_FACES": (
        Faces,
        "faces are wanted: connect those of Face Detect & Align or Face Select",
    ),
    "CONDITIONING": (
        list,
        "prompts are wanted: connect OSDFace Visual Prompts to OSDFace One Step, CLIP Text Encode "
        "to OSEDiff Upscale",
    ),
    "STRING": (str, "a text is wanted"),
    "COMBO": (str, "one of the menu's texts is wanted"),
}
# Restrictions that core nodes put on a prompt. The rest of the picture would come out as something
# that the networks have not made.
RESTRICTIONS = {
    "area": "an area",
    "mask": "a mask",
    "start_percent": "a part of the steps",
    "end_percent": "a part of the steps",
}
UNRESTRICTED = {"start_percent": 0.0, "end_percent": 1.0}


def with_input_checks(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, with an `execute` that raises OSDFaceError for inputs its schema does not allow."""
    execute: Callable[..., io.NodeOutput] = node.execute.__func__
    if hasattr(execute, "__wrapped__"):
        return node

    @functools.wraps(execute)
    def check_first(cls: type[io.ComfyNode], **inputs: Any) -> io.NodeOutput:
        for item in cls.define_schema().inputs:
            if item.id in inputs and not (item.optional and inputs[item.id] is None):
                check(item, inputs[item.id])
        return execute(cls, **inputs)

    node.execute = classmethod(check_first)
    return node


def check(item: Any, value: Any) -> None:
    """Raises OSDFaceError unless `value` is what the schema's input `item` takes."""
    kind = item.get_io_type()
    if kind in KINDS and not isinstance(value, KINDS[kind][0]):
        # A lazy input that was not asked for is None.
        if value is None and item.lazy:
            return
        raise OSDFaceError(f"`{item.id}` is {_describe(value)}; {KINDS[kind][1]}.")
    # check_model and check_vae refuse a wrong MODEL or VAE; plain values are refused here.
    if kind in ("MODEL", "VAE") and type(value).__module__ == "builtins":
        raise OSDFaceError(
            f"`{item.id}` is {_describe(value)}; a {kind} is wanted: connect one of Stable "
            "Diffusion 2.1-base."
        )
    if kind == "CONDITIONING":
        if not all(map(_is_prompt, value)):
            raise OSDFaceError(
                f"`{item.id}` is a list of other things than prompts; {KINDS[kind][1]}."
            )
        for name, what in RESTRICTIONS.items():
            if any(
                options.get(name, UNRESTRICTED.get(name)) != UNRESTRICTED.get(name)
                for _, options in value
            ):
                raise OSDFaceError(
                    f"`{item.id}` is confined to {what}; a prompt is of the whole picture here: "
                    "take that node away."
                )
    if kind == "IMAGE" and not value.is_floating_point():
        raise OSDFaceError(
            f"`{item.id}` holds {value.dtype}; fractions in [0,1] are wanted: divide whole "
            "numbers by 255 before this node."
        )
    if kind in ("INT", "FLOAT"):
        # numpy's numbers too, which many packs pass on.
        number = isinstance(value, numbers.Real if kind == "FLOAT" else numbers.Integral)
        if not number or not item.min <= value <= item.max:  # NaN too
            wanted = "a whole number" if kind == "INT" else "a number"
            raise OSDFaceError(
                f"`{item.id}` is {_describe(value)}; {wanted} from {item.min} to {item.max} is "
                "wanted: look at what is connected to it."
            )
    # A file that the menu lacks is still looked for, and the node says how to get it.
    if kind == "COMBO" and not item.id.endswith("_name") and value not in item.options:
        raise OSDFaceError(
            f"`{item.id}` is {_describe(value)}; one of these is wanted: {', '.join(item.options)}."
        )


def _is_prompt(entry: Any) -> bool:
    return (
        isinstance(entry, (list, tuple))
        and len(entry) == 2
        and isinstance(entry[0], Tensor)
        and isinstance(entry[1], dict)
    )


def _describe(value: Any) -> str:
    """A value in the words of a sentence: short, and on one line."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = " ".join(
            (
                "nothing"
                if value is None
                else repr(value)
                if isinstance(value, str)
                else str(value)
            ).split()
        )
        return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return f"a {type(value).__name__}"
