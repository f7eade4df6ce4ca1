#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command: builds the CUDA kernels, tests them, measures them, and writes one
# JSON file. `scripts/gpu_check.sh --help` lists the options; docs/GPU.md says what is done.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || {
    echo "error: no $python here: make env makes it, or PYTHON names another one with vitrail's dev dependencies" >&2
    exit 1
}
exec "$python" scripts/gpu_check.py "$@"
