"""dsv4 on numpy arrays: bytes against reference.py, golden bytes, out=, gathers, and what wrong arguments say."""
import subprocess
import sys
import threading

import dsv4
import numpy as np
import pytest
import reference


def random_rows(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)) * np.exp(rng.standard_normal((rows, cols // 16)) * 2).repeat(16, axis=1)
    return x.astype(np.float32)


def row_globals(x):
    amax = np.abs(x).max(axis=1)
    return np.where(amax == 0, np.float32(1), amax / np.float32(2688)).astype(np.float32)


# ---- values ----


def test_golden_bytes():
    x = np.array([[0, -0.0, 0.5, -0.5, 1, -1, 1.5, -1.5, 2, -2, 3, -3, 4, -4, 6, -6]], np.float32)
    codes, sf = dsv4.quantize(x)
    assert bytes(codes) == bytes.fromhex("8091A2B3C4D5E6F7")
    assert bytes(sf) == b"\x38"
    assert dsv4.dequantize(codes, sf).tobytes() == x.tobytes()


@pytest.mark.parametrize(
    "value, code", [(2.5000002, 4 + 1), (2.5, 4), (-0.25, 8), (5.2, 7), (2.7, 5), (3.3, 5), (3.5, 6), (0.75, 2), (1.25, 2), (1.75, 4), (5, 6)]
)
def test_elements_round_once(value, code):
    x = np.zeros((1, 16), np.float32)
    x[0, 0], x[0, 15] = value, 6  # amax 6: sf is 1
    codes, sf = dsv4.quantize(x)
    assert sf[0, 0] == 0x38
    assert codes[0, 0] & 15 == code


def test_not_a_number_and_infinity():
    x = np.full((1, 16), np.nan, np.float32)
    x[0, 1], x[0, 2] = 6, -np.nan
    codes, sf = dsv4.quantize(x)
    assert sf[0, 0] == 0x38 and codes[0, 0] == 0x77
    x[0, 1] = np.inf
    codes, sf = dsv4.quantize(x)
    assert sf[0, 0] == 0x7E and codes[0, 0] >> 4 == 7


@pytest.mark.parametrize("rows, cols", [(1, 16), (3, 48), (130, 272), (5, 4096)])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layout", ["linear", "128x4"])
@pytest.mark.parametrize("mode", ["one", "number", "array", "rows", "row"])
def test_quantize_gives_the_rules_bytes(rows, cols, bf16, layout, mode):
    x = random_rows(rows, cols, seed=rows)
    x[0, :16] = 0
    argument = x
    if bf16:
        argument = reference.to_bf16(x)
        x = reference.from_bf16(argument)
    scale = {"one": 1.0, "number": 0.013, "array": 0.02, "rows": 0.01 * np.arange(1, rows + 1), "row": row_globals(x)}[mode]
    scale = np.asarray(scale, np.float32)
    given = {"one": None, "number": 0.013, "array": scale.reshape(-1), "rows": scale, "row": "row"}[mode]
    result = dsv4.quantize(argument, global_scale=given, sf_layout=layout)
    codes, sf = reference.quantize(x, scale)
    assert np.array_equal(result[0], codes)
    assert np.array_equal(result[1], reference.swizzle(sf) if layout == "128x4" else sf)
    assert len(result) == (3 if mode == "row" else 2)
    if mode == "row":
        assert result[2].tobytes() == scale.tobytes()
    back = dsv4.dequantize(result[0], result[1], None if mode == "one" else scale.reshape(-1), sf_layout=layout)
    assert back.tobytes() == reference.dequantize(codes, sf, scale).tobytes()


def test_quantize_strided_rows():
    wide = random_rows(6, 96)
    assert all(np.array_equal(a, b) for a, b in zip(dsv4.quantize(wide[::2, 16:64]), reference.quantize(wide[::2, 16:64], 1)))


def test_quantize_fp8_gives_the_rules_bytes():
    x = random_rows(7, 384)
    x[2, :128] = 0
    for got, want in zip(dsv4.quantize(x, format="fp8"), reference.quantize_fp8(x)):
        assert np.array_equal(got, want)


def test_quantize_bf16_rounds_to_even():
    x = random_rows(9, 64)
    assert np.array_equal(dsv4.quantize(x, format="bf16"), reference.to_bf16(x))


def test_norm_comes_first_and_its_row_can_be_kept():
    x, weight = random_rows(5, 256), reference.to_bf16(random_rows(1, 256, seed=1))[0]
    mean = np.cumsum(x.astype(np.float64) ** 2, axis=1)[:, -1:].astype(np.float32) / np.float32(256)
    factor = np.float32(1) / np.sqrt(mean + np.float32(1e-5))
    want = reference.round_bf16(reference.from_bf16(weight) * (x * factor))
    kept = np.empty((5, 256), np.uint16)
    result = dsv4.quantize(x, norm_weight=weight, norm_eps=1e-5, normalized=kept)
    assert np.array_equal(kept, reference.to_bf16(want))
    assert all(np.array_equal(a, b) for a, b in zip(result, reference.quantize(want, 1)))


def test_swiglu_against_binary64():
    both = reference.to_bf16(random_rows(6, 512))
    gate, up = both[:, :256], both[:, 256:]  # halves of one array
    rho = np.linspace(0.1, 1, 6, dtype=np.float32)
    g, u = (reference.from_bf16(a).astype(np.float64) for a in (gate, up))
    g, u = np.minimum(g, 7), np.clip(u, -7, 7)
    h = rho[:, None] * (g / (1 + np.exp(-g)) * u)
    y = reference.from_bf16(dsv4.swiglu_quantize(gate, up, rho, limit=7, format="bf16"))
    assert np.all(np.abs(y - h) <= np.abs(h) * 2.0**-8 * 1.01 + 1e-30)
    codes, sf, scale = dsv4.swiglu_quantize(gate, up, rho, limit=7, global_scale="row")
    assert np.allclose(scale, np.abs(h).max(axis=1) / 2688, rtol=1e-6)
    step = reference.E4M3[sf].repeat(16, axis=1) * scale[:, None]
    assert np.all(np.abs(dsv4.dequantize(codes, sf, scale) - h) <= step * 1.001 + 1e-12)
    assert np.any(np.abs(h) > step)  # the bound above says something


@pytest.mark.parametrize("layout", ["linear", "128x4"])
def test_inverse_rope_gives_the_rules_bytes(layout):
    tokens, heads, dim, rope, per_group = 5, 6, 64, 16, 3
    x = reference.to_bf16(random_rows(tokens * heads, dim)).reshape(tokens, heads, dim)
    angle = np.outer(np.arange(9), 0.5 ** np.arange(rope // 2))
    cos_sin = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    positions = np.array([8, 0, 3, 3, 1], np.int32)
    cos, sin = np.split(cos_sin[positions][:, None, :], 2, axis=2)
    want = reference.from_bf16(x.reshape(-1)).reshape(x.shape).copy()
    even, odd = want[:, :, -rope::2].copy(), want[:, :, dim - rope + 1 :: 2].copy()
    want[:, :, -rope::2] = reference.round_bf16(even * cos + odd * sin)
    want[:, :, dim - rope + 1 :: 2] = reference.round_bf16(odd * cos - even * sin)
    grouped = want.reshape(tokens, heads // per_group, per_group * dim).transpose(1, 0, 2)
    y = dsv4.inverse_rope_quantize(x, cos_sin, positions, per_group, format="bf16")
    assert np.array_equal(y, reference.to_bf16(grouped))
    codes, sf, scale = dsv4.inverse_rope_quantize(x, cos_sin, positions, per_group, global_scale="row", sf_layout=layout)
    assert codes.shape == (2, 5, 96) and scale.shape == (2, 5)
    for group in range(2):
        rows = np.ascontiguousarray(grouped[group])
        want_codes, want_sf = reference.quantize(rows, row_globals(rows))
        assert np.array_equal(codes[group], want_codes)
        assert np.array_equal(sf[group], reference.swizzle(want_sf) if layout == "128x4" else want_sf)


# ---- decoding ----


@pytest.mark.parametrize("layout", ["linear", "128x4"])
def test_gather_picks_rows_and_minus_one_is_zeros(layout):
    x = random_rows(140, 80)
    codes, sf, scale = dsv4.quantize(x, global_scale="row", sf_layout=layout)
    whole = dsv4.dequantize(codes, sf, scale, sf_layout=layout)
    indices = np.array([139, -1, 0, 0, 77, -1], np.int32)
    rows = dsv4.dequantize_rows(codes, sf, indices, scale, sf_layout=layout)
    assert rows.tobytes() == np.where(indices[:, None] < 0, np.float32(0), whole[indices]).tobytes()


def test_every_code_and_scale_decodes():
    codes = np.repeat(np.array([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], np.uint8), 127, axis=0)
    sf = np.arange(127, dtype=np.uint8)[:, None]
    for scale in (1.0, 0.3):
        want = reference.dequantize(codes, sf, scale)
        assert dsv4.dequantize(codes, sf, scale).tobytes() == want.tobytes()
        assert np.array_equal(dsv4.dequantize(codes, sf, scale, dtype="bfloat16"), reference.to_bf16(want))
    assert np.isnan(dsv4.dequantize(codes[:1], np.array([[0x7F]], np.uint8))[0, 1])


def test_flat_tiled_scales_are_accepted():
    x = random_rows(3, 32)
    codes, sf = dsv4.quantize(x, sf_layout="128x4")
    assert np.array_equal(dsv4.dequantize(codes, sf.reshape(-1), sf_layout="128x4"), dsv4.dequantize(codes, sf, sf_layout="128x4"))


def test_thin_names_have_their_argument_order():
    codes, sf, scale = dsv4.quantize(random_rows(4, 32), global_scale="row")
    indices = np.array([2, -1], np.int32)
    assert np.array_equal(dsv4.dequant_nvfp4(codes, sf, scale), dsv4.dequantize(codes, sf, scale))
    assert np.array_equal(dsv4.dequant_nvfp4_selective(codes, sf, scale, indices), dsv4.dequantize_rows(codes, sf, indices, scale))


# ---- arrays ----


def test_out_is_written_and_returned():
    x = random_rows(4, 64)
    fresh = dsv4.quantize(x, global_scale="row")
    out = tuple(np.full_like(a, 7) for a in fresh)
    result = dsv4.quantize(x, global_scale="row", out=out)
    assert all(a is b for a, b in zip(result, out))
    assert all(np.array_equal(a, b) for a, b in zip(fresh, out))
    y = np.empty((4, 64), np.uint16)
    assert dsv4.dequantize(fresh[0], fresh[1], fresh[2], out=y) is y
    assert np.array_equal(y, dsv4.dequantize(*fresh, dtype="bfloat16"))


def test_empty_and_read_only_inputs():
    codes, sf = dsv4.quantize(np.empty((0, 32), np.float32))
    assert codes.shape == (0, 16) and sf.shape == (0, 2)
    x = random_rows(2, 32)
    x.setflags(write=False)
    codes, sf = dsv4.quantize(x)
    assert dsv4.dequantize_rows(codes, sf, np.empty(0, np.int32)).shape == (0, 32)


def test_ml_dtypes_bfloat16_is_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = reference.to_bf16(random_rows(2, 32))
    for got, want in zip(dsv4.quantize(bits.view(ml_dtypes.bfloat16)), dsv4.quantize(bits)):
        assert np.array_equal(got, want)


def test_calls_from_several_threads():
    x = random_rows(64, 512)
    want = dsv4.quantize(x)
    wrong = []

    def work():
        for _ in range(20):
            if not all(np.array_equal(a, b) for a, b in zip(dsv4.quantize(x), want)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_a_forked_child_has_threads_of_its_own():
    script = """
import os, dsv4, numpy as np
x = np.ones((64, 512), np.float32)
dsv4.quantize(x)
child = os.fork()
if child == 0:
    dsv4.quantize(x)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# ---- errors ----

X = random_rows(4, 64)
CODES, SF = dsv4.quantize(X)
BF16 = reference.to_bf16(X)
TABLE = np.ones((3, 16), np.float32)
HEADS = reference.to_bf16(random_rows(8, 32)).reshape(2, 4, 32)


def read_only(array):
    array.setflags(write=False)
    return array


def int32(*values):
    return np.array(values, np.int32)


ERRORS = {
    "dtype": (lambda: dsv4.quantize(X.astype(np.float64)), "x: expected dtype bfloat16 (numpy: uint16 bit patterns) or float32, found float64"),
    "dimensions": (lambda: dsv4.quantize(X[0]), "x: expected 2 dimensions, found shape (64,)"),
    "no array": (lambda: dsv4.quantize([[1.0]]), "x: expected an array that exports DLPack, found list"),
    "columns": (lambda: dsv4.quantize(X[:, :24]), "x: expected a positive multiple of 16 columns, found 24"),
    "fp8 columns": (lambda: dsv4.quantize(X, format="fp8"), "x: expected a positive multiple of 128 columns, found 64"),
    "format": (lambda: dsv4.quantize(X, format="int4"), "format: expected 'nvfp4' or 'fp8' or 'bf16', found 'int4'"),
    "layout": (lambda: dsv4.quantize(X, sf_layout="4x4"), "sf_layout: expected 'linear' or '128x4', found '4x4'"),
    "strides": (lambda: dsv4.quantize(X[:, ::2]), "x: expected rows of adjacent elements, found shape (4, 32), strides (64, 2)"),
    "global rows": (lambda: dsv4.quantize(X, global_scale=np.ones(3, np.float32)), "global_scale: expected shape (4), found shape (3)"),
    "global dtype": (lambda: dsv4.quantize(X, global_scale=np.ones(4)), "global_scale: expected dtype float32, found float64"),
    "global word": (lambda: dsv4.quantize(X, global_scale="rows"), "global_scale: expected 'row' or None or 'a number' or 'a float32 array', found 'rows'"),
    "global of bf16": (lambda: dsv4.quantize(X, format="bf16", global_scale=2.0), "global_scale: expected None (only format 'nvfp4' has one), found a value"),
    "layout of bf16": (
        lambda: dsv4.quantize(X, format="bf16", sf_layout="128x4"),
        "sf_layout: expected 'linear' (only format 'nvfp4' has another), found '128x4'",
    ),
    "out count": (lambda: dsv4.quantize(X, out=(CODES,)), "out: expected (codes, sf), found 1 arrays"),
    "out shape": (lambda: dsv4.quantize(X, out=(CODES[:, :16].copy(), SF)), "codes: expected shape (4, 32), found shape (4, 16)"),
    "out strides": (lambda: dsv4.quantize(X[:, :32], out=(CODES[:, :16], SF[:, :2].copy())), "codes: expected a contiguous array, found shape (4, 16), strides (32, 1)"),
    "out read-only": (lambda: dsv4.quantize(X, out=(CODES, read_only(SF.copy()))), "sf: expected a writable array that exports DLPack, found ndarray"),
    "result shape": (lambda: dsv4.dequantize(CODES, SF, out=np.empty((4, 32), np.float32)), "out: expected shape (4, 64), found shape (4, 32)"),
    "rounded shape": (lambda: dsv4.quantize(X, format="bf16", out=BF16[:3].copy()), "out: expected shape (4, 64), found shape (3, 64)"),
    "normalized": (lambda: dsv4.quantize(X, normalized=X.copy()), "normalized: expected dtype bfloat16 (numpy: uint16 bit patterns), found float32"),
    "norm": (lambda: dsv4.quantize(X, norm_weight=np.ones(64, np.float32)), "norm_weight: expected dtype bfloat16 (numpy: uint16 bit patterns), found float32"),
    "up": (lambda: dsv4.swiglu_quantize(BF16, BF16[:3]), "up: expected shape (4, 64), found shape (3, 64)"),
    "up stride": (lambda: dsv4.swiglu_quantize(BF16[:, :32], BF16[:, :32].copy()), "up: expected gate's row stride of 64 elements, found 32"),
    "rho": (lambda: dsv4.swiglu_quantize(BF16, BF16, np.ones((4, 1), np.float32)), "rho: expected shape (4), found shape (4, 1)"),
    "limit": (lambda: dsv4.swiglu_quantize(BF16, BF16, limit=81), "limit: expected 0 < limit <= 80, found 81.000000"),
    "heads": (lambda: dsv4.inverse_rope_quantize(HEADS, TABLE, int32(0, 0), 3), "heads_per_group: expected a divisor of num_heads 4, found 3"),
    "position": (lambda: dsv4.inverse_rope_quantize(HEADS, TABLE, int32(2, 3), 2), "positions: expected 0 <= index < 3 (rows of cos_sin), found 3 at [1]"),
    "unchecked position": (
        lambda: dsv4.inverse_rope_quantize(HEADS, TABLE, int32(2, -1), 2, check_positions=False),
        "positions: expected 0 <= index < 3 (rows of cos_sin), found -1 at [1]",
    ),
    "index": (lambda: dsv4.dequantize_rows(CODES, SF, int32(0, 4, -2)), "indices: expected -1 <= index < 4 (rows of codes; -1 gives zeros), found 4 at [1]"),
    "negative index": (lambda: dsv4.dequantize_rows(CODES, SF, int32(-2)), "indices: expected -1 <= index < 4 (rows of codes; -1 gives zeros), found -2 at [0]"),
    "index dtype": (lambda: dsv4.dequantize_rows(CODES, SF, np.array([0])), "indices: expected dtype int32, found int64"),
    "no indices": (lambda: dsv4.dequantize_rows(CODES, SF, None), "indices: expected an array that exports DLPack, found None"),
    "sf shape": (lambda: dsv4.dequantize(CODES, SF[:, :2].copy()), "sf: expected shape (4, 4), found shape (4, 2)"),
    "tiled sf shape": (lambda: dsv4.dequantize(CODES, SF, sf_layout="128x4"), "sf: expected shape (128, 4) or (512), found shape (4, 4)"),
    "result dtype": (lambda: dsv4.dequantize(CODES, SF, dtype="float16"), "dtype: expected 'float32' or 'bfloat16', found 'float16'"),
    "stream": (lambda: dsv4.dequantize(CODES, SF, stream=5), "stream: expected None, as codes is on the CPU, found 5"),
    "compress dtype": (
        lambda: dsv4.compress_quantize("csa", *[CODES] * 10, row_format="bf16", rows_per_page=64, first_position=0),
        "value: expected dtype float32, found uint8",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_expected_and_found(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


def test_a_refused_call_writes_nothing():
    out = np.full((2, 64), 7, np.float32)
    with pytest.raises(ValueError):
        dsv4.dequantize_rows(CODES, SF, int32(0, 9), out=out)
    assert np.all(out == 7)


# ---- compress_quantize ----

COMPRESSORS = {"csa": (4, 512, 1024, 8), "hca": (128, 512, 512, 128), "indexer": (4, 128, 256, 8)}  # ratio, dim, width, state rows
ROW_BYTES = {("csa", "bf16"): 1024, ("csa", "nvfp4"): 384, ("hca", "bf16"): 1024, ("hca", "fp8"): 584, ("indexer", "bf16"): 256, ("indexer", "fp4"): 68}


class Compression:
    """One sequence, its pages and its state; run(sizes) feeds chunks of these sizes, single tokens through the decode form."""

    def __init__(self, kind, row_format, windows=3):
        self.kind, self.row_format, self.windows = kind, row_format, windows
        self.ratio, self.dim, self.width, self.state_rows = COMPRESSORS[kind]
        random = np.random.default_rng(7)
        self.tokens = windows * self.ratio + 2
        self.value, self.gate = (random.standard_normal((self.tokens, self.width), dtype=np.float32) for _ in range(2))
        self.ape = random.standard_normal((self.ratio, self.width), dtype=np.float32)
        self.norm_weight = reference.to_bf16(random.standard_normal(self.dim, dtype=np.float32))
        angle = random.standard_normal((windows + 1, 32), dtype=np.float32)
        self.cos_sin = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)

    def run(self, *sizes):
        pages = np.zeros((windows_to_pages(self.windows), (2 * ROW_BYTES[self.kind, self.row_format] + 15) // 16 * 16), np.uint8)
        state_value = np.zeros((2, self.state_rows, self.width), np.float32)
        state_gate = np.full_like(state_value, -np.inf)
        options = dict(row_format=self.row_format, rows_per_page=2)
        shared = self.ape, self.norm_weight, self.cos_sin
        first = 0
        for size in sizes:
            rows = slice(first, first + size)
            if size == 1:
                window = int32(first // self.ratio)
                dsv4.compress_quantize(
                    self.kind, self.value[rows], self.gate[rows], *shared, state_value, state_gate, pages, window, window,
                    positions=int32(first), states=int32(1), **options,
                )
            else:
                ids = np.arange(first // self.ratio, (first + size) // self.ratio, dtype=np.int32)
                dsv4.compress_quantize(
                    self.kind, self.value[rows], self.gate[rows], *shared, state_value[1], state_gate[1], pages, ids, ids, first_position=first, **options
                )
            first += size
        return pages

    def rows(self):
        """Finished rows in float64, rounded nowhere."""
        value, gate = self.value.astype(float), (self.gate + self.ape[np.arange(self.tokens) % self.ratio]).astype(float)
        result = np.empty((self.windows, self.dim))
        for w in range(self.windows):
            own = slice(w * self.ratio, (w + 1) * self.ratio)
            v, g = value[own, self.width - self.dim :], gate[own, self.width - self.dim :]
            if self.width > self.dim and w > 0:
                before = slice((w - 1) * self.ratio, w * self.ratio)
                v, g = np.concatenate([value[before, : self.dim], v]), np.concatenate([gate[before, : self.dim], g])
            weight = np.exp(g - g.max(axis=0))
            row = (weight * v).sum(axis=0) / weight.sum(axis=0)
            row *= reference.from_bf16(self.norm_weight) / np.sqrt(np.mean(row**2) + 1e-6)
            even, odd, cos, sin = row[-64::2].copy(), row[-63::2].copy(), self.cos_sin[w, :32], self.cos_sin[w, 32:]
            row[-64::2], row[-63::2] = even * cos - odd * sin, even * sin + odd * cos
            result[w] = row
        return result


def windows_to_pages(windows):
    return (windows + 1) // 2


def test_two_windows_cannot_complete_into_one_row():
    c = Compression("csa", "bf16")
    state_value = np.zeros((2, c.state_rows, c.width), np.float32)

    def decode(positions, slots):
        dsv4.compress_quantize(
            "csa", c.value[:2], c.gate[:2], c.ape, c.norm_weight, c.cos_sin, state_value, np.full_like(state_value, -np.inf), np.zeros((2, 2048), np.uint8),
            np.array(slots, np.int32), np.zeros(2, np.int32), row_format="bf16", rows_per_page=2, positions=np.array(positions, np.int32),
            states=np.arange(2, dtype=np.int32),
        )

    with pytest.raises(ValueError, match="slots.*a row of its own.*1 again"):
        decode([3, 7], [1, 1])
    decode([3, 7], [1, 2])
    decode([3, 6], [1, 1])  # the second completes nothing
    decode([3, 7], [9, 9])  # out of range: not stored


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_compressed_rows_are_near_float64(kind):
    compression = Compression(kind, "bf16")
    pages = compression.run(compression.tokens)
    stored = pages[:, : 4 * compression.dim].reshape(-1).view(np.uint16).reshape(-1, compression.dim)[: compression.windows]
    want = compression.rows()
    size = np.maximum(np.abs(want), np.abs(want.reshape(-1, 2)[:, ::-1].reshape(want.shape)))  # rotation adds the partner's rounding
    assert np.all(np.abs(reference.from_bf16(stored) - want) <= size * 2.0**-6 + 2e-3)


@pytest.mark.parametrize("kind, row_format", ROW_BYTES)
def test_compressing_token_by_token_gives_the_chunks_pages(kind, row_format):
    compression = Compression(kind, row_format)
    whole = compression.run(compression.tokens)
    assert whole.any()
    assert np.array_equal(compression.run(*[1] * compression.tokens), whole)
    assert np.array_equal(compression.run(3, 1, 1, compression.tokens - 5), whole)
