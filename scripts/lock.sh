#!/bin/sh
# Pin every dependency by hash, without index URLs. One file per environment.
# Usage: scripts/lock.sh [options for uv pip compile, such as --upgrade]
set -eu
cd "$(dirname "$0")/.."
lock() {
    out=$1
    shift
    .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
        --no-emit-index-url --no-emit-find-links --output-file "requirements/$out.txt" "$@"
}
echo "uv>=0.9" | lock uv "$@" -
lock dev pyproject.toml --extra operator --extra trainer --extra dev "$@"
lock operator pyproject.toml --extra operator --constraint requirements/dev.txt "$@"
lock trainer pyproject.toml --extra trainer --constraint requirements/dev.txt "$@"
# Transformer Engine reveals its requirements only to a Python that has torch.
NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_FRAMEWORK=pytorch \
    lock gpu pyproject.toml --extra trainer --extra gpu --constraint requirements/dev.txt --no-build-isolation --python .venv/bin/python "$@"
# Build dependencies of the Headrace wheel and of Transformer Engine. torch brings CUDA's headers, except the compiler's (crt).
printf '%s\n' 'cuda-toolkit[crt]' ninja 'setuptools>=77' | lock build --constraint requirements/gpu.txt "$@" -
