"""DiffIR in half precision beside the released code's fp32, on the golden cases.

    python -m benchmarks.diffir_half [--golden DIR] [--device cpu]

For each case: the largest distance and the PSNR of the network's output, clamped to [0,1], to the
released code's, and the largest distance of the prior; in fp32, bf16 and fp16. The weights are the
full-size stand-ins that the cases were made with.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file

from osdface_core.diffir.network import build_network
from tests.test_diffir import CASES, FAMILIES, family_of, network_input, tensors_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--golden", type=Path, default=Path("../shared/golden/diffir"))
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    released = load_file(given.golden / "golden.safetensors")
    spec = importlib.util.spec_from_file_location("maker", given.golden / "make_weights.py")
    assert spec and spec.loader
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    print("| case | " + " | ".join(f"{name}: max, dB, prior" for name in DTYPES) + " |")
    print("|---" * (1 + len(DTYPES)) + "|")
    for case in CASES:
        wanted = released[f"{case}.out"].clamp(0, 1)
        cells = []
        for dtype in DTYPES.values():
            tensors = tensors_of(maker, *FAMILIES[family_of(case)])
            network = build_network(tensors).to(given.device, dtype)
            lq = network_input(case, released, network.shape.multiple).to(given.device, dtype)
            lq = lq.contiguous(memory_format=torch.channels_last)
            prior = network.prior(lq, released[f"{case}.noise"].to(given.device, dtype))
            found = network.restore(lq, prior)[0, :, : wanted.shape[1], : wanted.shape[2]]
            apart = found.float().cpu().clamp(0, 1) - wanted
            decibels = -10 * apart.square().mean().log10().item()
            of_prior = (prior.float().cpu() - released[f"{case}.ipr"][-1:]).abs().max().item()
            cells.append(f"{apart.abs().max().item():.1e}, {decibels:.0f}, {of_prior:.1e}")
        print(f"| {case} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
