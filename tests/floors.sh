#!/usr/bin/env bash
# Tests the core with the oldest packages that it works with, those of AUTOMATIC1111's WebUI 1.10.1:
# `bash tests/floors.sh [pytest's arguments]`. They go into an environment of its own, of Python 3.10 or 3.11
# (OSDFACE_FLOORS_PYTHON), with neither diffusers nor peft. OSDFACE_FLOORS names one that is kept: torch of that
# age brings CUDA's libraries, 2.6 GB.
set -euo pipefail
cd "$(dirname "$0")/.."

environment=${OSDFACE_FLOORS:-$(mktemp -d)}
[ -n "${OSDFACE_FLOORS:-}" ] || trap 'rm -rf "$environment"' EXIT
oldest=$environment/bin/python
if [ ! -x "$oldest" ]; then
  "${OSDFACE_FLOORS_PYTHON:-python3}" -m venv "$environment"
  "$oldest" -m pip install torch==2.1.2 torchvision==0.16.2 numpy==1.26.2 Pillow==9.5.0 safetensors==0.4.2 \
    einops==0.4.1 scipy==1.11.4 scikit-image==0.21.0 huggingface_hub==0.23.5 filelock pytest hypothesis \
    opencv-python-headless==4.8.1.78
  "$oldest" -m pip install --no-deps facexlib==0.3.0 filterpy==1.4.5
  "$oldest" -m pip install numba==0.58.1 tqdm
fi

tests=()
for name in align builtin builtin_detector choose color cpu detect detector_check diffir face_mask face_parser \
  floors install ldm lora one_step osediff paste sd21 tone track vre webui weights_fetch weights_reading; do
  tests+=("tests/test_$name.py")
done
OSDFACE_TEST_FLOORS=1 "$oldest" -m pytest -m 'not host and not full and not repeat' "${tests[@]}" "$@"
