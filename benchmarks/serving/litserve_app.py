"""LitServe with its dynamic batching. Raw bodies are none of its request types: the image comes as base64 in JSON."""

import base64
import io
import os

import litserve as ls
import numpy as np
import onnxruntime as ort
from PIL import Image

SIZE = int(os.environ["SIZE"])


class Classifier(ls.LitAPI):
    def setup(self, device):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options)

    def decode_request(self, request):
        image = Image.open(io.BytesIO(base64.b64decode(request["image"]))).convert("RGB").resize((SIZE, SIZE))
        return np.asarray(image)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, batch):
        return self.session.run(None, {"images": batch})[0]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, scores):
        best = np.argsort(-scores)[:5]
        return {"top": [{"index": int(i), "probability": float(scores[i])} for i in best]}


if __name__ == "__main__":
    api = Classifier(max_batch_size=int(os.environ["BATCH"]), batch_timeout=0.0)
    ls.LitServer(api, accelerator="cpu", workers_per_device=1).run(
        host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False, log_level="warning")
