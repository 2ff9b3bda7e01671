"""`product` compiled: a library of matrix products copies the whole matrix at every call, this one when it is built.

Panels of the matrix, one vector wide, lie as they are read; sums of a block of rows with a panel stay in registers, and
a block that is not full costs as much. A row's result does not depend by one bit on the rows beside it.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.core.types import Array, intp, void
from numba.extending import intrinsic

_ROWS = 4
"""Rows of a block: with 16 columns each in float32, as many sums as hide the latency of multiplication in AVX2."""
_PANEL_BYTES = 64


@intrinsic
def _multiply_block(typing_context, x, start, end, panels, panel, biases, out, column):
    """Write a block's product with a panel, from this column on.

    The block is the `_ROWS` rows from `start` on; in place of those from `end` on it has row end - 1.
    """
    if not all(isinstance(array, Array) and array.layout == "C" and array.dtype is x.dtype for array in
               (x, panels, biases, out)):
        return None  # numba says that there is no such function

    def generate(context, builder, signature, arguments):
        x, panels, biases, out = (
            context.make_array(signature.args[k])(context, builder, arguments[k]) for k in (0, 3, 5, 6)
        )
        start, end, panel, column = (arguments[k] for k in (1, 2, 4, 7))
        kind = signature.args[0].dtype
        size = kind.bitwidth // 8
        scalar, lanes, number = context.get_value_type(kind), _PANEL_BYTES // size, start.type
        vector = ir.VectorType(scalar, lanes)
        add_product = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{lanes}f{kind.bitwidth}"
        )
        dim, width = cgutils.unpack_tuple(builder, x.shape, 2)[1], cgutils.unpack_tuple(builder, out.shape, 2)[1]

        def vector_at(data, place):
            return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())

        def repeated(value):
            undefined, zero = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
            places = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)
            return builder.shuffle_vector(builder.insert_element(undefined, value, zero), undefined, places)

        last = builder.sub(end, number(1))
        rows = [builder.add(start, number(k)) for k in range(_ROWS)]
        rows = [builder.select(builder.icmp_signed("<", row, last), row, last) for row in rows]
        heads = [builder.gep(x.data, [builder.mul(row, dim)]) for row in rows]
        bias = builder.load(vector_at(biases.data, builder.mul(panel, number(lanes))), align=size)
        sums = [cgutils.alloca_once(builder, vector) for _ in rows]  # LLVM keeps them in registers
        for place in sums:
            builder.store(bias, place)
        head = builder.gep(panels.data, [builder.mul(panel, builder.mul(dim, number(lanes)))])
        with cgutils.for_range(builder, dim) as loop:
            weights = builder.load(vector_at(head, builder.mul(loop.index, number(lanes))), align=size)
            for row, place in zip(heads, sums, strict=True):
                factor = repeated(builder.load(builder.gep(row, [loop.index])))
                builder.store(builder.call(add_product, [factor, weights, builder.load(place)]), place)
        for row, place in zip(rows, sums, strict=True):
            target = vector_at(out.data, builder.add(builder.mul(row, width), column))
            builder.store(builder.load(place), target, align=size)
        return context.get_dummy_value()

    return void(x, intp, intp, panels, intp, biases, out, intp), generate


@numba.njit(cache=True)
def _multiply(x, panels, biases, out):
    num_rows, lanes, width = x.shape[0], panels.shape[2], out.shape[1]
    rest = np.empty((num_rows, lanes), x.dtype)
    for panel in range(panels.shape[0]):
        column = panel * lanes
        inside = column + lanes <= width
        for start in range(0, num_rows, _ROWS):
            if inside:
                _multiply_block(x, start, num_rows, panels, panel, biases, out, column)
            else:
                _multiply_block(x, start, num_rows, panels, panel, biases, rest, 0)
        if not inside:
            out[:, column:] = rest[:, : width - column]


class Product:
    """See `product.Product`."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        (self._width, dim), lanes = weight.shape, _PANEL_BYTES // weight.itemsize
        num_panels = -(-self._width // lanes)
        padded = np.zeros((num_panels * lanes, dim + 1), weight.dtype)
        padded[: self._width, :dim], padded[: self._width, dim] = weight, bias
        panels = padded.reshape(num_panels, lanes, dim + 1).swapaxes(1, 2)
        self._panels, self._biases = np.ascontiguousarray(panels[:, :dim]), np.ascontiguousarray(panels[:, dim])

    def __call__(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """See `product.Product`; C-contiguous arrays of the weight's dtype, or numba raises a TypingError."""
        if out is None:
            out = np.empty((len(x), self._width), x.dtype)
        assert x.shape[1] == self._panels.shape[1] and out.shape == (len(x), self._width), (x.shape, out.shape)
        _multiply(x, self._panels, self._biases, out)
        return out
