"""docs/benchmarks/serving.md out of the JSON of a run."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import overload
from peers import OURS, PEERS

NAMES = {**{key: name for key, (name, _, _) in OURS.items()}, **{key: peer.name for key, peer in PEERS.items()}}
BODIES = {"jpeg": "the JPEG", "json": "base64 in JSON", "v2": "/v2 binary", "v2-json": "/v2, base64 in JSON"}
FORMS = {**{key: form for key, (_, _, form) in OURS.items()}, **{key: peer.body for key, peer in PEERS.items()}}
SAME_FORM = {"flask": "lanner", "litserve": "lanner-v2-json", "bentoml": "lanner", "mlserver": "lanner-v2-json",
             "pytriton": "lanner-v2"}
FLOOR = "floor"  # no server: what a request takes that nothing is done for
Row = dict[str, Any]


def render(run: Row) -> str:
    return "\n\n".join([
        "# Serving", "Written from serving.json by `./run bench serving --docs`; by the rules of "
        "[protocol.md](../../benchmarks/protocol.md).", machine(run),
        "## One JPEG a request", about(run), drawing(run), table(run), *floor(run), "## Aims", aims(run),
        "## Beside the bare engine", engine(run), *_rest(run)]) + "\n"


def write(folder: Path, run: Row) -> None:
    (folder / "serving.json").write_text(json.dumps(run, indent=1) + "\n")
    (folder / "serving.md").write_text(render(run))


def machine(run: Row) -> str:
    versions = "; ".join(f"{NAMES.get(key, key).split(',')[0]}: " + ", ".join(f"{n} {v}" for n, v in found.items())
                         for key, found in run["versions"].items())
    told = (f"`{run['command']}`, {run['date']}, {run['cpu']}, {run['cores']} cores, load {run['load']:.1f} over five "
            f"minutes at its end, this run's own share in it. {versions}.")
    return f"{told} {run['note']}" if "note" in run else told


def about(run: Row) -> str:
    return ("`bench-tiny`, two convolutions: the same ONNX file for all, one thread of ONNX Runtime, server and client "
            f"on one core each. A JPEG of 32 x 32 pixels, {run['bytes']:,} bytes. wrk, closed loop with 1, 16 and 64 "
            f"connections; medians of {run['rounds']} interleaved rounds of {run['seconds']} s. Each server has the "
            "form of request that its documentation has for images. Servers that do not have their turn are stopped, "
            "but for Triton, which ends itself when it goes on.")


def table(run: Row) -> str:
    lines = ["| server | request | requests/s, c = 1 | 16 | 64 | p50 ms, c = 1 | 16 | 64 | p99 ms, c = 1 | 16 | 64 | "
             "failed |", "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for key in dict.fromkeys(row["server"] for row in run["rows"]):
        mine = [row for row in run["rows"] if row["server"] == key]
        cells = [f"{median(row['per_s']):,.0f}" for row in mine]
        cells += [f"{median(row[what]) / 1000:.2f}" for what in ("p50_us", "p99_us") for row in mine]
        lines.append(f"| {NAMES[key]} | {BODIES[FORMS[key]]} | {' | '.join(cells)} | {sum(r['bad'] for r in mine)} |")
    lines += [f"| {NAMES[key]} | {BODIES[FORMS[key]]} | not measured: {why} |" + " |" * 9
              for key, why in run["missing"].items()]
    return "\n".join(lines)


def drawing(run: Row) -> str:
    """A bar a server, of those that measured it; GitHub draws it."""
    bars = {NAMES[key].replace(", JPEG as the body", ""): _median(run, key, 64, "per_s")
            for key in ("lanner", *PEERS) if key != FLOOR and key in {row["server"] for row in run["rows"]}}
    names = ", ".join(f'"{name}"' for name in bars)
    return "\n".join(["```mermaid", "xychart-beta horizontal", '  title "requests/s with 64 connections"',
                      f"  x-axis [{names}]", '  y-axis "requests/s"',
                      f"  bar [{', '.join(f'{per_s:.0f}' for per_s in bars.values())}]", "```"])


def floor(run: Row) -> list[str]:
    """What no server in Python gets below on this host, and how near the aim is to that."""
    if FLOOR not in {row["server"] for row in run["rows"]} or "flask" not in {row["server"] for row in run["rows"]}:
        return []
    per_s = {row["what"]: median(row["per_s"]) for row in run["engine"] if row["network"] == "bench-tiny"}
    bounds = []
    for c, batch in ((1, 1), (16, 64), (64, 64)):
        took = 1e6 / _median(run, FLOOR, c, "per_s") + 1e6 / per_s[f"engine, batch {batch}"]
        bounds.append(f"{1e6 / took / _median(run, 'flask', c, 'per_s'):.1f}")
    least = 1 / _median(run, FLOOR, 64, "per_s")
    small = next(median(row["per_s"]) for row in run["engine"]
                 if (row["network"], row["what"]) == ("small", "engine, batch 64"))
    turning = [f"{1 - 2 * median(row['capacity']) * least:.2f} of the capacity for `{row['network']}`"
               for row in run.get("overload", {}).get("rows", [])]
    told = [f"On the one core that the aims give to the server it alone leaves {1 / (1 + small * least):.2f} of the "
            "engine's images/s to `small` by JPEG, before one is decoded; and turning away two thirds of three times "
            f"the capacity, each in its time a request, leaves {', '.join(turning)}."] if turning else []
    return [f"`{NAMES[FLOOR]}` reads each request in an event loop and sends a fixed answer. Its time and the "
            "engine's, which decode no image, choose no model, count nothing and write no answer, add up to "
            f"{', '.join(bounds)} times Flask's requests/s at c = 1, 16, 64: what is left of 10 times is for all that.",
            *told]


def aims(run: Row) -> str:
    """Ratios of medians, of the same form of request where there is one; missed ones in bold."""
    lines = ["| aim | ratio | |", "|---|---|---|"]
    measured = {row["server"] for row in run["rows"]}
    for key, least in (("flask", 10.0), ("litserve", 2.0), ("bentoml", 2.0), ("mlserver", 2.0), ("pytriton", 1.0)):
        if key in measured:
            ours = SAME_FORM[key]
            for c in (1, 16, 64):
                ratio = _median(run, ours, c, "per_s") / _median(run, key, c, "per_s")
                lines.append(_line(f"requests/s of {NAMES[key]}, c = {c}: at least {least:g} times", ratio,
                                   ratio >= least))
    for key in ("flask", "litserve", "bentoml", "mlserver"):
        if key in measured:
            ratio = _median(run, SAME_FORM[key], 1, "p50_us") / _median(run, key, 1, "p50_us")
            lines.append(_line(f"p50 at c = 1 of {NAMES[key]}: at most 0.5 of it", ratio, ratio <= 0.5))
    for what, least in (("JPEG, 64 connections", 0.95), ("tensors of 64, 4 connections", 0.9)):
        ratio = _of_engine(run, "small", what)
        lines.append(_line(f"`small`, {what}: at least {least:g} of the engine at batch 64", ratio, ratio >= least))
    if "overload" in run:
        lines += [_line(*aim) for aim in overload.aims(run["overload"]["rows"], run["overload"]["slow"])]
    return "\n".join(lines)


def engine(run: Row) -> str:
    lines = ["images/s of a loop over the Session with ready tensors, and of the API on the same core.", "",
             "| network | what | images/s | of the engine at batch 64 |", "|---|---|---|---|"]
    lines += [f"| {row['network']} | {row['what']} | {median(row['per_s']):,.0f} | "
              f"{_of_engine(run, row['network'], row['what']):.2f} |" for row in run["engine"]]
    return "\n".join(lines)


def _line(what: str, ratio: float, met: bool) -> str:
    return f"| {what} | {ratio:.2f} | {'met' if met else '**missed**'} |"


def _median(run: Row, server: str, connections: int, what: str) -> float:
    return float(median(next(row[what] for row in run["rows"]
                             if (row["server"], row["connections"]) == (server, connections))))


def _of_engine(run: Row, network: str, what: str) -> float:
    found = {row["what"]: median(row["per_s"]) for row in run["engine"] if row["network"] == network}
    return float(found[what] / found["engine, batch 64"])


def _rest(run: Row) -> list[str]:
    gpus = ["## Not measured here", "GPUs: `./run bench gpu`."]
    if "overload" not in run:
        return [gpus[0], "Open loop and overload: wrk's loop is closed. " + gpus[1]]
    return ["## Overload", overload.render(run["overload"]["rows"], run["overload"]["slow"]),
            "## HTTP_PROCESSES", processes(run), *gpus]


def processes(run: Row) -> str:
    lines = [f"The API on all {run['cores']} cores, which wrk shares: as one process with a thread of ONNX Runtime a "
             "core, and as one process a core.", "",
             "| network | processes | requests/s, c = 1 | 64 | p50 ms, c = 1 | 64 | p99 ms, c = 1 | 64 | failed |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, count in dict.fromkeys((row["network"], row["processes"]) for row in run["processes"]):
        mine = [row for row in run["processes"] if (row["network"], row["processes"]) == (name, count)]
        cells = [f"{median(row['per_s']):,.0f}" for row in mine]
        cells += [f"{median(row[what]) / 1000:.2f}" for what in ("p50_us", "p99_us") for row in mine]
        lines.append(f"| {name} | {count} | {' | '.join(cells)} | {sum(row['bad'] for row in mine)} |")
    return "\n".join(lines)
