"""The recipe `speedrun` beside a hand-tuned PyTorch script: same GPU, same images, same timing rule, runs in turns.

    ./run bench train --data DATA --anchor PATH/airbench94_muon.py --anchor-python PYTHON --runs 10
    ./run bench train --data DATA --ours-only --runs 2 --profile --explore

DATA is a published Dataset's folder, or a folder with {train,test}/<class>/<images>, decoded once and kept in --arrays.
The anchor is fetched by you from github.com/KellerJordan/cifar10-airbench; it runs unmodified in --anchor-python, which
has its PyTorch, on images that this command writes where it looks for them.

Timed: the first layer from the training images, all steps, and the answers with views moved and mirrored (TTA) to the
images held out. Not timed, of either: compiling, a warm-up run, loading, new random weights, the answers without TTA.

Held out are --validation of the training images; the test split only where --test is given, and then once.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

AIM = 1.0
Split = tuple[np.ndarray, np.ndarray]

DRIVE = """
import importlib.util, json, os, sys
import numpy as np, torch
script, data = sys.argv[1:3]
for name in ("train", "test"):
    with np.load(f"{data}/{name}.npz") as held:
        images, labels = torch.from_numpy(held["images"]), torch.from_numpy(held["labels"]).long()
    os.makedirs(f"{data}/cifar10", exist_ok=True)
    classes = [str(k) for k in range(10)]
    torch.save({"images": images, "labels": labels, "classes": classes}, f"{data}/cifar10/{name}.pt")
os.chdir(data)
spec = importlib.util.spec_from_file_location("anchor", script)
anchor = importlib.util.module_from_spec(spec)
spec.loader.exec_module(anchor)
last = {}
anchor.print_training_details = lambda variables, is_final_entry: last.update(variables)
print(json.dumps({"torch": torch.__version__, "gpu": torch.cuda.get_device_name()}), flush=True)
"""
DRIVE_94 = """
model = anchor.CifarNet().cuda().to(memory_format=torch.channels_last)
model.compile(mode="max-autotune")
for line in sys.stdin:
    anchor.main("warmup" if line == "warmup\\n" else int(line), model)
    print(json.dumps({"seconds": last["time_seconds"], "accuracy": last["tta_val_acc"],
                      "plain": last["val_acc"]}), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--arrays", type=Path, default=Path("/tmp/lanner-bench-train"), help="keeps decoded images")
    parser.add_argument("--validation", type=int, default=5000, help="training images that are held out")
    parser.add_argument("--test", action="store_true", help="train on all training images, answer the test split")
    parser.add_argument("--images", type=int, default=0, help="train on so many, 0 for all")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=0, help="0: as the recipe says")
    parser.add_argument("--batch", type=int, default=0, help="0: as the recipe says")
    parser.add_argument("--device", default="gpu", choices=["gpu", "cpu"])
    parser.add_argument("--anchor", type=Path, help="airbench94_muon.py")
    parser.add_argument("--anchor-python", default="python3")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--vary", default="", help="all runs with one thing changed, as --explore names it")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER",
                        help="a field of the recipe, or an upper-case constant of training.speedrun.program")
    parser.add_argument("--explore", action="store_true", help="time an epoch with one thing changed, each")
    parser.add_argument("--profile", action="store_true", help="what the GPU did in an epoch")
    parser.add_argument("--seconds", type=float, default=540, help="no further run or variation is begun after so many")
    parser.add_argument("--out", type=Path, default=Path("train.json"))
    args = parser.parse_args()
    if not args.ours_only and not args.anchor:
        parser.error("give --anchor PATH of airbench94_muon.py, or --ours-only")
    began = time.monotonic()
    train, held, labels = splits(args)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "command": " ".join(["./run bench train", *sys.argv[1:]]),
        "cores": len(os.sched_getaffinity(0)), "train": len(train[0]), "held out": len(held[0]), "test": args.test}
    print(f"{len(train[0])} training images, {len(held[0])} {'test' if args.test else 'validation'} images, "
          f"read in {time.monotonic() - began:.1f} s", flush=True)
    anchor = None if args.ours_only else Anchor(args, train, held)
    from train_ours import Ours
    ours = Ours(args, train, held, labels)
    result |= ours.about
    print(f"ours: compiled and run once in {ours.compile_s:.1f} s: " +
          ", ".join(f"{k} {v:.1f}" for k, v in ours.first.items()), flush=True)
    if anchor:
        result |= {"anchor": anchor.about, "anchor compile": anchor.warm_up()}
        print(f"anchor: compiled and run once in {result['anchor compile']:.1f} s", flush=True)
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "anchor": []}
    sides = [("ours", ours), *([("anchor", anchor)] if anchor else [])]
    for number in range(args.runs):
        if time.monotonic() - began > args.seconds:
            print(f"{number} runs of {args.runs} in {args.seconds:.0f} s")
            break
        for name, side in sides[:: 1 if number % 2 == 0 else -1]:
            rows[name].append(side.run(number))
            print(name, {k: round(v, 4) for k, v in rows[name][-1].items()}, flush=True)
    result |= {"compile": ours.compile_s, "runs": rows, "laps": ours.laps(), **summary(rows)}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    if args.profile:
        result["profile"] = ours.profile()
        print(*result["profile"], sep="\n    ", flush=True)
    if args.explore:
        result["explored"] = ours.explore(until=began + args.seconds)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def splits(args: argparse.Namespace) -> tuple[Split, Split, list[str]]:
    """What is trained on, what is held out, and the names of the classes."""
    if (args.data / "manifest.json").exists():
        train, held = _of_dataset(args.data, args.test)
        labels = json.loads((args.data / "manifest.json").read_text())["spec"]["labels"]
    else:
        folders = sorted(p.name for p in (args.data / "train").iterdir() if p.is_dir())
        train, labels = _decoded(args, "train", folders), folders
        held = _decoded(args, "test", folders) if args.test else None
    if held is None:
        order = np.random.default_rng(0).permutation(len(train[0]))
        train, held = ((train[0][rows], train[1][rows]) for rows in (order[args.validation:], order[:args.validation]))
    if args.images:
        train = train[0][:args.images], train[1][:args.images]
    return train, held, labels


def _of_dataset(folder: Path, test: bool) -> tuple[Split, Split]:
    """With `test`, validation is trained on too: the anchor's own split of CIFAR-10 has none."""
    held = {name: (np.load(folder / f"{name}.npy"), np.load(folder / f"{name}.labels.npy"))
            for name in (("train", "validation", "test") if test else ("train", "validation"))}
    if not test:
        return held["train"], held["validation"]
    both = [np.concatenate(pair) for pair in zip(held["train"], held["validation"], strict=True)]
    return (both[0], both[1]), held["test"]


def _decoded(args: argparse.Namespace, split: str, folders: list[str]) -> Split:
    """Images of {train,test}/<class>/ in an order that mixes the classes, decoded once."""
    import simplejpeg

    kept = args.arrays / f"{split}.npz"
    if not kept.exists():
        files = [(path, k) for k, name in enumerate(folders) for path in sorted((args.data / split / name).iterdir())]
        files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda f: simplejpeg.decode_jpeg(f[0].read_bytes()), files, chunksize=256))
        args.arrays.mkdir(parents=True, exist_ok=True)
        np.savez(kept, images=np.stack(images), labels=np.array([k for _, k in files], np.int32))
    with np.load(kept) as held:
        return held["images"], held["labels"]


class Anchor:
    """The anchor in a process of its own, which does a run when it is told to."""

    def __init__(self, args: argparse.Namespace, train: Split, held: Split, drive: str = DRIVE_94):
        """drive: what the process does once the script is loaded as `anchor`."""
        folder = (args.arrays / "anchor").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for name, (images, labels) in (("train", train), ("test", held)):
            np.savez(folder / f"{name}.npz", images=images, labels=labels)
        (folder / "drive.py").write_text(DRIVE + drive)
        # PyTorch's libraries, not those that TensorFlow here was given.
        env = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME")}
        self.process = subprocess.Popen(
            [args.anchor_python, folder / "drive.py", args.anchor.absolute(), folder], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"the anchor ended with {self.process.wait()}: its message is above")

    def _told(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def warm_up(self) -> float:
        began = time.perf_counter()
        self._told("warmup")
        return time.perf_counter() - began

    def run(self, number: int) -> dict[str, float]:
        return self._told(str(number))


def summary(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of time, means and deviations of accuracy, and the ratio of the times."""
    found: dict[str, Any] = {}
    for name, runs in rows.items():
        if runs:
            times = [run["seconds"] for run in runs]
            found[name + " summary"] = {
                "n": len(runs), "median": statistics.median(times), "least": min(times), "most": max(times),
                **{f"{what} {key}": f([run[key] for run in runs]) for key in ("accuracy", "plain")
                   for what, f in (("mean", statistics.mean), ("deviation", deviation))}}
    if rows["anchor"]:
        found["ratio"] = found["ours summary"]["median"] / found["anchor summary"]["median"]
    return found


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':8} {'n':>3} {'median s':>9} {'least':>7} {'most':>7} {'accuracy':>16} {'without TTA':>16}"]
    for name in ("ours", "anchor"):
        if s := result.get(name + " summary"):
            shown = [f"{100 * s['mean ' + k]:8.2f} ± {100 * s['deviation ' + k]:5.2f}" for k in ("accuracy", "plain")]
            lines.append(f"{name:8} {s['n']:3} {s['median']:9.3f} {s['least']:7.3f} {s['most']:7.3f} {shown[0]:>16} "
                         f"{shown[1]:>16}")
    lines.append("ours, each waited for: " + ", ".join(f"{name} {s:.3f} s" for name, s in result["laps"].items()))
    if "ratio" in result:
        ours, anchor = (result[name + " summary"]["mean accuracy"] for name in ("ours", "anchor"))
        met = result["ratio"] <= AIM and ours >= anchor
        lines.append(f"aim: at least its accuracy in at most {AIM} of its time: {'met' if met else 'missed'}, "
                     f"{100 * (ours - anchor):+.2f} points in {result['ratio']:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
