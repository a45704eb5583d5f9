#!/usr/bin/env bash
# Holds the imports to the contracts in pyproject.toml: bash tests/lint_imports.sh [FOLDER]
set -euo pipefail
folder=$(realpath "${1:-$(dirname "$0")/..}")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
ln -s "$folder" "$place/osdface"
# In a WebUI the core is a package of its own.
ln -s "$folder/osdface_core" "$place/osdface_core"
cd "$place"
lint-imports osdface/pyproject.toml --no-cache
