"""What a host and its other nodes do to our networks and to the MODEL, and what it does not do to
the picture.

With the small built-in model in ComfyUI in this process where that shows it; on a real server where
it does not.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import modes
from benchmarks.fuzz import populate
from tests.frontend import server
from tests.prompts import Prompts
from tests.widgets import FIND, PASTE, RESTORE, STEP

pytestmark = [pytest.mark.host, pytest.mark.full]

LORA_FILE = "of_the_small_model.safetensors"


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    """ComfyUI runs every node so."""
    with torch.inference_mode():
        yield


@pytest.fixture
def given(host: Any) -> SimpleNamespace:
    """The built-in model, two crops of noise that are quickly restored, and their prompts."""
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args[:2]
    crops = F.interpolate(
        torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)), (64, 72), mode="bicubic"
    ).clamp(0, 1)
    crops = crops.movedim(1, -1).contiguous()
    prompts = host.nodes["OSDFaceVRE"].execute(crops=crops, vre_name="builtin").args[0]
    return SimpleNamespace(model=model, vae=vae, crops=crops, prompts=prompts)


def scope_of(host: Any, node: str) -> dict[str, Any]:
    """The names of the module that the node is written in."""
    return vars(sys.modules[host.nodes[node].__module__])


def core(module: str, node: str) -> Any:
    """A node of ComfyUI's own that is not loaded here, as the server would load it."""
    return getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), node)


def step(
    host: Any, given: SimpleNamespace, model: Any = None, prompts: Any = None, **changed: Any
) -> Tensor:
    inputs = {
        "model": model or given.model,
        "vae": given.vae,
        "crops": given.crops,
        "conditioning": prompts or given.prompts,
    }
    return host.nodes["OSDFaceOneStep"].execute(**inputs | STEP | changed).args[0]


def restored(host: Any, image: Tensor, **changed: Any) -> Tensor:
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args[:2]
    # Another tensor each time: what was found on one is not looked for again.
    return (
        host.nodes["OSDFaceRestore"]
        .execute(image=image.clone(), model=model, vae=vae, **RESTORE | changed)
        .args[0]
    )


# The host takes our networks away


def test_networks_that_are_unloaded_between_any_two_steps(
    host: Any, group: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    management = host.comfy.model_management
    wanted = restored(host, group)
    assert (wanted != group).any(-1).float().mean() > 0.1
    went: list[int] = []
    called: set[str] = set()
    check = management.throw_exception_if_processing_interrupted
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args[:2]

    def there(network: torch.nn.Module, name: str) -> None:
        """On a CPU a network that is away would work all the same; here it does not."""
        work = getattr(type(network), name)

        def works(self: Any, *given: Any, **named: Any) -> Any:
            loaded = [
                known.model.model
                for known in management.current_loaded_models
                if known.model is not None
            ]
            assert any(other is self for other in loaded), (
                f"{type(self).__name__} is called while it is away"
            )
            called.add(f"{type(self).__name__}.{name}")
            return work(self, *given, **named)

        monkeypatch.setattr(type(network), name, works)

    there(model.model, "apply_model")
    there(vae.first_stage_model, "encode")
    there(vae.first_stage_model, "decode")
    there(host.networks.load_embedder("builtin", 1)[0], "forward")

    def take_all() -> None:
        went.append(len(management.loaded_models()))
        management.unload_all_models()
        check()

    # The same crops would not be encoded again.
    vae.osdface_latents.clear()
    # It is asked before every network, and between the networks of each face.
    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", take_all)
    assert torch.equal(restored(host, group), wanted)
    assert sum(count > 0 for count in went) >= 6
    assert called == {
        "BaseModel.apply_model",
        "Autoencoder.encode",
        "Autoencoder.decode",
        "VisualEmbedder.forward",
    }


def test_memory_that_is_freed_between_the_nodes(host: Any, group: Tensor) -> None:
    management = host.comfy.model_management

    def run(free: Callable[[], object]) -> Tensor:
        model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args[:2]
        free()
        faces, crops = host.nodes["FaceDetectAlign"].execute(image=group, **FIND).args[:2]
        free()
        prompts = host.nodes["OSDFaceVRE"].execute(crops=crops, vre_name="builtin").args[0]
        free()
        given = {"model": model, "vae": vae, "crops": crops, "conditioning": prompts}
        result = host.nodes["OSDFaceOneStep"].execute(**given, **STEP).args[0]
        free()
        return (
            host.nodes["FacePasteBack"]
            .execute(image=group, faces=faces, restored=result, **PASTE)
            .args[0]
        )

    wanted = run(lambda: None)
    assert torch.equal(run(management.unload_all_models), wanted)
    assert torch.equal(run(lambda: management.free_memory(1e30, torch.device("cpu"))), wanted)
    assert torch.equal(run(lambda: None), wanted)


# Memory runs out


def failing(
    monkeypatch: pytest.MonkeyPatch, network: type, size_of: Callable[[Any], int]
) -> list[int]:
    """The network's forward runs out of memory with more than one at once; the sizes that it was
    called with.
    """
    forward, sizes = network.forward, []

    def short(self: Any, x: Any, *rest: Any) -> Any:
        sizes.append(size_of(x))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("no room (as the test wants it)")
        return forward(self, x, *rest)

    monkeypatch.setattr(network, "forward", short)
    return sizes


def test_the_detector_halves_its_chunk_when_memory_runs_out(
    host: Any, group: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.cat([group, group.flip(2), group, group.flip(2)])[:, :, :320]
    find = host.nodes["FaceDetectAlign"].execute
    widgets = FIND | {"image": images}
    wanted = find(**widgets).args
    network = host.networks.load_network(
        host.files.find("detection_mobilenet0.25_Final.pth", "facedetection"),
        host.networks.build_detector,
    )
    sizes = failing(monkeypatch, type(network), len)
    found = find(**widgets).args
    assert max(sizes) == 4
    assert sizes.count(1) >= 4
    assert found[4] == wanted[4]
    assert (found[1] - wanted[1]).abs().max() < 1e-3


def test_the_embedder_halves_its_chunk_when_memory_runs_out(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops = torch.rand(5, 32, 32, 3)
    embed = host.nodes["OSDFaceVRE"].execute
    wanted = embed(crops=crops, vre_name="builtin").args[0][0][0]
    monkeypatch.setattr(host.networks, "max_batch", lambda memory: 4)
    module, _ = host.networks.load_embedder("builtin", 1)
    sizes = failing(monkeypatch, type(module), len)
    assert torch.equal(embed(crops=crops, vre_name="builtin").args[0][0][0], wanted)
    assert sizes == [4, 2, 1, 1, 1, 1, 1]


def test_the_face_parser_halves_its_chunk_when_memory_runs_out(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = host.networks.ParseNet().eval()
    labels = torch.linspace(-1, 1, 19)[:, None, None]
    monkeypatch.setattr(type(network), "forward", lambda self, x: x[:, :1] * labels)
    monkeypatch.setattr(host.networks, "find", lambda name, kind: name)
    monkeypatch.setattr(host.networks, "load_network", lambda *_: network)
    crops = torch.rand(3, 64, 64, 3)
    wanted = host.networks.parse_crops(crops)
    monkeypatch.setattr(host.networks, "max_batch", lambda memory: 3)
    sizes = failing(monkeypatch, type(network), len)
    assert torch.equal(host.networks.parse_crops(crops), wanted)
    assert sizes == [3, 1, 1, 1]


@pytest.mark.parametrize("network", ["detector", "embedder"])
def test_memory_that_does_not_hold_one_is_told_and_the_next_run_works(
    network: str, host: Any, group: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = restored(host, group)
    with monkeypatch.context() as patch:
        module = (
            host.networks.load_network(
                host.files.find("detection_mobilenet0.25_Final.pth", "facedetection"),
                host.networks.build_detector,
            )
            if network == "detector"
            else host.networks.load_embedder("builtin", 1)[0]
        )

        def never(*_: Any) -> Any:
            raise torch.OutOfMemoryError("no room (as the test wants it)")

        patch.setattr(type(module), "forward", never)
        # The host knows this error, and says of it what it says of its own nodes'.
        with pytest.raises(host.comfy.model_management.OOM_EXCEPTION):
            restored(host, group)
    assert torch.equal(restored(host, group), wanted)


# Other nodes' work on the MODEL


@pytest.fixture
def lora(host: Any, given: SimpleNamespace) -> Iterator[dict[str, Tensor]]:
    """A LoRA file on the small UNet's convolutions and queries; by weight, what it adds at strength
    1.
    """
    weights = given.model.model.diffusion_model.state_dict()
    rng, tensors, adds = torch.Generator().manual_seed(1), {}, {}
    for name in (name for name in weights if name.endswith(("to_q.weight", "in_layers.2.weight"))):
        out, *into = weights[name].shape
        up = torch.randn(out, 4, *(1 for _ in into[1:]), generator=rng) * 0.2
        down = torch.randn(4, *into, generator=rng) * 0.2
        key = f"diffusion_model.{name.removesuffix('.weight')}"
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        adds[name] = (up.flatten(1) @ down.flatten(1)).reshape(weights[name].shape)
    save_file(tensors, path := host.base / "models" / "loras" / LORA_FILE)
    yield adds
    path.unlink()


def with_weights_of(host: Any, adds: dict[str, Tensor]) -> Any:
    """Another built-in MODEL with these added to its weights themselves."""
    scope = scope_of(host, "OSDFaceBuiltinModel")
    model = scope["make_model"]()
    weights = model.model.diffusion_model.state_dict()
    for name, add in adds.items():
        weights[name] += add
    return model


def test_a_lora_that_is_already_on_the_model_stays_and_leaves_nothing_behind(
    host: Any, given: SimpleNamespace, lora: dict[str, Tensor]
) -> None:
    plain = step(host, given)
    with_lora = host.nodes["LoraLoaderModelOnly"]().load_lora_model_only(
        given.model, LORA_FILE, 1.0
    )[0]
    changed = step(host, given, with_lora)
    wanted = step(host, given, with_weights_of(host, lora))
    assert (changed - plain).abs().max() > 0.003
    assert (changed - wanted).abs().max() < 1e-5
    assert torch.equal(step(host, given), plain)
    assert torch.equal(step(host, given, with_lora), changed)


def test_our_lora_adds_to_one_that_is_already_on_the_model(
    host: Any, checkpoint: tuple[Any, Any]
) -> None:
    model, path = checkpoint[0], host.files.find("pytorch_lora_weights.safetensors", "loras")
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    weight = (
        model.backup[key].weight if key in model.backup else model.model.state_dict()[key]
    ).clone()
    other = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.01
    before = model.clone()
    before.add_patches({key: ("diff", (other,))}, 1.0)

    def merged(model: Any) -> Tensor:
        return host.comfy.lora.calculate_weight(model.patches[key], weight.clone(), key)

    ours = merged(host.lora.with_lora(model, path, 1.0)) - weight
    assert ours.abs().max() > 1e-4
    assert (
        merged(host.lora.with_lora(before, path, 1.0)) - weight - other - ours
    ).abs().max() < 1e-6
    assert len(before.patches) == 1


def test_a_lora_that_comes_as_a_hook_of_the_conditioning(
    host: Any, given: SimpleNamespace, lora: dict[str, Tensor]
) -> None:
    plain = step(host, given)
    hooks = core("hooks", "CreateHookLoraModelOnly")().create_hook_model_only(LORA_FILE, 1.0)[0]
    prompts = core("hooks", "ConditioningSetProperties")().set_properties(
        given.prompts, 1.0, "default", hooks=hooks
    )[0]
    changed = step(host, given, prompts=prompts)
    assert (changed - step(host, given, with_weights_of(host, lora))).abs().max() < 1e-5
    assert (changed - plain).abs().max() > 0.003
    assert torch.equal(step(host, given), plain)


def patched(model: Any, what: str, seen: list[str]) -> Any:
    """A clone with a patch that only looks on."""
    import comfy.patcher_extension

    model = model.clone()

    def look(*given: Any, **_: Any) -> Any:
        seen.append(what)
        return given[0]

    def pair(q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Any:
        seen.append(what)
        return q, k, v

    def skip(h: Tensor, hsp: Tensor, options: Any) -> Any:
        seen.append(what)
        return h, hsp

    def cfg(args: dict[str, Any]) -> Tensor:
        seen.append(what)
        return args["cond"]

    def post(args: dict[str, Any]) -> Tensor:
        seen.append(what)
        return args["denoised"]

    def unet(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        seen.append(what)
        return apply(args["input"], args["timestep"], **args["c"])

    def wrapper(executor: Any, *given: Any, **named: Any) -> Any:
        seen.append(what)
        return executor(*given, **named)

    types = comfy.patcher_extension.WrappersMP
    {
        "input block": lambda: model.set_model_input_block_patch(look),
        "output block": lambda: model.set_model_output_block_patch(skip),
        "attention": lambda: model.set_model_attn2_patch(pair),
        "attention's output": lambda: model.set_model_attn1_output_patch(look),
        "guidance": lambda: model.set_model_sampler_cfg_function(cfg),
        "after guidance": lambda: model.set_model_sampler_post_cfg_function(post),
        "around the UNet": lambda: model.set_model_unet_function_wrapper(unet),
        "wrapper of the model": lambda: model.add_wrapper(types.APPLY_MODEL, wrapper),
        "wrapper of the sampler": lambda: model.add_wrapper(types.SAMPLER_SAMPLE, wrapper),
        "wrapper of the whole": lambda: model.add_wrapper(types.OUTER_SAMPLE, wrapper),
    }[what]()
    return model


@pytest.mark.parametrize(
    "what",
    [
        *(
            "input block",
            "output block",
            "attention",
            "attention's output",
            "guidance",
            "after guidance",
            "around the UNet",
        ),
        *("wrapper of the model", "wrapper of the sampler", "wrapper of the whole"),
    ],
)
def test_patches_of_other_nodes_are_called_and_what_they_leave_alone_is_the_same(
    what: str, host: Any, given: SimpleNamespace
) -> None:
    plain = step(host, given)
    seen: list[str] = []
    changed = step(host, given, patched(given.model, what, seen))
    # Guidance takes the difference from x and back again.
    assert (changed - plain).abs().max() < (1e-5 if what == "guidance" else 1e-30)
    assert set(seen) == {what}


def test_a_patch_of_another_node_has_its_effect(host: Any, given: SimpleNamespace) -> None:
    plain = step(host, given)
    model = given.model.clone()
    model.set_model_output_block_patch(lambda h, hsp, options: (h * 1.2, hsp))
    assert (step(host, given, model) - plain).abs().max() > 0.003
    assert torch.equal(step(host, given), plain)


@pytest.mark.parametrize(
    ("module", "node"),
    [
        *(
            ("freelunch", "FreeU_V2"),
            ("hypertile", "HyperTile"),
            ("tomesd", "TomePatchModel"),
            ("easycache", "EasyCacheNode"),
        ),
        *(("model_downscale", "PatchModelAddDownscale"), ("model_advanced", "RescaleCFG")),
    ],
)
def test_core_nodes_that_patch_a_model(
    module: str, node: str, host: Any, given: SimpleNamespace
) -> None:
    """Whatever they make of the picture, it is one; and the MODEL without them is as it was."""
    plain = step(host, given)
    kind = core(module, node)
    specs = kind.INPUT_TYPES()["required"]
    widgets = {
        name: of[1]["default"] if "default" in of[1] else of[0][0]
        for name, of in specs.items()
        if name != "model"
    }
    made = getattr(kind if hasattr(kind, "execute") else kind(), kind.FUNCTION)(
        model=given.model, **widgets
    )
    changed = step(host, given, (made.args if hasattr(made, "args") else made)[0])
    assert changed.shape == plain.shape
    assert bool(changed.isfinite().all())
    assert torch.equal(step(host, given), plain)


def test_a_compiled_model(host: Any, given: SimpleNamespace) -> None:
    """With torch.compile's graph capture, but not its minutes of C++: benchmarks/modes.py
    --compiled runs that.
    """
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    plain = step(host, given)
    model = given.model.clone()
    set_torch_compile_wrapper(model=model, backend="eager")
    assert (step(host, given, model) - plain).abs().max() < 1e-5
    assert torch.equal(step(host, given), plain)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"])
def test_weights_of_fewer_bits(dtype: str, host: Any, given: SimpleNamespace) -> None:
    """As the loader's weight_dtype gives them: stored so, and cast as they are used."""
    import comfy.ops

    plain = step(host, given)
    scope = scope_of(host, "OSDFaceBuiltinModel")
    model = scope["make_model"]()
    model.model.diffusion_model.to(getattr(torch, dtype))
    assert model.model.manual_cast_dtype is None
    model.model.manual_cast_dtype = torch.float32
    assert issubclass(host.networks.Operations, comfy.ops.manual_cast)
    error = (step(host, given, model) - plain).square().mean().sqrt()
    # The file's are of 16 bits.
    assert (
        float(error)
        <= {"float8_e4m3fn": 0.03, "float8_e5m2": 0.06, "bfloat16": 0.01, "float16": 0.0}[dtype]
    )
    assert (float(error) > 0) == (dtype != "float16")


@pytest.mark.repeat
def test_a_checkpoint_in_fp8_with_our_lora(host: Any) -> None:
    """Full size, from ComfyUI's own loader, as its weight_dtype fp8_e4m3fn asks."""
    path = host.folder_paths.get_full_path_or_raise(
        "checkpoints", "v2-1_512-ema-pruned.safetensors"
    )
    options = {"dtype": torch.float8_e4m3fn}
    model, _, vae, _ = host.comfy.sd.load_checkpoint_guess_config(
        path, output_vae=True, output_clip=False, model_options=options
    )
    assert (
        model.model.diffusion_model.input_blocks[1][1].proj_in.weight.dtype == torch.float8_e4m3fn
    )
    crops = torch.rand(1, 64, 72, 3, generator=torch.Generator().manual_seed(0))
    prompts = host.nodes["OSDFaceVRE"].execute(crops=crops, vre_name="associate_2.ckpt").args[0]
    lora = STEP | {"lora_name": "pytorch_lora_weights.safetensors"}
    result = (
        host.nodes["OSDFaceOneStep"]
        .execute(model=model, vae=vae, crops=crops, conditioning=prompts, **lora)
        .args[0]
    )
    assert result.shape == crops.shape
    assert bool(result.isfinite().all())


# On a real server


@pytest.mark.parametrize("mode", ["FUZZ_VRAM=NO_VRAM", "--fp16-vae", "--bf16-unet"])
def test_a_server_that_was_started_in_another_way(
    mode: str,
    small_server: Any,
    comfyui: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three of benchmarks/modes.py's; the built-in networks stay in fp32 in each."""
    small_server.run(modes.small_graph("plain"))
    populate(tmp_path)
    if "=" in mode:
        monkeypatch.setenv(*mode.split("="))
    with server(comfyui, tmp_path, arguments=[] if "=" in mode else [mode]) as address:
        other = Prompts(address, tmp_path)
        other.run(modes.small_graph("other"))
    assert torch.equal(other.kept("other"), small_server.kept("plain"))
    saved = [
        next((base / "output").glob(f"{name}_*.png"))
        for base, name in ((tmp_path, "other"), (small_server.base, "plain"))
    ]
    pixels = [Image.open(path).tobytes() for path in saved]
    assert pixels[0] == pixels[1]
    if "=" in mode:
        assert "loaded partially" in (tmp_path / "log.txt").read_text()


def test_two_prompts_in_the_queue_with_different_models(
    small_server: Any, host: Any, lora: dict[str, Tensor]
) -> None:
    """Queued at once: neither has anything of the other, and each is what it is alone."""
    save = small_server.base / "models" / "loras" / LORA_FILE
    save.write_bytes((host.base / "models" / "loras" / LORA_FILE).read_bytes())

    def prompt(strength: float | None, name: str) -> dict[str, Any]:
        model = ["model", 0] if strength is None else ["lora", 0]
        nodes = {
            "load": {"class_type": "LoadImage", "inputs": {"image": "close.png"}},
            "model": {"class_type": "OSDFaceBuiltinModel", "inputs": {}},
            "work": {
                "class_type": "OSDFaceRestore",
                "inputs": RESTORE | {"image": ["load", 0], "model": model, "vae": ["model", 1]},
            },
            "keep": {"class_type": "FuzzKeep", "inputs": {"image": ["work", 0], "name": name}},
        }
        if strength is not None:
            inputs = {"model": ["model", 0], "lora_name": LORA_FILE, "strength_model": strength}
            nodes["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
        return nodes

    alone = {}
    for name, strength in (("plain", None), ("strong", 1.0), ("weak", 0.3)):
        small_server.run(prompt(strength, name))
        alone[name] = small_server.kept(name)
    assert not torch.equal(alone["plain"], alone["strong"])
    order = [("strong", 1.0), ("plain", None), ("weak", 0.3), ("strong", 1.0), ("plain", None)]
    waiting = [
        small_server.queue(prompt(strength, f"{name}{i}"))
        for i, (name, strength) in enumerate(order)
    ]
    for i, (mine, (name, _)) in enumerate(zip(waiting, order, strict=True)):
        small_server.finished(mine)
        assert torch.equal(small_server.kept(f"{name}{i}"), alone[name]), (i, name)
    assert math.isfinite(float(alone["plain"].sum()))
