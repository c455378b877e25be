"""dsv4 on JAX arrays on the CPU: bfloat16 through DLPack, results in numpy arrays given as out=."""
import dsv4
import numpy as np
import pytest

jnp = pytest.importorskip("jax.numpy", reason="JAX is not installed")


def arrays():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 64)), jnp.bfloat16)
    return x, (np.empty((4, 32), np.uint8), np.empty((4, 4), np.uint8))


def test_bfloat16_equals_its_bit_patterns():
    x, out = arrays()
    assert dsv4.quantize(x, out=out) == out
    assert all(np.array_equal(a, b) for a, b in zip(out, dsv4.quantize(np.asarray(x).view(np.uint16))))


def test_out_is_required():
    x, _ = arrays()
    with pytest.raises(ValueError, match="out: expected an array .* x is of jaxlib"):
        dsv4.quantize(x)


def test_immutable_arrays_are_not_written():
    x, out = arrays()
    with pytest.raises(ValueError, match="codes: expected an array that may be written, found a JAX array"):
        dsv4.quantize(x, out=tuple(map(jnp.asarray, out)))
