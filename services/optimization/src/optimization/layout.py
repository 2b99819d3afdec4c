"""What Keras exports, laid out anew for a CPU: the same answers, without work that comes of the layout alone.

Keras keeps the colours of a pixel together (NHWC), ONNX convolutions take an image a colour (NCHW). Arithmetic on
three colours at a time is what ONNX Runtime and LiteRT's int8 have no fast kernel for: on `small` the scaling of the
pixels took a third as long as all convolutions. What it gains: docs/benchmarks/layout.md.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import keras
import numpy as np
import onnx
from onnx import helper, numpy_helper

ARITHMETIC = ("Add", "Sub", "Mul", "Div")
TO_CHANNELS_FIRST = [0, 3, 1, 2]


def arrange(path: Path, merge: bool = False) -> None:
    """Rewrite an ONNX file: pixels are scaled an image a colour at a time, and shapes that are known are constants.

    Its answers stay as they are to the last bit. merge: the scaling becomes one node, and answers may differ in the
    last bits; for what is quantized next, where ONNX Runtime's convolutions keep colours together, and it would have
    all else do so, too.
    """
    proto = onnx.load(path)
    channels_first(proto.graph, merge)
    constant_shapes(proto)
    drop_unread(proto.graph)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def channels_first(graph: onnx.GraphProto, merge: bool = False) -> None:
    """Let each Transpose to NCHW go ahead of the sums and products with constants of a colour that feed it alone.

    merge: they become one BatchNormalization, which can't be moved back, where they are one product and one sum.
    """
    constants = {c.name: c for c in graph.initializer}
    for transpose in [n for n in graph.node if n.op_type == "Transpose" and _perm(n) == TO_CHANNELS_FIRST]:
        chain = _arithmetic_before(graph, transpose, constants)
        if not chain:
            continue
        first, last = chain[0], chain[-1]
        pixels, moved = _data(first, constants), f"{transpose.output[0]}/first"
        last.output[0], transpose.output[0] = transpose.output[0], moved
        transpose.input[0] = pixels
        for node in chain:
            node.input[:] = [_of_colours(graph, constants, name) if name in constants else
                             moved if name == pixels else name for name in node.input]
        merged = _merged(graph, chain, constants, moved) if merge else None
        at = list(graph.node).index(first)
        for node in (transpose, *(chain if merged else ())):
            graph.node.remove(node)
        for node in ([transpose, merged] if merged else [transpose])[::-1]:
            graph.node.insert(at, node)


def constant_shapes(proto: onnx.ModelProto) -> None:
    """Give each Reshape whose result is known but for the batch its shape as a constant.

    A Flatten's is computed by seven small nodes, which one image notices.
    """
    graph, constants = proto.graph, {c.name for c in proto.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    shapes = {v.name: [d.dim_value or -1 for d in v.type.tensor_type.shape.dim] for v in inferred.value_info}
    for node in graph.node:
        shape = shapes.get(node.output[0], [])
        if node.op_type == "Reshape" and node.input[1] not in constants and shape and shape.count(-1) <= 1:
            node.input[1] = f"{node.output[0]}/shape"
            graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), node.input[1]))


def drop_unread(graph: onnx.GraphProto) -> None:
    """Take away nodes and constants that nothing reads."""
    while unread := [n for n in graph.node if not any(_readers(graph, name) for name in n.output)]:
        for node in unread:
            graph.node.remove(node)
    for constant in [c for c in graph.initializer if not _readers(graph, c.name)]:
        graph.initializer.remove(constant)


def scaled_by_convolution(model: keras.Model) -> keras.Model:
    """The same functional model, its Rescaling of pixels a 1 x 1 convolution of each colour: LiteRT has it in int8."""
    def layer_of(layer: keras.layers.Layer) -> keras.layers.Layer:
        if not isinstance(layer, keras.layers.Rescaling) or len(layer.output.shape) != 4:
            return layer
        colours = layer.output.shape[-1]
        if not {np.size(layer.scale), np.size(layer.offset)} <= {1, colours}:
            return layer
        scaled = keras.layers.DepthwiseConv2D(1, dtype="float32", name=layer.name)
        scaled.build((None, None, None, colours))
        scaled.set_weights([np.broadcast_to(np.ravel(layer.scale), (1, 1, colours))[..., None],
                            np.broadcast_to(np.ravel(layer.offset), colours)])
        return scaled

    return keras.models.clone_model(model, clone_function=layer_of)


def _perm(node: onnx.NodeProto) -> list[int]:
    return [number for attribute in node.attribute if attribute.name == "perm" for number in attribute.ints]


def _readers(graph: onnx.GraphProto, name: str) -> int:
    """How many nodes and outputs read a tensor."""
    return (sum(name in node.input for node in graph.node) + sum(name == output.name for output in graph.output))


def _data(node: onnx.NodeProto, constants: Iterable[str]) -> str:
    """The one input that is no constant; "" where that is not so."""
    names = [name for name in node.input if name not in constants]
    return names[0] if len(names) == 1 else ""


def _arithmetic_before(graph: onnx.GraphProto, transpose: onnx.NodeProto,
                       constants: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
    """The nodes that may as well follow it, in their order."""
    makers, chain, name = {out: n for n in graph.node for out in n.output}, [], transpose.input[0]
    while (node := makers.get(name)) is not None and node.op_type in ARITHMETIC and _readers(graph, name) == 1:
        data, sizes = _data(node, constants), [tuple(constants[i].dims) for i in node.input if i in constants]
        if not data or any(np.prod(dims) != (dims[-1] if dims else 1) or len(dims) > 4 for dims in sizes):
            break
        chain.insert(0, node)
        name = data
    return chain


def _merged(graph: onnx.GraphProto, chain: Sequence[onnx.NodeProto], constants: dict[str, onnx.TensorProto],
            pixels: str) -> onnx.NodeProto | None:
    """One node that does what the chain does to `pixels`; None where a constant is divided by them."""
    scale, offset = np.ones(()), np.zeros(())
    for node in chain:
        right = node.input[1] in constants
        value = numpy_helper.to_array(constants[node.input[right]]).astype(np.float64).reshape(-1)
        match node.op_type, right:
            case "Add", _:
                offset = offset + value
            case "Mul", _:
                scale, offset = scale * value, offset * value
            case "Sub", True:
                offset = offset - value
            case "Sub", False:
                scale, offset = -scale, value - offset
            case "Div", True:
                scale, offset = scale / value, offset / value
            case _:
                return None
    colours = np.broadcast_shapes(scale.shape, offset.shape)
    if colours in ((), (1,)):  # how many colours there are is not known here
        return None
    out, names = chain[-1].output[0], []
    for name, values in (("scale", scale), ("offset", offset), ("mean", np.zeros(1)), ("variance", np.ones(1))):
        names.append(f"{out}/{name}")
        graph.initializer.append(numpy_helper.from_array(np.broadcast_to(values, colours).astype(np.float32),
                                                         names[-1]))
    return helper.make_node("BatchNormalization", [pixels, *names], [out], name=f"{out}/merged", epsilon=0.0)


def _of_colours(graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto], name: str) -> str:
    """A constant [..., C] as one of [C, 1, 1]; a single number is left as it is."""
    values = numpy_helper.to_array(constants[name])
    if values.size == 1:
        return name
    if f"{name}/first" not in constants:
        constants[f"{name}/first"] = numpy_helper.from_array(values.reshape(-1, 1, 1), f"{name}/first")
        graph.initializer.append(constants[f"{name}/first"])
    return f"{name}/first"
