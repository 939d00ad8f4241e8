#!/bin/sh
# Create .venv with the dependencies pinned in requirements/. Does nothing if it is up to date.
# Usage: scripts/setup.sh [python]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
stamp=.venv/.installed
want=$(cat requirements/dev.txt pyproject.toml | cksum)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null || true)" = "$want" ]; then exit 0; fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is older than 3.11; name another: make PYTHON=python3.12" >&2
    exit 2
}
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    # Debian packages ensurepip separately.
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -qq -y "python$version-venv"
    else
        echo "error: $python cannot make virtual environments; install python$version-venv" >&2
        exit 2
    fi
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --require-hashes -r requirements/uv.txt
# Compiled once: where Python may not write bytecode, importing torch and Megatron takes three times as long.
.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --require-hashes -r requirements/dev.txt
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps -e .
echo "$want" > "$stamp"
