"""Triton itself, which calls this process: PyTriton with dynamic batching, the image in a BYTES tensor."""

import io
import os

import numpy as np
import onnxruntime as ort
from PIL import Image
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

SIZE = int(os.environ["SIZE"])
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(os.environ["MODEL"], options)


@batch
def predict(images):
    pixels = [np.asarray(Image.open(io.BytesIO(item)).convert("RGB").resize((SIZE, SIZE))) for item in images[:, 0]]
    return {"probabilities": session.run(None, {"images": np.stack(pixels)})[0]}


port = int(os.environ["PORT"])
with Triton(config=TritonConfig(http_address="127.0.0.1", http_port=port, grpc_port=port + 1, metrics_port=port + 2,
                                log_verbose=0)) as triton:
    triton.bind("bench-tiny", predict, inputs=[Tensor(name="images", dtype=bytes, shape=(1,))],
                outputs=[Tensor(name="probabilities", dtype=np.float32, shape=(-1,))],
                config=ModelConfig(max_batch_size=int(os.environ["BATCH"]), batcher=DynamicBatcher()))
    triton.serve()
