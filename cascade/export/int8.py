"""Copies of exported graphs whose matrix products run in 8 bits.

A layer's product x W becomes s (q Q) c: q = round(127 x / s) with s = max |x| of its row, one frame of one stream, and
Q = round(W / c) with one c per column. Behind a SiLU, which has no large negative values, q = round(255 (x + 0.28) / s)
uses all 8 bits. onnxruntime's own `quantize_dynamic` takes one s for the whole tensor, so that a stream's text would
depend on the other streams of its batch, and one loud frame would cost all others their digits.

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
_SILU_DEPTH = np.float32(0.2785)
"""How far x sigmoid(x) goes below zero, rounded up."""
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
        self._made_by = {name: node for node in proto.graph.node for name in node.output}
        self._kept, self._largest = kept, 2 ** (bits - 1) - 1
        self.num_converted = 0
        self.weights: list[Any] = []
        constants = {"step": np.float32(1 / _LEVELS), "zero": np.uint8(128), "least": np.float32(1e-30)}
        constants |= {"silu_step": np.float32(1 / 255), "silu_zero": np.uint8(0), "silu_depth": _SILU_DEPTH}
        for name, value in constants.items():
            self._store(f"int8.{name}", np.array(value))

    def _store(self, name: str, array: np.ndarray) -> str:
        self.weights.append(self._make_tensor(np.ascontiguousarray(array), name))
        return name

    def _is_silu(self, name: str) -> bool:
        node = self._made_by.get(name)
        factors = [self._made_by.get(each) for each in node.input] if node is not None and node.op_type == "Mul" else []
        return any(each is not None and each.op_type == "Sigmoid" and each.input[0] in node.input for each in factors)

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
        name, nodes, x = node.output[0], [], node.input[0]

        def add(kind: str, output: str, *inputs: str, **attributes: Any) -> str:
            nodes.append(self._make_node(kind, inputs, [f"{name}.{output}"], **attributes))
            return nodes[-1].output[0]

        scale = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny) / self._largest
        matrix = np.rint(weight / scale).astype(np.int8)
        biases = [node.input[2]] if node.op_type == "Gemm" and len(node.input) > 2 else []
        if self._is_silu(x):  # nothing lies below -0.28: all levels for what lies above, and the shift taken back
            x, kind = add("Add", "shifted", x, "int8.silu_depth"), "silu_"
            size = x
            biases.append(self._store(f"{name}.shift", -_SILU_DEPTH * matrix.sum(axis=0, dtype=np.float32) * scale))
        else:
            size, kind = add("Abs", "size", x), ""
        largest = add("Max", "row", add("ReduceMax", "largest", size, axes=[-1]), "int8.least")
        step, zero = f"int8.{kind}step", f"int8.{kind}zero"
        integers = add("QuantizeLinear", "integers", add("Div", "share", x, largest), step, zero)
        weights = self._store(f"{name}.matrix", matrix), step, self._store(f"{name}.scale", scale), zero
        product = add("MatMulIntegerToFloat", "share_out", integers, *weights, domain=_FUSED)
        result = add("Mul", "product", product, largest)
        for number, bias in enumerate(biases):
            result = add("Add", f"sum{number}", result, bias)
        nodes[-1].output[0] = name
        return nodes
