#!/bin/sh
# The quickstart: text from this machine -> a served model, then one answer from it over HTTP.
# Usage: scripts/demo.sh [home]
set -eu
cd "$(dirname "$0")/.."
home=${1:-.headrace}
bin=.venv/bin
if [ ! -e "$home/raw/done" ]; then
    "$bin/python" -m headrace_trainer.stages.corpus.machine_docs --out "$home/raw"
    touch "$home/raw/done"
fi
# Stop the server however the demo ends.
trap '"$bin/headrace" stop quickstart --home "$home"' EXIT
"$bin/headrace" run manifests/quickstart.yaml --home "$home"
"$bin/headrace" ask quickstart "Return a new array with the" --home "$home"
