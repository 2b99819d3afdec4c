"""MLServer: a custom runtime with adaptive batching, the image as base64 in a BYTES tensor of the protocol's JSON."""

import base64
import io
import os

import numpy as np
import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from PIL import Image

SIZE = int(os.environ["SIZE"])


class Classifier(MLModel):
    async def load(self) -> bool:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(item))).convert("RGB").resize((SIZE, SIZE)))
                  for item in payload.inputs[0].data]
        scores = self.session.run(None, {"images": np.stack(images)})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("probabilities", scores)])
