#!/bin/sh
# Build the images with buildah. Needs no Docker daemon; works as root in a container too.
# Usage: scripts/build-images.sh [target ...]      targets: operator (default), trainer
#
# BASE_IMAGE   an image with Python 3.11 or newer; by default a Debian made by debootstrap, which needs no image registry
# TAG          image tag (default 0.1.0)
# BUILD_FLAGS  extra flags for `buildah build`
# STORE        folder for buildah's images and layers, instead of the machine's own store
# ARCHIVES     folder to also write TARGET.tar to, in `docker save` format
# PIP_CERT, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_DEFAULT_TIMEOUT are passed to pip
set -eu
cd "$(dirname "$0")/.."
tag=${TAG:-0.1.0}
[ $# -gt 0 ] || set -- operator
export BUILDAH_ISOLATION="${BUILDAH_ISOLATION:-chroot}"
if [ -z "${STORAGE_DRIVER:-}" ]; then
    # Overlayfs cannot be stacked on overlayfs, which is what a container's disk usually is.
    mkdir -p "${STORE:-/var/lib/containers}"
    case $(stat -f -c %T "${STORE:-/var/lib/containers}") in
        overlayfs) STORAGE_DRIVER=vfs ;;
        *) STORAGE_DRIVER=overlay ;;
    esac
fi
export STORAGE_DRIVER

buildah() {
    command buildah ${STORE:+--root "$STORE/layers" --runroot "$STORE/run"} "$@"
}

make_base() {
    root=$(mktemp -d)
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$root" >&2
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$root" / >&2
    buildah commit --quiet --rm "$container" localhost/headrace-base:bookworm >&2
    rm -rf "$root"
}

if [ -z "${BASE_IMAGE:-}" ]; then
    BASE_IMAGE=localhost/headrace-base:bookworm
    buildah inspect --type image "$BASE_IMAGE" >/dev/null 2>&1 || make_base
fi

# pip settings of this machine, certificates included; not kept in the images.
pip_conf=$(mktemp)
trap 'rm -f "$pip_conf"' EXIT
{
    echo "[global]"
    [ -z "${PIP_INDEX_URL:-}" ] || echo "index-url = $PIP_INDEX_URL"
    [ -z "${PIP_EXTRA_INDEX_URL:-}" ] || echo "extra-index-url = $PIP_EXTRA_INDEX_URL"
    [ -z "${PIP_DEFAULT_TIMEOUT:-}" ] || echo "timeout = $PIP_DEFAULT_TIMEOUT"
    [ -z "${PIP_CERT:-}" ] || echo "cert = $PIP_CERT"
} > "$pip_conf"

for target in "$@"; do
    image=localhost/headrace-$target:$tag
    # shellcheck disable=SC2086  # lists of flags
    buildah build --pull=false --layers --target "$target" --build-arg "BASE_IMAGE=$BASE_IMAGE" \
        --volume "$pip_conf:/etc/pip.conf:ro" ${PIP_CERT:+--volume "$PIP_CERT:$PIP_CERT:ro"} ${BUILD_FLAGS:-} \
        --tag "$image" .
    if [ -n "${ARCHIVES:-}" ]; then
        mkdir -p "$ARCHIVES"
        rm -f "$ARCHIVES/$target.partial"
        buildah push --quiet "$image" "docker-archive:$ARCHIVES/$target.partial:$image"
        mv "$ARCHIVES/$target.partial" "$ARCHIVES/$target.tar"
    fi
done
