"""The GPU benchmark: ``python -m benchmarks.gpu --out FOLDER``.

Sections run one after the other, each in fresh processes. After each of them ``results.json`` and ``results.md`` in the
folder are written anew; called again with the same folder, it goes on with what is left, so that it can be cut into calls
of a few minutes. All of it takes about 40 minutes on an H100. ``--smoke`` rehearses every line on any machine.
"""

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.processes import FreshProcesses, PieceFailed
from benchmarks.gpu.report import Results, markdown
from benchmarks.gpu.sections import Section, Setting, Unmet, sections

_SLACK = 2.5
"""A section is stopped after so many times what it should take."""


def main(argv: list[str]) -> int:
    """Run what is left and fits; 1 where a section failed."""
    args = _arguments(argv)
    # Models of all sizes follow each other: without it, memory is lost to pieces of the wrong size.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"sections": {}}
    results: Results = record["sections"]
    setting, fresh = Setting(smoke=args.smoke), FreshProcesses(on_gpu=args.device == "cuda")
    ends = time.monotonic() + 60 * args.minutes
    for section in _chosen(args, results):
        left = ends - time.monotonic()
        if not args.smoke and left < section.seconds:
            print(f"{section.name}: needs {section.seconds} s, {left:.0f} s are left: next time", flush=True)
            continue
        fresh.deadline = time.monotonic() + min(left, _SLACK * section.seconds) if not args.smoke else float("inf")
        results[section.name] = _run(section, setting, fresh)
        record |= {"command": " ".join(["python -m benchmarks.gpu", *argv]), "smoke": args.smoke}
        file.write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "results.md").write_text(markdown(results, title="Headrace on one GPU"))
    print((args.out / "results.md").read_text() if results else "nothing was run")
    return int(any(entry["status"] == "failed" for entry in results.values()))


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results are, and where new ones go")
    parser.add_argument("--minutes", type=float, default=40, help="begin nothing that does not fit")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="small models and few steps, to rehearse")
    parser.add_argument("--only", action="append", help="a section; may be repeated")
    parser.add_argument("--again", action="store_true", help="repeat sections that failed or were done")
    args = parser.parse_args(argv)
    if (args.device == "cuda") is not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this machine has {'a' if torch.cuda.is_available() else 'no'} GPU")
    if args.device == "cpu" and not args.smoke:
        parser.error("--device cpu: goes with --smoke")
    if unknown := set(args.only or []) - {section.name for section in sections()}:
        parser.error(f"--only: no section {', '.join(sorted(unknown))}")
    return args


def _chosen(args: argparse.Namespace, results: Results) -> list[Section]:
    """What is left: what was never run, or lacked something."""
    over = set() if args.again else {name for name, entry in results.items() if entry["status"] != "unmet"}
    return [s for s in sections() if s.name not in over and (args.only is None or s.name in args.only)]


def _run(section: Section, setting: Setting, fresh: FreshProcesses) -> dict[str, Any]:
    print(f"{section.name} ...", flush=True)
    begun = time.monotonic()
    try:
        entry = {"status": "done", "result": section.run(setting, fresh)}
    except Unmet as error:
        entry = {"status": "unmet", "reason": str(error)}
    except PieceFailed as error:
        entry = {"status": "failed", "reason": str(error)}
    seconds = round(time.monotonic() - begun, 1)
    print(f"{section.name}: {entry['status']} after {seconds} s", flush=True)
    return {**entry, "seconds": seconds, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
