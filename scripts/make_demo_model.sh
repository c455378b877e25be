#!/usr/bin/env bash
# Makes models/demo: the trained demo checkpoint (BF16, outside the repository) as NVFP4, experts and dense matrices.
# Usage: scripts/make_demo_model.sh [dsv4 binary] [source folder]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dsv4=${1:-$root/build/apps/dsv4}
source=${2:-$root/../shared/demo-model}
target=$root/models/demo
staging=$(mktemp -d)
trap 'rm -rf "$staging"' EXIT

[ -x "$dsv4" ] || { echo "make_demo_model.sh: no dsv4 binary at $dsv4: build it, or give its path" >&2; exit 2; }
"$dsv4" quantize "$source" "$staging/demo" --dense nvfp4 --scale modelopt
# The source's README describes the BF16 weights; this folder has its own.
rm -f "$staging/demo/README.md"
cp "$target/README.md" "$staging/demo/"
mkdir -p "$target"
cp "$staging"/demo/* "$target/"
du -sh "$target"
