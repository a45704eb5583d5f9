"""What ComfyUI changed after 0.3.64: in a real newer ComfyUI where there is one, and by stand-ins
for what wants a card or a build that keeps watch over files.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
import websocket
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.fuzz import populate
from tests.frontend import server
from tests.prompts import Prompts
from tests.widgets import RESTORE

pytestmark = [pytest.mark.host, pytest.mark.full]
newer_only = pytest.mark.usefixtures("newer_only")

# What newer frontends fold away.
ADVANCED = {
    "FaceDetectAlign": ["max_size", "smoothing"],
    "FaceSelect": ["max_size"],
    "OSDFaceVRE": [],
    "OSDFaceOneStep": ["timestep", "faces_per_batch"],
    "FacePasteBack": ["keep_detail"],
    "OSDFaceRestore": ["order", "smoothing", "feather"],
    "OSDFaceBuiltinModel": [],
    "OSEDiffUpscale": ["overlap"],
}


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    """ComfyUI runs every node so."""
    with torch.inference_mode():
        yield


@pytest.fixture
def portrait(photographs: Path, load_picture: Callable[[Path], Tensor]) -> Tensor:
    return load_picture(photographs / "astronaut.png")


@pytest.fixture
def nothing_made(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are read anew, and what a test makes of them goes with it."""
    monkeypatch.setattr(host.files, "_cache", {})


def restored(host: Any, image: Tensor, **changed: Any) -> Any:
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args
    return (
        host.nodes["OSDFaceRestore"]
        .execute(image=image, model=model, vae=vae, **RESTORE | changed)
        .args
    )


TEXT = bytes((0, 0, 0, 3))


def small_graph(name: str, **changed: Any) -> dict[str, Any]:
    """The portrait through the one node and the built-in model; picture and mask are kept too."""
    given = {"image": ["load", 0], "model": ["model", 0], "vae": ["model", 1]}
    nodes = {
        "load": ("LoadImage", {"image": "close.png"}),
        "model": ("OSDFaceBuiltinModel", {}),
        "work": ("OSDFaceRestore", RESTORE | given | changed),
        "keep": ("FuzzKeep", {"image": ["work", 0], "name": name}),
        "keep_picture": ("FuzzKeep", {"image": ["load", 0], "name": f"picture_of_{name}"}),
        "mask": ("MaskToImage", {"mask": ["work", 1]}),
        "keep_mask": ("FuzzKeep", {"image": ["mask", 0], "name": f"mask_of_{name}"}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


# What a page gets to see


@pytest.fixture(scope="module")
def listed(small_server: Any) -> dict[str, Any]:
    """The nodes as the server describes them."""
    return requests.get(f"{small_server.address}/object_info", timeout=60).json()


@pytest.mark.parametrize("node", ADVANCED)
def test_search_words_and_folded_widgets_reach_a_host_that_knows_them(
    node: str, listed: dict[str, Any], newer: bool
) -> None:
    words = listed[node].get("search_aliases") or []
    assert bool(words) == newer
    assert len(set(words)) == len(words)
    folded = [
        name
        for group in listed[node]["input"].values()
        for name, given in group.items()
        if len(given) > 1 and given[1].get("advanced")
    ]
    assert folded == (ADVANCED[node] if newer else [])


@newer_only
def test_the_one_node_is_found_by_the_name_of_its_kind(listed: dict[str, Any]) -> None:
    assert "GFPGAN" in listed["OSDFaceRestore"]["search_aliases"]
    shown = {node for node in ADVANCED if listed[node]["has_intermediate_output"]}
    assert "OSDFaceRestore" in shown
    assert "FacePasteBack" not in shown


def test_a_text_is_shown_on_the_node_while_it_runs_and_after(small_server: Any) -> None:
    # As no other test has it, or the server would take what it remembers.
    prompt = small_graph("shown", strength=0.93)
    client = str(uuid.uuid4())
    address = small_server.address.removeprefix("http://")
    link = websocket.create_connection(f"ws://{address}/ws?clientId={client}", timeout=120)
    sent = {"prompt": prompt, "client_id": client}
    assert requests.post(f"{small_server.address}/prompt", json=sent, timeout=60).ok
    while_it_runs, after = "", ""
    while True:
        message = link.recv()
        if isinstance(message, bytes):
            if message[:4] == TEXT:
                while_it_runs = message[8 + int.from_bytes(message[4:8], "big") :].decode()
            continue
        event = json.loads(message)
        assert event["type"] != "execution_error", event
        if event["type"] == "executed" and event["data"]["node"] == "work":
            after = event["data"]["output"]["text"][0]
        if event["type"] == "execution_success":
            break
    link.close()
    assert while_it_runs == after
    assert after.startswith("1 face found in 1 picture, 1 chosen.")


# Half-precision pictures and latents


@newer_only
def test_pictures_and_latents_of_half_precision(
    small_server: Any, comfyui: Path, tmp_path: Path
) -> None:
    small_server.run(small_graph("whole"))
    populate(tmp_path)
    with server(comfyui, tmp_path, arguments=["--fp16-intermediates"]) as address:
        other = Prompts(address, tmp_path)
        other.run(small_graph("halves"))
    wanted, given = (small_server.kept(name) for name in ("whole", "picture_of_whole"))
    out, half, mask = (
        other.kept(name) for name in ("halves", "picture_of_halves", "mask_of_halves")
    )
    assert half.dtype == out.dtype == torch.float16
    assert mask.dtype == torch.float32
    assert (half.float() - given).abs().max() < 0.001
    assert not torch.equal(wanted, given)
    assert (out.float() - wanted).abs().max() < 0.02
    assert torch.equal(out[mask == 0], half[mask == 0])


# Layers that wait for their weights, and patchers that page them


@newer_only
def test_layers_that_wait_for_their_weights_are_filled(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dynamic VRAM a layer has no weight until one is loaded, unless it reads the file's
    itself, as ours do.
    """
    import comfy.memory_management
    import comfy.ops

    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    load_network = host.module("osdface_core.layers").load_network

    class Network(nn.Module):
        def __init__(self, operations: Any) -> None:
            super().__init__()
            self.book, self.project = operations.Embedding(5, 3), operations.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.project(self.book(x))

    plain = Network(nn)
    tensors = {name: tensor.detach().clone() for name, tensor in plain.state_dict().items()}

    def filled(operations: Any) -> nn.Module:
        return load_network(lambda: Network(operations), tensors, "It does not fit", "look.")

    assert comfy.ops.manual_cast.Linear(3, 2).weight is None
    with pytest.raises(host.error, match="left over"):
        filled(comfy.ops.manual_cast)
    x = torch.tensor([0, 4, 2])
    assert torch.equal(filled(host.networks.Operations)(x), plain(x))


@pytest.fixture
def dynamic(host: Any, newer_only: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The host's own patcher for dynamic VRAM, which it does not take on a CPU by itself. The names
    of the networks that it loads.
    """
    import comfy.memory_management
    import comfy.model_patcher

    loaded: list[str] = []

    class Dynamic(comfy.model_patcher.ModelPatcherDynamic):
        def __new__(cls, *given: Any, **named: Any) -> Any:
            return object.__new__(cls)

        def load(self, *given: Any, **named: Any) -> None:
            loaded.append(type(self.model).__name__)
            super().load(*given, **named)

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    return loaded


def test_all_networks_work_in_the_hosts_dynamic_patcher(
    host: Any,
    portrait: Tensor,
    nothing_made: None,
    newer_only: None,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = restored(host, portrait.clone())[0]
    assert not torch.equal(wanted, portrait)
    monkeypatch.setattr(host.files, "_cache", {})
    loaded = request.getfixturevalue("dynamic")
    assert torch.equal(restored(host, portrait.clone())[0], wanted)
    assert {"RetinaFace", "VisualEmbedder", "Autoencoder", "BaseModel"} <= set(loaded)


def test_what_a_host_keeps_free_is_counted_once_and_not_for_each_face(
    host: Any, nothing_made: None, dynamic: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dynamic patcher asks for a gigabyte beside what a batch takes."""
    management = host.comfy.model_management
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args
    backbone = host.backbone.HostBackbone(model, vae, {host.base_model.BUILTIN_MARK: True})
    one, two = (model.memory_required((n, 4, 64, 64)) for n in (1, 2))
    assert one > 1024**3 > two - one
    free = one + 5.5 * (two - one) + model.model_size()
    monkeypatch.setattr(management, "get_free_memory", lambda device: free)
    monkeypatch.setattr(management, "loaded_models", lambda: [])
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    assert backbone.max_batch(512, 512) == 6


@pytest.fixture
def paging(host: Any, nothing_made: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weights of ComfyUI's layers are nowhere but while they are used, as with dynamic VRAM on a
    card: a stand-in, for the host's own pager finds no card here. The names of the networks that
    were so.
    """
    import comfy.model_patcher
    import comfy.ops

    paged: list[str] = []

    class CoreModelPatcher(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self) -> bool:
            return True

        def partially_load(
            self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False
        ) -> float:
            assert not force_patch_weights
            for layer in self.model.modules():
                if hasattr(layer, "comfy_cast_weights") and not hasattr(layer, "page"):
                    layer.page = layer.weight, layer.bias
                    layer.comfy_cast_weights = True
                    for name, tensor in zip(("weight", "bias"), layer.page, strict=True):
                        if tensor is not None:
                            setattr(
                                layer, name, nn.Parameter(tensor.to("meta"), requires_grad=False)
                            )
            self.model.device = device_to
            paged.append(type(self.model).__name__)
            return 0

        def detach(self, unpatch_all: bool = True) -> nn.Module:
            return self.model

    cast = comfy.ops.cast_bias_weight

    def from_page(layer: Any, *given: Any, **named: Any) -> Any:
        if not hasattr(layer, "page"):
            return cast(layer, *given, **named)
        away = layer.weight, layer.bias
        layer.weight, layer.bias = layer.page
        try:
            return cast(layer, *given, **named)
        finally:
            layer.weight, layer.bias = away

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", CoreModelPatcher, raising=False)
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", from_page)
    return paged


def test_all_networks_work_while_their_weights_are_paged(
    host: Any, portrait: Tensor, request: pytest.FixtureRequest
) -> None:
    wanted = restored(host, portrait.clone())[0]
    assert not torch.equal(wanted, portrait)
    paged = request.getfixturevalue("paging")
    assert torch.equal(restored(host, portrait.clone())[0], wanted)
    assert {"RetinaFace", "VisualEmbedder", "BaseModel"} <= set(paged)


def test_the_face_parser_works_where_its_buffers_are(
    host: Any, paging: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode(False):
        tensors = host.networks.ParseNet().state_dict()
    network = host.networks.load_network(
        host.files.find("detection_mobilenet0.25_Final.pth", "facedetection"),
        host.networks.build_parser,
        read=lambda path: tensors,
    )
    assert paging == ["ParseNet"]
    assert next(network.parameters()).device.type == "meta"
    seen = []
    monkeypatch.setattr(
        type(network),
        "forward",
        lambda self, x: seen.append(x.device.type) or torch.zeros(1, 19, 512, 512),
    )
    host.networks.parse_faces(torch.zeros(1, 512, 512, 3), network)
    assert seen == ["cpu"]


# Memory


def test_out_of_memory_in_any_of_the_hosts_spellings(host: Any, newer: bool) -> None:
    assert host.networks.is_out_of_memory(torch.OutOfMemoryError())
    assert host.networks.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not host.networks.is_out_of_memory(RuntimeError("error 2 of the accelerator"))
    error = torch.AcceleratorError("the accelerator has an error")
    assert not host.networks.is_out_of_memory(error)
    # Newer hosts tell it by its number, whatever it says.
    error.error_code = 2
    assert host.networks.is_out_of_memory(error) == newer


# Files. `app.governance`, of builds that keep watch over them, is stood in for: 0.33.0 has none.


@pytest.mark.parametrize("refused", ["associate_2.ckpt", "embedding_change_weights.pth"])
def test_a_file_that_the_hosts_keeper_forbids_is_not_read(
    refused: str, host: Any, nothing_made: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    governance = SimpleNamespace(
        model_allowed=lambda path: asked.append(Path(path).name) or Path(path).name != refused
    )
    monkeypatch.setitem(sys.modules, "app.governance", governance)
    monkeypatch.setattr(
        host.networks, "read_embedder", lambda path: pytest.fail("read all the same")
    )
    with pytest.raises(
        host.error,
        match=f"^`vre_name`: {refused} is not among the files that this ComfyUI may load",
    ):
        host.nodes["OSDFaceVRE"].execute(
            crops=torch.zeros(1, 64, 64, 3), vre_name="associate_2.ckpt"
        )
    assert asked[-1] == refused


def test_a_file_that_the_hosts_keeper_allows_is_asked_for_once(
    host: Any, nothing_made: None, monkeypatch: pytest.MonkeyPatch, portrait: Tensor
) -> None:
    asked = []
    monkeypatch.setitem(
        sys.modules,
        "app.governance",
        SimpleNamespace(model_allowed=lambda path: asked.append(Path(path).name) or True),
    )
    for _ in range(2):
        restored(host, portrait.clone(), strength=0.0)
    assert sorted(asked) == sorted({*asked})
    assert "detection_mobilenet0.25_Final.pth" in asked


@newer_only
def test_a_detector_in_the_hosts_own_folder_is_found(host: Any) -> None:
    name = "detection_Resnet50_Final.pth"
    with pytest.raises(host.error, match="is missing"):
        host.files.find(name, "facedetection")
    file = host.base / "models" / "detection" / name
    file.parent.mkdir()
    save_file({"x": torch.zeros(1)}, file)
    try:
        assert host.files.find(name, "facedetection") == file
    finally:
        file.unlink()
