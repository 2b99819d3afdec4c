"""BentoML: a service of one worker whose API takes the image as the body. Its batches are of JSON and files alone."""

import os

import bentoml
import numpy as np
import onnxruntime as ort
from PIL import Image as Pillow
from PIL.Image import Image

SIZE = int(os.environ["SIZE"])


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Classifier:
    def __init__(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options)

    @bentoml.api
    def predict(self, image: Image, /) -> dict:
        pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Pillow.Resampling.BICUBIC))
        scores = self.session.run(None, {"images": pixels[None]})[0][0]
        best = np.argsort(-scores)[:5]
        return {"top": [{"index": int(i), "probability": float(scores[i])} for i in best]}
