#!/bin/sh
# From the text on this machine to an assistant that answers as preferred, then two answers from it.
# Usage: scripts/assistant.sh [home]
set -eu
cd "$(dirname "$0")/.."
home=${1:-.headrace}
bin=.venv/bin
if [ ! -e "$home/raw/done" ]; then
    "$bin/python" -m headrace_trainer.stages.corpus.machine_docs --out "$home/raw"
    touch "$home/raw/done"
fi
"$bin/python" scripts/assistant_tasks.py "$home/assistant"
# Stop the server, however this script ends.
trap '"$bin/headrace" stop assistant --home "$home"' EXIT
"$bin/headrace" run manifests/assistant.yaml --home "$home"
for question in "Sort 7 2 5" "Which comes first in a dictionary, river or chair?"; do
    echo "> $question"
    "$bin/headrace" chat assistant "$question" --temperature 0 --home "$home"
done
