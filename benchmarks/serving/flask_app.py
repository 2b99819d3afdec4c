"""Flask as its quickstart has it, under gunicorn's gthread workers: one process, since the server has one core."""

import io
import os

import numpy as np
import onnxruntime as ort
from flask import Flask, jsonify, request
from PIL import Image

SIZE = int(os.environ["SIZE"])
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(os.environ["MODEL"], options)
app = Flask(__name__)


@app.post("/predict")
def predict():
    image = Image.open(io.BytesIO(request.get_data())).convert("RGB").resize((SIZE, SIZE))
    scores = session.run(None, {"images": np.asarray(image)[None]})[0][0]
    best = np.argsort(-scores)[:5]
    return jsonify(top=[{"index": int(i), "probability": float(scores[i])} for i in best])
