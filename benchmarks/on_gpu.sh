#!/usr/bin/env bash
# Shows on a machine with a GPU, in under nine minutes, what this project is there: its tests, its
# numbers, its speed beside the paper's code, its memory, what more could make it faster.
#
#     bash benchmarks/on_gpu.sh OUT [--dry-run cpu]
#
# Needs a folder .gpu that `python -m benchmarks.pack_for_gpu` has filled, and nothing from outside.
# OUT/report.md grows as the parts end. --dry-run cpu runs all parts at small size without a card.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
shift
kit=${OSDFACE_GPU_KIT:-.gpu}
[ -d "$kit/comfyui" ] || { echo "$kit holds no kit: fill it by python -m benchmarks.pack_for_gpu" >&2; exit 1; }
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# Only what this Python lacks: its own packages stay as they are.
for wheel in "$kit"/wheels/*.whl; do
    [ -e "$wheel" ] || continue
    name=$(basename "$wheel")
    python3 -m pip show -q "${name%%-*}" 2>/dev/null && continue
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheel"
done
python3 -c 'import av' 2>/dev/null || cp -r "$kit/stubs/." "$site/"
export PYTHONPATH="$site" PYTHONUNBUFFERED=1
python3 -m benchmarks.on_gpu --kit "$kit" --out "$out" "$@"
