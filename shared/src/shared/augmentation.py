"""What may be asked of augmentation: the option names of Keras' ImageDataGenerator, and two of our own.

Here, because a training with an option that can't work is refused when it is asked for, not when its dataset is ready.
"""

import math
from typing import Any

from shared.errors import Refused

LARGEST = 256  # pixels a side of a Dataset's images
OPTIONS = {
    "horizontal_flip": "true or false",
    "width_shift_range": "a fraction of the width below 1, or pixels",
    "height_shift_range": "a fraction of the height below 1, or pixels",
    "rotation_range": "degrees, 0 to 180",
    "zoom_range": "a number from 0 to below 1, or [lowest, highest] above 0",
    "views": "true or false",
    "cutout": "side of a square to blank, a fraction of the side below 1, or pixels",
}
SPEEDRUN = ("horizontal_flip", "width_shift_range", "height_shift_range", "views")  # what recipe speedrun knows of them


def check_augmentation(options: dict[str, Any], size: int = LARGEST, recipe: str = "") -> None:
    """Raises Refused for an option that is unknown, to this recipe too, or has a value it can't take at `size` pixels
    a side.
    """
    known = SPEEDRUN if recipe == "speedrun" else tuple(OPTIONS)
    for name, value in options.items():
        if name not in known:
            who = "recipe speedrun has no augmentation" if name in OPTIONS else "augmentation has no option"
            raise Refused(f"{who} {name!r}: expected some of {', '.join(known)}", "bad_augmentation")
        if not _valid(name, value, size):
            raise Refused(f"augmentation {name} is {value!r}: expected {OPTIONS[name]}", "bad_augmentation")


def _valid(name: str, value: Any, size: int) -> bool:
    if name in ("horizontal_flip", "views"):
        return isinstance(value, bool)
    if name == "zoom_range" and isinstance(value, (list, tuple)):
        return len(value) == 2 and all(_number(v) for v in value) and 0 < value[0] <= value[1] <= 10
    if not _number(value) or value < 0:
        return False
    return bool(value <= {"rotation_range": 180, "zoom_range": 0.99}.get(name, size))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
