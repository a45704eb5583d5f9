"""What ComfyUI changed after 0.3.64, as small stand-ins of its new interfaces put into the real
0.3.64.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.widgets import RESTORE

pytestmark = [pytest.mark.host, pytest.mark.full]

NODES = (
    "FaceDetectAlign",
    "OSDFaceVRE",
    "OSDFaceOneStep",
    "FacePasteBack",
    "FaceSelect",
    "OSDFaceRestore",
    "OSDFaceBuiltinModel",
    "OSEDiffUpscale",
)


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


# Schemas


def test_the_host_that_is_run_gets_no_word_that_it_does_not_know(host: Any) -> None:
    from comfy_api.latest import io

    assert "search_aliases" not in io.Schema.__dataclass_fields__
    assert "advanced" not in inspect.signature(io.Int.Input.__init__).parameters
    for node in NODES:
        given = host.nodes[node].INPUT_TYPES()
        assert not any(
            "advanced" in options
            for kind in ("required", "optional")
            for _, options in given.get(kind, {}).values()
        )


def test_newer_hosts_get_search_words_and_rarely_turned_widgets(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy_api.latest import io

    @dataclass
    class Schema(io.Schema):
        search_aliases: list[str] = field(default_factory=list)
        has_intermediate_output: bool = False

    widget = next(kind for kind in io.Int.Input.__mro__ if kind.__name__ == "WidgetInput")
    monkeypatch.setattr(io, "Schema", Schema)
    monkeypatch.setattr(widget, "advanced", None, raising=False)
    folded = {}
    for node in NODES:
        schema = host.nodes[node].define_schema()
        schema.finalize()
        schema.validate()
        assert schema.search_aliases
        assert len(set(schema.search_aliases)) == len(schema.search_aliases)
        folded[node] = [given.id for given in schema.inputs if getattr(given, "advanced", None)]
    assert folded["OSDFaceOneStep"] == ["timestep", "faces_per_batch"]
    assert folded["FaceDetectAlign"] == ["max_size", "smoothing"]
    assert folded["OSDFaceRestore"] == ["order", "smoothing", "feather"]
    assert host.nodes["OSDFaceRestore"].define_schema().has_intermediate_output
    assert not host.nodes["FacePasteBack"].define_schema().has_intermediate_output
    assert "GFPGAN" in host.nodes["OSDFaceRestore"].define_schema().search_aliases


# Layers that wait for their weights, and patchers that page them


def waiting(layer: type[nn.Module], plain: type[nn.Module]) -> Any:
    """A layer as newer hosts have it where they page: no weight until one is loaded, unless a
    subclass reads the file's itself.
    """

    class Waiting(layer):
        def __init__(self, *sizes: int, **options: Any) -> None:
            if type(self)._load_from_state_dict is not Waiting._load_from_state_dict:
                plain.__init__(self, *sizes, **options)
                return
            nn.Module.__init__(self)
            self.weight = self.bias = None

        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
            self.weight = nn.Parameter(state[f"{prefix}weight"], requires_grad=False)
            if f"{prefix}bias" in state:
                self.bias = nn.Parameter(state[f"{prefix}bias"], requires_grad=False)

    return Waiting


def test_layers_that_wait_for_their_weights_are_filled(host: Any) -> None:
    import comfy.ops

    load_network = host.module("osdface_core.layers").load_network
    late = {
        "Linear": waiting(comfy.ops.manual_cast.Linear, nn.Linear),
        "Embedding": waiting(comfy.ops.manual_cast.Embedding, nn.Embedding),
    }

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

    with pytest.raises(host.error, match="left over"):
        filled(SimpleNamespace(**late))
    complete = SimpleNamespace(
        **{name: host.networks._with_weights(late[name], getattr(nn, name)) for name in late}
    )
    x = torch.tensor([0, 4, 2])
    assert torch.equal(filled(complete)(x), plain(x))
    assert torch.equal(filled(host.networks.Operations)(x), plain(x))


@pytest.fixture
def paging(host: Any, nothing_made: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weights of ComfyUI's layers are nowhere but while they are used, as with dynamic VRAM. The
    names of the networks that were so.
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


def restored(host: Any, image: Tensor, **changed: Any) -> Any:
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args
    return (
        host.nodes["OSDFaceRestore"]
        .execute(image=image, model=model, vae=vae, **RESTORE | changed)
        .args
    )


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


# Half-precision pictures and latents


def test_pictures_and_latents_of_half_precision(host: Any, portrait: Tensor) -> None:
    """--fp16-intermediates: pictures come as halves, and the VAE hands out halves."""
    wanted = restored(host, portrait.clone())[0]
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args
    encode, decode = vae.encode, vae.decode
    latents = []
    vae.encode = lambda pixels: latents.append(encode(pixels).half()) or latents[-1]
    vae.decode = lambda latent: decode(latent).half()
    try:
        backbone = host.backbone.HostBackbone(model, vae, {host.base_model.BUILTIN_MARK: True})
        assert backbone.encode(torch.rand(2, 3, 64, 64)).dtype == torch.float32
        assert [latent.dtype for latent in latents] == [torch.float16] * 2
        out, mask, both, _ = (
            host.nodes["OSDFaceRestore"]
            .execute(image=portrait.half(), model=model, vae=vae, **RESTORE)
            .args
        )
    finally:
        del vae.encode, vae.decode
    assert out.dtype == torch.float16
    assert mask.dtype == both.dtype == torch.float32
    assert (out.float() - wanted).abs().max() < 0.02
    assert torch.equal(out[0][mask[0] == 0], portrait.half()[0][mask[0] == 0])


# Memory


def test_out_of_memory_in_any_of_the_hosts_spellings(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.networks.is_out_of_memory(torch.OutOfMemoryError())
    assert host.networks.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not host.networks.is_out_of_memory(RuntimeError("error 2 of the accelerator"))
    management = host.comfy.model_management
    monkeypatch.setattr(management, "is_oom", lambda error: "error 2" in str(error), raising=False)
    assert host.networks.is_out_of_memory(RuntimeError("error 2 of the accelerator"))
    assert not host.networks.is_out_of_memory(RuntimeError("no"))


def test_what_a_host_keeps_free_is_counted_once_and_not_for_each_face(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    management, gib = host.comfy.model_management, 1024**3
    model = SimpleNamespace(
        load_device=torch.device("meta"),
        model_size=lambda: 2 * gib,
        memory_required=lambda shape: gib + shape[0] * 0.5 * gib,
    )
    monkeypatch.setattr(management, "get_free_memory", lambda device: 6 * gib)
    monkeypatch.setattr(management, "loaded_models", lambda: [])
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    backbone = object.__new__(host.backbone.HostBackbone)
    backbone.model = model
    assert backbone.max_batch(512, 512) == 6


# Files


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


def test_a_detector_in_the_hosts_own_folder_is_found(
    host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "detection_Resnet50_Final.pth"
    save_file({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(host.error, match="is missing"):
        host.files.find(name, "facedetection")
    monkeypatch.setitem(
        host.folder_paths.folder_names_and_paths, "detection", ([str(tmp_path)], {".pth"})
    )
    assert host.files.find(name, "facedetection") == tmp_path / name
