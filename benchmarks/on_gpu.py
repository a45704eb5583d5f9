"""What benchmarks/on_gpu.sh runs: each part in a process of its own, with a limit of time.

    python -m benchmarks.on_gpu --kit DIR --out DIR [--dry-run cpu] [--weights DIR]
                                [--only PART ...]

The parts, in the order of what matters most: tests, golden, speed, memory, options, pictures. Each
writes its table to OUT/report.md when it ends, and all it says to OUT/PART.log. --weights: ready
stand-ins (sd21-diffusers/, v2-1_512-seeded.safetensors, osdface/); drawn without.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import speed

ROOT = Path(__file__).resolve().parents[1]
# Seconds for everything, of which a later part gets what the earlier ones have left.
SECONDS = 520
PRECISIONS = ("fp32", "fp16", "bf16")
TESTS = ("tests/test_other_device.py", "tests/test_one_step.py", "tests/test_host.py")
CROPS = ("astronaut_lq", "many_codes")
STAGES = ("prompt", "latent", "x0", "image")
# Batches of the options' table, and the side of their latents.
BATCHES, SIDE = (1, 16), 64


@dataclass(frozen=True)
class Part:
    """A part of the run.

    seconds: its limit.
    commands: run at once, each a list of words after `python`.
    beside: whether it may run while another does, since it measures no time.
    table: whether its output is a table for the report, or a log whose end is enough.
    """

    seconds: int
    commands: list[list[str]] = field(default_factory=list)
    beside: bool = False
    table: bool = True


def parts(given: argparse.Namespace) -> dict[str, Part]:
    small = bool(given.dry_run)
    weights, comfyui = ["--weights", str(given.weights)], ["--comfyui", str(given.kit / "comfyui")]
    paper = given.kit / "paper"
    of_speed = ["-m", "benchmarks.speed", *weights, *comfyui, *(["--small"] if small else [])]
    with_paper = ["--paper", str(paper)] if paper.is_dir() else []
    me = ["-m", "benchmarks.on_gpu", "--kit", str(given.kit), "--out", str(given.out), *weights]
    me += ["--dry-run", given.dry_run] if small else []
    faces = ["--faces", "1", "2"] if small else ["--faces", "1", "4", "16"]
    # A CPU has no fp16 worth waiting for.
    kind = "bf16" if small else "fp16"
    precisions = ("fp32", "bf16") if small else PRECISIONS
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-rfE"]
    chosen = ["-k", "accelerator or other_device"] if small else []
    return {
        "tests": Part(150, [[*tests, *TESTS, *chosen]], beside=True, table=False),
        "golden": Part(
            150, [[*me, "--worker", "golden", "--kind", kind] for kind in precisions], beside=True
        ),
        "speed": Part(
            130,
            [
                [
                    *(*of_speed, *with_paper, *faces, "--parts", "faces", "--precision", kind),
                    *("--rounds", "1" if small else "3"),
                ]
            ],
        ),
        "memory": Part(100, [[*of_speed, *faces, "--parts", "memory", "--precision", kind]]),
        "options": Part(120, [[*me, "--worker", "options", "--kind", kind]]),
        "pictures": Part(90, [[*of_speed, "--parts", "pictures", "--precision", kind]]),
    }


# The run


def draw_weights(given: argparse.Namespace) -> None:
    """Draws the stand-ins, each file in a process of its own."""
    script = [sys.executable, str(ROOT / "tests" / "golden" / "make_weights.py")]
    kinds = ["checkpoint", "osdface", *(["diffusers"] if (given.kit / "paper").is_dir() else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "4"}
    drawing = [
        subprocess.Popen([*script, "--out", str(given.weights), "--only", kind], env=environment)
        for kind in kinds
    ]
    if any([process.wait() for process in drawing]):
        raise SystemExit("the stand-in weights could not be drawn")


class Run:
    """Starts parts, waits for them, writes what they said."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.end = time.monotonic() + (3600 if given.dry_run else SECONDS)
        self.report = given.out / "report.md"
        self.environment = os.environ | {
            "OSDFACE_TEST_STAND_INS": str(given.weights),
            "COMFYUI_PATH": str(given.kit / "comfyui"),
            **({} if given.dry_run else {"OSDFACE_TEST_DEVICE": "cuda"}),
        }

    def write(self, text: str) -> None:
        print(text, flush=True)
        with self.report.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def start(self, name: str, part: Part) -> list[tuple[Any, Path]]:
        started = []
        for i, words in enumerate(part.commands):
            log = self.given.out / f"{name}{i or ''}.log"
            with log.open("w") as out:
                process = subprocess.Popen(
                    [sys.executable, *words],
                    cwd=ROOT,
                    env=self.environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            started.append((process, log))
        return started

    def finish(self, name: str, part: Part, started: list[tuple[Any, Path]], since: float) -> bool:
        """Writes what a part has said, when it has ended or its time is over."""
        limit = 3600 if self.given.dry_run else part.seconds
        until = min(since + limit, self.end)
        fine = True
        texts = []
        for process, log in started:
            try:
                code = process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = "stopped: its time was over"
            lines = log.read_text(errors="replace").splitlines()
            if part.table and code == 0:
                # Its tables and their heads; a table wants an empty line before it.
                lines = [line for line in lines if line.startswith(("|", "**")) or not line]
            else:
                lines = ["```", *lines[-40:], "```"]
            if code != 0:
                lines.append(f"**exit {code}**")
                fine = False
            texts.append("\n".join(lines))
        # One log for a part: only so many files come back from a machine that is lent.
        (_, first), *others = started
        for _, log in others:
            with first.open("a") as whole:
                whole.write(log.read_text(errors="replace"))
            log.unlink()
        seconds = time.monotonic() - since
        self.write(f"\n## {name} ({seconds:.0f} s)\n\n" + "\n\n".join(texts))
        return fine

    def all(self) -> bool:
        self.write(f"# {machine()}")
        start = time.monotonic()
        if not self.given.ready:
            draw_weights(self.given)
            self.write(f"\nStand-in weights drawn in {time.monotonic() - start:.0f} s.")
        todo = {
            name: part
            for name, part in parts(self.given).items()
            if name in (self.given.only or [name])
        }
        fine = True
        beside = [] if self.given.dry_run else [name for name, part in todo.items() if part.beside]
        since = time.monotonic()
        running = {name: self.start(name, todo[name]) for name in beside}
        for name, part in todo.items():
            if name not in running:
                since = time.monotonic()
                running[name] = self.start(name, part)
            fine &= self.finish(name, part, running[name], since)
        self.write(f"\n{time.monotonic() - start:.0f} s in all.")
        return fine


def machine() -> str:
    name = torch.cuda.get_device_name() if speed.CUDA else speed.processor()
    return (
        f"{name}, {os.cpu_count()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


# Golden: each stage beside what the released code gives in fp32


def golden(given: argparse.Namespace) -> None:
    """Each stage on its own, with the released code's input to it, so that errors do not add up."""
    from PIL import Image
    from safetensors.torch import load_file

    # As the aim has it. The product leaves torch's switches as the host has set them.
    torch.backends.cudnn.allow_tf32 = False
    ours = speed.Ours(given)
    places = ROOT / "tests" / "golden"
    print(f"**{given.kind}**\n")
    print("| crop | stage | largest difference | PSNR dB |\n|---|---|---|---|")
    for name in CROPS:
        truth = load_file(places / f"{name}.safetensors")
        with Image.open(places / "inputs" / f"{name}.png") as file:
            crop = speed.as_tensor(file)[None]
        with torch.inference_mode():
            ((prompts, _),) = ours.call("OSDFaceVRE", crops=crop, vre_name=speed.VRE)[0]
            host = ours.backbone(ours.model, ours.vae, {}, speed.LORA)
            given_prompt = truth[f"{name}.prompt"].to(prompts)
            latents = host.encode(crop.movedim(-1, 1))
            x0 = host.denoise(truth[f"{name}.latent"].to(latents), given_prompt, 399)
            wanted = {stage: truth[f"{name}.{stage}"] for stage in ("prompt", "latent", "x0")}
            ordered = in_order_of(prompts, wanted["prompt"])
            made = {"prompt": ordered, "latent": latents, "x0": x0}
            if f"{name}.image" in truth:
                image = host.decode(truth[f"{name}.x0"].to(x0))
                made["image"], wanted["image"] = image, truth[f"{name}.image"]
        for stage in STAGES:
            if stage in made:
                largest, psnr = apart(made[stage], wanted[stage])
                print(f"| {name} | {stage} | {largest:.1e} | {psnr:.0f} |", flush=True)
        chain = ours.restored(crop)
        if "image" in made:
            largest, psnr = apart(chain.movedim(-1, 1), wanted["image"])
            print(f"| {name} | all of it | {largest:.1e} | {psnr:.0f} |", flush=True)


def in_order_of(prompt: Tensor, wanted: Tensor) -> Tensor:
    """A prompt (1,77,1024) with its rows, whose order has no meaning, each beside the nearest."""
    rows = prompt[0].float().cpu()
    return rows[torch.cdist(wanted[0].float(), rows).argmin(1)][None]


def apart(made: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The largest difference, and the PSNR by the range of the truth."""
    made, wanted = made.float().cpu(), wanted.float().cpu()
    error = float((made - wanted).square().mean())
    span = float(wanted.max() - wanted.min())
    psnr = float(10 * torch.log10(torch.tensor(span**2 / max(error, 1e-30))))
    return float((made - wanted).abs().max()), psnr


# Options: each beside the same without it


def options(given: argparse.Namespace) -> None:
    """Time of UNet, encoder and decoder, as they are and by what a card may gain from."""
    ours = speed.Ours(given)
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[given.kind]
    device = torch.device("cuda" if speed.CUDA else "cpu")
    side = 8 if given.small else SIDE
    vae = ours.vae.first_stage_model.to(device, kind)
    unet = ours.model.model.diffusion_model.to(device, kind)
    print(f"**{given.kind}**\n")
    print("| network | batch | option | ms a face | time beside without | difference |")
    print("|---|---|---|---|---|---|")
    for batch in BATCHES[:1] if given.small else BATCHES:
        x = torch.randn(batch, 4, side, side, device=device, dtype=kind)
        context = torch.randn(batch, 77, 1024, device=device, dtype=kind)
        time_step = torch.full((batch,), 399, device=device)
        pixels = torch.rand(batch, 3, 8 * side, 8 * side, device=device, dtype=kind) * 2 - 1
        calls: dict[str, tuple[Any, Callable[[], Tensor]]] = {
            "decoder": (vae, lambda x=x: vae.decode(x)),  # type: ignore[misc]
            "encoder": (vae, lambda x=pixels: vae.encode(x)),  # type: ignore[misc]
            "UNet": (
                unet,
                lambda x=x, t=time_step, c=context: unet(x, t, context=c),  # type: ignore[misc]
            ),
        }
        for name, (network, call) in calls.items():
            for row in compared(network, call, batch, given.small):
                print(f"| {name} | {batch} | " + " | ".join(row) + " |", flush=True)


def compared(
    network: torch.nn.Module, call: Callable[[], Tensor], batch: int, small: bool
) -> Iterator[tuple[str, str, str, str]]:
    rounds = 1 if small else 10
    plain, truth = clocked(call, rounds)
    yield "none", f"{1000 * plain / batch:.1f}", "1.000", "0"

    def row(
        name: str, other: Callable[[], Tensor], after: Callable[[], None] = lambda: None
    ) -> tuple[str, str, str, str]:
        try:
            seconds, made = clocked(other, rounds)
            after()
        except Exception as error:  # an option that fails here must not end the table
            return name, "-", "-", f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        difference = float((made.float() - truth.float()).abs().max())
        again, _ = clocked(call, rounds)
        ratio = seconds / min(plain, again)
        return name, f"{1000 * seconds / batch:.1f}", f"{ratio:.3f}", f"{difference:.1e}"

    def in_channels_last() -> Tensor:
        network.to(memory_format=torch.channels_last)
        return call()

    def as_it_was() -> None:
        network.to(memory_format=torch.contiguous_format)

    yield row("channels-last", in_channels_last, as_it_was)
    if speed.CUDA:
        yield row("CUDA graph", graphed(call))
    if batch == 1 or not speed.CUDA:
        yield row("torch.compile", torch.compile(call, dynamic=False))
        torch._dynamo.reset()


def graphed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`call` recorded as a CUDA graph; its input stays where it was."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def clocked(call: Callable[[], Tensor], rounds: int) -> tuple[float, Tensor]:
    """The best time of a call in seconds, after one that warms it up, and its result."""
    best = float("inf")
    with torch.inference_mode():
        result = call()
        for _ in range(rounds):
            start = speed.moment()
            result = call()
            best = min(best, speed.moment() - start)
        return best, result.clone()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--dry-run", choices=["cpu"])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--worker", choices=["golden", "options"], help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=PRECISIONS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.kit, given.out = given.kit.resolve(), given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    given.comfyui, given.small = given.kit / "comfyui", bool(given.dry_run)
    if given.worker:
        work(given)
        return
    if not given.dry_run and not speed.CUDA:
        raise SystemExit("torch finds no CUDA here: --dry-run cpu runs all of it at small size.")
    with tempfile.TemporaryDirectory() as folder:
        given.ready, given.weights = bool(given.weights), given.weights or Path(folder)
        if not Run(given).all():
            raise SystemExit("not all of it went well; see report.md")


def work(given: argparse.Namespace) -> None:
    given.mode, given.paper = "", None
    with tempfile.TemporaryDirectory() as folder:
        given.data = speed.default_data(Path(folder) / "data")
        {"golden": golden, "options": options}[given.worker](given)


if __name__ == "__main__":
    main()
