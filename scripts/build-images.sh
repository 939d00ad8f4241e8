#!/bin/sh
# Build the images with buildah, without a Docker daemon; works as root in a container too.
# Usage: scripts/build-images.sh [target ...]      targets: operator (default), trainer
#
# BASE_IMAGE   an image with Python 3.11 or newer; Debian made by debootstrap if unset, so that no image registry is needed
# TAG          tag of the images (default 0.1.0)
# BUILD_FLAGS  as --build-arg=TRANSFORMER_ENGINE= for a trainer without Transformer Engine, on a base without CUDA
# PIP_CERT, PIP_INDEX_URL and their like are handed to pip
set -eu
cd "$(dirname "$0")/.."
tag=${TAG:-0.1.0}
[ $# -gt 0 ] || set -- operator
export BUILDAH_ISOLATION="${BUILDAH_ISOLATION:-chroot}" STORAGE_DRIVER="${STORAGE_DRIVER:-vfs}"

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

secrets=""
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_DEFAULT_TIMEOUT; do
    eval "value=\${$name:-}"
    [ -z "$value" ] || secrets="$secrets --env $name=$value"
done
if [ -n "${PIP_CERT:-}" ]; then
    # The builder's own certificates, for a network that has its own authority; the images do not keep them.
    secrets="$secrets --volume $PIP_CERT:$PIP_CERT:ro --env PIP_CERT=$PIP_CERT"
fi
for target in "$@"; do
    # shellcheck disable=SC2086  # lists of flags
    buildah build --pull=false --target "$target" --build-arg "BASE_IMAGE=$BASE_IMAGE" $secrets ${BUILD_FLAGS:-} \
        --tag "headrace-$target:$tag" .
done
