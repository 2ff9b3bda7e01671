"""Copies of exported graphs whose matrix products run in 8 bits.

A layer's product x W becomes s (q Q) c: q = round(127 x / s) with s = max |x| of its row, one frame of one stream, and
Q = round(W / c) with one c per column. onnxruntime's own `quantize_dynamic` takes one s for the whole tensor, so that a
stream's text would depend on the other streams of its batch, and one loud frame would cost all others their digits.

Products with weights are converted, nothing else: not the front end, not the joiner's output, not the predictor, where
8 bits cost words and save little.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cascade.export.sessions import DECODER, int8_name
from cascade.models.transducer import CascadedTransducer
from cascade.provenance import instruction_sets

_LEVELS = 127
_FUSED = "com.microsoft"
"""Home of onnxruntime's MatMulIntegerToFloat: the sum of integers, scaled on its way out."""


def weight_bits() -> int:
    """8, or 7 where the processor adds products of 8 bits in 16, which overflow: x86 without VNNI."""
    known = instruction_sets()
    return 7 if "AVX2" in known and "VNNI" not in known else 8


def float32_weights(model: CascadedTransducer) -> list[np.ndarray]:
    """The matrices (in, out) that stay as they are."""
    layers = (model.encoder.subsampling.out, model.joiner.output)
    return [layer.weight.detach().numpy().T for layer in layers]


def quantise_files(folder: Path, model: CascadedTransducer, bits: int) -> list[str]:
    """Write the copy of every graph in `folder` but the predictor's; returns the names of the float32 files."""
    kept = float32_weights(model)
    files = [path for path in sorted(folder.glob("*.onnx")) if path.name != DECODER]
    for path in files:
        quantise(path, path.with_name(int8_name(path.name)), kept, bits)
    return [path.name for path in files]


def quantise(path: Path, out: Path, kept: list[np.ndarray], bits: int = 8) -> int:
    """Write `path` with its layers' products in integers.

    Args:
      kept: matrices (in, out) that stay float32.
      bits: of the weights, 7 or 8.
    Returns:
      How many layers were converted.
    """
    import onnx

    proto = onnx.load(str(path))
    writer = _Writer(proto, kept, bits)
    nodes = [new for node in proto.graph.node for new in writer.convert(node)]
    used = {name for node in nodes for name in node.input}
    weights = [weight for weight in (*proto.graph.initializer, *writer.weights) if weight.name in used]
    for field, values in ((proto.graph.node, nodes), (proto.graph.initializer, weights)):
        del field[:]
        field.extend(values)
    proto.opset_import.append(onnx.helper.make_opsetid(_FUSED, 1))
    onnx.checker.check_model(proto)
    onnx.save(proto, str(out))
    return writer.num_converted


class _Writer:
    """Makes the nodes that stand for a node."""

    def __init__(self, proto: Any, kept: list[np.ndarray], bits: int) -> None:
        from onnx import helper, numpy_helper

        self._make_node, self._make_tensor = helper.make_node, numpy_helper.from_array
        self._float32 = {weight.name: numpy_helper.to_array(weight) for weight in proto.graph.initializer}
        self._kept, self._largest = kept, 2 ** (bits - 1) - 1
        self._rows: dict[str, tuple[str, str]] = {}
        """Tensor -> its integers and the largest values of its rows: several layers may read it."""
        self.num_converted = 0
        constants = {"step": np.float32(1 / _LEVELS), "zero": np.uint8(128), "least": np.float32(1e-30)}
        self.weights = [self._make_tensor(np.array(value), f"int8.{name}") for name, value in constants.items()]

    def convert(self, node: Any) -> list[Any]:
        """The nodes in the place of a layer's product; of another node, itself."""
        weight = self._float32.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or weight.ndim != 2:
            return [node]
        if node.op_type == "Gemm" and any(each.name == "transB" and each.i for each in node.attribute):
            weight = weight.T
        if any(weight.shape == other.shape and (weight == other).all() for other in self._kept):
            return [node]
        self.num_converted += 1
        name, nodes = node.output[0], []

        def add(kind: str, output: str, *inputs: str, **attributes: Any) -> str:
            nodes.append(self._make_node(kind, inputs, [f"{name}.{output}" if output else name], **attributes))
            return nodes[-1].output[0]

        if node.input[0] not in self._rows:
            largest = add("ReduceMax", "largest", add("Abs", "size", node.input[0]), axes=[-1])
            largest = add("Max", "row", largest, "int8.least")
            share = add("Div", "share", node.input[0], largest)
            self._rows[node.input[0]] = add("QuantizeLinear", "integers", share, "int8.step", "int8.zero"), largest
        integers, largest = self._rows[node.input[0]]
        scale = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny) / self._largest
        matrix = np.rint(weight / scale).astype(np.int8)
        for suffix, array in (("matrix", matrix), ("scale", scale.astype(np.float32))):
            self.weights.append(self._make_tensor(np.ascontiguousarray(array), f"{name}.{suffix}"))
        inputs = (integers, f"{name}.matrix", "int8.step", f"{name}.scale", "int8.zero")
        product = add("MatMulIntegerToFloat", "share_out", *inputs, domain=_FUSED)
        if node.op_type == "Gemm" and len(node.input) > 2:
            add("Add", "", add("Mul", "product", product, largest), node.input[2])
        else:
            add("Mul", "", product, largest)
        return nodes
