"""Results as Markdown: one table a question."""

from collections.abc import Iterator
from typing import Any

BF16_SHEET_TFLOPS = 989.0
"""Of an H100 or H200 (SXM), dense, from NVIDIA's data sheet."""
FP8_SHEET_TFLOPS = 1979.0

Results = dict[str, dict[str, Any]]


def markdown(results: Results, *, title: str) -> str:
    """Everything that was measured so far, and what was not."""
    done = {name: entry["result"] for name, entry in results.items() if entry["status"] == "done"}
    parts = [f"# {title}", *_environment(done), *_steps(done), *_multiplications(done), *_curves(done)]
    parts += [*_resumes(done), *_saves(done), *_beside(done), *_serve(done), *_missing(results)]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _environment(done: dict[str, Any]) -> Iterator[str]:
    if "environment" in done:
        yield ", ".join(f"{name} {value}" for name, value in done["environment"].items() if value is not None)


def _steps(done: dict[str, Any]) -> Iterator[str]:
    names = sorted(name for name in done if name.startswith("step-"))
    if not names:
        return
    measured = done.get("peak", {}).get("tflops")
    rows = []
    for name in names:
        r = done[name]
        bf16 = done.get("-".join(name.split("-")[:2]) + "-bf16")
        gain = r["tokens_per_second"] / bf16["tokens_per_second"] if bf16 else None
        rows.append(
            [
                name.removeprefix("step-"),
                r["kernels"],
                f"{r['milliseconds']:.1f}",
                f"{r['tokens_per_second']:,.0f}",
                _percent(r["tflops"], measured),
                _percent(r["tflops"], BF16_SHEET_TFLOPS),
                _percent(r["tflops"], FP8_SHEET_TFLOPS) if "fp8" in name else "",
                f"{gain:.2f}" if gain else "",
                f"{r['peak_gib']:.1f} ({r['planned_state_gib']:.1f})",
            ]
        )
    yield "## A training step"
    yield _table(
        [
            "training",
            "kernels",
            "ms",
            "tokens/s",
            f"MFU of the measured bf16 peak{f', {measured:.0f} TFLOP/s' if measured else ''}",
            f"of {BF16_SHEET_TFLOPS:.0f}",
            f"of fp8's {FP8_SHEET_TFLOPS:.0f}",
            "against bf16",
            "peak GiB (planned state)",
        ],
        rows,
    )


def _percent(value: float, whole: float | None) -> str:
    return f"{100 * value / whole:.1f}%" if whole else ""


def _multiplications(done: dict[str, Any]) -> Iterator[str]:
    if found := done.get("fp8-multiplication"):
        yield "## One multiplication, 4096 x 4096 x 16384"
        rows = [
            [recipe, f"{r['tflops']:.0f}", f"{r['tflops_bf16']:.0f}", f"{r['relative_error']:.4f}"]
            for recipe, r in found.items()
        ]
        yield _table(["recipe", "TFLOP/s", "bf16", "relative error"], rows)


def _curves(done: dict[str, Any]) -> Iterator[str]:
    bf16 = done.get("curve-bf16")
    if not bf16:
        return
    yield f"## Losses over {len(bf16)} steps from one seed"
    rows = [["bf16", f"{bf16[0]:.4f}", f"{bf16[-1]:.4f}", "", ""]]
    for name, losses in done.items():
        if name.startswith("curve-fp8"):
            apart = [abs(a - b) for a, b in zip(losses, bf16, strict=True)]
            largest, last = max(apart), losses[-1] - bf16[-1]
            rows.append(
                [name.removeprefix("curve-"), f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{largest:.4f}", f"{last:+.4f}"]
            )
    yield _table(["precision", "first loss", "last loss", "largest difference", "last difference"], rows)


def _resumes(done: dict[str, Any]) -> Iterator[str]:
    names = [name for name in done if name.startswith("resume-")]
    if names:
        yield "## Stopped and resumed in a new process"
        rows = [
            [
                name.removeprefix("resume-"),
                str(done[name]["resumed_after"]),
                str(done[name]["steps"]),
                "every bit the same" if done[name]["identical"] else "DIFFERENT",
            ]
            for name in names
        ]
        yield _table(["precision", "resumed after step", "of", "losses"], rows)


def _saves(done: dict[str, Any]) -> Iterator[str]:
    if r := done.get("save"):
        yield "## A checkpoint of the 1B training"
        yield (
            f"{r['bytes'] / 1e9:.2f} GB; a step takes {r['plain_milliseconds']:.0f} ms, and {r['stall_milliseconds']:.0f} "
            f"ms more where it saves: {r['stall_milliseconds'] / 18000:.3f}% of an interval of 30 minutes."
        )


def _beside(done: dict[str, Any]) -> Iterator[str]:
    rows = []
    for name in ("beside-megatron-bf16", "beside-megatron-fp8"):
        if r := done.get(name):
            low, high = r["ratio_quartiles"]
            rows.append(
                [
                    f"bare Megatron-core, {name.removeprefix('beside-megatron-')}",
                    f"{r['bare_milliseconds']:.1f}",
                    f"{r['milliseconds']:.1f}",
                    f"{r['ratio']:.3f} ({low:.3f} to {high:.3f})",
                ]
            )
    theirs, ours = done.get("beside-transformers"), done.get("step-1b-bf16")
    if theirs and ours:
        name = f"transformers{', compiled' if theirs['compiled'] else ''}, bf16"
        ratio = ours["milliseconds"] / theirs["milliseconds"]
        rows.append([name, f"{theirs['milliseconds']:.1f}", f"{ours['milliseconds']:.1f}", f"{ratio:.3f}"])
    if rows:
        yield "## The 1B training beside others on this machine"
        yield _table(["beside", "its ms/step", "ours", "ratio (quartiles)"], rows)


def _serve(done: dict[str, Any]) -> Iterator[str]:
    if r := done.get("serve"):
        yield "## Serving the export"
        speed = (
            f"; {r['tokens_per_second']:,.0f} tokens/s with 192 requests at once" if "tokens_per_second" in r else ""
        )
        yield f"{r['engine']} gives {r['same_tokens']} of transformers' {r['of']} greedy tokens{speed}."


def _missing(results: Results) -> Iterator[str]:
    missing = {name: entry for name, entry in results.items() if entry["status"] != "done"}
    if missing:
        yield "## Not measured"
        rows = [[name, entry["status"], entry["reason"].strip().splitlines()[-1]] for name, entry in missing.items()]
        yield _table(["section", "status", "reason"], rows)
