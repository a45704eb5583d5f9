#!/usr/bin/env bash
# Tests the pack in a newer ComfyUI, at COMFYUI_NEWER_PATH or ~/comfy/ComfyUI-newer: `bash tests/newer_host.sh
# [pytest's arguments]`. What that ComfyUI wants beside or in place of the packages at hand goes into an environment
# of its own over them. Without arguments, its pages in the newest frontend follow, and every use of comfy.* is
# compared with its source.
set -euo pipefail
cd "$(dirname "$0")/.."

comfyui=${COMFYUI_NEWER_PATH:-$HOME/comfy/ComfyUI-newer}
if [ ! -f "$comfyui/main.py" ]; then
  echo "no newer ComfyUI: set COMFYUI_NEWER_PATH to its folder, or put it at ~/comfy/ComfyUI-newer"
  exit 0
fi
export COMFYUI_PATH=$comfyui
screenshots=${OSDFACE_SCREENSHOTS:-screenshots}

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python -m venv "$environment"
newer=$environment/bin/python
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
python -c "$packages" > "$("$newer" -c "$packages")/at_hand.pth"
"$newer" -m pip install -r "$comfyui/requirements.txt" comfyui-manager==4.3 comfy-import-guard
"$newer" -m pip install --no-deps --target "$environment/newest" comfyui-frontend-package==1.58.1

mine='host and not once and not repeat'
OSDFACE_SCREENSHOTS=$screenshots/newer "$newer" -m pytest -n 2 -m "$mine" "$@"
if [ $# = 0 ]; then
  OSDFACE_FRONTEND=$environment/newest/comfyui_frontend_package/static OSDFACE_SCREENSHOTS=$screenshots/newest \
    "$newer" -m pytest -m "$mine" tests/test_browser.py

  mkdir -p "$environment/guard/custom_nodes"
  ln -s "$PWD" "$environment/guard/custom_nodes/osdface"
  ln -s "$(realpath "$comfyui")" "$environment/guard/ComfyUI"
  if [ -e "$comfyui/.git" ]; then
    "$environment/bin/comfy-import-guard" check --comfy-dir "$environment/guard" --cache-dir "$environment/guard" \
      --target HEAD --offline --no-update --strict
  fi
fi
