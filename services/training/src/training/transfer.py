"""The recipe `transfer`: MobileNetV2 as others have trained it on ImageNet, found here and never fetched.

MobileNetV2 of those in keras.applications because its convolutions, ReLU6 and sums go to ONNX and to int8 as they are.
"""

from pathlib import Path

import keras
from keras import layers

from shared.errors import Refused
from shared.weights import LEAST, SOURCE, file_names


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
