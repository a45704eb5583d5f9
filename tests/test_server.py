"""The basic workflow and the one node on photographs, over HTTP, in a real ComfyUI server with
full-size stand-in weights.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests
import torch
import torch.nn.functional as F
import websocket
from torch import Tensor

from tests.conftest import give_memory_back
from tests.frontend import server as serving

pytestmark = [pytest.mark.host, pytest.mark.full]

ROOT = Path(__file__).resolve().parents[1]
PREVIEW, TEXT = bytes((0, 0, 0, 1)), bytes((0, 0, 0, 3))

# Writes whatever comes in to a file, bit for bit, where a picture would have 8 bits; and notes
# which weight files are opened.
KEEP_NODE = """
import torch, folder_paths, os, safetensors, sys
def note(path):
    if str(path).endswith((".safetensors", ".ckpt", ".pth")):
        with open(os.path.join(folder_paths.get_output_directory(), "opened.txt"), "a") as file:
            file.write(os.path.basename(path) + chr(10))
def opened(event, args):
    if event == "open" and isinstance(args[0], (str, os.PathLike)):
        note(args[0])


sys.addaudithook(opened)
safe_open = safetensors.safe_open
safetensors.safe_open = lambda path, *args, **kwargs: note(path) or safe_open(path, *args, **kwargs)
class KeepTensor:
    OUTPUT_NODE, RETURN_TYPES, FUNCTION, CATEGORY = True, (), "keep", "test"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",), "name": ("STRING", {})}}
    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True
    def keep(self, value, name):
        kept = value.clone() if isinstance(value, torch.Tensor) else value
        torch.save(kept, os.path.join(folder_paths.get_output_directory(), name))
        return {"ui": {}}
NODE_CLASS_MAPPINGS = {"KeepTensor": KeepTensor}
"""


@dataclass
class Run:
    executed: list[str]
    messages: list[dict[str, Any]]
    pictures: int
    texts: dict[str, str]
    seconds: float

    @property
    def error(self) -> str | None:
        return next(
            (
                m["data"]["exception_message"].strip()
                for m in self.messages
                if m["type"] == "execution_error"
            ),
            None,
        )


@dataclass
class Server:
    address: str
    base: Path

    def queue(
        self, prompt: dict[str, Any], heard: Callable[[dict[str, Any]], Any] = lambda event: None
    ) -> Run:
        """Runs a prompt to its end. heard: called with each message."""
        client = str(uuid.uuid4())
        link = websocket.create_connection(f"ws://{self.address}/ws?clientId={client}", timeout=900)
        answer = requests.post(
            f"http://{self.address}/prompt",
            json={"prompt": prompt, "client_id": client},
            timeout=60,
        )
        assert answer.ok, answer.text
        executed, messages, pictures, texts, start = [], [], 0, {}, time.monotonic()
        while True:
            message = link.recv()
            if isinstance(message, bytes):
                pictures += message[:4] == PREVIEW
                if message[:4] == TEXT:
                    end = 8 + int.from_bytes(message[4:8], "big")
                    texts[message[8:end].decode()] = message[end:].decode()
                continue
            event = json.loads(message)
            messages.append(event)
            heard(event)
            if event["type"] == "executing" and event["data"]["node"] is not None:
                executed.append(event["data"]["node"])
            if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                break
        link.close()
        return Run(executed, messages, pictures, texts, time.monotonic() - start)

    def opened(self) -> set[str]:
        """The weight files that were opened since this was last asked."""
        log = self.base / "output" / "opened.txt"
        names = set(log.read_text().split()) if log.exists() else set()
        log.unlink(missing_ok=True)
        return names

    def kept(self, name: str) -> Any:
        return torch.load(self.base / "output" / name, weights_only=True)


@pytest.fixture(scope="module")
def server(
    comfyui: Path,
    populate: Callable[[Path], None],
    photographs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    # A ComfyUI in this process, from tests before these, keeps gigabytes that the server wants.
    if management := sys.modules.get("comfy.model_management"):
        management.unload_all_models()
        give_memory_back()
    base = tmp_path_factory.mktemp("server")
    populate(base)
    (base / "custom_nodes" / "keep").mkdir()
    (base / "custom_nodes" / "keep" / "__init__.py").write_text(KEEP_NODE)
    shutil.copy(photographs / "astronaut.png", base / "input" / "astronaut.png")
    with serving(comfyui, base) as address:
        yield Server(address.removeprefix("http://"), base)


def basic(**changed: Any) -> dict[str, Any]:
    """The shipped basic workflow in API format, with the files that are at hand and widgets
    `node.input` changed.
    """
    prompt = json.loads((ROOT / "tests" / "osdface_basic_api.json").read_text())
    here = {
        "FaceDetectAlign.detector": "retinaface_mobile0.25",
        "OSDFaceVRE.vre_name": "associate_2.ckpt",
        "FacePasteBack.mask_type": "ellipse",
        "LoadImage.image": "astronaut.png",
    }
    for key, value in (here | changed).items():
        kind, name = key.split(".")
        node = next(n for n in prompt.values() if n["class_type"] == kind)
        assert name in node["inputs"], key
        node["inputs"][name] = value
    return prompt


def node_of(prompt: dict[str, Any], kind: str) -> str:
    return next(key for key, node in prompt.items() if node["class_type"] == kind)


def keeping(prompt: dict[str, Any], **values: tuple[str, int]) -> dict[str, Any]:
    """The prompt with outputs written to files: name=(node kind, output)."""
    for name, (kind, output) in values.items():
        prompt[f"keep_{name}"] = {
            "class_type": "KeepTensor",
            "inputs": {"value": [node_of(prompt, kind), output], "name": name},
        }
    return prompt


@torch.inference_mode()
def released_path(crops: Tensor, prompts: Tensor, seeded: ModuleType) -> Tensor:
    """What the paper's formulas give for a crop on diffusers' networks with the LoRA added to the
    weights.
    """
    import diffusers

    unet_state, vae_state = seeded.sd21_base()[1:]
    lora = seeded.lora()
    for key, down in lora.items():
        for down_part, up_part in (
            (".lora_A.weight", ".lora_B.weight"),
            (".lora.down.weight", ".lora.up.weight"),
        ):
            if key.endswith(down_part):
                module = key.removesuffix(down_part).removeprefix("unet.")
                up = lora[f"unet.{module}{up_part}"]
                weight = unet_state[f"{module}.weight"]
                weight += (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            sample_size=512,
        )
    unet.load_state_dict(unet_state, assign=True)
    vae.load_state_dict(vae_state, assign=True)
    # Channels first in memory, as the released code has it: the other order costs torch's group
    # norm four digits on the CPU.
    latents = vae.encode(crops.movedim(-1, 1).contiguous() * 2 - 1).latent_dist.mode() * 0.18215
    noise = unet(latents, 399, encoder_hidden_states=prompts).sample
    abar = (
        diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        .alphas_cumprod[399]
        .double()
    )
    x0 = ((latents - (1 - abar).sqrt() * noise) / abar.sqrt()).float()
    return (vae.decode(x0 / 0.18215).sample.clamp(-1, 1) * 0.5 + 0.5).movedim(1, -1)


def test_without_a_face_the_picture_passes_and_no_network_runs(
    server: Server, photographs: Path, load_picture: Callable[[Path], Tensor]
) -> None:
    from PIL import Image

    rng = torch.Generator().manual_seed(0)
    flat = F.interpolate(torch.rand(1, 3, 6, 6, generator=rng), (300, 401), mode="bilinear")[
        0
    ].movedim(0, -1)
    Image.fromarray((flat * 255).byte().numpy()).save(server.base / "input" / "flat.png")
    prompt = keeping(
        basic(**{"LoadImage.image": "flat.png"}),
        image=("FacePasteBack", 0),
        mask=("FacePasteBack", 1),
    )
    run = server.queue(prompt)
    assert run.error is None
    assert torch.equal(server.kept("image"), load_picture(server.base / "input" / "flat.png"))
    assert not server.kept("mask").any()
    kinds = {prompt[node]["class_type"] for node in run.executed}
    assert kinds == {"LoadImage", "FaceDetectAlign", "FacePasteBack", "SaveImage", "KeepTensor"}


def photograph(**changed: Any) -> dict[str, Any]:
    return keeping(
        basic(**changed),
        crops=("FaceDetectAlign", 1),
        count=("FaceDetectAlign", 3),
        prompts=("OSDFaceVRE", 0),
        restored=("OSDFaceOneStep", 0),
        image=("FacePasteBack", 0),
        mask=("FacePasteBack", 1),
    )


@pytest.mark.once
def test_a_photograph_is_restored(
    server: Server, photographs: Path, seeded: ModuleType, load_picture: Callable[[Path], Tensor]
) -> None:
    pytest.importorskip("diffusers", reason="diffusers is the outside truth for the restored crop")
    assert server.queue(photograph()).error is None
    given = load_picture(photographs / "astronaut.png")
    image, mask, crops, restored = (server.kept(n) for n in ("image", "mask", "crops", "restored"))
    assert server.kept("count") == 1
    assert crops.shape == restored.shape == (1, 512, 512, 3)

    # The face of the picture, as an eye finds it: about the middle of the upper half.
    y, x = (float(v) for v in (mask[0] > 0.5).nonzero().float().mean(0))
    assert abs(x - 222) < 15
    assert abs(y - 115) < 25
    outside = mask[0] == 0
    assert 0.5 < outside.float().mean() < 0.99
    assert torch.equal(image[0][outside], given[0][outside])
    assert (image[0][mask[0] == 1] - given[0][mask[0] == 1]).abs().mean() > 0.01

    wanted = released_path(crops, server.kept("prompts")[0][0], seeded)
    assert (restored - wanted).abs().max() < 1e-4

    saved = load_picture(next((server.base / "output").glob("*.png")))
    assert torch.equal(saved[0][outside], given[0][outside])


@pytest.mark.once
def test_a_turned_widget_runs_what_depends_on_it_and_no_file_is_read_twice(server: Server) -> None:
    assert server.queue(photograph()).error is None
    files = {
        "v2-1_512-ema-pruned.safetensors",
        "associate_2.ckpt",
        "pytorch_lora_weights.safetensors",
        "detection_mobilenet0.25_Final.pth",
    }
    assert files <= server.opened()

    def ran(**changed: Any) -> set[str]:
        prompt = photograph(**changed)
        run = server.queue(prompt)
        assert run.error is None
        return {
            node if node.startswith("keep") else prompt[node]["class_type"] for node in run.executed
        }

    pasting = {"FacePasteBack", "SaveImage", "keep_image", "keep_mask"}
    assert ran() == set()
    assert ran(**{"FacePasteBack.strength": 0.5}) == pasting
    assert ran(**{"OSDFaceOneStep.lora_strength": 0.5}) == pasting | {
        "OSDFaceOneStep",
        "keep_restored",
    }
    assert not server.opened()


@pytest.mark.once
def test_the_one_node_gives_what_the_four_give_in_one_bar(server: Server) -> None:
    def both(**changed: Any) -> dict[str, Any]:
        prompt = photograph()
        four: dict[str, Any] = {}
        for kind in ("FacePasteBack", "OSDFaceOneStep", "OSDFaceVRE", "FaceDetectAlign"):
            four |= prompt[node_of(prompt, kind)]["inputs"]
        schema = requests.get(
            f"http://{server.address}/object_info/OSDFaceRestore", timeout=60
        ).json()["OSDFaceRestore"]["input"]
        inputs = {name: four[name] for name in schema["required"]} | changed
        prompt["one"] = {"class_type": "OSDFaceRestore", "inputs": inputs}
        prompt["keep_one"] = {
            "class_type": "KeepTensor",
            "inputs": {"value": ["one", 0], "name": "one"},
        }
        prompt["keep_one_mask"] = {
            "class_type": "KeepTensor",
            "inputs": {"value": ["one", 1], "name": "one_mask"},
        }
        return prompt

    assert server.queue(photograph()).error is None
    server.opened()
    first = server.queue(both())
    assert first.error is None
    assert set(first.executed) == {"one", "keep_one", "keep_one_mask"}
    assert torch.equal(server.kept("one"), server.kept("image"))
    assert torch.equal(server.kept("one_mask"), server.kept("mask"))
    values = [m["data"]["value"] for m in first.messages if m["type"] == "progress"]
    assert values == sorted(values)
    assert values[-1] == 100
    assert first.pictures == 3  # the crop, restored, and pasted
    assert not server.opened()
    said = next(
        m["data"]["output"]["text"][0]
        for m in first.messages
        if m["type"] == "executed" and m["data"]["node"] == "one"
    )
    assert said.startswith("1 face found in 1 picture, 1 chosen.")
    assert first.texts == {"one": said}

    softer = server.queue(both(strength=0.5))
    assert not torch.equal(server.kept("one"), server.kept("image"))
    assert softer.pictures == 1
    assert softer.seconds < first.seconds / 3


@pytest.mark.once
def test_a_stop_is_heeded_within_a_face_and_the_next_run_works(
    server: Server, photographs: Path
) -> None:
    shutil.copy(photographs / "group.png", server.base / "input" / "group.png")
    prompt = photograph(**{"LoadImage.image": "group.png"})
    embedder, times = node_of(prompt, "OSDFaceVRE"), []

    def stop(event: dict[str, Any]) -> None:
        if event["type"] in ("executing", "progress") and event["data"]["node"] == embedder:
            times.append(time.monotonic())
            if len(times) == 3:
                requests.post(f"http://{server.address}/interrupt", timeout=60)

    run = server.queue(prompt, stop)
    ended = time.monotonic()
    assert run.messages[-1]["type"] == "execution_interrupted"
    assert len(times) <= 4, "more than one face was finished after the stop"
    assert ended - times[2] < 2 * (times[2] - times[1]) + 2
    assert node_of(prompt, "OSDFaceOneStep") not in run.executed
    assert server.queue(photograph(**{"LoadImage.image": "flat.png"})).error is None


def test_only_the_people_who_were_chosen_change(
    server: Server, photographs: Path, load_picture: Callable[[Path], Tensor]
) -> None:
    """Two of the mosaic's six, by Face Select; their crops come back inverted, which anyone would
    see.
    """
    shutil.copy(photographs / "group.png", server.base / "input" / "group.png")
    choice = {
        "select": "by index",
        "order": "left to right",
        "indices": "1,3-3",
        "max_faces": 0,
        "min_size": 24,
        "max_size": 0,
    }
    prompt = {
        "load": {"class_type": "LoadImage", "inputs": {"image": "group.png"}},
        "find": {
            "class_type": "FaceDetectAlign",
            "inputs": choice
            | {
                "image": ["load", 0],
                "detector": "retinaface_mobile0.25",
                "confidence": 0.9,
                "select": "all",
                "indices": "0",
            }
            | {"any_angle": False, "crop_size": 512, "smoothing": 0.0},
        },
        "choose": {"class_type": "FaceSelect", "inputs": choice | {"faces": ["find", 0]}},
        "invert": {"class_type": "ImageInvert", "inputs": {"image": ["choose", 1]}},
        "paste": {
            "class_type": "FacePasteBack",
            "inputs": {
                "image": ["load", 0],
                "faces": ["choose", 0],
                "restored": ["invert", 0],
                "strength": 1.0,
                "mask_type": "ellipse",
            }
            | {"feather": 0.1, "color_match": "none"},
        },
        "keep_group": {
            "class_type": "KeepTensor",
            "inputs": {"value": ["paste", 0], "name": "group"},
        },
        "keep_rest": {
            "class_type": "KeepTensor",
            "inputs": {"value": ["choose", 3], "name": "rest"},
        },
    }
    assert server.queue(prompt).error is None
    given, pasted = (
        load_picture(photographs / "group.png")[0],
        server.kept("group")[0],
    )
    assert server.kept("rest").shape == (4, 512, 512, 3)
    # Six portraits side by side in two rows of three: what is numbered from the left alternates
    # between the rows.
    height, width = given.shape[0] // 2, given.shape[1] // 3
    tiles = [(y * height, x * width) for y in range(2) for x in range(3)]
    changed = [
        (pasted[y : y + height, x : x + width] != given[y : y + height, x : x + width])
        .any(-1)
        .float()
        .mean()
        for y, x in tiles
    ]
    assert sum(float(c) > 0.05 for c in changed) == 2
    assert sum(float(c) == 0 for c in changed) == 4


def test_an_error_reaches_the_user_as_one_sentence(server: Server) -> None:
    prompt = basic()
    for key, node in {
        "split": {
            "class_type": "ImageScale",
            "inputs": {
                "image": [node_of(prompt, "LoadImage"), 0],
                "upscale_method": "bilinear",
                "width": 4,
                "height": 4,
                "crop": "disabled",
            },
        },
        "end": {"class_type": "PreviewImage", "inputs": {"images": ["step", 0]}},
        "step": {
            "class_type": "OSDFaceOneStep",
            "inputs": prompt[node_of(prompt, "OSDFaceOneStep")]["inputs"] | {"crops": ["split", 0]},
        },
    }.items():
        prompt[key] = node
    for kind in ("FacePasteBack", "SaveImage"):
        del prompt[node_of(prompt, kind)]
    error = server.queue(prompt).error
    assert error == "`crops` are 4 x 4 px; at least 8 x 8 are wanted: connect larger pictures."
