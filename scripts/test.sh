#!/bin/sh
# Run every test tier in sequence and print a table of results. The cluster's programs are built in the background.
# The cluster tier needs root or HEADRACE_TEST_KUBECONFIG. Without either it is skipped; in CI it fails.
set -u
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
results=$(mktemp)
trap 'rm -f "$results" "$results".*' EXIT
failed=0

tier() {
    name=$1
    shift
    echo
    echo "== $name"
    began=$(date +%s)
    if "$@"; then how=passed; else how=FAILED; failed=1; fi
    printf '%-10s %-8s %5d s\n' "$name" "$how" $(($(date +%s) - began)) >> "$results"
}

build_cluster() {
    # Low priority: the tiers below need the CPU.
    nice -n 15 make --no-print-directory cluster-build > "$results.build" 2>&1
}

wait_for_build() {
    wait "$build" && return 0
    cat "$results.build"
    echo "error: failed to build the test cluster's programs"
    return 1
}

can_cluster=no
[ "$(id -u)" != 0 ] && [ -z "${HEADRACE_TEST_KUBECONFIG:-}" ] || can_cluster=yes
[ $can_cluster = no ] || { build_cluster & build=$!; }
tier lint make --no-print-directory lint
tier unit make --no-print-directory test-unit
tier trainer make --no-print-directory test-trainer
tier local make --no-print-directory test-local
if [ $can_cluster = yes ]; then
    tier build wait_for_build
    tier cluster make --no-print-directory test-cluster
    tier down make --no-print-directory cluster-down
elif [ "${CI:-}" = true ]; then
    tier cluster sh -c 'echo "error: the cluster tier needs root or HEADRACE_TEST_KUBECONFIG"; exit 1'
else
    printf '%-10s %-8s %s\n' cluster skipped "needs root, or HEADRACE_TEST_KUBECONFIG" >> "$results"
fi

echo
cat "$results"
exit $failed
