"""Label images with the model beside this file: python predict.py IMAGE ...

python predict.py --check    runs the images that it was published with, and compares
Needs `pip install -r requirements.txt`, and nothing of Lanner.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).parent
MANIFEST = json.loads((HERE / "manifest.json").read_text())
SIZE, LABELS = MANIFEST["spec"]["size"], MANIFEST["spec"]["labels"]
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "int8": 5e-2}  # of a probability, from machine to machine


def new_run() -> Callable[[np.ndarray], np.ndarray]:
    """run(uint8 [N, SIZE, SIZE, 3], RGB) -> float32 [N, len(LABELS)], probabilities; the rest is inside the model."""
    if (HERE / "model.onnx").exists():
        import onnxruntime

        session = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})[0]
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(HERE / "model.tflite"))

    def run(images: np.ndarray) -> np.ndarray:
        at = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(at, images.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(at, images)
        interpreter.invoke()
        scores: np.ndarray = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        return scores

    return run


def read(path: str) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3]: upright, on white, stretched, which is what the model was trained on.

    Lanner itself decodes and shrinks with other libraries: a probability may differ in its second decimal.
    """
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    return np.asarray(white.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    run = new_run()
    if args.check:
        golden = np.load(HERE / "golden.npz")
        off = float(np.abs(run(golden["images"]) - golden["probabilities"]).max())
        print(f"{len(golden['images'])} images, off by {off:.2g} at most")
        sys.exit(off > TOLERANCE[MANIFEST["precision"]])
    if not args.images:
        parser.error("expected images, or --check")
    for path in args.images:
        scores = run(read(path)[None])[0]
        best = [f"{LABELS[i]} {scores[i]:.3f}" for i in np.argsort(-scores)[:3]]
        print(f"{path}: {', '.join(best)}")


if __name__ == "__main__":
    main()
