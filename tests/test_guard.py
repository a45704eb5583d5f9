"""What may come in through a link or a menu, though the host does not look at it, is refused in one
sentence that names the input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.widgets import FIND, PASTE

FOUND = FIND | {"detector": "builtin"}

pytestmark = [pytest.mark.host, pytest.mark.full]


def find(host: Any, **changed: Any) -> Any:
    return (
        host.nodes["FaceDetectAlign"]
        .execute(**{"image": torch.rand(1, 40, 40, 3)} | FOUND | changed)
        .args
    )


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "crop_size",
            7,
            "`crop_size` is 7; a whole number from 256 to 1024 is wanted: look at what is "
            "connected to it.",
        ),
        (
            "confidence",
            math.nan,
            "`confidence` is nan; a number from 0.05 to 0.999 is wanted: look at what is "
            "connected to it.",
        ),
        (
            "smoothing",
            -1.0,
            "`smoothing` is -1.0; a number from 0.0 to 1.0 is wanted: look at what is connected "
            "to it.",
        ),
        (
            "max_faces",
            "many",
            "`max_faces` is 'many'; a whole number from 0 to 1000 is wanted: look at what is "
            "connected to it.",
        ),
        (
            "min_size",
            10**80,
            f"`min_size` is 1{'0' * 59}...; a whole number from 0 to 16384 is wanted: look at "
            f"what is connected to it.",
        ),
        ("indices", None, "`indices` is nothing; a text is wanted."),
        ("image", None, "`image` is nothing; pictures are wanted: connect an IMAGE."),
        ("image", {"samples": 1}, "`image` is a dict; pictures are wanted: connect an IMAGE."),
        (
            "image",
            torch.zeros(1, 9, 9, 3, dtype=torch.uint8),
            "`image` holds torch.uint8; fractions in [0,1] are wanted: divide whole numbers by "
            "255 before this node.",
        ),
        (
            "detector",
            "mtcnn",
            "`detector` is 'mtcnn'; one of these is wanted: retinaface_resnet50, "
            "retinaface_mobile0.25, builtin.",
        ),
    ],
)
def test_an_input_that_its_schema_does_not_allow(
    name: str, value: Any, says: str, host: Any
) -> None:
    with pytest.raises(host.error) as raised:
        find(host, **{name: value})
    assert str(raised.value) == says


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "model",
            None,
            "`model` is nothing; a MODEL is wanted: connect one of Stable Diffusion 2.1-base.",
        ),
        (
            "vae",
            {"samples": 1},
            "`vae` is a dict; a VAE is wanted: connect one of Stable Diffusion 2.1-base.",
        ),
        ("conditioning", None, "`conditioning` is nothing; prompts are wanted"),
        (
            "conditioning",
            [[None, {}]],
            "`conditioning` is a list of other things than prompts; prompts are wanted",
        ),
        (
            "conditioning",
            [[torch.zeros(1, 77, 1024)]],
            "`conditioning` is a list of other things than prompts; prompts are wanted",
        ),
        ("faces_per_batch", -1, "`faces_per_batch` is -1; a whole number from 0 to 1024 is wanted"),
        (
            "lora_strength",
            math.nan,
            "`lora_strength` is nan; a number from -10.0 to 10.0 is wanted",
        ),
        ("timestep", 1000, "`timestep` is 1000; a whole number from 0 to 999 is wanted"),
    ],
)
def test_an_input_of_the_step(name: str, value: Any, says: str, host: Any) -> None:
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args
    given = {
        "model": model,
        "vae": vae,
        "crops": torch.rand(1, 16, 24, 3),
        "conditioning": [[torch.zeros(1, 77, 1024), {}]],
    }
    given |= {"lora_name": "none", "lora_strength": 1.0, "timestep": 399, "faces_per_batch": 0}
    with pytest.raises(host.error, match=f"^{re.escape(says)}"):
        host.nodes["OSDFaceOneStep"].execute(**given | {name: value})


@pytest.mark.parametrize(
    ("node", "values", "what"),
    [
        (
            "ConditioningSetAreaPercentage",
            {"width": 1.0, "height": 1.0, "x": 1.0, "y": 0.0, "strength": 1.0},
            "an area",
        ),
        (
            "ConditioningSetMask",
            {"mask": torch.ones(1, 9, 9), "set_cond_area": "default", "strength": 1.0},
            "a mask",
        ),
        ("ConditioningSetTimestepRange", {"start": 0.0, "end": 0.1}, "a part of the steps"),
        ("ConditioningSetTimestepRange", {"start": 0.0, "end": 1.0}, None),
        ("ConditioningSetAreaStrength", {"strength": 0.5}, None),
    ],
)
def test_prompts_that_are_confined(
    node: str, values: dict[str, Any], what: str | None, host: Any
) -> None:
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args
    crops = torch.rand(1, 16, 24, 3)
    with torch.inference_mode():
        plain = host.nodes["OSDFaceVRE"].execute(crops=crops, vre_name="builtin").args[0]
        kind = host.nodes[node]()
        prompts = getattr(kind, kind.FUNCTION)(plain, **values)[0]
        widgets = {"lora_name": "none", "lora_strength": 1.0, "timestep": 399, "faces_per_batch": 0}
        given = {"model": model, "vae": vae, "crops": crops, **widgets}
        if what is None:
            restored = host.nodes["OSDFaceOneStep"].execute(conditioning=prompts, **given).args[0]
            assert (
                restored - host.nodes["OSDFaceOneStep"].execute(conditioning=plain, **given).args[0]
            ).abs().max() < 1e-5
        else:
            with pytest.raises(host.error, match=f"^`conditioning` is confined to {what}; "):
                host.nodes["OSDFaceOneStep"].execute(conditioning=prompts, **given)


def test_model_and_vae_that_were_swapped(
    host: Any, photographs: Path, load_picture: Callable[[Path], torch.Tensor]
) -> None:
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args
    widgets = (
        {name: value for name, value in FOUND.items() if name != "max_size"}
        | PASTE
        | {"vre_name": "builtin", "lora_name": "none"}
    )
    with pytest.raises(host.error, match=r"^`model` is VAE"), torch.inference_mode():
        host.nodes["OSDFaceRestore"].execute(
            image=load_picture(photographs / "astronaut.png"), model=vae, vae=model, **widgets
        )


@pytest.mark.parametrize("shape", [(40, 40, 3), (1, 1, 40, 40, 3), (1, 40, 40, 0)])
def test_a_picture_of_another_shape_in_the_one_node(shape: tuple[int, ...], host: Any) -> None:
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args
    widgets = (
        {name: value for name, value in FOUND.items() if name != "max_size"}
        | PASTE
        | {"vre_name": "builtin", "lora_name": "none"}
    )
    with pytest.raises(
        host.error, match=r"^`image` .*a batch \(B,H,W,C\) is wanted: connect an IMAGE\.$"
    ):
        host.nodes["OSDFaceRestore"].execute(
            image=torch.rand(shape), model=model, vae=vae, **widgets
        )


def test_faces_that_are_none(host: Any) -> None:
    for node, given in (
        (
            "FaceSelect",
            {
                n: FOUND[n]
                for n in ("select", "order", "indices", "max_faces", "min_size", "max_size")
            },
        ),
        ("FacePasteBack", PASTE | {"image": torch.rand(1, 40, 40, 3)}),
    ):
        with pytest.raises(host.error, match=r"^`faces` is nothing; faces are wanted"):
            host.nodes[node].execute(faces=None, **given)
    # What is asked for first says nothing of it, lest the host shows that instead.
    assert host.nodes["FacePasteBack"].check_lazy_status(faces=None, strength=math.nan) == []


def test_what_is_optional_or_lazy_may_be_missing(host: Any) -> None:
    image = torch.rand(1, 40, 40, 3)
    faces = find(host, image=image)[0]
    after, mask = (
        host.nodes["FacePasteBack"]
        .execute(image=image, faces=faces, restored=None, keep=None, **PASTE)
        .args
    )
    assert after is image
    assert not mask.any()


def test_numbers_as_other_packs_hand_them_on(host: Any) -> None:
    import numpy as np

    assert (
        find(host, confidence=np.float32(0.5), max_faces=np.int64(2), min_size=True, smoothing=0)[3]
        == 0
    )


def test_a_file_that_no_menu_offers_is_told_of_by_the_node(host: Any) -> None:
    with pytest.raises(host.error, match=r"^`vre_name`: .*other\.safetensors"):
        host.nodes["OSDFaceVRE"].execute(
            crops=torch.rand(1, 64, 64, 3), vre_name="other.safetensors"
        )
