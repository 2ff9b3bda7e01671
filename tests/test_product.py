"""Products with constant matrices: the compiled ones are those of numpy, and each row its own."""

from __future__ import annotations

import numpy as np
import pytest

from cascade.product import Product

TOLERANCE = {np.float32: 1e-4, np.float64: 1e-11}


@pytest.fixture(scope="module")
def compiled_product():
    pytest.importorskip("numba", reason="needs numba")
    from cascade.product_numba import Product

    return Product


def arrays(dtype, *shapes):
    random = np.random.default_rng(sum(map(sum, shapes)))
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 7, 8, 16, 17, 50])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 5, 9])
def test_rows_times_the_matrix_plus_the_bias(compiled_product, num_rows, width, dtype):
    x, weight, bias = arrays(dtype, (num_rows, 37), (width, 37), (width,))
    exact = x.astype(np.longdouble) @ weight.T.astype(np.longdouble) + bias
    for kind in (Product, compiled_product):
        out = np.full((num_rows + 1, width), 7, dtype)  # what lies behind the rows stays
        product = kind(np.asarray(weight, order="F"), bias)
        np.testing.assert_allclose(product(x), exact, rtol=0, atol=TOLERANCE[dtype])
        product(x, out[:num_rows])
        np.testing.assert_allclose(out[:num_rows], exact, rtol=0, atol=TOLERANCE[dtype])
        assert (out[num_rows] == 7).all()


def test_a_compiled_row_has_the_same_bits_whatever_rows_stand_beside_it(compiled_product):
    x, weight, bias = arrays(np.float32, (9, 64), (20, 64), (20,))
    product = compiled_product(weight, bias)
    together = product(x)
    for row in range(len(x)):
        assert np.array_equal(product(x[row : row + 1])[0], together[row])
        assert np.array_equal(product(x[row:])[0], together[row])


def test_what_a_compiled_product_cannot_read_is_refused(compiled_product):
    x, weight, bias = arrays(np.float32, (6, 8), (5, 8), (5,))
    product, good = compiled_product(weight, bias), np.empty((6, 5), np.float32)
    for wrong in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1], x.astype(np.float64)):
        with pytest.raises(Exception, match="_multiply_block"):
            product(wrong, good)
    for out in (np.asfortranarray(good), good.astype(np.float64), np.empty((6, 10), np.float32)[:, ::2]):
        with pytest.raises(Exception, match="_multiply_block"):
            product(x, out)
    for wrong, out in ((x[:, :4].copy(), good), (x, good[:5]), (x, np.empty((6, 6), np.float32))):
        with pytest.raises(AssertionError):
            product(wrong, out)
