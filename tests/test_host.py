"""The nodes inside a real ComfyUI, in this process, on full-size stand-in weights: the paper's
numbers, and refusals.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import skimage.data
import torch
from safetensors.torch import save_file

from tests import widgets
from tests.conftest import DEVICE, FULL_SIZE_FP16

pytestmark = [pytest.mark.host, pytest.mark.full]

INPUTS = ("astronaut_lq", "portrait_severe_lq", "portrait_128", "portrait_512x640", "many_codes")
LORA = "pytorch_lora_weights.safetensors"
STEP = widgets.STEP | {"lora_name": LORA}


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    """ComfyUI runs every node so."""
    with torch.inference_mode():
        yield


def sorted_rows(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack(sorted(rows, key=lambda row: row.tolist()))


def run(host: Any, node: str, **inputs: Any) -> Any:
    result = host.nodes[node].execute(**inputs)
    return result.args[0]


def prompts_of(host: Any, crops: torch.Tensor) -> Any:
    return run(host, "OSDFaceVRE", crops=crops, vre_name="associate_2.ckpt")


def step_inputs(host: Any, checkpoint: tuple[Any, Any], crops: torch.Tensor) -> dict[str, Any]:
    """The step node's inputs for the crops."""
    model, vae = checkpoint
    conditioning = prompts_of(host, crops)
    return {"model": model, "vae": vae, "crops": crops, "conditioning": conditioning} | STEP


@pytest.mark.once
@pytest.mark.parametrize("name", INPUTS)
def test_latent_prompts_and_x0_are_the_released_codes(
    name: str,
    host: Any,
    checkpoint: tuple[Any, Any],
    truth: Callable[[str], torch.Tensor],
    crop: Callable[[str], torch.Tensor],
) -> None:
    model, vae = checkpoint
    crops = crop(name)
    prompts = prompts_of(host, crops)[0][0]
    wanted = truth(f"{name}.prompt")[0]
    assert (sorted_rows(prompts[0]) - sorted_rows(wanted)).abs().max() < 1e-5
    backbone = host.backbone.HostBackbone(
        host.lora.with_lora(model, host.files.find(LORA, "loras"), 1.0), vae
    )
    latents = backbone.encode(host.module("osdface_core.osdface.restore").network_input(crops))
    assert (latents - truth(f"{name}.latent")).abs().max() < 1e-5
    x0 = backbone.denoise(latents, prompts, 399)
    assert (x0 - truth(f"{name}.x0")).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name", ["astronaut_lq", pytest.param("portrait_severe_lq", marks=pytest.mark.repeat)]
)
def test_the_restored_picture_is_the_released_codes(
    name: str,
    host: Any,
    checkpoint: tuple[Any, Any],
    truth: Callable[[str], torch.Tensor],
    crop: Callable[[str], torch.Tensor],
) -> None:
    model, vae = checkpoint
    restored = run(
        host,
        "OSDFaceOneStep",
        model=model,
        vae=vae,
        crops=crop(name),
        conditioning=prompts_of(host, crop(name)),
        **STEP,
    )
    assert (restored.movedim(-1, 1) - truth(f"{name}.image")).abs().max() < 1e-4


@pytest.mark.once
def test_crops_at_once_are_each_alone_and_again_the_same(
    host: Any, checkpoint: tuple[Any, Any], crop: Callable[[str], torch.Tensor]
) -> None:
    model, vae = checkpoint
    crops = torch.cat([crop("astronaut_lq"), crop("many_codes")])[:, 150:278, 180:316]

    def restored(crops: torch.Tensor, at_once: int) -> tuple[torch.Tensor, torch.Tensor]:
        conditioning = prompts_of(host, crops)
        given = {"model": model, "vae": vae, "crops": crops, "conditioning": conditioning}
        return conditioning[0][0], run(
            host, "OSDFaceOneStep", **given, **STEP | {"faces_per_batch": at_once}
        )

    prompts, together = restored(crops, 2)
    for i in range(2):
        prompts_alone, alone = restored(crops[i : i + 1], 1)
        assert (sorted_rows(prompts_alone[0]) - sorted_rows(prompts[i])).abs().max() < 1e-5
        assert (alone[0] - together[i]).abs().max() < 1e-5
    host.comfy.model_management.unload_all_models()
    assert torch.equal(restored(crops, 2)[1], together)


def test_no_crops_give_no_restored(host: Any, checkpoint: tuple[Any, Any]) -> None:
    model, vae = checkpoint
    crops = torch.zeros(0, 512, 512, 3)
    conditioning = prompts_of(host, crops)
    assert conditioning[0][0].shape == (0, 77, 1024)
    assert run(
        host, "OSDFaceOneStep", model=model, vae=vae, crops=crops, conditioning=conditioning, **STEP
    ).shape == (0, 512, 512, 3)


def test_the_lora_lands_on_278_weights_of_a_clone(host: Any, checkpoint: tuple[Any, Any]) -> None:
    model, _ = checkpoint
    before = {key: list(value) for key, value in model.patches.items()}, model.patches_uuid
    clone = host.lora.with_lora(model, host.files.find(LORA, "loras"), 0.5)
    assert len(clone.patches) == 278
    assert (
        {key: list(value) for key, value in model.patches.items()},
        model.patches_uuid,
    ) == before
    assert host.lora.with_lora(model, host.files.find(LORA, "loras"), 0.5) is clone
    assert host.lora.with_lora(model, host.files.find(LORA, "loras"), 0.6) is not clone


def test_the_clone_with_the_lora_goes_with_its_model(
    host: Any, checkpoint: tuple[Any, Any]
) -> None:
    model = checkpoint[0].clone()
    clone = weakref.ref(host.lora.with_lora(model, host.files.find(LORA, "loras"), 0.5))
    assert clone() is not None
    del model
    gc.collect()
    assert clone() is None


def test_a_changed_strength_leaves_nothing_behind(host: Any, checkpoint: tuple[Any, Any]) -> None:
    management, (model, _) = host.comfy.model_management, checkpoint
    for strength in (0.5, 0.6):
        management.load_models_gpu(
            [host.lora.with_lora(model, host.files.find(LORA, "loras"), strength)]
        )
        gc.collect()
        assert all(patcher is not None for patcher in management.loaded_models())
    management.load_models_gpu([model])
    assert not model.backup


def test_the_lora_survives_a_model_that_is_unloaded_and_loaded_in_part(
    host: Any, checkpoint: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card with little memory. Six layers stand for the UNet; ComfyUI's own classes do the
    loading.
    """
    import comfy.model_patcher
    import comfy.ops

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                comfy.ops.disable_weight_init.Linear(64, 64) for _ in range(6)
            )
            for parameter in self.parameters():
                torch.nn.init.normal_(parameter, std=0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    module, cpu, management = Layers(), torch.device("cpu"), host.comfy.model_management
    model = comfy.model_patcher.ModelPatcher(module, cpu, cpu)
    patches = {f"layers.{i}.weight": ("diff", (torch.randn(64, 64) * 0.05,)) for i in range(6)}

    def merged(model: Any, *_: Any) -> Any:
        clone = model.clone()
        clone.add_patches(patches, 1.0)
        return clone

    monkeypatch.setattr(host.lora, "merge_lora", merged)
    monkeypatch.setattr(host.lora, "cached", lambda *_: {})
    file, x = host.files.find(LORA, "loras"), torch.randn(1, 64)
    management.load_models_gpu([host.lora.with_lora(model, file, 1.0)])
    first = module(x).clone()
    gc.collect()
    loaded = next(
        m
        for m in management.current_loaded_models
        if m.model is not None and m.model.model is module
    )
    loaded.model_unload(model.model_size() // 2)
    host.lora.with_lora(model, file, 1.0).partially_load(cpu, extra_memory=model.model_size() // 6)
    assert (module(x) - first).abs().max() < 1e-5


def test_a_merged_weight_is_base_plus_strength_times_up_times_down(
    host: Any, checkpoint: tuple[Any, Any], seeded: ModuleType
) -> None:
    model, _ = checkpoint
    clone = host.lora.with_lora(model, host.files.find(LORA, "loras"), 0.5)
    lora, base = seeded.lora(), model.model.state_dict()
    for name, ldm in (
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
        ),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
    ):
        down, up = (
            (".lora.down.weight", ".lora.up.weight")
            if "attn" in name
            else (".lora_A.weight", ".lora_B.weight")
        )
        delta = lora[f"unet.{name}{up}"].flatten(1) @ lora[f"unet.{name}{down}"].flatten(1)
        key = f"diffusion_model.{ldm}.weight"
        plain = model.backup[key].weight if key in model.backup else base[key]
        merged = host.comfy.lora.calculate_weight(clone.patches[key], plain.clone(), key)
        assert (merged - plain - 0.5 * delta.reshape(plain.shape)).abs().max() < 1e-5


@pytest.mark.parametrize("harm", ["too many", "missing", "wrong shape"])
def test_a_lora_that_does_not_fit_is_refused_and_the_model_untouched(
    harm: str, host: Any, checkpoint: tuple[Any, Any], seeded: ModuleType
) -> None:
    model, vae = checkpoint
    key = "unet.mid_block.resnets.0.conv1.lora_B.weight"
    tensors = seeded.lora()
    if harm == "too many":
        tensors["unet.conv_out.lora_A.weight"] = torch.zeros(16, 320, 3, 3)
    elif harm == "missing":
        del tensors[key]
    else:
        tensors[key] = tensors[key][:64].clone()
    name = f"{harm.replace(' ', '_')}.safetensors"
    save_file(tensors, host.base / "models" / "loras" / name)
    before = model.patches_uuid, len(model.patches)
    with pytest.raises(
        host.error, match="conv_out" if harm == "too many" else "mid_block.resnets.0.conv1"
    ):
        run(
            host,
            "OSDFaceOneStep",
            model=model,
            vae=vae,
            crops=torch.zeros(1, 64, 64, 3),
            conditioning=[[torch.zeros(1, 77, 1024), {}]],
            **STEP | {"lora_name": name},
        )
    assert (model.patches_uuid, len(model.patches)) == before


class RunsCode:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.proof}'",)


def test_a_pickle_that_would_run_code_does_not(host: Any, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    torch.save({"state_dict": RunsCode(proof)}, host.base / "models" / "osdface" / "evil.ckpt")
    with pytest.raises(host.error, match=r"evil\.ckpt"):
        run(host, "OSDFaceVRE", crops=torch.zeros(1, 64, 64, 3), vre_name="evil.ckpt")
    assert not proof.exists()


@pytest.mark.parametrize("name", [LORA, "associate_2.ckpt"])
def test_a_truncated_file_is_named(name: str, host: Any, checkpoint: tuple[Any, Any]) -> None:
    whole = host.files.find(name, "loras").read_bytes()
    cut = host.base / "models" / "osdface" / f"cut_{name}"
    cut.write_bytes(whole[: len(whole) * 2 // 5])
    with pytest.raises(host.error, match=f"cut_{name}"):
        if name == LORA:
            host.lora.with_lora(checkpoint[0], cut, 1.0)
        else:
            run(host, "OSDFaceVRE", crops=torch.zeros(1, 64, 64, 3), vre_name=cut.name)


def test_a_file_that_is_not_there_is_named_with_the_remedy(host: Any) -> None:
    says = (
        r"^`detector`: detection_Resnet50_Final.pth is missing "
        r".*install.py --only detection_Resnet50_Final.pth .* or allow downloads"
    )
    given = widgets.FIND | {"detector": "retinaface_resnet50"}
    with pytest.raises(host.error, match=says):
        run(host, "FaceDetectAlign", image=torch.zeros(1, 64, 64, 3), **given)


def test_a_lora_that_is_not_there_is_named_before_a_network_runs(
    host: Any, checkpoint: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.networks, "load_embedder", lambda *_: pytest.fail("ran"))
    model, vae = checkpoint
    picture = torch.from_numpy(skimage.data.astronaut()).float()[None] / 255
    says = r"^`lora_name`: gone\.safetensors is in none of the model folders"
    with pytest.raises(host.error, match=says):
        host.nodes["OSDFaceRestore"].execute(
            image=picture,
            model=model,
            vae=vae,
            **widgets.RESTORE | {"vre_name": "associate_2.ckpt", "lora_name": "gone.safetensors"},
        )


def test_menus_offer_what_a_shared_workflow_names_present_or_not(host: Any) -> None:
    """So that it validates on a fresh install; the file that is missing is asked for when it is
    needed.
    """
    for node, menu, name in (
        ("OSDFaceVRE", "vre_name", "osdface_vre.safetensors"),
        ("OSDFaceOneStep", "lora_name", LORA),
        ("FaceDetectAlign", "detector", "retinaface_resnet50"),
        ("FacePasteBack", "mask_type", "parsing"),
    ):
        kind, options = host.nodes[node].INPUT_TYPES()["required"][menu]
        assert name in (options["options"] if kind == "COMBO" else kind)


@pytest.mark.parametrize("several", [False, True])
def test_any_user_of_several_may_allow_downloads(
    several: bool, host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.folder_paths, "get_user_directory", lambda: str(tmp_path))
    monkeypatch.setattr(host.files.args, "multi_user", several)
    monkeypatch.delenv("OSDFACE_DOWNLOAD", raising=False)
    for name, allowed in (("default", False), ("anna_1f", True)):
        (tmp_path / name).mkdir()
        settings = json.dumps({"OSDFace.download": allowed})
        (tmp_path / name / "comfy.settings.json").write_text(settings)
    asked = []
    monkeypatch.setattr(
        host.files.Store,
        "ensure",
        lambda store, name, *, allow_download, progress: asked.append(allow_download),
    )
    host.files.find("detection_Resnet50_Final.pth", "facedetection")
    assert asked == [several]


@pytest.mark.parametrize("how", ["nowhere", "variable", "setting"])
def test_a_missing_file_is_fetched_only_where_the_user_allowed_it(
    how: str, host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.folder_paths, "get_user_directory", lambda: str(tmp_path))
    settings = tmp_path / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps({"OSDFace.download": how == "setting"}))
    monkeypatch.setenv("OSDFACE_DOWNLOAD", "1" if how == "variable" else "")
    asked = {}

    def ensure(
        store: Any, name: str, *, allow_download: bool, progress: Callable[[int, int], None]
    ) -> Path:
        asked.update(name=name, folders=store.folders, allowed=allow_download)
        progress(10, 100)
        return Path(name)

    monkeypatch.setattr(host.files.Store, "ensure", ensure)
    host.files.find("detection_Resnet50_Final.pth", "facedetection")
    assert asked["allowed"] == (how != "nowhere")
    assert asked["folders"]["facedetection"][0] == host.base / "models" / "facedetection"
    host.comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(host.comfy.model_management.InterruptProcessingException):
        host.files.find("detection_Resnet50_Final.pth", "facedetection")


@pytest.mark.parametrize(
    "crops",
    [
        torch.zeros(2, 16, 16, 1),
        torch.zeros(2, 16, 16, 4),
        torch.zeros(16, 16, 3),
        torch.full((1, 16, 16, 3), torch.nan),
    ],
)
@pytest.mark.parametrize("node", ["OSDFaceVRE", "OSDFaceOneStep"])
def test_crops_that_do_not_fit_are_refused_by_both_nodes(
    node: str, crops: torch.Tensor, host: Any, checkpoint: tuple[Any, Any]
) -> None:
    step = {
        "model": checkpoint[0],
        "vae": checkpoint[1],
        "conditioning": [[torch.zeros(1, 77, 1024), {}]],
    } | STEP
    with pytest.raises(host.error, match="`crops`"):
        run(
            host,
            node,
            crops=crops,
            **({"vre_name": "associate_2.ckpt"} if node == "OSDFaceVRE" else step),
        )


def test_importing_the_pack_reaches_no_network_and_leaves_the_path_alone(
    host: Any, comfyui: Path
) -> None:
    script = f"""
import sys
sys.argv = ["main.py", "--cpu", "--base-directory", {str(host.base)!r}]
sys.path.insert(0, {str(comfyui)!r})
import comfy.options
comfy.options.enable_args_parsing()
import asyncio, nodes, comfy_api.latest, torchvision
before = list(sys.path)
before_modules = set(sys.modules)
reached = []
watched = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen")
sys.addaudithook(lambda event, args: reached.append((event, args)) if event in watched else None)
assert asyncio.run(nodes.load_custom_node({str(host.base / "custom_nodes" / "osdface")!r}))
for node in ("FaceDetectAlign", "OSDFaceVRE", "OSDFaceOneStep", "FacePasteBack"):
    nodes.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
assert sys.path == before, sys.path
assert not reached, reached
never = {{"cv2", "facexlib", "peft", "diffusers", "numba", "huggingface_hub", "pooch"}}
unwanted = never & set(sys.modules) - before_modules
assert not unwanted, unwanted
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("fine"), done.stderr


def test_a_text_prompt_is_refused(host: Any, checkpoint: tuple[Any, Any]) -> None:
    model, vae = checkpoint
    conditioning = [[torch.randn(1, 77, 1024), {"pooled_output": torch.randn(1, 1024)}]]
    with pytest.raises(host.error, match="not made by OSDFace's visual embedder"):
        run(
            host,
            "OSDFaceOneStep",
            model=model,
            vae=vae,
            crops=torch.zeros(1, 64, 64, 3),
            conditioning=conditioning,
            **STEP,
        )
    with pytest.raises(host.error, match="holds 2 prompts that were combined"):
        run(
            host,
            "OSDFaceOneStep",
            model=model,
            vae=vae,
            crops=torch.zeros(1, 64, 64, 3),
            conditioning=conditioning * 2,
            **STEP,
        )


# Other bases, as ComfyUI's own detection describes them; their UNets are not built.

UNET = {
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_classes": None,
    "adm_in_channels": None,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
BASES = {
    "SD15": UNET
    | {
        "context_dim": 768,
        "use_linear_in_transformer": False,
        "num_heads": 8,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    },
    "SDXL": UNET
    | {
        "context_dim": 2048,
        "use_linear_in_transformer": True,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "transformer_depth": [0, 0, 2, 2, 10, 10],
    },
    "SD20": UNET | {"context_dim": 1024, "use_linear_in_transformer": True},
    "inpainting": UNET | {"context_dim": 1024, "use_linear_in_transformer": True, "in_channels": 9},
    "Lotus": UNET
    | {
        "context_dim": 1024,
        "use_linear_in_transformer": True,
        "adm_in_channels": 4,
        "num_classes": "sequential",
    },
}


def base_model(host: Any, kind: str, model_type: str = "EPS") -> Any:
    import comfy.model_base
    import comfy.model_detection
    import comfy.model_patcher

    config = comfy.model_detection.model_config_from_unet_config(dict(BASES[kind]))
    assert config is not None, kind
    config.unet_config["disable_unet_model_creation"] = True
    base = comfy.model_base.BaseModel(
        config, comfy.model_base.ModelType[model_type], device=torch.device("cpu")
    )
    return comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def test_a_right_base_passes(host: Any, checkpoint: tuple[Any, Any]) -> None:
    host.base_model.check_model(base_model(host, "SD20"))
    host.base_model.check_model(checkpoint[0])
    host.base_model.check_vae(checkpoint[1])


def patched_to_v(host: Any) -> Any:
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(base_model(host, "SD20"), "v_prediction", False)[0]


def narrow(host: Any) -> Any:
    model = base_model(host, "SD20")
    model.model.model_config.unet_config["model_channels"] = 256
    return model


def patched_to_flow(host: Any) -> Any:
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    return ModelSamplingSD3().patch(base_model(host, "SD20"), 3.0)[0]


def with_zero_terminal_snr(host: Any) -> Any:
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(base_model(host, "SD20"), "eps", True)[0]


@pytest.mark.parametrize(
    ("make", "says", "patched"),
    [
        (
            lambda host: base_model(host, "SD15"),
            "`model` is SD15 with a text width of 768 instead of 1024",
            False,
        ),
        (
            lambda host: base_model(host, "SDXL"),
            "`model` is SDXL with a text width of 2048 instead of 1024",
            False,
        ),
        (
            lambda host: base_model(host, "SD20", "V_PREDICTION"),
            "`model` is SD20 that predicts v, as Stable Diffusion 2.1 768-v does",
            True,
        ),
        (
            lambda host: base_model(host, "inpainting"),
            "`model` is SD20 with 9 input channels, such as an inpainting",
            False,
        ),
        (
            lambda host: base_model(host, "Lotus"),
            "`model` is LotusD, a variant with another UNet",
            False,
        ),
        (
            patched_to_v,
            "`model` is SD20 that predicts v, as Stable Diffusion 2.1 768-v does",
            True,
        ),
        (with_zero_terminal_snr, "`model` is SD20 with a changed noise schedule", True),
        (patched_to_flow, "`model` is SD20 that predicts something else and not noise", True),
        (
            narrow,
            "`model` is SD20 with a UNet of width 256, a",
            False,
        ),
    ],
)
def test_a_wrong_base_is_refused(
    make: Callable[[Any], Any],
    says: str,
    patched: bool,
    host: Any,
    checkpoint: tuple[Any, Any],
) -> None:
    remedy = "take away the node that patches it, or " if patched else ""
    with pytest.raises(
        host.error,
        match=f"{says}.*Stable Diffusion 2.1-base.* is wanted: {remedy}"
        "load .*v2-1_512-ema-pruned.safetensors",
    ):
        run(
            host,
            "OSDFaceOneStep",
            model=make(host),
            vae=checkpoint[1],
            crops=torch.zeros(1, 64, 64, 3),
            conditioning=[[torch.zeros(1, 77, 1024), {}]],
            **STEP,
        )


def test_a_vae_of_another_family_is_refused(host: Any, checkpoint: tuple[Any, Any]) -> None:
    vae = copy.copy(checkpoint[1])
    vae.latent_channels = 16
    with pytest.raises(
        host.error,
        match=r"`vae` makes latents of 16 channels at 1/8 of the size; 4 at 1/8 are wanted",
    ):
        run(
            host,
            "OSDFaceOneStep",
            model=checkpoint[0],
            vae=vae,
            crops=torch.zeros(1, 64, 64, 3),
            conditioning=[[torch.zeros(1, 77, 1024), {}]],
            **STEP,
        )


def test_our_networks_leave_when_comfyui_needs_room_and_come_back(
    host: Any, crop: Callable[[str], torch.Tensor]
) -> None:
    management = host.comfy.model_management

    def embedder_is_loaded() -> bool:
        return any(
            type(patcher.model).__name__ == "VisualEmbedder"
            for patcher in management.loaded_models()
            if patcher
        )

    first = prompts_of(host, crop("astronaut_lq"))[0][0]
    assert embedder_is_loaded()
    management.unload_all_models()
    assert not embedder_is_loaded()
    assert torch.equal(prompts_of(host, crop("astronaut_lq"))[0][0], first)
    assert embedder_is_loaded()


def test_another_projector_beside_the_checkpoint_is_noticed(host: Any, seeded: ModuleType) -> None:
    folder = host.base / "models" / "osdface" / "other"
    folder.mkdir()
    (folder / "associate_2.ckpt").symlink_to(host.files.find("associate_2.ckpt", "osdface"))
    crops, inputs = torch.rand(1, 64, 64, 3), {"vre_name": "other/associate_2.ckpt"}
    torch.save(seeded.embedding_change(), folder / "embedding_change_weights.pth")
    before = (
        run(host, "OSDFaceVRE", crops=crops, **inputs)[0][0],
        host.nodes["OSDFaceVRE"].fingerprint_inputs(**inputs),
    )
    torch.save(seeded.embedding_change(salt="other"), folder / "embedding_change_weights.pth")
    after = (
        run(host, "OSDFaceVRE", crops=crops, **inputs)[0][0],
        host.nodes["OSDFaceVRE"].fingerprint_inputs(**inputs),
    )
    assert before[1] != after[1]
    assert not torch.equal(before[0], after[0])


def test_faces_that_come_out_as_nan_are_told(
    host: Any, checkpoint: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, vae = checkpoint
    crops = torch.rand(2, 64, 72, 3)
    given = step_inputs(host, checkpoint, crops)
    decode, broken = vae.decode, [True, False]

    def decode_to_nan(latents: torch.Tensor) -> torch.Tensor:
        out = decode(latents)
        return out * torch.nan if broken.pop(0) else out

    monkeypatch.setattr(vae, "decode", decode_to_nan)
    result = host.nodes["OSDFaceOneStep"].execute(**given)
    assert torch.equal(result.args[0][0], crops[0])
    assert result.args[0][1].isfinite().all()
    assert "Crops 0 came out as NaN and are left as they were" in result.ui.as_dict()["text"][0]
    broken[:] = [True, True]
    with pytest.raises(
        host.error,
        match=r"Every face \(crops 0, 1\) came out as NaN: start ComfyUI with --fp32-vae",
    ):
        host.nodes["OSDFaceOneStep"].execute(**given)


@FULL_SIZE_FP16
@pytest.mark.once
def test_what_overflows_in_an_fp16_vae_is_decoded_in_fp32(
    host: Any, checkpoint: tuple[Any, Any]
) -> None:
    """A VAE whose activations leave fp16's range, as SDXL's do: there only NaN comes out."""
    model, vae = checkpoint
    tensors = {name: tensor.clone() for name, tensor in vae.get_sd().items()}
    tensors["decoder.conv_in.weight"] *= 65000 / tensors["decoder.conv_in.weight"].abs().max()
    wide, narrow = (
        host.comfy.sd.VAE(sd=dict(tensors), dtype=dtype) for dtype in (torch.float32, torch.float16)
    )
    crops = torch.rand(1, 64, 64, 3)
    given = {"model": model, "crops": crops, "conditioning": prompts_of(host, crops)} | STEP
    assert narrow.decode(torch.ones(1, 4, 8, 8)).isnan().any()
    result = host.nodes["OSDFaceOneStep"].execute(vae=narrow, **given)
    exact = run(host, "OSDFaceOneStep", vae=wide, **given)
    assert (result.args[0] - exact).abs().max() < 0.05
    says = result.ui.as_dict()["text"][0]
    assert says.startswith(
        "Crops 0 came out as NaN in half precision and were computed again in fp32"
    )
    assert narrow.vae_dtype == torch.float16


@pytest.mark.once
def test_memory_that_runs_out_in_the_unet_halves_the_chunk(
    host: Any, checkpoint: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, vae = checkpoint
    crops = torch.rand(4, 64, 72, 3)
    given = (
        {"model": model, "vae": vae, "crops": crops, "conditioning": prompts_of(host, crops)}
        | STEP
        | {"faces_per_batch": 4}
    )
    wanted = run(host, "OSDFaceOneStep", **given)
    usual, sizes = host.backbone.HostBackbone.denoise, []

    def denoise(backbone: Any, latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(latents))
        if len(latents) > 2:
            raise host.comfy.model_management.OOM_EXCEPTION("out of memory")
        return usual(backbone, latents, *rest)

    monkeypatch.setattr(host.backbone.HostBackbone, "denoise", denoise)
    made = run(host, "OSDFaceOneStep", **given)
    # An accelerator rounds differently for each number of faces at once.
    torch.testing.assert_close(made, wanted, atol=1e-4 if DEVICE else 0, rtol=0)
    assert [size for size in sizes if size > 1] == [4, 2, 2]


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_memory_that_runs_out_in_the_vae_does_not_end_the_run(
    half: str,
    host: Any,
    checkpoint: tuple[Any, Any],
    crop: Callable[[str], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ComfyUI then works in tiles by itself, which is near what the whole gives."""
    _, vae = checkpoint
    crops = crop("astronaut_lq")[:, 100:300, 100:308]
    given = step_inputs(host, checkpoint, crops)
    wanted = run(host, "OSDFaceOneStep", **given)
    vae.__dict__.pop("osdface_latents", None)
    network, failed = vae.first_stage_model, []
    usual = getattr(network, half)

    def once(x: torch.Tensor, **options: Any) -> torch.Tensor:
        if not failed:
            failed.append(True)
            raise host.comfy.model_management.OOM_EXCEPTION("out of memory")
        return usual(x, **options)

    monkeypatch.setattr(network, half, once)
    error = (run(host, "OSDFaceOneStep", **given) - wanted).square().mean()
    vae.__dict__.pop("osdface_latents", None)
    assert failed
    assert -10 * error.log10() > 25


@pytest.mark.processor
def test_the_same_crops_are_encoded_once(
    host: Any, checkpoint: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, vae = checkpoint
    vae.__dict__.pop("osdface_latents", None)  # of other tests
    crops = torch.rand(2, 64, 72, 3)
    given = step_inputs(host, checkpoint, crops)
    usual, encoded = vae.encode, []
    monkeypatch.setattr(vae, "encode", lambda pixels: encoded.append(len(pixels)) or usual(pixels))
    first = run(host, "OSDFaceOneStep", **given)
    assert torch.equal(run(host, "OSDFaceOneStep", **given), first)
    other = run(host, "OSDFaceOneStep", **given | {"timestep": 300})
    assert not torch.equal(other, first)
    assert encoded == [1, 1]
    crops[1] = crops[1].flip(0)  # written into by a node before this one
    run(host, "OSDFaceOneStep", **given)
    assert encoded == [1, 1, 1]
    again = host.comfy.sd.VAE(sd=vae.get_sd())
    monkeypatch.setattr(
        again, "encode", lambda pixels: encoded.append(len(pixels)) or usual(pixels)
    )
    run(host, "OSDFaceOneStep", **given | {"vae": again})
    assert encoded == [1, 1, 1, 1, 1]
    monkeypatch.setattr(host.backbone, "MAX_LATENTS", 3)
    run(host, "OSDFaceOneStep", **given | {"crops": torch.rand(2, 64, 72, 3)})
    assert len(vae.osdface_latents) == 3


@pytest.mark.processor
def test_the_vae_of_an_accelerator_takes_all_faces_at_once(
    host: Any, checkpoint: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, vae = checkpoint
    crops = torch.rand(3, 64, 72, 3)
    given = step_inputs(host, checkpoint, crops) | {"faces_per_batch": 3}
    wanted = run(host, "OSDFaceOneStep", **given)
    network, sizes = vae.first_stage_model, []

    def counted(usual: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, **options: sizes.append(len(x)) or usual(x, **options)

    for half in ("encode", "decode"):
        monkeypatch.setattr(network, half, counted(getattr(network, half)))
    monkeypatch.setattr(host.backbone.mm, "is_device_cpu", lambda device: False)
    assert (run(host, "OSDFaceOneStep", **given) - wanted).abs().max() < 1e-4
    assert sizes == [3, 3]


def test_pictures_for_looking_at_are_made_when_somebody_looks(
    host: Any,
    photographs: Path,
    load_picture: Callable[[Path], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = load_picture(photographs / "astronaut.png")
    preview = host.module("osdface_core.faces.preview")
    drawn: list[str] = []

    def counted(name: str) -> Any:
        usual = getattr(preview, name)
        return lambda *given: drawn.append(name) or usual(*given)

    monkeypatch.setattr(host.module("nodes.face_detect_align"), "draw_faces", counted("draw_faces"))
    monkeypatch.setattr(
        host.module("nodes.osdface_restore"), "before_after", counted("before_after")
    )
    shown = host.nodes["FaceDetectAlign"].execute(image=picture, **widgets.FIND).args[2]
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args
    both = (
        host.nodes["OSDFaceRestore"]
        .execute(image=picture, model=model, vae=vae, **widgets.RESTORE)
        .args[2]
    )
    assert shown.shape == picture.shape
    assert len(both) == 1
    assert not drawn
    # As Save Image takes them, and as most nodes do.
    saved = [(255 * shown[0].cpu().numpy()).astype("uint8") for _ in range(2)]
    assert (saved[0] == saved[1]).all()
    assert (saved[0] != (255 * picture[0].numpy()).astype("uint8")).any()
    assert torch.equal(torch.cat([both])[0, :, : picture.shape[2]], picture[0])
    assert drawn == ["draw_faces", "before_after"]


@pytest.mark.processor
def test_attention_on_a_cpu_is_torchs_own_unless_another_is_chosen(
    host: Any, checkpoint: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = checkpoint
    fused = host.backbone._with_fused_attention

    def chosen(options: dict[str, Any]) -> Any:
        return (
            fused(model, options).get("transformer_options", {}).get("optimized_attention_override")
        )

    assert chosen({}) is not None
    options = {"transformer_options": {"patches": {}}}
    assert chosen(options) is not None
    assert options == {"transformer_options": {"patches": {}}}
    assert chosen({"transformer_options": {"optimized_attention_override": chosen}}) is chosen
    monkeypatch.setattr(host.backbone.args, "use_quad_cross_attention", True)
    assert chosen({}) is None


@pytest.mark.processor
def test_a_bf16_unet_computes_in_bf16_on_a_processor_that_can(
    host: Any, checkpoint: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI would cast every weight to fp32. Only where the user has asked for bf16, and the
    MODEL itself is not changed.
    """
    model = checkpoint[0].clone()

    def merged(weights: torch.dtype, computes: bool) -> Any:
        monkeypatch.setattr(host.lora, "has_bf16", lambda: computes)
        monkeypatch.setattr(model.model, "get_dtype", lambda: weights)
        monkeypatch.setattr(
            model.model, "manual_cast_dtype", None if weights == torch.float32 else torch.float32
        )
        clone = host.lora.merge_lora(
            model,
            host.lora.parse_lora(host.lora.read_tensors(host.files.find(LORA, "loras")), LORA),
            LORA,
            1.0,
        )
        return clone.object_patches.get("manual_cast_dtype")

    assert merged(torch.bfloat16, True) == torch.bfloat16
    assert merged(torch.bfloat16, False) is None
    assert merged(torch.float16, True) is None
    assert merged(torch.float32, True) is None
    assert not model.object_patches


def test_a_network_is_read_once_while_its_file_stays(
    host: Any, monkeypatch: pytest.MonkeyPatch, crop: Callable[[str], torch.Tensor]
) -> None:
    prompts_of(host, crop("astronaut_lq"))
    monkeypatch.setattr(host.networks, "read_embedder", lambda path: pytest.fail("read again"))
    prompts_of(host, crop("astronaut_lq"))


def test_an_interrupt_stops_the_step(
    host: Any, checkpoint: tuple[Any, Any], crop: Callable[[str], torch.Tensor]
) -> None:
    management = host.comfy.model_management
    model, vae = checkpoint
    conditioning = prompts_of(host, crop("astronaut_lq"))
    management.interrupt_current_processing(True)
    try:
        with pytest.raises(management.InterruptProcessingException):
            run(
                host,
                "OSDFaceOneStep",
                model=model,
                vae=vae,
                crops=crop("astronaut_lq"),
                conditioning=conditioning,
                **STEP,
            )
    finally:
        management.interrupt_current_processing(False)


def test_the_schemas_are_valid(host: Any) -> None:
    for node in json.loads((Path(__file__).parent / "interfaces.json").read_text()):
        schema = host.nodes[node].GET_SCHEMA()
        assert schema.category == "OSDFace"
        assert all(i.tooltip for i in schema.inputs), [i.id for i in schema.inputs if not i.tooltip]


def test_interfaces_are_for_ever(host: Any) -> None:
    """Saved workflows hold these names and this order."""
    wanted = json.loads((Path(__file__).parent / "interfaces.json").read_text())
    for node, (inputs, outputs) in wanted.items():
        schema = host.nodes[node].GET_SCHEMA()
        assert [i.id for i in schema.inputs][: len(inputs)] == inputs
        assert [[o.display_name, o.io_type] for o in schema.outputs] == outputs


def test_the_pack_loads_through_the_entry_point(host: Any) -> None:
    pack = next(m for name, m in sys.modules.items() if name.endswith("custom_nodes/osdface"))
    extension = asyncio.run(pack.comfy_entrypoint())
    assert {n.define_schema().node_id for n in asyncio.run(extension.get_node_list())} <= set(
        host.nodes
    )
