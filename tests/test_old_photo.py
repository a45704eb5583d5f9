"""The workflows for scratched photographs, run in a real ComfyUI on the networks that come with the
pack.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.photographs import astronaut
from tests.prompts import Prompts
from tests.test_workflows import PASSED_OVER, ROOT, as_api, read, second_ways

pytestmark = [pytest.mark.host, pytest.mark.full]

SIDE = 256
# Aslant over the whole photograph, and over a cheek: the face lies at the top of its middle.
ROWS = torch.arange(10, 250)
COLUMNS = 110 + ROWS // 6
HERE = {
    "vre_name": "builtin",
    "lora_name": "none",
    "detector": "builtin",
    "mask_type": "ellipse",
    "confidence": 0.7,
}


def upscaler() -> dict[str, Tensor]:
    """A 2x upscale model of Real-ESRGAN's compact kind, which only repeats pixels."""
    state = {"body.1.weight": torch.zeros(4), "body.3.weight": torch.zeros(4)}
    for layer, inside, out in ((0, 3, 4), (2, 4, 4), (4, 4, 3 * 2**2)):
        state[f"body.{layer}.weight"] = torch.zeros(out, inside, 3, 3)
        state[f"body.{layer}.bias"] = torch.zeros(out)
    return state


@pytest.fixture(scope="module")
def given() -> Tensor:
    return torch.from_numpy(np.array(astronaut().convert("RGB").resize((SIDE, SIDE))))


@pytest.fixture(scope="module")
def site(small_server: Prompts, given: Tensor) -> Prompts:
    """A server that has an upscale model and the photograph with two paints in its scratch: what
    Load Image takes for a mask is alpha. Holes are filled by the network that comes with the pack.
    """
    models = small_server.base / "models" / "upscale_models"
    models.mkdir()
    save_file(upscaler(), models / "RealESRGAN_x4plus.safetensors")
    for name, paint in (("white", 255), ("black", 0)):
        painted = torch.cat([given, torch.full((SIDE, SIDE, 1), 255, dtype=torch.uint8)], -1)
        for beside in (-1, 0, 1):
            painted[ROWS, COLUMNS + beside] = torch.tensor([paint] * 3 + [0], dtype=torch.uint8)
        Image.fromarray(painted.numpy()).save(small_server.base / "input" / f"{name}.png")
    return small_server


def run(site: Prompts, workflow: dict[str, Any], image: str, **changed: Any) -> Tensor:
    """What the workflow saves, with the built-in model for the checkpoint and a text."""
    prompt = as_api(workflow)
    for number, node in prompt.items():
        kind, inputs = node["class_type"], node["inputs"]
        inputs.update({name: value for name, value in HERE.items() if name in inputs})
        inputs.update({name: value for name, value in changed.items() if name in inputs})
        if kind == "CheckpointLoaderSimple":
            prompt[number] = {"class_type": "OSDFaceBuiltinModel", "inputs": {}}
        elif kind == "CLIPTextEncode":
            text = {"kind": "text", "count": 1, "seed": 0}
            prompt[number] = {"class_type": "FuzzConditioning", "inputs": text}
        elif kind == "LoadImage":
            inputs["image"] = f"{image}.png"
        elif kind == "SaveImage":
            inputs = {"image": inputs["images"], "name": f"{image}.pt"}
            prompt[number] = {"class_type": "FuzzKeep", "inputs": inputs}
    builtin = {n for n, node in prompt.items() if node["class_type"] == "OSDFaceBuiltinModel"}
    for node in prompt.values():
        for name, value in node["inputs"].items():
            # MODEL, CLIP and VAE of a checkpoint; the built-in one has no CLIP.
            if isinstance(value, list) and value[0] in builtin:
                node["inputs"][name] = [value[0], min(value[1], 1)]
    site.run(prompt)
    return site.kept(f"{image}.pt")


def pass_over(workflow: dict[str, Any], *titles: str) -> dict[str, Any]:
    """The workflow with the nodes of these titles passed over, as Ctrl+B does it."""
    changed = copy.deepcopy(workflow)
    nodes = [node for node in changed["nodes"] if node.get("title") in titles]
    assert len(nodes) == len(titles)
    for node in nodes:
        node["mode"] = PASSED_OVER
    return changed


def test_a_scratch_is_filled_in_the_picture_and_in_the_face_and_the_rest_stays(
    site: Prompts, given: Tensor
) -> None:
    workflow = read(ROOT / "workflows" / "osdface_scratches.json")
    white, black = (run(site, workflow, name) for name in ("white", "black"))
    assert white.shape == (1, SIDE, SIDE, 3)
    # Whatever colour the scratch had: nothing of it shows.
    assert torch.equal(white, black)
    original = given.float() / 255
    changed = (white[0] != original).any(-1)
    scratch = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for beside in (-1, 0, 1):
        scratch[ROWS, COLUMNS + beside] = True
    # Filled with what was there: white is 0.65 from it on average, black 0.35.
    apart = (white[0] - original)[scratch].abs().mean()
    assert apart < 0.1 < original[scratch].mean() - 0.2
    beside = changed & ~scratch
    # The face, and nothing of the lower half.
    assert 0.01 < beside.float().mean() < 0.25
    assert not beside[SIDE // 2 :].any()
    # Where the fill of the upright face is passed over, that face is another one.
    of_picture = pass_over(workflow, "DiffIR Inpaint: the upright faces")
    other = (run(site, of_picture, "white") != white)[0].any(-1)
    assert other.any()
    # In the face some pixels come out as they were by chance: what is next to changed ones is it.
    face = F.max_pool2d((beside | scratch)[None].float(), 5, 1, 2)[0] > 0
    assert not (other & ~face).any()


@pytest.mark.parametrize("way", ["2a", "2b"])
def test_the_whole_way_enlarges_by_either_of_its_ways(
    site: Prompts, given: Tensor, way: str
) -> None:
    workflow = read(ROOT / "workflows" / "osdface_old_photo_complete.json")
    second = second_ways(workflow)
    if way == "2b":
        for node in workflow["nodes"]:
            if node["id"] in second:
                node["mode"] = 0
            elif node["type"] in ("OSEDiffUpscale", "CLIPTextEncode"):
                node["mode"] = PASSED_OVER
    white, black = (run(site, workflow, name, upscale=2.0) for name in ("white", "black"))
    assert white.shape == (1, 2 * SIDE, 2 * SIDE, 3)
    assert torch.equal(white, black)
    if way == "2b":
        # This upscale model repeats pixels: where neither scratch nor face is, they are the given.
        found = (white[0, ::2, ::2] * 255).round()
        assert torch.equal(found[SIDE // 2 + 8 :, :90], given[SIDE // 2 + 8 :, :90].float())
        assert not torch.equal(found[: SIDE // 2], given[: SIDE // 2].float())
