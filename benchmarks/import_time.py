"""Time that the pack takes to import inside ComfyUI, beside torch's and ComfyUI's.

    python -m benchmarks.import_time [path of ComfyUI]

Or what a run of `restore` with the built-in model takes of the processor, and where:

    python -m benchmarks.import_time --restore [CHECKOUT ...] [--rounds 3]

For each checkout of this project, the first of them this one; the others' ratios to it are given.
Seconds of user and system time together, so that what else runs matters little; the least of the
rounds. One thread, and as many as there are processors: what two threads take beyond one, they
have waited.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import sys, time
start = time.perf_counter()
import torch
torch_time = time.perf_counter() - start
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, {comfyui!r})
import comfy.options
comfy.options.enable_args_parsing()
start = time.perf_counter()
import asyncio, nodes, comfy_api.latest
host_time = time.perf_counter() - start
start = time.perf_counter()
assert asyncio.run(nodes.load_custom_node({pack!r}))
for name in ("FaceDetectAlign", "OSDFaceVRE", "OSDFaceOneStep", "FacePasteBack"):
    nodes.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
pack_time = time.perf_counter() - start
print(f"torch {{torch_time:.2f}} s, ComfyUI {{host_time:.2f}} s, the pack {{pack_time:.3f}} s")
print(f"the pack is {{pack_time / torch_time:.3f}} of torch")
"""

# What `python -m osdface_core` does, in its steps. Run within a checkout.
STEPS = """
import sys, time
from pathlib import Path
took, last = {}, 0.0
def step(name):
    global last
    now = time.process_time()
    took[name], last = now - last, now
folder = Path(sys.argv[1])
step("python")
import torch
step("torch")
from osdface_core.cli import job, restorer
from osdface_core.cli.options import parser
step("our imports")
def ready(name):
    given = ["restore", str(folder / name), str(folder / "out.png"), "--overwrite",
             "--model", "builtin", "--device", "cpu"]
    options = restorer.resolve(parser().parse_args(given))
    return options, job.plan(options.input, options.output, True, ())[0]
options, one = ready("1.jpg")
six = ready("6.jpg")[1]
networks = job.networks(options)
step("networks")
for name, item in (("first face", one), ("another face", one), ("six faces", six)):
    assert "error" not in job.work(item, networks)
    step(name)
import json
print(json.dumps(took))
"""


def inside_comfyui(comfyui: Path) -> None:
    """Prints the times in ComfyUI, three times."""
    script = SCRIPT.format(comfyui=str(comfyui), pack=str(ROOT))
    for _ in range(3):
        subprocess.run([sys.executable, "-c", script], check=True, stderr=subprocess.DEVNULL)


def write_pictures(folder: Path) -> None:
    """A picture of 1920 x 1080 px with six faces, and one with one of them."""
    from PIL import Image

    from tests import photographs

    six = photographs.group()
    one = Image.new("RGB", six.size, (128, 128, 128))
    one.paste(six.crop((0, 0, 640, 540)))
    for name, picture in (("1.jpg", one), ("6.jpg", six)):
        picture.save(folder / name, quality=92)


def restore_steps(checkout: Path, folder: Path, threads: int) -> dict[str, float]:
    """Seconds of the processor that each step of a run takes, in a process of its own.

    checkout: of the project. folder: with the pictures. threads: of torch's.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    # As the checkout's own __main__ has it, which is not run here.
    if "OMP_WAIT_POLICY" in (checkout / "osdface_core" / "__main__.py").read_text():
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(folder)],
        check=True,
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    took: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    whole = sum(took.values())
    return took | {
        "command, one face": whole - took["another face"] - took["six faces"],
        "command, six faces": whole - took["first face"] - took["another face"],
    }


def restoring(checkouts: list[Path], rounds: int) -> None:
    """Prints a table of the steps, with a column and a ratio for each checkout."""
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        for threads in sorted({1, os.cpu_count() or 1}):
            runs: list[list[dict[str, float]]] = [[] for _ in checkouts]
            for _ in range(rounds):
                # In turn, so that each meets the same neighbours.
                for checkout, of in zip(checkouts, runs, strict=True):
                    of.append(restore_steps(checkout, Path(folder), threads))
            least = [{name: min(run[name] for run in of) for name in of[0]} for of in runs]
            print(f"\n{threads} threads: seconds of the processor")
            for name, first in least[0].items():
                others = "".join(
                    f"   {of[name]:6.2f} ({of[name] / max(first, 1e-3):.2f} times)"
                    for of in least[1:]
                )
                print(f"{name:20}{first:6.2f}{others}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comfyui", nargs="?", type=Path)
    parser.add_argument("--restore", nargs="*", type=Path, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.restore is not None:
        restoring([ROOT, *(path.resolve() for path in given.restore)], given.rounds)
        return
    there = os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI")
    inside_comfyui(given.comfyui or Path(there))


if __name__ == "__main__":
    main()
