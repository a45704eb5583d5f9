"""Time that the pack takes to import inside ComfyUI, beside torch's and ComfyUI's.

python benchmarks/import_time.py [path of ComfyUI]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def main() -> None:
    comfyui = Path(
        sys.argv[1]
        if len(sys.argv) > 1
        else os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI")
    )
    script = SCRIPT.format(comfyui=str(comfyui), pack=str(Path(__file__).resolve().parents[1]))
    for _ in range(3):
        subprocess.run([sys.executable, "-c", script], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
