"""The WebUIs' extension on a made-up host, loaded as the real ones load it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from osdface_core.faces.files import BUILTIN_PARSER
from osdface_core.ldm.backbone import LdmBackbone
from osdface_core.ldm.networks import Attention, Autoencoder, UNet, UNetResidual
from osdface_core.ldm.osediff import load_osediff
from osdface_core.ldm.text import empty_text
from osdface_core.osdface.files import LORA
from osdface_core.osediff.upscale import UpscaleOptions, upscale
from osdface_core.sd21.base_model import UNET_PREFIX, VAE_PREFIX
from tests.conftest import ROOT
from tests.small_sd21 import SMALL, small_checkpoint, small_osdface, small_osediff, text_encoder

GRADIO = (
    *("Row", "Group", "Accordion", "Slider", "Dropdown", "Textbox", "Number"),
    *("Checkbox", "Image", "Button", "HTML", "Radio"),
)
# Whether tests/floors.sh runs them, with the oldest packages.
OLDEST = "OSDFACE_TEST_FLOORS" in os.environ
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


class Options:
    """The host's options: what nobody has set raises AttributeError, as there."""

    def add_option(self, key: str, info: Any) -> None:
        setattr(self, key, info.default)


class OptionInfo:
    def __init__(self, default: Any, label: str, component: Any, **given: Any) -> None:
        self.default, self.label, self.component, self.given = default, label, component, given

    def info(self, text: str) -> OptionInfo:
        return self


class Component:
    """Any of gradio's components: a context, and what it was made with."""

    def __init__(self, *values: Any, **given: Any) -> None:
        self.values, self.given = values, given
        self.elem_id = given.get("elem_id")
        self.clicked: dict[str, Any] = {}

    def __enter__(self) -> Component:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def click(self, fn: Callable[..., Any], **given: Any) -> None:
        self.clicked = {"fn": fn, **given}


class Upscaler:
    """The host's base class of upscalers, which AUTOMATIC1111 and Forge look under."""

    def __init__(self, create_dirs: bool = False) -> None:
        self.scale = 1


class UpscalerData:
    def __init__(self, name: str, path: str, upscaler: Any, scale: int = 4) -> None:
        self.name, self.data_path, self.scaler, self.scale = name, path, upscaler, scale


class Host:
    """A made-up WebUI. `reported` holds what it was told of errors."""

    def __init__(self, models: Path) -> None:
        self.reported: list[tuple[str, bool]] = []
        self.callbacks: dict[str, list[Callable[..., Any]]] = {}
        self.state = SimpleNamespace(
            interrupted=False, skipped=False, begin=lambda job: None, end=lambda: None
        )
        self.shared = SimpleNamespace(
            opts=Options(),
            cmd_opts=SimpleNamespace(),
            state=self.state,
            face_restorers=[],
            sd_upscalers=[],
            OptionInfo=OptionInfo,
        )
        self.scripts = SimpleNamespace(
            Script=type("Script", (), {}), AlwaysVisible=object(), scripts_data=[]
        )
        self.sd_models = SimpleNamespace(
            model_data=SimpleNamespace(sd_model=None),
            checkpoints_list={},
            checkpoint_tiles=list,
            list_models=lambda: None,
            get_closet_checkpoint_match=lambda title: None,
        )
        self.upscaler = type("Upscaler", (Upscaler,), {})
        restoration = type("FaceRestoration", (), {})
        postprocessing = type("ScriptPostprocessing", (), {})
        self.modules = {
            "modules.shared": self.shared,
            "modules.scripts": self.scripts,
            "modules.sd_models": self.sd_models,
            "modules.sd_vae": SimpleNamespace(),
            "modules.devices": SimpleNamespace(
                get_device_for=lambda task: torch.device("cpu"), torch_gc=lambda: None
            ),
            "modules.paths_internal": SimpleNamespace(models_path=str(models), data_path=""),
            "modules.errors": SimpleNamespace(report=self._report),
            "modules.upscaler": SimpleNamespace(Upscaler=self.upscaler, UpscalerData=UpscalerData),
            "modules.modelloader": SimpleNamespace(load_upscalers=self._load_upscalers),
            "modules.face_restoration": SimpleNamespace(FaceRestoration=restoration),
            "modules.scripts_postprocessing": SimpleNamespace(ScriptPostprocessing=postprocessing),
            "modules.ui_components": SimpleNamespace(InputAccordion=Component),
            "modules.call_queue": SimpleNamespace(queue_lock=threading.Lock()),
            "modules.script_callbacks": SimpleNamespace(
                **{
                    name: self.callbacks.setdefault(name, []).append
                    for name in (
                        "on_before_ui",
                        "on_after_component",
                        "on_ui_settings",
                        "on_app_started",
                    )
                }
            ),
        }
        self.postprocessing = postprocessing

    def _report(self, message: str, *, exc_info: bool = False) -> None:
        self.reported.append((message, exc_info))

    def _load_upscalers(self) -> None:
        """As AUTOMATIC1111 and Forge do it, at the start and at Reload UI."""
        self.shared.sd_upscalers = [
            data for kind in self.upscaler.__subclasses__() for data in kind(None).scalers
        ]

    def call(self, name: str, *given: Any, **more: Any) -> None:
        for callback in self.callbacks[name]:
            callback(*given, **more)

    def load(self) -> list[ModuleType]:
        """Runs every script as the hosts do, at the start and at Reload UI."""
        for callbacks in self.callbacks.values():
            callbacks.clear()
        before, loaded = sys.path, []
        for path in SCRIPTS:
            sys.path = [str(ROOT), *before]
            spec = importlib.util.spec_from_file_location(path.name, path)
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            loaded.append(module)
        sys.path = before
        self.modules["modules.modelloader"].load_upscalers()
        self.call("on_before_ui")
        return loaded

    @property
    def restorer(self) -> Any:
        return self.shared.face_restorers[-1]

    def extras(self) -> Any:
        """The script that the host finds for the Extras tab."""
        found = [
            thing
            for module in self.load()
            for thing in vars(module).values()
            if isinstance(thing, type)
            and issubclass(thing, self.postprocessing)
            and thing is not self.postprocessing
        ]
        assert len(found) == 1
        return found[0]()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path / "models")
    gradio = ModuleType("gradio")
    for name in GRADIO:
        setattr(gradio, name, Component)
    package = ModuleType("modules")
    package.__path__ = []
    for name, module in (host.modules | {"modules": package, "gradio": gradio}).items():
        monkeypatch.setitem(sys.modules, name, module)
        if child := name.partition(".")[2]:
            setattr(package, child, module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield host
    for name in [name for name in sys.modules if name.partition(".")[0] == "osdface_webui"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def photograph(photographs: Path) -> np.ndarray:
    return np.array(Image.open(photographs / "astronaut.png").convert("RGB"))


def test_scripts_are_flat_and_take_no_name_of_anybody() -> None:
    assert SCRIPTS and all(path.name.startswith("osdface_") for path in SCRIPTS)
    # With it the hosts' namespace `scripts`, which all extensions share, would be ours.
    assert not (ROOT / "scripts" / "__init__.py").exists()
    # The hosts would load or act on these.
    for name in ("javascript", "localizations", "style.css", "metadata.ini", "space_meta.json"):
        assert not (ROOT / name).exists()


def test_our_nodes_do_not_pass_for_comfyuis() -> None:
    """Forge leaves every extension's root on sys.path, where others look for ComfyUI's `nodes`."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['comfy_api'] = None; "
    code += "import nodes"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/"
    )
    assert "comfy_api" in done.stderr.splitlines()[-1]
    assert "torch" not in done.stderr


def test_nothing_of_comfyui_and_no_diffusers_is_imported(host: Host) -> None:
    before = set(sys.modules)
    host.load()
    fresh = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert "osdface_webui" in fresh
    assert not fresh & {"comfy", "comfy_api", "folder_paths", "nodes", "diffusers", "peft"}


def test_loading_twice_gives_one_restorer_and_one_axis(host: Host) -> None:
    axes: list[Any] = []
    plot = SimpleNamespace(
        axis_options=axes,
        AxisOption=lambda label, kind, apply, choices: SimpleNamespace(label=label, apply=apply),
        apply_override=lambda name: lambda p, x, xs: p.override_settings.update({name: x}),
    )
    script = type("Script", (), {"__module__": "xyz_grid.py"})
    host.scripts.scripts_data.append(SimpleNamespace(script_class=script, module=plot))
    other = SimpleNamespace(name=lambda: "GFPGAN")
    host.shared.face_restorers.append(other)
    for _ in range(2):
        host.load()
    assert [x.name() for x in host.shared.face_restorers] == ["GFPGAN", "OSDFace"]
    assert [axis.label for axis in axes] == ["[OSDFace] Face restorer"]
    p = SimpleNamespace(override_settings={}, restore_faces=False)
    axes[0].apply(p, "OSDFace", ["OSDFace"])
    assert p.restore_faces and p.override_settings == {"face_restoration_model": "OSDFace"}


def test_a_host_without_restorers_and_accordions_is_served(host: Host) -> None:
    del host.shared.face_restorers
    host.modules["modules.ui_components"].__dict__.clear()
    script = host.extras()
    assert "enable" in script.ui()


def test_a_face_is_restored_in_rgb_and_nothing_else_changes(
    host: Host, photograph: np.ndarray
) -> None:
    host.load()
    after = host.restorer.restore(photograph)
    assert host.reported == []
    assert after.dtype == np.uint8 and after.shape == photograph.shape
    difference = np.abs(after.astype(int) - photograph).max(-1)
    rows, columns = np.nonzero(difference)
    assert 1000 < len(rows) < 40000
    assert rows.max() < 260 and columns.min() > 100 and columns.max() < 350
    # Red and blue of skin are 60 levels apart.
    face = np.s_[100:170, 195:255]
    assert np.abs(after[face].mean((0, 1)) - photograph[face].mean((0, 1))).max() < 15


def test_an_error_is_reported_and_the_picture_comes_back(
    host: Host, photograph: np.ndarray
) -> None:
    host.load()
    host.shared.opts.osdface_base = "gone.safetensors"
    assert host.restorer.restore(photograph) is photograph
    ((message, with_traceback),) = host.reported
    assert "gone.safetensors" in message and with_traceback


def test_the_wish_to_stop_is_obeyed(host: Host, photograph: np.ndarray) -> None:
    host.load()
    host.state.interrupted = True
    assert host.restorer.restore(photograph) is photograph
    assert host.reported == []


def test_the_networks_are_named_among_a_pictures_parameters(
    host: Host, photograph: np.ndarray
) -> None:
    module = host.load()[[path.stem for path in SCRIPTS].index("osdface_restorer")]
    script = module.OSDFaceParameters()
    p = SimpleNamespace(extra_generation_params={})
    script.process(p)
    host.restorer.restore(photograph)
    assert "built-in" in p.extra_generation_params["OSDFace model"]
    # The next picture of the batch has no face; the hosts leave None out.
    host.restorer.restore(np.zeros((64, 64, 3), np.uint8))
    assert p.extra_generation_params["OSDFace model"] is None
    other = SimpleNamespace(extra_generation_params={})
    script.postprocess(other, None)
    host.restorer.restore(photograph)
    assert other.extra_generation_params == {}


def test_extras_do_nothing_for_what_the_api_gives(host: Host, photograph: np.ndarray) -> None:
    script = host.extras()
    image = Image.fromarray(photograph)
    pp = SimpleNamespace(image=image, info={})
    script.process(pp, **dict.fromkeys(script.ui()))
    assert pp.image is image and pp.info == {}


def test_extras_restore_and_keep_transparency(host: Host, photograph: np.ndarray) -> None:
    script = host.extras()
    image = Image.fromarray(photograph).convert("RGBA")
    fade = Image.linear_gradient("L").resize(image.size)
    image.putalpha(fade)
    pp = SimpleNamespace(image=image, info={})
    given = dict.fromkeys(script.ui()) | {"enable": True, "min_size": 24.0}
    script.process(pp, **given)
    assert pp.image.mode == "RGBA" and pp.image.size == image.size
    assert np.array_equal(np.array(pp.image)[..., 3], np.array(fade))
    assert not np.array_equal(np.array(pp.image), np.array(image))
    assert pp.info["OSDFace"].startswith("1 face found")
    # White where the picture must stay.
    pp = SimpleNamespace(image=image, info={})
    script.process(pp, **given | {"keep": Image.new("L", (8, 8), 255)})
    assert np.array_equal(np.array(pp.image), np.array(image))


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_a_picture_of_16_bits_becomes_one_of_8_and_the_report_says_so(
    mode: str, host: Host, photograph: np.ndarray
) -> None:
    script = host.extras()
    grey = np.array(Image.fromarray(photograph).convert("L"))
    # Older versions of Pillow read such a PNG as I.
    kind = np.uint16 if mode == "I;16" else np.int32
    deep = Image.fromarray(grey.astype(kind) * 257)
    assert deep.mode == mode

    def done(image: Image.Image) -> Any:
        pp = SimpleNamespace(image=image, info={})
        script.process(pp, **dict.fromkeys(script.ui()) | {"enable": True})
        return pp

    found, wanted = done(deep), done(Image.fromarray(grey))
    assert host.reported == []
    assert found.image.mode == "L"
    assert np.array_equal(np.array(found.image), np.array(wanted.image))
    assert not np.array_equal(np.array(found.image), grey)
    said = "1 chosen. The picture had 16 bits for each value and has 8 now."
    assert found.info["OSDFace"].endswith(said)
    # Where nobody is found nothing is lost.
    empty = Image.fromarray(np.full((64, 64), 1234, kind))
    assert done(empty).image is empty
    # What has no known range is told apart.
    done(Image.fromarray(np.full((64, 64), 70000, np.int32)))
    ((message, _),) = host.reported
    assert "mode I and values of more than 16 bits" in message


def test_a_video_s_faces_are_followed_over_its_frames(host: Host, photograph: np.ndarray) -> None:
    """As Forge-Neo hands them over: one by one, each marked, all in one job."""
    script = host.extras()
    given = dict.fromkeys(script.ui()) | {"enable": True, "select": "by index", "indices": "0"}
    given["order"] = "left to right"
    one, frames = Image.fromarray(photograph[20:276, 100:356]), []
    # She who is above goes to the right, she who is below to the left.
    for step in range(5):
        frame = Image.new("RGB", (512, 512), (90, 90, 90))
        frame.paste(one, (100 + 14 * step, 0))
        frame.paste(one, (150 - 14 * step, 256))
        frames.append(frame)

    def changed(frames: list[Image.Image], is_video: bool) -> list[str]:
        """Who was changed in each frame."""
        who = []
        for frame in frames:
            pp = SimpleNamespace(image=frame, info={}, shared=SimpleNamespace(is_video=is_video))
            script.process(pp, **given)
            differs = (np.array(pp.image) != np.array(frame)).any(-1)
            who.append("above" * int(differs[:256].any()) + "below" * int(differs[256:].any()))
        return who

    host.state.time_start = 1.0
    assert changed(frames, is_video=True) == ["above"] * 5
    assert host.reported == []
    # In a picture by itself number 0 is the one at the left.
    assert changed(frames[4:], is_video=False) == ["below"]
    # Another job is another video.
    host.state.time_start = 2.0
    assert changed(frames[4:], is_video=True) == ["below"]


def test_every_option_of_the_node_has_its_place_in_extras(host: Host) -> None:
    shown = set(host.extras().ui())
    nodes = json.loads((ROOT / "tests" / "interfaces.json").read_text(encoding="utf-8"))
    wanted = set(nodes["OSDFaceRestore"][0]) - {"image", "model", "vae", "vre_name", "lora_name"}
    assert wanted <= shown


def test_a_click_numbers_the_faces(host: Host, photograph: np.ndarray) -> None:
    script = host.extras()
    source = Component(elem_id="extras_image")
    host.call("on_after_component", source, elem_id="extras_image")
    made: list[Component] = []
    button = sys.modules["gradio"].Button  # type: ignore[attr-defined]
    sys.modules["gradio"].Button = lambda *a, **k: made.append(button(*a, **k)) or made[-1]  # type: ignore[attr-defined]
    script.ui()
    (shown,) = made
    assert shown.clicked["inputs"][0] is source
    values = [None] * (len(shown.clicked["inputs"]) - 1)
    image, report = shown.clicked["fn"](Image.fromarray(photograph), *values)
    assert image.size == (512, 512) and "face 0" in report
    assert shown.clicked["fn"](None, *values)[0] is None
    # After Reload UI the component of the former page is forgotten.
    host.call("on_before_ui")
    made.clear()
    script.ui()
    assert made == []


def test_settings_are_added_with_the_defaults_that_hold_without_them(host: Host) -> None:
    host.load()
    from osdface_webui import host as facts

    names = ("base", "folder", "precision", "keep_loaded", "download")
    unset = {name: facts.option(name, "unset") for name in names}
    assert set(unset.values()) == {"unset"}
    host.call("on_ui_settings")
    given = {name: facts.option(name, "unset") for name in names}
    assert given == {
        "base": "automatic",
        "folder": "",
        "precision": "automatic",
        "keep_loaded": True,
        "download": False,
    }


def test_weights_are_found_where_the_hosts_have_them(host: Host, tmp_path: Path) -> None:
    host.load()
    from osdface_webui import files

    assert files.find(LORA) is None
    for folder in ("models/Lora", "models/osdface", "named", "chosen"):
        path = tmp_path / folder / LORA.name
        path.parent.mkdir(parents=True)
        path.touch()
        if folder == "named":
            host.shared.cmd_opts.osdface_models_path = str(path.parent)
        if folder == "chosen":
            host.shared.opts.osdface_folder = str(path.parent)
        # Each goes before those that are farther from us.
        assert files.find(LORA) == path
    assert files.parser() == BUILTIN_PARSER
    for name in ("detection_mobilenet0.25_Final.pth", "parsing_parsenet.pth"):
        path = tmp_path / "models" / "GFPGAN" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert files.detector("automatic").parent.name == "GFPGAN"
    assert files.parser().parent.name == "GFPGAN"
    assert files.mask_type("automatic") == "parsing"


def test_memory_is_given_back_by_the_settings(host: Host, photograph: np.ndarray) -> None:
    host.load()
    from osdface_webui import networks

    host.restorer.restore(photograph)
    first = dict(networks._kept)
    assert {"detector", "embedder", "backbone"} <= set(first)
    host.restorer.restore(photograph)
    assert networks._kept["detector"][1] is first["detector"][1]
    there = [weakref.ref(thing) for _, thing in first.values() if not isinstance(thing, dict)]
    first.clear()
    host.shared.opts.osdface_keep_loaded = False
    # Of what is still held then, the device would not give the memory back.
    held: list[Any] = []
    host.modules["modules.devices"].torch_gc = lambda: held.extend(ref() for ref in there)
    host.restorer.restore(photograph)
    assert networks._kept == {}
    assert held == [None] * len(there) and len(there) >= 3


@pytest.mark.parametrize(
    ("where", "name", "stays"),
    [
        ("cmd_opts", "medvram", False),
        ("cmd_opts", "lowvram", False),
        ("opts", "face_restoration_unload", False),
        ("opts", "nothing", True),
    ],
)
def test_networks_leave_the_device_where_room_is_short(
    where: str, name: str, stays: bool, host: Host, photograph: np.ndarray
) -> None:
    if OLDEST:
        pytest.skip("no made-up device: torch 2.1 has no device written in Python")
    from tests.fake_device import DEVICE, elsewhere

    host.load()
    host.modules["modules.devices"].get_device_for = lambda task: DEVICE
    setattr(getattr(host.shared, where), name, True)
    from osdface_webui import networks

    with elsewhere():
        after = host.restorer.restore(photograph)
        assert host.reported == []
        assert not np.array_equal(after, photograph)
        kept = [thing for _, thing in networks._kept.values()]
        modules = [thing for thing in kept if isinstance(thing, nn.Module)]
        for backbone in (thing for thing in kept if isinstance(thing, LdmBackbone)):
            modules += [backbone.unet, backbone.autoencoder]
        devices = [{p.device.type for p in module.parameters()} for module in modules]
        assert devices == [{DEVICE.type if stays else "cpu"}] * 4  # detector, embedder, these two
        if name == "medvram":  # and are brought back for the next picture
            assert np.array_equal(host.restorer.restore(photograph), after)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.bias = nn.Parameter(torch.ones(2))


def test_the_hosts_tensors_are_shared_as_they_are_without_a_prompts_loras(host: Host) -> None:
    host.load()
    from osdface_webui.backbone import shared_networks

    unet = nn.ModuleDict({"plain": Layer(), "adapted": Layer()})
    vae = nn.ModuleDict({"decoder": Layer()})
    before = torch.zeros(2, 2)
    # AUTOMATIC1111 keeps beside a weight what it was.
    unet["adapted"].network_weights_backup = before
    unet["adapted"].network_bias_backup = None
    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=unet), first_stage_model=vae)
    given, of_vae = shared_networks(model)
    assert given["plain.weight"] is unet["plain"].weight
    assert given["adapted.weight"] is before and given["adapted.bias"] is unet["adapted"].bias
    assert of_vae["decoder.weight"] is vae["decoder"].weight
    # Forge keeps them in a table.
    whole = nn.ModuleDict({"diffusion_model": nn.ModuleDict({"a": Layer(), "b": Layer()})})
    whole.diffusion_model = whole["diffusion_model"]
    whole.lora_loader = SimpleNamespace(backup={"diffusion_model.b.weight": before})
    objects = SimpleNamespace(
        unet=SimpleNamespace(model=whole), vae=SimpleNamespace(first_stage_model=vae)
    )
    given, of_vae = shared_networks(SimpleNamespace(forge_objects_original=objects))
    assert given["a.weight"] is whole["diffusion_model"]["a"].weight
    assert given["b.weight"] is before
    assert set(of_vae) == {"decoder.weight", "decoder.bias"}


def tree(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A module whose parameters have these names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        module = root
        *path, last = name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(tensor))
    return root


@pytest.mark.parametrize(
    ("channels", "deviation", "says"),
    [
        (4, 0.05, "pytorch_lora_weights.safetensors and osdface_vre.safetensors are missing"),
        (4, 0.3, "no Stable Diffusion 2.1-base is there"),
        (9, 0.05, "no Stable Diffusion 2.1-base is there"),
    ],
)
def test_what_forge_takes_for_stable_diffusion_2_and_is_not_its_base_is_passed_over(
    channels: int, deviation: float, says: str, host: Host
) -> None:
    """The 768-v model, told by this bias in its weights alone, and the one for inpainting."""
    host.load()
    from osdface_webui.backbone import source

    unet = tree(
        {
            "input_blocks.0.0.weight": torch.zeros(2, channels, 3, 3),
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2, 1024),
            "output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])
            * deviation,
        }
    )
    whole = nn.Module()
    whole.diffusion_model = unet
    vae = SimpleNamespace(first_stage_model=tree({"decoder.weight": torch.zeros(1)}))
    objects = SimpleNamespace(unet=SimpleNamespace(model=whole), vae=vae)
    model = SimpleNamespace(is_sd2=True, forge_objects_original=objects)
    host.sd_models.model_data.sd_model = model
    assert says in source().words


# What the picture just made was made with


class CrossAttention(Attention):
    """The host's own attention, whose forward its hypernetworks reach."""

    loaded: ClassVar[list[Callable[[torch.Tensor], torch.Tensor]]] = []

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for hypernetwork in self.loaded:
            context = hypernetwork(context)
        return super().forward(x, context)


class HostsUNet(UNet):
    """The host's own UNet.

    engine: in whose place it is, as TensorRT's; the host asks for it at the class's forward.
    patches: on what each output block gives, as FreeU's; Forge hands them to the forward.
    """

    engine: ClassVar[list[Callable[[torch.Tensor], torch.Tensor]]] = []
    patches: ClassVar[list[Callable[[torch.Tensor], torch.Tensor]]] = []

    def forward(self, latents: torch.Tensor, timestep: int, prompts: torch.Tensor) -> torch.Tensor:
        if self.engine:
            return self.engine[0](latents)
        handles = [
            block.register_forward_hook(lambda module, given, x, patch=patch: patch(x))
            for block in self.output_blocks.modules()
            if isinstance(block, UNetResidual)
            for patch in self.patches
        ]
        try:
            return super().forward(latents, timestep, prompts)
        finally:
            for handle in handles:
                handle.remove()


def hosts_networks(path: Path) -> tuple[HostsUNet, Autoencoder]:
    """A small checkpoint as working networks of the host's own classes."""
    tensors = load_file(path)
    networks = HostsUNet(SMALL.unet), Autoencoder(SMALL.vae, SMALL.vae_groups)
    for network, prefix in zip(networks, (UNET_PREFIX, VAE_PREFIX), strict=True):
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        network.load_state_dict(own)
    for module in networks[0].modules():
        if type(module) is Attention:
            module.__class__ = CrossAttention
    return networks


def as_held(kind: str, unet: HostsUNet, vae: Autoencoder) -> Any:
    """The host's checkpoint, in the shape that it has there."""
    info = SimpleNamespace(name="small.safetensors", filename="small.safetensors")
    if kind == "a1111":
        return SimpleNamespace(
            is_sd2=True,
            parameterization="eps",
            model=SimpleNamespace(diffusion_model=unet),
            first_stage_model=vae,
            sd_checkpoint_info=info,
        )
    whole = nn.Module()
    whole.diffusion_model = unet
    held = SimpleNamespace(first_stage_model=vae)
    original = SimpleNamespace(unet=SimpleNamespace(model=whole, model_options={}), vae=held)
    # A patched clone shares the model, and has options of its own.
    options = {"transformer_options": {"patches": {"output_block_patch": HostsUNet.patches}}}
    patched = SimpleNamespace(unet=SimpleNamespace(model=whole, model_options=options), vae=held)
    return SimpleNamespace(
        is_sd2=True,
        forge_objects_original=original,
        forge_objects=patched,
        sd_checkpoint_info=info,
    )


class SmallBackbone(LdmBackbone):
    """Of small shapes."""

    @classmethod
    def from_tensors(cls, *given: Any, **options: Any) -> LdmBackbone:
        return super().from_tensors(*given, shapes=SMALL, **options)


@pytest.mark.parametrize("kind", ["a1111", "forge"])
@pytest.mark.parametrize("what", ["hypernetworks", "FreeU", "TensorRT"])
def test_what_a_picture_was_made_with_does_not_touch_the_restoring(
    what: str,
    kind: str,
    host: Host,
    small_base: Path,
    photograph: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora = tmp_path / "models" / "Lora" / LORA.name
    lora.parent.mkdir(parents=True)
    lora.touch()
    host.load()
    from osdface_webui import backbone

    monkeypatch.setattr(backbone, "LdmBackbone", SmallBackbone)
    monkeypatch.setattr(backbone, "read_tensors", lambda path: {})
    monkeypatch.setattr(backbone, "parse_lora", lambda tensors, name: small_osdface())
    # None is the built-in embedder.
    monkeypatch.setattr(backbone.files, "ensure_embedder", lambda: None)
    host.shared.opts.osdface_precision = "fp32"
    unet, vae = hosts_networks(small_base)
    held = host.sd_models.model_data.sd_model = as_held(kind, unet, vae)
    as_it_was = dict(vars(held))
    unet_module = SimpleNamespace(current_unet=None, current_unet_option=None)
    host.shared.loaded_hypernetworks = CrossAttention.loaded
    monkeypatch.setitem(sys.modules, "modules.sd_unet", unet_module)

    latents, prompts = torch.ones(1, 4, 8, 8), torch.ones(1, 77, 1024)

    def own() -> torch.Tensor:
        with torch.no_grad():
            return HostsUNet.forward(unet, latents, 399, prompts)

    made, wanted = own(), host.restorer.restore(photograph)
    assert not np.array_equal(wanted, photograph)

    def halved(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    place = {
        "hypernetworks": CrossAttention.loaded,
        "FreeU": HostsUNet.patches,
        "TensorRT": HostsUNet.engine,
    }[what]
    place.append(halved)
    if what == "TensorRT":
        unet_module.current_unet = unet_module.current_unet_option = halved
    in_place = dict(vars(unet_module))
    try:
        changed = own()
        assert not torch.equal(made, changed)  # the host's own network is touched
        found = host.restorer.restore(photograph)
        assert host.reported == []
        assert np.array_equal(found, wanted)
        # All of it is there for the next picture.
        assert place == [halved] and torch.equal(own(), changed)
        assert vars(held) == as_it_was and vars(unet_module) == in_place
        assert host.shared.loaded_hypernetworks is CrossAttention.loaded
    finally:
        place.clear()


# OSEDiff as an upscaler


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion 2.1-base with a text encoder of the real width and one block."""
    path = tmp_path_factory.mktemp("webui") / "small.safetensors"
    save_file(small_checkpoint() | text_encoder(2), path)
    return path


@pytest.fixture
def small_networks(host: Host, small_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Networks of small shapes, and OSEDiff's weights of those shapes for a file that is there.

    Gives that file.
    """
    weights = Path(str(host.modules["modules.paths_internal"].models_path)) / "osediff"
    weights.mkdir(parents=True)
    (weights / "osediff.safetensors").touch()
    host.sd_models.checkpoints_list["small"] = SimpleNamespace(
        title="small.safetensors", name="small.safetensors", filename=str(small_base)
    )
    host.load()
    from osdface_webui import backbone

    for name in ("load_osediff", "lend_osediff"):
        monkeypatch.setattr(backbone, name, partial(getattr(backbone, name), shapes=SMALL))
    monkeypatch.setattr(backbone, "read_tensors", lambda path: {})
    monkeypatch.setattr(backbone, "parse_weights", lambda tensors, name: small_osediff())
    host.shared.opts.osdface_precision = "fp32"
    return weights / "osediff.safetensors"


def lent(path: Path) -> Any:
    """A checkpoint as AUTOMATIC1111 holds it."""
    tensors = load_file(path)
    unet, vae = (
        tree({name.removeprefix(p): t for name, t in tensors.items() if name.startswith(p)})
        for p in (UNET_PREFIX, VAE_PREFIX)
    )
    return SimpleNamespace(
        is_sd2=True,
        parameterization="eps",
        model=SimpleNamespace(diffusion_model=unet),
        first_stage_model=vae,
        sd_checkpoint_info=SimpleNamespace(name="small.safetensors", filename=str(path)),
    )


def by_the_core(picture: np.ndarray, base: Path, scale: float) -> np.ndarray:
    """What the core's function makes of a picture (H,W,C) uint8."""
    networks = load_osediff(base, small_osediff(), dtype=torch.float32, shapes=SMALL)
    given = torch.from_numpy(picture)[None] / 255
    result = upscale(given, empty_text(base), networks, UpscaleOptions(scale)).pictures[0]
    return (result * 255).round().byte().numpy()


@pytest.mark.parametrize("where", ["as loaded", "beside the loaded checkpoint"])
def test_osediff_enlarges_a_picture_on_the_loaded_checkpoint_or_a_file(
    where: str, host: Host, small_networks: Path, small_base: Path, photograph: np.ndarray
) -> None:
    if where == "as loaded":
        host.sd_models.model_data.sd_model = lent(small_base)
        before = [p.clone() for p in lent(small_base).model.diffusion_model.parameters()]
    else:
        host.shared.opts.osdface_base = "small.safetensors"
        host.sd_models.get_closet_checkpoint_match = host.sd_models.checkpoints_list.get
        host.sd_models.checkpoints_list["small.safetensors"] = host.sd_models.checkpoints_list[
            "small"
        ]
    (data,) = host.shared.sd_upscalers
    assert data.name == "OSEDiff" and data.data_path == str(small_networks)
    given = photograph[100:140, 180:228]
    found = data.scaler.upscale(Image.fromarray(given), 2.0, data.data_path)
    assert host.reported == []
    wanted = by_the_core(given, small_base, 2.0)
    assert found.size == (96, 80)
    assert np.abs(np.array(found).astype(int) - wanted).max() <= 1
    plain = Image.fromarray(given).resize((96, 80), Image.Resampling.BICUBIC)
    assert np.abs(wanted.astype(int) - np.array(plain)).max() > 20
    if where == "as loaded":
        after = host.sd_models.model_data.sd_model.model.diffusion_model.parameters()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # Sides are multiples of 8 as the host's other upscalers give them, and alpha comes along.
    fade = Image.linear_gradient("L").resize((48, 40))
    with_alpha = Image.fromarray(given)
    with_alpha.putalpha(fade)
    found = data.scaler.upscale(with_alpha, 1.55, data.data_path)
    assert found.mode == "RGBA" and found.size == (72, 56)
    alpha = np.array(fade.resize((72, 56), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.array(found)[..., 3] - alpha).max() <= 3


def test_what_osediff_cannot_do_is_reported_and_enlarged_all_the_same(
    host: Host, small_networks: Path, photograph: np.ndarray
) -> None:
    (data,) = host.shared.sd_upscalers
    image = Image.fromarray(photograph).resize((40, 24))
    plain = np.array(image.resize((80, 48), Image.Resampling.LANCZOS))
    found = data.scaler.upscale(image, 2, data.data_path)
    assert np.array_equal(np.array(found), plain)
    ((message, with_traceback),) = host.reported
    assert "Stable Diffusion 2.1-base" in message and with_traceback
    # A picture that gets smaller needs no networks, and neither does one that nobody waits for.
    assert data.scaler.upscale(image, 0.5, data.data_path).size == (16, 8)
    host.state.interrupted = True
    found = data.scaler.upscale(image, 2, data.data_path)
    assert np.array_equal(np.array(found), plain)
    assert len(host.reported) == 1


def test_osediff_is_registered_where_its_files_are(host: Host, tmp_path: Path) -> None:
    def names() -> list[str]:
        return [data.name for data in host.shared.sd_upscalers]

    host.load()
    assert names() == []
    weights = tmp_path / "models" / "osediff"
    weights.mkdir(parents=True)
    (weights / "osediff_face.pkl").touch()
    (weights / "osediff.pkl").touch()
    host.load()
    # No Stable Diffusion 2.1-base, and no checkpoint that might be one.
    assert names() == []
    base = tmp_path / "models" / "Stable-diffusion" / "v2-1_512-ema-pruned.safetensors"
    base.parent.mkdir()
    base.touch()
    for _ in range(2):
        host.load()
        assert names() == ["OSEDiff", "OSEDiff (faces)"]


def test_forge_neo_which_looks_for_no_upscalers_keeps_ours(
    host: Host, small_networks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_upscalers() -> None:
        del host.shared.sd_upscalers
        none = SimpleNamespace(name="None", scaler=SimpleNamespace())
        host.shared.sd_upscalers = [none]

    # Its own script of the Extras tab has the function by its name.
    script = SimpleNamespace(load_upscalers=load_upscalers)
    host.scripts.postprocessing_scripts_data = [SimpleNamespace(module=script)]
    monkeypatch.setattr(host.modules["modules.modelloader"], "load_upscalers", load_upscalers)
    for _ in range(2):
        host.load()
        script.load_upscalers()
        assert [data.name for data in host.shared.sd_upscalers] == ["None", "OSEDiff"]
