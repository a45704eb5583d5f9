"""ComfyUI behind the core: its MODEL and VAE as a Backbone, our networks in its memory management,
its folders and progress bar.

The only file that knows ComfyUI's insides. Run on 0.3.64; what newer versions changed (read up to
0.38) is asked for by name before it is used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import comfy.lora
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor, nn

from ...osdface_core.cpu import computes_in_bf16, faster
from ...osdface_core.errors import OSDFaceError
from ...osdface_core.osdface import builtin
from ...osdface_core.osdface.vre import build_embedder, embedder_files, read_embedder
from ...osdface_core.osdface.vre.embedder import VisualEmbedder
from ...osdface_core.sd21.adapters import LoraModule, parse_lora
from ...osdface_core.sd21.backbone import (
    LATENT_CHANNELS,
    STRIDE,
    TIMESTEP,
    TIMESTEPS,
    alphas_cumprod,
)
from ...osdface_core.weights import catalogue
from ...osdface_core.weights.reading import read_tensors
from ...osdface_core.weights.store import ensure

log = logging.getLogger(__name__)

T = TypeVar("T")

# Folders of a menu's files; the LoRA may lie with the other LoRAs, a detector in newer hosts'
# folder for such.
SEARCHED = catalogue.SEARCHED | {
    catalogue.LORAS: (catalogue.OSDFACE, catalogue.LORAS),
    catalogue.FACES: (*catalogue.SEARCHED[catalogue.FACES], "detection"),
}
EXTENSIONS = {".safetensors", ".ckpt", ".pth"}
# ComfyUI's settings file holds this once the user has allowed downloads there (web/osdface.js); the
# variable does the same.
DOWNLOAD_SETTING, DOWNLOAD_VARIABLE = "OSDFace.download", "OSDFACE_DOWNLOAD"
NONE = "none"
# What the networks of OSDFace Built-in Model, and prompts made for it, are known by.
BUILTIN_MARK = "osdface_builtin"
BUILTIN_FILES = {catalogue.OSDFACE: builtin.VRE, catalogue.FACES: builtin.DETECTOR}

CHECKPOINT = (
    "Load Stable Diffusion 2.1-base (v2-1_512-ema-pruned.safetensors) with Load Checkpoint."
)
PREVIEW_SIDE = 512
# A chunk is also the grain at which a run shows progress, and the UNet's at which it stops.
MOST_FACES_AT_ONCE = 16
# Crops whose latents are kept with a VAE: 64 KB each at 512 px, 256 KB at 1024.
MOST_LATENTS = 128
# Peak of the embedder's activations for a 512 px crop in fp32.
EMBEDDER_MEMORY = 450 * 1024**2


# Schemas


def with_extras(
    schema: io.Schema,
    *,
    search: tuple[str, ...] = (),
    advanced: tuple[str, ...] = (),
    shows: bool = False,
) -> io.Schema:
    """The schema with what newer hosts offer, where the host does.

    search: other names that people look for. advanced: ids of inputs that are rarely turned, to be
    folded away. shows: the node shows something on itself that is to stay when the page is loaded
    anew.
    """
    if hasattr(schema, "search_aliases"):
        schema.search_aliases = list(search)
    if hasattr(schema, "has_intermediate_output"):
        schema.has_intermediate_output = shows
    for given in schema.inputs:
        if given.id in advanced and hasattr(given, "advanced"):
            given.advanced = True
    return schema


# Files


@contextmanager
def naming(given: str) -> Iterator[None]:
    """Errors about a file say which input named the file."""
    try:
        yield
    except OSDFaceError as error:
        raise OSDFaceError(f"`{given}`: {error}") from error


def register_folders() -> None:
    """Makes ComfyUI look in models/osdface and models/facedetection, beside what
    extra_model_paths.yaml names for them.
    """
    for name in (catalogue.OSDFACE, catalogue.FACES):
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
        paths, extensions = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (
            paths,
            set(extensions) | EXTENSIONS if extensions else EXTENSIONS,
        )


def names(kind: str, *first: str) -> list[str]:
    """What a menu of files offers: the names that a shared workflow holds, present or not, then
    whatever else is there.
    """
    found = dict.fromkeys(first)
    for folder in SEARCHED[kind]:
        if folder in folder_paths.folder_names_and_paths:
            found |= dict.fromkeys(folder_paths.get_filename_list(folder))
    return list(found)


def find(name: str, kind: str = catalogue.FACES) -> Path:
    """The file `name` in the folders that are searched for `kind`; fetched first if it is missing
    and the user has allowed that.

    `builtin` names our own small one. Raises OSDFaceError, which says how to get it.
    """
    if (path := _present(name, kind)) is not None:
        return path
    folders = {
        folder: [Path(path) for path in folder_paths.get_folder_paths(folder)]
        for searched in SEARCHED.values()
        for folder in searched
        if folder in folder_paths.folder_names_and_paths
    }
    return ensure(name, folders, allow_download=_downloads_allowed(), progress=_download_progress())


def _present(name: str, kind: str) -> Path | None:
    if name == builtin.NAME and kind in BUILTIN_FILES:
        return BUILTIN_FILES[kind]
    for folder in SEARCHED[kind]:
        if (path := folder_paths.get_full_path(folder, name)) is not None:
            return Path(path)
    return None


def at_hand(*files: str, kind: str = catalogue.FACES) -> bool:
    """Whether one of the files is there, or may be fetched when it is wanted."""
    return _downloads_allowed() or any(_present(name, kind) is not None for name in files)


def _downloads_allowed() -> bool:
    if os.environ.get(DOWNLOAD_VARIABLE, "").lower() in ("1", "true", "yes", "on"):
        return True
    settings = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        return json.loads(settings.read_text(encoding="utf-8")).get(DOWNLOAD_SETTING) is True
    except (OSError, ValueError, AttributeError):
        return False


def _download_progress() -> Callable[[int, int], None]:
    """For bytes there of bytes in all."""
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, max(total, 1))

    return report


def state_of(
    name: str | None, kind: str, files_of: Callable[[Path], tuple[Path, ...]] = lambda path: (path,)
) -> str:
    """A text that changes when the named file does, for nodes that read it; empty for none, or one
    that is not there.
    """
    path = None if name is None or name == NONE else _present(name, kind)
    return "" if path is None else str(fingerprint(*files_of(path)))


def fingerprint(*files: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when one of the files does: path, size and time of change of each."""
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


_made: dict[tuple[str, str], tuple[object, Any]] = {}


def once(what: str, files: tuple[Path, ...], make: Callable[[], T]) -> T:
    """What `make` gives from the files, made anew only when one of them has changed.

    Raises OSDFaceError for a file that the host's keeper does not allow: newer hosts may be told
    which files may be loaded.
    """
    key, state = (what, str(files[0])), fingerprint(*files)
    if key not in _made or _made[key][0] != state:
        _made.pop(key, None)
        governance = sys.modules.get("app.governance")
        for path in files:
            if not getattr(governance, "model_allowed", lambda path: True)(str(path)):
                raise OSDFaceError(
                    f"{path.name} is not among the files that this ComfyUI may load: ask who "
                    f"looks after it to allow it."
                )
        _made[key] = state, make()
    return _made[key][1]


# Networks of our own


def _complete(layer: type[nn.Module], plain: type[nn.Module]) -> Any:
    """ComfyUI's layer with its weights there from the start; newer hosts wait for them where a
    subclass does not read them itself.
    """
    return type(
        layer.__name__,
        (layer,),
        {"__init__": plain.__init__, "_load_from_state_dict": nn.Module._load_from_state_dict},
    )


class Operations(comfy.ops.manual_cast):
    """ComfyUI's layers, which cast weights to what comes in and let it page them."""

    Linear = _complete(comfy.ops.manual_cast.Linear, nn.Linear)
    Embedding = _complete(comfy.ops.manual_cast.Embedding, nn.Embedding)


def network(
    path: Path,
    build: Callable[[dict[str, Tensor], Any], nn.Module],
    memory: float = 0,
    read: Callable[[Path], dict[str, Tensor]] = read_tensors,
    files_of: Callable[[Path], tuple[Path, ...]] = lambda path: (path,),
) -> nn.Module:
    """The network of a weight file, on the device that ComfyUI computes on, ready to be called.

    build: (tensors, operations) -> module. memory: bytes that its activations will want. files_of:
    all files that `read` reads. The network is read once for each state of its files, stays loaded
    between runs, and leaves the device when ComfyUI needs the room. Raises ComfyUI's own error when
    the user has asked to stop.
    """
    mm.throw_exception_if_processing_interrupted()

    def make() -> comfy.model_patcher.ModelPatcher:
        # The newer one pages weights in as they are used.
        patcher_class = getattr(
            comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher
        )
        return patcher_class(
            build(read(path), Operations),
            load_device=mm.get_torch_device(),
            offload_device=mm.unet_offload_device(),
        )

    patcher = once(build.__module__ + "." + build.__qualname__, files_of(path), make)
    mm.load_models_gpu([patcher], memory_required=memory)
    return patcher.model


def embedder(vre_name: str, faces: int) -> tuple[VisualEmbedder, torch.device]:
    """The Visual Representation Embedder of a file of models/osdface, with room for so many faces
    at once, and where it computes.
    """
    with naming("vre_name"):
        path = find(vre_name, catalogue.OSDFACE)
        module = network(
            path, build_embedder, faces * EMBEDDER_MEMORY, read_embedder, embedder_files
        )
    assert isinstance(module, VisualEmbedder)
    return module, mm.get_torch_device()


def faces_that_fit(memory: float) -> int:
    """How many faces a network of our own takes at once that wants so many bytes for each; one on a
    CPU, to stop within it.
    """
    device = mm.get_torch_device()
    return 1 if mm.is_device_cpu(device) else _clamp(_room(device) / memory)


def out_of_memory(error: BaseException) -> bool:
    # Newer hosts know more spellings of it than one class.
    return mm.is_oom(error) if hasattr(mm, "is_oom") else isinstance(error, mm.OOM_EXCEPTION)


def _room(device: torch.device, *staying: comfy.model_patcher.ModelPatcher) -> float:
    """Bytes for activations once ComfyUI has made all the room it can: every loaded model may leave
    but those that stay.
    """
    loaded = sum(
        patcher.loaded_size()
        for patcher in mm.loaded_models()
        if patcher and patcher.load_device == device
    )
    return (
        mm.get_free_memory(device)
        + loaded
        - sum(patcher.model_size() for patcher in staying)
        - mm.extra_reserved_memory()
    )


def _clamp(faces: float) -> int:
    return max(1, min(MOST_FACES_AT_ONCE, int(faces)))


# Progress


def progress(total: int) -> Callable[..., None]:
    """A function to call with the number of finished steps and a picture (3,H,W) or (1,H,W) in
    [0,1] or None.

    It moves ComfyUI's bar, shows the picture, and raises ComfyUI's own error when the user has
    asked to stop.
    """
    return stages(all=total)("all", total)


def stages(**shares: int) -> Callable[[str, int], Callable[..., None]]:
    """One bar over the stages of a job, each with its share of it. Called with a stage and its
    number of steps, gives its `progress`.

    The bar never goes back, however many steps a stage turns out to have, and whether it is begun
    at all.
    """
    bar = comfy.utils.ProgressBar(sum(shares.values()))
    starts = dict(zip(shares, itertools.accumulate(shares.values(), initial=0), strict=False))

    def begin(stage: str, total: int) -> Callable[..., None]:
        steps = 0

        def report(done: int = 1, picture: Tensor | None = None) -> None:
            nonlocal steps
            mm.throw_exception_if_processing_interrupted()
            if done:
                steps += done
                preview = None if picture is None else ("JPEG", _pil(picture), PREVIEW_SIDE)
                bar.update_absolute(
                    starts[stage] + shares[stage] * min(steps, total) // max(total, 1),
                    bar.total,
                    preview,
                )

        return report

    return begin


def shown(text: str) -> ui.PreviewText:
    """The text on the running node itself: as its output, and as the progress text that pages show
    on any node.
    """
    server, context = (
        getattr(sys.modules.get("server"), "PromptServer", None),
        get_executing_context(),
    )
    if context is not None and (instance := getattr(server, "instance", None)) is not None:
        instance.send_progress_text(text, context.node_id, instance.client_id)
    return ui.PreviewText(text)


def _pil(picture: Tensor) -> Image.Image:
    pixels = (picture.detach().float().clamp(0, 1) * 255).byte().movedim(0, -1).cpu().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])


# The base model


def check_model(model: Any) -> None:
    """Raises OSDFaceError unless MODEL is Stable Diffusion 2.1-base (or a fine-tune of it) sampled
    as it was trained.
    """
    base = getattr(model, "model", None)
    config = getattr(base, "model_config", None)
    unet = getattr(config, "unet_config", None) or {}
    given = type(config).__name__ if config is not None else type(model).__name__

    def refuse(what: str) -> NoReturn:
        raise OSDFaceError(
            f"`model` is {what}; OSDFace needs Stable Diffusion 2.1-base (512 px, epsilon). "
            f"{CHECKPOINT}"
        )

    if not is_builtin(base) and (
        unet.get("context_dim") != 1024 or unet.get("model_channels") != 320
    ):
        refuse(
            f"{given} (text width {unet.get('context_dim', 'unknown')}, UNet width "
            f"{unet.get('model_channels', 'unknown')})"
        )
    if unet.get("in_channels") != LATENT_CHANNELS:
        refuse(
            f"{given} with {unet.get('in_channels')} input channels, such as an inpainting or "
            f"depth model has"
        )
    if (
        unet.get("adm_in_channels") is not None
        or not unet.get("use_linear_in_transformer")
        or unet.get("use_temporal_attention")
    ):
        refuse(
            f"{given}, a variant of Stable Diffusion 2 with another UNet (unCLIP, video or the "
            f"like)"
        )
    sampling = model.get_model_object("model_sampling")
    kinds = comfy.model_sampling
    # V_PREDICTION and X0 are subclasses of EPS there.
    others = tuple(
        getattr(kinds, name) for name in ("V_PREDICTION", "X0", "EDM") if hasattr(kinds, name)
    )
    if isinstance(sampling, kinds.V_PREDICTION):
        refuse(
            f"{given} predicting v, such as Stable Diffusion 2.1 768-v, or patched to do so by a "
            f"node before this one"
        )
    if not isinstance(sampling, kinds.EPS) or isinstance(sampling, others):
        refuse(
            f"{given} that does not predict noise, or is patched not to by a node before this one"
        )
    sigmas = getattr(sampling, "sigmas", None)
    if not isinstance(sigmas, Tensor) or len(sigmas) != TIMESTEPS:
        refuse(f"{given} sampled without the {TIMESTEPS} discrete timesteps of Stable Diffusion")
    abar = alphas_cumprod()[TIMESTEP]
    wanted = float(((1 - abar) / abar) ** 0.5)
    if abs(float(sigmas[TIMESTEP]) - wanted) > 1e-3:
        refuse(
            f"{given} with a changed noise schedule (sigma {float(sigmas[TIMESTEP]):.3f} at step "
            f"{TIMESTEP} instead of {wanted:.3f})"
        )


def check_vae(vae: Any) -> None:
    """Raises OSDFaceError unless VAE has 4 latent channels at an eighth of the size."""
    if getattr(vae, "first_stage_model", None) is None:
        raise OSDFaceError(
            f"`vae` holds no autoencoder; the one of Stable Diffusion 2.1-base is wanted. "
            f"{CHECKPOINT}"
        )
    channels, stride = vae.latent_channels, vae.spacial_compression_encode()
    if channels != LATENT_CHANNELS or stride != STRIDE:
        raise OSDFaceError(
            f"`vae` makes latents of {channels} channels at 1/{stride} of the size; OSDFace needs "
            f"{LATENT_CHANNELS} at 1/{STRIDE}, "
            f"as the autoencoder of Stable Diffusion 2.1-base does. {CHECKPOINT}"
        )


def is_builtin(network: Any) -> bool:
    return bool(getattr(network, BUILTIN_MARK, False))


def check_together(model: Any, vae: Any, builtin_prompts: bool, lora: bool) -> None:
    """Raises OSDFaceError unless all of them, or none, are the built-in model's, which takes no
    LoRA.
    """
    of = {
        "`model`": is_builtin(model.model),
        "`vae`": is_builtin(vae.first_stage_model),
        "`conditioning`": builtin_prompts,
    }
    ours, others = ([name for name, known in of.items() if known == kind] for kind in (True, False))
    remedy = (
        "take model and vae from OSDFace Built-in Model with `builtin` as vre_name and `none` as "
        "lora_name, or none of these."
    )
    if ours and others:
        raise OSDFaceError(
            f"{' and '.join(ours)} of the small built-in model cannot go with another "
            f"{' and '.join(others)}: {remedy}"
        )
    if ours and lora:
        raise OSDFaceError(
            f"`lora_name` names OSDFace's LoRA, and the small built-in `model` takes none: {remedy}"
        )


# The LoRA


def with_lora(model: Any, path: Path, strength: float) -> Any:
    """A clone of MODEL with OSDFace's LoRA on all of its 278 modules; MODEL's own patches stay as
    they are.

    The clone lives as long as the MODEL: ComfyUI then keeps the merged weights from run to run, and
    finds the patches when it has to merge a part of them anew. Raises OSDFaceError if a tensor of
    the file, or a weight of the model, is left over.
    """
    state = fingerprint(path), strength, model.patches_uuid
    known = getattr(model, "osdface_clone", None)
    if known is None or known[0] != state:
        with naming("lora_name"):
            lora = once("lora", (path,), lambda: parse_lora(read_tensors(path), path.name))
        clone = _merged(model, lora, path.name, strength)
        # ComfyUI hands the loaded weights to the parent when a clone goes. The oldest one outlives
        # all that share them.
        while clone.parent is not None and clone.parent.parent is not None:
            clone.parent = clone.parent.parent
        model.osdface_clone = known = state, clone
    return known[1]


def _merged(model: Any, lora: dict[str, LoraModule], source: str, strength: float) -> Any:
    targets = {name: f"diffusion_model.{module.ldm}" for name, module in lora.items()}
    tensors = {}
    for name, module in lora.items():
        tensors[f"{name}.lora_down.weight"] = module.down
        tensors[f"{name}.lora_up.weight"] = module.up
        tensors[f"{name}.alpha"] = torch.tensor(module.scale * module.down.shape[0])
    if present := set(targets.values()) & set(model.patches):
        log.warning(
            "`model` already holds another LoRA on %d of the %d modules of %s: if that is "
            "OSDFace's own, choose `none` as lora_name.",
            len(present),
            len(targets),
            source,
        )
    clone = model.clone()
    if _as_fast_in_bf16(model):
        # As newer hosts' own set_model_compute_dtype does.
        clone.add_object_patch("manual_cast_dtype", torch.bfloat16)
    left_over = sorted(
        set(targets.values())
        - set(clone.add_patches(comfy.lora.load_lora(tensors, targets), strength))
    )
    if left_over:
        raise OSDFaceError(
            f"`model` has no weight for {len(left_over)} of the {len(targets)} modules of "
            f"{source} (such as {left_over[0]}). {CHECKPOINT}"
        )
    return clone


# The step


def _as_fast_in_bf16(model: Any) -> bool:
    """Whether the user asked for bf16 (--bf16-unet) on a CPU that computes in it, for which ComfyUI
    casts every weight to fp32.
    """
    base = model.model
    bf16 = base.get_dtype() == torch.bfloat16 and base.manual_cast_dtype is not None
    return bf16 and mm.is_device_cpu(model.load_device) and computes_in_bf16()


def _with_fused_attention(model: Any, model_options: dict[str, Any]) -> dict[str, Any]:
    """The sampler's options with torch's fused attention where ComfyUI would take the slower way
    that it has for CPUs.

    A way that the user or a node has chosen stays.
    """
    given = model_options.get("transformer_options", {})
    chosen = (
        mm.pytorch_attention_enabled()
        or args.use_split_cross_attention
        or args.use_quad_cross_attention
    )
    if chosen or not mm.is_device_cpu(model.load_device) or "optimized_attention_override" in given:
        return model_options

    def fused(usual: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
        return attention_pytorch(*inputs, **options)

    return model_options | {"transformer_options": given | {"optimized_attention_override": fused}}


class HostBackbone:
    """ComfyUI's MODEL and VAE as the core's Backbone.

    options: what nodes have added to the conditioning (hooks and the like); it goes along to the
    sampler. lora: file and strength. Raises OSDFaceError for a wrong base, autoencoder or LoRA.
    """

    def __init__(
        self,
        model: Any,
        vae: Any,
        options: dict[str, Any] | None = None,
        lora: tuple[Path, float] | None = None,
    ) -> None:
        check_model(model)
        check_vae(vae)
        self.options = dict(options or {})
        check_together(model, vae, self.options.pop(BUILTIN_MARK, False), lora is not None)
        self.model = model if lora is None else with_lora(model, *lora)
        self.vae = vae
        self.latent_format = model.get_model_object("latent_format")

    def encode(self, pixels: Tensor) -> Tensor:
        # Newer hosts may hand out half precision.
        with faster(self.vae.device, self.vae.first_stage_model):
            encoded = _face_by_face(self._encoded, pixels.movedim(1, -1))
        return self.latent_format.process_in(encoded)

    def _encoded(self, pixels: Tensor) -> Tensor:
        """Of one crop (1,H,W,3), kept with the VAE: with another strength or timestep the same
        crops come again.
        """
        kept = self.vae.__dict__.setdefault("osdface_latents", OrderedDict())
        network = id(self.vae.first_stage_model), self.vae.patcher.patches_uuid
        seen = (
            hashlib.blake2b(pixels.contiguous().numpy(force=True).data).digest(),
            tuple(pixels.shape),
            network,
        )
        latents = kept.pop(seen, None)
        if latents is None:
            # Newer hosts may hand out half precision.
            latents = self.vae.encode(pixels).float()
        kept[seen] = latents
        if len(kept) > MOST_LATENTS:
            kept.popitem(last=False)
        return latents

    def denoise(self, latents: Tensor, prompts: Tensor, timestep: int) -> Tensor:
        if len(latents) > 1 and mm.is_device_cpu(self.model.load_device):
            # Several at once take no less time there, and a face is the same to the bit, whoever
            # comes with it.
            faces = zip(latents.split(1), prompts.split(1), strict=True)
            return torch.cat([self.denoise(latent, prompt, timestep) for latent, prompt in faces])
        sigma = self.model.get_model_object("model_sampling").sigmas[timestep]
        guider = comfy.samplers.CFGGuider(self.model)
        guider.model_options = _with_fused_attention(self.model, guider.model_options)
        guider.inner_set_conds({"positive": [[prompts, dict(self.options)]]})
        x0 = guider.sample(
            torch.zeros_like(latents),
            self.latent_format.process_out(latents),
            comfy.samplers.KSAMPLER(_one_step),
            torch.stack([sigma, torch.zeros_like(sigma)]),
            disable_pbar=True,
        )
        return self.latent_format.process_in(x0.to(mm.intermediate_device()))

    def decode(self, latents: Tensor) -> Tensor:
        with faster(self.vae.device, self.vae.first_stage_model):
            return _face_by_face(self.vae.decode, self.latent_format.process_out(latents)).movedim(
                -1, 1
            )

    def faces_that_fit(self, height: int, width: int) -> int:
        device = self.model.load_device
        if mm.is_device_cpu(device):
            return 1
        one, two = (
            self.model.memory_required((n, LATENT_CHANNELS, height // STRIDE, width // STRIDE))
            for n in (1, 2)
        )
        # Newer hosts add what they want to keep free, however many faces there are.
        return _clamp(1 + (_room(device, self.model) - one) / (two - one))

    @contextmanager
    def precisely(self) -> Iterator[bool]:
        """The VAE's weights in fp32: its activations are the ones that leave the range of fp16."""
        vae = self.vae
        if vae.vae_dtype == torch.float32:
            yield False
            return
        self.vae = comfy.sd.VAE(sd=vae.get_sd(), device=vae.device, dtype=torch.float32)
        try:
            yield True
        finally:
            self.vae = vae

    def out_of_memory(self, error: BaseException) -> bool:
        return out_of_memory(error)


def _face_by_face(work: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """For the VAE, which wants the most memory for a face: so a run stops within one."""
    done = []
    for face in batch.split(1):
        mm.throw_exception_if_processing_interrupted()
        done.append(work(face))
    return torch.cat(done)


def _one_step(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Any = None,
    callback: Any = None,
    disable: Any = None,
) -> Tensor:
    """A sampler that calls the model once. The latent comes without noise, and the UNet is to see
    it unscaled: ComfyUI divides its input by sqrt(sigma^2 + 1), so it is multiplied by that here.
    """
    sigma = sigmas[0]
    return model(x * (1 + sigma**2) ** 0.5, sigma * x.new_ones(len(x)), **(extra_args or {}))
