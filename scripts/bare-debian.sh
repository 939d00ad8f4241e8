#!/bin/sh
# Run a command in a clone of this repository on a bare Debian, made by debootstrap: proof that a fresh machine needs only
# Python, make and git. Only commits are cloned. Network and certificates are this machine's.
# Usage: scripts/bare-debian.sh COMMAND...      as root, like: scripts/bare-debian.sh make demo
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: scripts/bare-debian.sh COMMAND..." >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "error: needs root" >&2; exit 2; }
command -v debootstrap >/dev/null || { apt-get update -qq && apt-get install -qq -y debootstrap; }

root=$(mktemp -d /var/tmp/bare-debian.XXXXXX)
# Mounts below it were private to namespaces that are gone by now.
trap 'rm -rf "$root"' EXIT
trap 'exit 130' INT TERM
debootstrap --variant=minbase --include=ca-certificates,git,make,python3 "${SUITE:-bookworm}" "$root" >"$root.log" 2>&1 || {
    tail "$root.log" >&2
    exit 1
}
rm "$root.log"
chmod 755 "$root"
git clone --quiet --no-hardlinks . "$root/headrace"
bundle=/etc/ssl/certs/ca-certificates.crt
[ ! -e "$bundle" ] || cp "$bundle" "$root$bundle"
cp /etc/resolv.conf "$root/etc/resolv.conf"

# pivot_root instead of chroot: containers pivot_root too, which needs a mount to pivot from.
enter='
mount --bind "$0" "$0" && cd "$0"
mount --rbind /sys sys && mount --rbind /dev dev && mount -t proc proc proc && mount -t tmpfs tmpfs run
mkdir -p .host && pivot_root . .host && cd /headrace
umount -l /.host && rmdir /.host
exec env -i HOME=/root TERM="${TERM:-dumb}" CI="${CI:-}" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive SSL_CERT_FILE='$bundle' PIP_CERT='$bundle' NODE_EXTRA_CA_CERTS='$bundle' "$@"
'
unshare --mount --pid --fork --kill-child --propagation private sh -euc "$enter" "$root" "$@"
