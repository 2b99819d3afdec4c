"""The recipe `transfer`: MobileNetV2 as others have trained it on ImageNet, found here and never fetched.

MobileNetV2 of those in keras.applications because its convolutions, ReLU6 and sums go to ONNX and to int8 as they are.
"""

import os
from pathlib import Path

import keras
from keras import layers

from shared.errors import Refused

SOURCE = "https://storage.googleapis.com/tensorflow/keras-applications/mobilenet_v2/"
SIDES = (224, 192, 160, 128, 96)  # pixels that the weights to be had were trained at
OWN = "mobilenet_v2.weights.h5"  # what save_weights of such a network without its top writes
LEAST = 96  # pixels a side that it should see: of 32 it makes a single place before it pools


def features(x: keras.KerasTensor, size: int) -> keras.KerasTensor:
    """Pixels of -1..1 [N, size, size, 3] -> [N, 1280]. Smaller images are made larger inside the network.

    Batch normalisation keeps the statistics that it comes with, also while its neighbours learn: a batch of a small
    dataset has worse ones.
    """
    if size < LEAST:
        factor = -(-LEAST // size)
        x, size = layers.UpSampling2D(factor, interpolation="bilinear", name="enlarge")(x), factor * size
    backbone = keras.applications.MobileNetV2((size, size, 3), include_top=False, weights=None, input_tensor=x)
    for layer in backbone.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.trainable = False
    return layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(backbone.output))


def file_names(size: int) -> list[str]:
    """Files that hold usable weights, the best for images of `size` pixels a side first."""
    near = sorted(SIDES, key=lambda side: abs(side - max(size, LEAST)))
    return [OWN] + [f"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_{side}_no_top.h5" for side in near]


def find(root: Path, size: int) -> Path:
    """The weights: in weights/ on the volume, or where Keras keeps what it has fetched itself.

    Raises:
        Refused: there are none; says which file, from where, and where to put it.
    """
    folders = (root / "weights", Path(os.path.expanduser("~/.keras/models")))
    for folder in folders:
        for name in file_names(size):
            if (folder / name).is_file():
                return folder / name
    wanted = file_names(size)[1]
    raise Refused(f"recipe transfer needs weights of MobileNetV2, and neither {folders[0]} nor {folders[1]} has any: "
                  f"fetch {SOURCE}{wanted} and put it into {folders[0]}, or take another recipe", "no_weights")


def load(model: keras.Model, path: Path) -> None:
    """Put the weights of a file into the layers of `model` that have their names.

    Raises:
        Refused: the file holds no weights of MobileNetV2 without its top.
    """
    backbone = keras.applications.MobileNetV2((224, 224, 3), include_top=False, weights=None)
    try:
        backbone.load_weights(path)
    except (OSError, ValueError, KeyError) as e:
        raise Refused(f"{path} holds no weights of MobileNetV2 without its top ({type(e).__name__}: {str(e)[:200]}): "
                      f"fetch {SOURCE}{file_names(224)[1]} in its place", "no_weights") from e
    for layer in backbone.layers:
        if layer.weights:
            model.get_layer(layer.name).set_weights(layer.get_weights())
