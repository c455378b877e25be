"""NVFP4 and FP8 rules in numpy, written from the definitions with value tables: shares no code with the library."""
import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
E4M3 = np.array([m / 512 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127])  # code 127 is NaN


def nearest(values, table):
    """Index of the nearest table entry, ties to the even index, saturating; values are not negative."""
    values = np.asarray(values, np.float64)
    above = np.clip(np.searchsorted(table, values), 1, len(table) - 1)
    below = above - 1
    low, high = values - table[below], table[above] - values
    return np.where((low < high) | ((low == high) & (below % 2 == 0)), below, above).astype(np.uint8)


def encode_e2m1(x):
    code = nearest(np.where(np.isfinite(x), np.abs(x), 6), E2M1) | (np.signbit(x) << 3).astype(np.uint8)
    return np.where(np.isnan(x), 7, code).astype(np.uint8)


def round_bf16(x):
    """float32 values rounded to bfloat16, ties to even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def to_bf16(x):
    return (round_bf16(x).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def quantize(x, g):
    """Run-time rule, g float32 [rows] or scalar -> codes, linear sf."""
    f32 = np.float32
    rows, cols = x.shape
    g = np.broadcast_to(np.asarray(g, f32), (rows,))[:, None]
    groups = x.reshape(rows, cols // 16, 16)
    amax = np.max(np.where(np.isnan(groups), 0, np.abs(groups)), axis=2)
    sf = nearest(amax * (f32(1) / (f32(6) * g)), E4M3)
    with np.errstate(divide="ignore", invalid="ignore"):
        multiplier = np.where(sf == 0, f32(0), f32(1) / (E4M3[sf].astype(f32) * g))
        code = encode_e2m1(groups * multiplier[:, :, None]).reshape(rows, cols)
    return code[:, 0::2] | code[:, 1::2] << 4, sf


def dequantize(codes, sf, g):
    code = np.stack([codes & 15, codes >> 4], axis=2).reshape(codes.shape[0], -1)
    value = np.where(code & 8, -1.0, 1.0) * E2M1[code & 7] * np.repeat(E4M3[sf], 16, axis=1)
    return value.astype(np.float32) * np.broadcast_to(np.asarray(g, np.float32), (codes.shape[0],))[:, None]


def swizzle(sf):
    """Linear [rows, groups] -> 128x4, by the formula of the tile."""
    rows, groups = sf.shape
    padded = np.zeros(((rows + 127) // 128 * 128, (groups + 3) // 4 * 4), np.uint8)
    flat = padded.reshape(-1)
    for m in range(rows):
        for g in range(groups):
            flat[m // 128 * 128 * padded.shape[1] + g // 4 * 512 + m % 32 * 16 + m % 128 // 32 * 4 + g % 4] = sf[m, g]
    return padded


def quantize_fp8(x):
    rows, cols = x.shape
    blocks = x.reshape(rows, cols // 128, 128)
    amax = np.maximum(np.max(np.abs(blocks), axis=2), np.float32(1e-4)) * np.float32(1 / 448)
    mantissa, exponent = np.frexp(amax.astype(np.float64))
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)  # ceil(log2)
    scaled = blocks / np.ldexp(1.0, exponent)[:, :, None]
    code = nearest(np.abs(scaled), E4M3) | (np.signbit(scaled) << 7).astype(np.uint8)
    return code.reshape(rows, cols), (exponent + 127).astype(np.uint8)
