"""Where the weights are that recipe `transfer` begins with: others have trained them, Lanner does not fetch them."""

import os
from pathlib import Path

from shared.errors import Refused

SOURCE = "https://storage.googleapis.com/tensorflow/keras-applications/mobilenet_v2/"
SIDES = (224, 192, 160, 128, 96)  # pixels that the weights to be had were trained at
OWN = "mobilenet_v2.weights.h5"  # what save_weights of such a network without its top writes
LEAST = 96  # pixels a side that it should see: of 32 it makes a single place before it pools


def file_names(size: int) -> list[str]:
    """Files that hold usable weights, the best for images of `size` pixels a side first."""
    near = sorted(SIDES, key=lambda side: abs(side - max(size, LEAST)))
    return [OWN] + [f"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_{side}_no_top.h5" for side in near]


def find_weights(root: Path, size: int) -> Path:
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
