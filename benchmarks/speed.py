"""Compares OSDFace in ComfyUI with the paper's released code: speed, agreement and memory.

    python -m benchmarks.speed --weights DIR [--data DIR] [--comfyui DIR] [--paper DIR]
                               [--precision fp32 bf16] [--faces 1 4 16] [--rounds 3]
                               [--parts faces pictures memory] [--small]
    python -m benchmarks.speed --method osediff --osediff FILE [--sides 512 1024] ...

Measured are time a face, stages, agreement, start, memory and whole pictures, all in one run.
--weights: Stable Diffusion 2.1-base and OSDFace's files, or stand-ins of the same shapes, laid out
as `sd21-diffusers/`, `v2-1_512-seeded.safetensors` and `osdface/`. --data: a folder with
images/portraits and weights/detection_mobilenet0.25_Final.pth; the tests' photographs and the
built-in detector without one. --paper: a checkout of jkwang28/OSDFace; left out without one.
--method osediff: OSEDiff from picture to picture, by the side of the result, with osediff.pkl;
--paper is then a checkout of cswry/OSEDiff. --small: crops of 72 x 64 px and few of them, pictures
by the built-in model, to see that all of it runs. Each program runs in its own process and waits
while another runs. On a machine with CUDA both run there, otherwise on the CPU; the released code
is then given a CUDA that does nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tests import photographs
from tests.widgets import FIND, PASTE

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = "v2-1_512-ema-pruned.safetensors"
LORA, VRE, DETECTOR = (
    "pytorch_lora_weights.safetensors",
    "associate_2.ckpt",
    "detection_mobilenet0.25_Final.pth",
)
PICTURES = {"1080p": (1920, 1080), "4K": (3840, 2160), "640 x 360": (640, 360)}
# Width and height of a crop; not square, because squares are enlarged to 512.
CROP, SMALL_CROP = (512, 512), (72, 64)
# How ComfyUI uses the card's memory, by the options of its start.
MODES = {"": [], "lowvram": ["--lowvram"], "novram": ["--novram"]}
STAGES = ("prompts", "encode", "step", "decode")
CUDA = torch.cuda.is_available()


# Common to both programs


def crops(portraits: Path, count: int, size: tuple[int, int] = CROP) -> Tensor:
    """Crops (count,h,w,3) in [0,1]: portraits degraded by shrinking to 64 px.

    size: width and height.
    """
    small = torch.nn.functional.interpolate(
        squares(portraits, count, 64).movedim(-1, 1), size[::-1], mode="bicubic"
    )
    return small.clamp(0, 1).movedim(1, -1).contiguous()


def default_data(folder: Path) -> Path:
    """The tests' photographs and the built-in detector, laid out as --data."""
    for part in ("weights", "images/portraits"):
        (folder / part).mkdir(parents=True)
    photographs.write_detector(folder / "weights")
    for name, picture in (
        ("astronaut", photographs.astronaut().crop(photographs.HEAD).resize((512, 432))),
        ("portrait", photographs.portrait()),
    ):
        picture.save(folder / "images" / "portraits" / f"{name}.jpg", quality=95)
    return folder


def squares(portraits: Path, count: int, side: int) -> Tensor:
    """Portraits (count,side,side,3) in [0,1]."""
    files = sorted(portraits.glob("*.jpg"))
    images = (
        Image.open(files[i % len(files)]).resize((side, side), Image.Resampling.LANCZOS)
        for i in range(count)
    )
    return torch.stack([as_tensor(image) for image in images])


def as_tensor(image: Image.Image) -> Tensor:
    """(H,W,3) in [0,1]."""
    return torch.from_numpy(photographs.pixels(image)).float() / 255


def group(portraits: Path, faces: int, width: int, height: int) -> Tensor:
    """A picture (1,height,width,3) in [0,1] with `faces` portraits side by side."""
    columns = math.ceil(math.sqrt(faces * width / height))
    side = min(width // columns, height // math.ceil(faces / columns))
    picture = torch.full((1, height, width, 3), 0.5)
    for i, square in enumerate(squares(portraits, faces, side)):
        row, column = divmod(i, columns)
        picture[0, row * side : (row + 1) * side, column * side : (column + 1) * side] = square
    return picture


def moment() -> float:
    """The time in seconds, once the GPU has finished its work."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(reset: bool = False) -> float:
    """Peak memory in MiB since the last reset: of the card where there is one, else of the process.

    The process's is known only on Linux.
    """
    if CUDA:
        most = torch.cuda.max_memory_allocated() / 2**20
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return most
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return next(
        int(line.split()[1]) / 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )


# The released code


class Paper:
    """The released code: its class and its forward as they are.

    Only loading and the choice of the device are done here.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        from diffusers import AutoencoderKL, DDIMScheduler
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        sys.path[:0] = [str(given.paper)]
        for name in (
            "matplotlib",
            "matplotlib.pyplot",
            "matplotlib.backends",
            "matplotlib.backends.backend_agg",
            "imageio",
            "imageio.v2",
        ):
            sys.modules.setdefault(name, types.ModuleType(name))  # only training uses them
        sys.modules["matplotlib.backends.backend_agg"].FigureCanvasAgg = object  # type: ignore[attr-defined]
        if not CUDA:
            torch.cuda.Stream = torch.cuda.stream = lambda *_: contextlib.nullcontext()  # type: ignore[assignment, misc]
            torch.cuda.synchronize = torch.cuda.empty_cache = torch.cuda.reset_peak_memory_stats = (
                lambda *_: None
            )  # type: ignore[assignment]
            torch.cuda.max_memory_allocated = lambda *_: 0
        os.chdir(given.paper)
        import infer

        # Its draw from the posterior is random; the mean takes as long and can be compared.
        DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()

        base = given.weights / "sd21-diffusers"
        flags = ["merge_lora"], ["cat_prompt_embedding", "use_pos_embedding", "use_att_pool"]
        options = argparse.Namespace(
            **dict.fromkeys(flags[0], True),
            **dict.fromkeys(flags[1], False),
            lora_rank=16,
            lora_alpha=16.0,
        )
        options.pretrained_model_name_or_path, options.ckpt_path = (
            str(base),
            str(given.weights / "osdface"),
        )
        options.img_encoder_weight = str(given.weights / "osdface" / VRE)
        self.device = torch.device("cuda:0" if CUDA else "cpu")
        self.dtype = {"fp32": torch.float32, "fp16": torch.float16}[given.kind]
        program = infer.OSDFace_test.__new__(infer.OSDFace_test)
        torch.nn.Module.__init__(program)
        program.args, program.device, program.weight_dtype, program.timesteps = (
            options,
            self.device,
            self.dtype,
            399,
        )
        program.noise_scheduler = DDIMScheduler.from_pretrained(base, subfolder="scheduler")
        program.alphas_cumprod = program.noise_scheduler.alphas_cumprod.to(self.device)
        program.vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
        program.unet = infer.merge_Unet(options)
        program.load_ckpt(options.ckpt_path)
        program.img_encoder = infer.vqvae_encoder(options)
        self.program = program.to(self.device, dtype=self.dtype)

    def faces(self, pictures: Tensor) -> tuple[Tensor, dict[str, float]]:
        done = []
        for picture in pictures:
            pixels = picture.movedim(-1, 0)[None].to(self.device, self.dtype) * 2 - 1
            done.append(self.program(pixels).cpu().float().movedim(1, -1))
        return torch.cat(done), {}


# Ours


class Ours:
    """The nodes, called as ComfyUI calls them, in ComfyUI's process."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.base = base = Path(tempfile.mkdtemp())
        for name in ("checkpoints", "osdface", "loras", "facedetection"):
            (base / "models" / name).mkdir(parents=True)
        for name in ("custom_nodes", "input", "output", "user"):
            (base / name).mkdir()
        (base / "models" / "checkpoints" / CHECKPOINT).symlink_to(
            given.weights / "v2-1_512-seeded.safetensors"
        )
        (base / "models" / "facedetection" / DETECTOR).symlink_to(given.data / "weights" / DETECTOR)
        for file in (given.weights / "osdface").iterdir():
            (base / "models" / "osdface" / file.name).symlink_to(file)
        (base / "custom_nodes" / "osdface").symlink_to(ROOT)
        flags = {
            "fp32": ["--force-fp32"],
            "fp16": ["--fp16-unet", "--fp16-vae"],
            "bf16": ["--bf16-unet", "--bf16-vae"],
        }[given.kind]
        sys.argv = [
            "main.py",
            *([] if CUDA else ["--cpu"]),
            *flags,
            *MODES[given.mode],
            "--base-directory",
            str(base),
            "--user-directory",
            str(base / "user"),
        ]
        sys.path[:] = [
            str(given.comfyui),
            *(p for p in sys.path if Path(p or ".").resolve() != ROOT),
        ]
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.sd

        import nodes

        pack = base / "custom_nodes" / "osdface"
        assert asyncio.run(nodes.load_custom_node(str(pack))), "ComfyUI could not load the pack"
        self.nodes = nodes.NODE_CLASS_MAPPINGS
        checkpoint = str(base / "models" / "checkpoints" / CHECKPOINT)
        self.model, _, self.vae, _ = comfy.sd.load_checkpoint_guess_config(
            checkpoint, output_vae=True, output_clip=False
        )
        self.networks = self.model, self.vae, VRE, LORA
        # Those that pictures are restored by: at full size a CPU would need minutes.
        self.of_pictures = self.networks
        if given.small:
            self.of_pictures = (*self.call("OSDFaceBuiltinModel"), "builtin", "none")
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.portraits, self.without = given.data / "images" / "portraits", False
        self.rooms = rooms = str(pack).replace(".", "_x_") + ".nodes.comfy"
        self.backbone = backbone = sys.modules[f"{rooms}.backbone"].HostBackbone
        networks = sys.modules[f"{rooms}.networks"]
        self._time(
            backbone,
            "encode",
            "encode",
            lambda of, pixels: torch.zeros(len(pixels), 4, 64, 64),
        )
        self._time(backbone, "denoise", "step", lambda of, latents, prompts, timestep: latents)
        self._time(
            backbone,
            "decode",
            "decode",
            lambda of, latents: torch.full((len(latents), 3, 512, 512), 0.5),
        )
        self._time(
            networks,
            "embed",
            "prompts",
            lambda pictures, *_, **__: torch.zeros(len(pictures), 77, 1024),
        )

    def _time(self, place: Any, name: str, stage: str, instead: Callable[..., Tensor]) -> None:
        usual = getattr(place, name)

        def timed(*arguments: Any, **named: Any) -> Tensor:
            start = moment()
            try:
                return (instead if self.without else usual)(*arguments, **named)
            finally:
                self.seconds[stage] += moment() - start

        setattr(place, name, timed)

    def call(self, node: str, **inputs: Any) -> tuple[Any, ...]:
        with torch.inference_mode():
            return self.nodes[node].execute(**inputs).args

    def faces(self, pictures: Tensor, **changed: Any) -> tuple[Tensor, dict[str, float]]:
        self.seconds.update(dict.fromkeys(STAGES, 0.0))
        if not changed:
            self.vae.__dict__.pop("osdface_latents", None)
        return self.restored(pictures, **changed), dict(self.seconds)

    def restored(self, pictures: Tensor, by: Any = None, **changed: Any) -> Tensor:
        model, vae, vre_name, lora_name = by or self.networks
        (conditioning,) = self.call("OSDFaceVRE", crops=pictures, vre_name=vre_name)
        step = {
            "lora_name": lora_name,
            "lora_strength": 1.0,
            "timestep": 399,
            "faces_per_batch": 0,
        } | changed
        (done,) = self.call(
            "OSDFaceOneStep",
            model=model,
            vae=vae,
            crops=pictures,
            conditioning=conditioning,
            **step,
        )
        return done

    def picture(self, picture: Tensor, networks: bool) -> tuple[int, dict[str, float]]:
        """Restores a picture, pasting by an ellipse.

        Returns the number of faces and the seconds of each stage. networks: False leaves them out.
        """
        self.without = not networks
        self.seconds.update(dict.fromkeys(STAGES, 0.0))
        self.vae.__dict__.pop("osdface_latents", None)
        faces, pictures, *_ = self.call("FaceDetectAlign", image=picture, **FIND)
        restored = self.restored(pictures, self.of_pictures)
        self.call("FacePasteBack", image=picture, faces=faces, restored=restored, **PASTE)
        self.without = False
        return len(faces), dict(self.seconds)


def method(given: argparse.Namespace) -> tuple[Any, Callable[[int], Tensor]]:
    """The program of a worker, and its input for a number of faces or a side in pixels."""
    if given.method == "osediff":
        from benchmarks import osediff

        program = osediff.Paper if given.worker == "paper" else osediff.Ours
        return program(given), partial(osediff.inputs, given)
    most = max(given.faces) if given.small else max(*given.faces, 64)
    size = SMALL_CROP if given.small else CROP
    pictures = crops(given.data / "images" / "portraits", most, size)
    return (Paper if given.worker == "paper" else Ours)(given), lambda count: pictures[:count]


def work(given: argparse.Namespace) -> None:
    """A program's process: each line of JSON on stdin is answered by one on stdout."""
    lines, sys.stdout = sys.stdout, sys.stderr
    arguments = given.kind, given.worker
    program, inputs = method(given)

    def say(**what: Any) -> None:
        print(json.dumps(what), file=lines, flush=True)

    say(ready=arguments, peak=memory())
    for line in sys.stdin:
        order = json.loads(line)
        memory(reset=True)
        start = moment()
        if order["do"] == "faces":
            result, stages = program.faces(inputs(order["count"]), **order.get("changed", {}))
            seconds, most = moment() - start, memory()
            torch.save(result, order["out"])
            say(seconds=seconds, stages=stages, peak=most)
        else:
            width, height = order["size"]
            frame = group(program.portraits, order["faces"], width, height)
            batch = frame.expand(order["frames"], -1, -1, -1) if order["frames"] > 1 else frame
            start = moment()
            found, stages = program.picture(batch, order["networks"])
            say(seconds=moment() - start, stages=stages, found=found, peak=memory())


# The table


class Program:
    def __init__(
        self, name: str, kind: str, given: argparse.Namespace, folder: Path, mode: str = ""
    ) -> None:
        self.title, self.out = f"{name} {kind} {mode}".strip(), folder / f"{name}_{kind}.pt"
        passed = [
            "--weights",
            given.weights,
            "--data",
            given.data,
            "--comfyui",
            given.comfyui,
            "--faces",
            *given.faces,
        ]
        passed += ["--paper", given.paper] if given.paper else []
        passed += ["--mode", mode] if mode else []
        passed += ["--method", given.method]
        passed += ["--osediff", given.osediff] if given.osediff else []
        passed += ["--small"] if given.small else []
        self.log = folder / f"{name}_{kind}.log"
        command = [
            sys.executable,
            "-m",
            "benchmarks.speed",
            "--worker",
            name,
            "--kind",
            kind,
            *map(str, passed),
        ]
        start = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.peak = self._answer()["peak"]
        self.started = time.perf_counter() - start

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.title} ended:\n{self.log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(what | {"out": str(self.out)}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def result(self) -> Tensor:
        made: Tensor = torch.load(self.out)
        return made


@contextlib.contextmanager
def programs(
    given: argparse.Namespace, folder: Path, kinds: list[tuple[str, str]], mode: str = ""
) -> Iterator[list[Program]]:
    started: list[Program] = []
    try:
        for name, kind in kinds:
            started.append(Program(name, kind, given, folder, mode))
        yield started
    finally:
        for program in started:
            program.process.kill()
            program.process.wait()


def agreement(given: Tensor, right: Tensor) -> str:
    apart = given - right
    psnr = float(-10 * apart.square().mean().clamp_min(1e-20).log10())
    return f"{float(apart.abs().max()):.1e}, {psnr:.0f} dB"


def faces_table(given: argparse.Namespace, started: list[Program]) -> None:
    print("| program | start s | memory then MiB | first face s |\n|---|---|---|---|")
    for program in started:
        first = program.ask(do="faces", count=given.faces[0])
        print(
            f"| {program.title} | {program.started:.1f} | {program.peak:.0f} | "
            f"{first['seconds']:.1f} |",
            flush=True,
        )
    of_stages = STAGES if given.method == "osdface" else STAGES[1:]
    columns = (
        "faces" if given.method == "osdface" else "px a side",
        "program",
        "s a face" if given.method == "osdface" else "s a picture",
        "ratio",
        f"{', '.join(of_stages)}, rest %",
        "most memory MiB",
        "apart from the first",
    )
    print(f"\n| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|")
    a_face = math.inf
    for count in given.faces:
        each = count if given.method == "osdface" else 1
        best: dict[str, dict[str, Any]] = {}
        # The released code takes one face after the other: on a CPU, where that takes minutes,
        # larger counts tell nothing new.
        taking = [
            program
            for program in started
            if each <= 4 or CUDA or not program.title.startswith("paper")
        ]
        for _ in range(given.rounds if each == 1 or CUDA else 1):
            for program in taking:
                answer = program.ask(do="faces", count=count)
                if program.title not in best or answer["seconds"] < best[program.title]["seconds"]:
                    best[program.title] = answer
        right = taking[0].result()
        a_face = (
            min(a_face, best[taking[0].title]["seconds"] / each) if taking == started else a_face
        )
        if given.method == "osediff":
            a_face = best[taking[0].title]["seconds"]
        for program in taking:
            answer = best[program.title]
            seconds, stages = answer["seconds"], list(answer["stages"].values())
            shares = [100 * s / seconds for s in [*stages, seconds - sum(stages)]] if stages else []
            row = [
                count,
                program.title,
                f"{seconds / each:.2f}",
                f"{seconds / each / a_face:.3f}",
            ]
            row += [", ".join(f"{s:.1f}" for s in shares) or "-", f"{answer['peak']:.0f}"]
            row.append(agreement(program.result(), right) if taking == started else "-")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print()
    if given.method == "osediff":
        return
    for program in (p for p in started if p.title.startswith("ours")):
        anew, again = (
            program.ask(do="faces", count=1, changed=c)
            for c in ({"timestep": 300}, {"lora_strength": 0.9})
        )
        seconds = [f"{answer['seconds']:.2f} s" for answer in (anew, again)]
        print(
            f"{program.title}, the same crop again: another timestep {seconds[0]}, another "
            f"lora_strength {seconds[1]}\n"
        )


def pictures_table(given: argparse.Namespace, ours: Program, a_face: float) -> None:
    print(
        "\n| picture | faces found | s without the networks | share of the whole % | measured "
        "whole s, its share % |"
    )
    print("|---|---|---|---|---|")
    jobs = [(name, faces, 1) for name in ("1080p", "4K") for faces in (6, 20)] + [
        ("640 x 360", 1, 200)
    ]
    if given.small:
        jobs = [("1080p", 6, 1), ("640 x 360", 1, 3)]
    for name, faces, frames in jobs:
        order = {"do": "picture", "faces": faces, "size": PICTURES[name], "frames": frames}
        answer = min(
            (ours.ask(**order, networks=False) for _ in range(2)), key=lambda a: a["seconds"]
        )
        rest = answer["seconds"] - sum(answer["stages"].values())
        whole = "-"
        # On a CPU the whole takes minutes.
        if (name, faces, frames) == ("1080p", 6, 1) or CUDA or given.small:
            full = ours.ask(**order, networks=True)
            share = 100 * (1 - sum(full["stages"].values()) / full["seconds"])
            whole = f"{full['seconds']:.1f}, {share:.1f}"
        title = f"{name}, {frames} frames" if frames > 1 else name
        share = 100 * rest / (rest + answer["found"] * a_face)
        print(f"| {title} | {answer['found']} | {rest:.2f} | {share:.1f} | {whole} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument(
        "--comfyui",
        type=Path,
        default=Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI")),
    )
    parser.add_argument("--paper", type=Path)
    parser.add_argument("--method", choices=["osdface", "osediff"], default="osdface")
    parser.add_argument("--osediff", type=Path, help="osediff.pkl, or a stand-in of its shapes")
    parser.add_argument("--sides", nargs="*", type=int, default=[512, 1024])
    parser.add_argument(
        "--precision", nargs="*", choices=["fp32", "fp16", "bf16"], default=["fp32", "bf16"]
    )
    parser.add_argument("--faces", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--parts",
        nargs="*",
        choices=["faces", "pictures", "memory"],
        default=["faces", "pictures", "memory"],
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--mode", choices=list(MODES), default="", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=["paper", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.weights, given.comfyui = given.weights.resolve(), given.comfyui.resolve()
    given.data, given.paper, given.osediff = (
        path and path.resolve() for path in (given.data, given.paper, given.osediff)
    )
    if given.method == "osediff":
        given.faces, given.parts = given.sides, ["faces"]
    if given.worker:
        work(given)
        return
    print(
        f"{torch.cuda.get_device_name() if CUDA else processor()}, {os.cpu_count()} threads, "
        f"torch {torch.__version__}\n"
    )
    # Two at a time, so that 16 GiB of memory are enough.
    truth = ("paper", "fp32") if given.paper else ("ours", "fp32")
    with tempfile.TemporaryDirectory() as folder:
        given.data = given.data or default_data(Path(folder) / "data")
        for kind in given.precision if "faces" in given.parts else ():
            # On a card the released code runs in fp16.
            first = ("paper", "fp16") if given.paper and kind == "fp16" and CUDA else truth
            kinds = list(dict.fromkeys([first, ("ours", kind)]))
            with programs(given, Path(folder), kinds) as started:
                faces_table(given, started)
        if "pictures" in given.parts:
            with programs(given, Path(folder), [("ours", given.precision[0])]) as (ours,):
                pictures_table(
                    given, ours, min(ours.ask(do="faces", count=1)["seconds"] for _ in range(3))
                )
        if "memory" in given.parts:
            print("\n| faces at once in the nodes | most memory MiB |\n|---|---|")
            # A CPU's peak is the process's, so each count has its own.
            counts = given.faces if given.small else sorted({*given.faces, 64})
            jobs = [("", [count]) for count in (4, 64)]
            if CUDA or given.small:
                jobs = [("", counts), *((mode, counts[-2:-1]) for mode in MODES if mode)]
            for mode, of_mode in jobs:
                if mode and not CUDA:
                    continue  # ComfyUI takes these options on a card alone.
                kind = [("ours", given.precision[-1])]
                with programs(given, Path(folder), kind, mode) as (ours,):
                    for count in of_mode:
                        answer = ours.ask(do="faces", count=count)
                        print(
                            f"| {count} ({ours.title}) | {answer['peak']:.0f} |",
                            flush=True,
                        )


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                amx = " with AMX" if "amx_tile" in Path("/proc/cpuinfo").read_text() else ""
                return line.split(":", 1)[1].strip() + amx
    return platform.processor()


if __name__ == "__main__":
    main()
