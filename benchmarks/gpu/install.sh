#!/bin/sh
# On a machine with a GPU and no network: take the wheels that benchmarks/gpu/wheels.py made, and install them.
#
#   sh benchmarks/gpu/install.sh take      copy the parts in build/gpu away from the checkout; once for each transfer
#   sh benchmarks/gpu/install.sh install   put pieces together, install, and begin to compile Transformer Engine
#   sh benchmarks/gpu/install.sh finish    wait for the compiler, install; the wheel is left in $OUT for the next time
#   . benchmarks/gpu/install.sh env        put the installed Python on PATH
#
# A transformer_engine_torch wheel that was left in $OUT before and is carried in build/gpu/part-99 is not compiled again.
set -eu
home=${HEADRACE_GPU_HOME:-/tmp/headrace-gpu}
wheels=$home/wheels
venv=$home/venv

use() {
    PATH=$venv/bin:$PATH
    libraries=$(python -c 'import glob, site; print(":".join(sorted({l for p in site.getsitepackages() for l in glob.glob(p + "/nvidia/*/lib")})))')
    LD_LIBRARY_PATH=$libraries:${LD_LIBRARY_PATH:-}
    PYTHONPATH=$PWD/api:$PWD/trainer:$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
    export PATH LD_LIBRARY_PATH PYTHONPATH
}

join() {
    for first in "$wheels"/*.piece-00; do
        [ -e "$first" ] || continue
        whole=${first%.piece-00}
        cat "$whole".piece-* > "$whole"
        rm "$whole".piece-*
    done
}

compile() {
    # Its own way would be to look for a ready-made wheel on the network.
    export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS="${MAX_JOBS:-16}"
    source=$(ls "$wheels"/transformer_engine_torch-*.tar.gz)
    options="--no-index --no-deps --no-build-isolation --wheel-dir $home/compiled"
    NVTE_BUILD_USE_NVIDIA_WHEELS=1 python -m pip wheel $options "$source" || python -m pip wheel $options "$source"
}

case ${1:-} in
take)
    mkdir -p "$wheels"
    for part in build/gpu/part-*; do cp "$part"/* "$wheels"; done
    ls -l "$wheels"
    ;;
join)
    join
    ;;
install)
    [ -x "$venv/bin/python" ] || python3 -m venv --system-site-packages "$venv"
    use
    join
    # curand is wanted only where torch did not bring it.
    ! python -c 'import nvidia.curand' 2>/dev/null || rm -f "$wheels"/nvidia_curand-*
    python -m pip install --quiet --no-index --no-deps $(ls "$wheels"/*.whl)
    if ls "$wheels"/transformer_engine_torch-*.whl >/dev/null 2>&1; then exit 0; fi
    mkdir -p "$home/compiled"
    (compile > "$home/compile.log" 2>&1; echo $? > "$home/compile.rc") &
    echo $! > "$home/compile.pid"
    ;;
finish)
    use
    while [ -e "$home/compile.pid" ] && [ ! -e "$home/compile.rc" ]; do sleep 2; done
    tail -5 "$home/compile.log"
    [ "$(cat "$home/compile.rc")" = 0 ]
    python -m pip install --quiet --no-index --no-deps "$home"/compiled/*.whl
    [ -z "${OUT:-}" ] || cp "$home"/compiled/*.whl "$OUT"
    python -c 'import transformer_engine.pytorch as te; print("Transformer Engine", te.__version__ if hasattr(te, "__version__") else "imported")'
    ;;
env)
    use
    set +eu
    ;;
*)
    sed -n '2,9p' "$0"
    exit 2
    ;;
esac
