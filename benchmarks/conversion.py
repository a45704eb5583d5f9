"""Peak memory and time of converting the visual embedder's checkpoint, beside torch's own.

    python -m benchmarks.conversion [--out DIR]

Writes a stand-in of the released 1.8 GB checkpoint (same tensors, random numbers) into a temporary
folder. Each way runs in its own process, with the checkpoint in the page cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from osdface_core.weights.fetching import sha256_of

OURS = """
from osdface_core.osdface.convert import convert_vre
convert_vre(checkpoint, projector, target)
"""
TORCH = """
import torch
from safetensors.torch import save_file
tensors = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=MMAP)["state_dict"]
tensors = {k[9:]: v for k, v in tensors.items() 
           if k.startswith(("vqvae_LQ.encoder.", "vqvae_LQ.quant"))}
tensors |= {"projector." + k: v for k, v in torch.load(projector, weights_only=True).items()}
save_file(tensors, target)
"""
ONLY_IMPORT = "import torch, safetensors.torch"
MEASURE = """
import json, resource, sys, time
from pathlib import Path
checkpoint, projector, target = map(Path, sys.argv[1:])
start = time.perf_counter()
{work}
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([time.perf_counter() - start, memory]))
"""


def write_stand_in(checkpoint: Path, projector: Path, size: float) -> None:
    """Writes a Lightning checkpoint of about `size` bytes, and the projector."""
    import torch

    from osdface_core.osdface.vre.embedder import VisualEmbedder

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VisualEmbedder().state_dict().items()}
    state = {
        ("vqvae_LQ." + name): torch.randn(shape)
        for name, shape in shapes.items()
        if not name.startswith("projector.")
    }
    kept = sum(tensor.nbytes for tensor in state.values())
    rest = int((size - kept) / 4 / 400)
    state |= {f"vqvae.decoder.{number}.weight": torch.randn(rest) for number in range(200)}
    optimizer = {
        number: {"step": 7, "exp_avg": torch.randn(rest), "exp_avg_sq": torch.rand(rest)}
        for number in range(100)
    }
    torch.save(
        {"state_dict": state, "optimizer_states": [{"state": optimizer}], "epoch": 9}, checkpoint
    )
    torch.save(
        {
            n.removeprefix("projector."): torch.randn(s)
            for n, s in shapes.items()
            if n.startswith("projector.")
        },
        projector,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the temporary folder is made")
    parser.add_argument("--size", type=float, default=1.8e9, help="bytes of the checkpoint")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.out) as name:
        folder = Path(name)
        start = time.perf_counter()
        checkpoint, projector = folder / "associate_2.ckpt", folder / "embedding_change_weights.pth"
        # In its own process: one that was large once passes its peak on to those that it starts.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_stand_in, args=(checkpoint, projector, options.size)
        )
        writer.start()
        writer.join()
        print(
            f"stand-in of {checkpoint.stat().st_size / 1e9:.2f} GB written in "
            f"{time.perf_counter() - start:.0f} s"
        )
        sha256_of(checkpoint)
        results = {}
        ways = {
            "this project": OURS,
            "torch.load, mmap": TORCH.replace("MMAP", "True"),
            "torch.load": TORCH.replace("MMAP", "False"),
            "(import torch alone)": ONLY_IMPORT,
        }
        for way, work in ways.items():
            target = folder / f"{len(results)}.safetensors"
            command = [
                sys.executable,
                "-c",
                MEASURE.format(work=work),
                str(checkpoint),
                str(projector),
                str(target),
            ]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
            )
            results[way] = json.loads(done.stdout)
            written = f", wrote {target.stat().st_size / 1e6:.1f} MB" if target.exists() else ""
            print(
                f"{way:>22}: {results[way][0]:6.2f} s, peak {results[way][1] / 1e6:6.0f} "
                f"MB{written}"
            )
        for way in list(results)[1:3]:
            ratios = [results[way][i] / results["this project"][i] for i in (0, 1)]
            print(
                f"{way} against this project: {ratios[0]:.1f} times the time, {ratios[1]:.1f} "
                "times the memory"
            )


if __name__ == "__main__":
    main()
