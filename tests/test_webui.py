"""The WebUIs' extension on a made-up host, loaded as the real ones load it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from osdface_core.faces.files import BUILTIN_PARSER
from osdface_core.osdface.files import LORA
from tests.conftest import ROOT

GRADIO = (
    *("Row", "Group", "Accordion", "Slider", "Dropdown", "Textbox", "Number"),
    *("Checkbox", "Image", "Button", "HTML", "Radio"),
)
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


def test_every_option_of_the_node_has_its_place_in_extras(host: Host) -> None:
    shown = set(host.extras().ui())
    # `smoothing` is for the frames of a video, which these hosts do not hand over together.
    nodes = json.loads((ROOT / "tests" / "interfaces.json").read_text(encoding="utf-8"))
    wanted = set(nodes["OSDFaceRestore"][0]) - {"image", "model", "vae", "vre_name", "lora_name"}
    assert wanted - {"smoothing"} <= shown


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
    host.shared.opts.osdface_keep_loaded = False
    host.restorer.restore(photograph)
    assert networks._kept == {}


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
