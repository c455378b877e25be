"""NVFP4 quantisers and dequantisers of dsv4.cpp on any array that exports DLPack: numpy, PyTorch, CuPy, JAX.

CPU arrays run the CPU reference; CUDA arrays run the kernels, in builds that have them (``has_cuda``), queued on ``stream``
(a CUstream as an integer; default: the current stream of PyTorch or CuPy, else stream 0). Both give the same bytes, but for
``compress_quantize``, whose kernel sums a window's softmax in another order (a value may round to the neighbouring bfloat16).

Representation. x ~ e2m1 * sf * global, one sf for 16 consecutive elements of a row:
  codes   uint8 [rows, cols / 2]    element 2j in the low nibble of byte j, 2j + 1 in the high one
  sf      uint8, ue4m3 bytes        sf_layout "linear": [rows, cols / 16]
                                    sf_layout "128x4":  [rows up to 128s, cols / 16 up to 4s], swizzled, padding zero
  global_scale  float32             multiplies when decoding
bfloat16 is PyTorch's or JAX's type; in numpy and CuPy it is uint16 bit patterns (ml_dtypes.bfloat16 is accepted too).

Outputs are allocated by numpy, PyTorch or CuPy, whichever the first array is of, unless given as out=, which is required for
other frameworks. Wrong arguments raise ValueError naming the argument, what was expected and what was found.
"""
import numbers

from . import _ops
from ._arrays import Caller, choice, shape, value_error

__all__ = [
    "compress_quantize",
    "dequant_nvfp4",
    "dequant_nvfp4_selective",
    "dequantize",
    "dequantize_rows",
    "has_cuda",
    "inverse_rope_quantize",
    "quantize",
    "swiglu_quantize",
]
__version__ = "0.1.0"

has_cuda = _ops.has_cuda

_FORMATS = ("nvfp4", "fp8", "bf16")
_LAYOUTS = ("linear", "128x4")


def _round_up(value, step):
    return (value + step - 1) // step * step


def _global_array(caller, global_scale):
    if isinstance(global_scale, numbers.Real) and not isinstance(global_scale, bool):
        return caller.full("global_scale", (1,), "float32", float(global_scale))
    return global_scale


class _Outputs:
    """Allocates or takes from out= what a quantiser writes for results of shape [*lead, rows, cols]."""

    def __init__(self, caller, lead, rows, cols, format, global_scale, sf_layout, out):
        choice("format", format, _FORMATS)
        choice("sf_layout", sf_layout, _LAYOUTS)
        by_row = isinstance(global_scale, str)
        if by_row:
            choice("global_scale", global_scale, ("row", None, "a number", "a float32 array"))
        if format == "bf16":
            wanted = {"y": ((*lead, rows, cols), "bfloat16")}
        elif format == "fp8":
            wanted = {"codes": ((*lead, rows, cols), "uint8"), "sf": ((*lead, rows, cols // 128), "uint8")}
        else:
            tiled = sf_layout == "128x4"
            sf_rows, groups = (_round_up(rows, 128), _round_up(cols // 16, 4)) if tiled else (rows, cols // 16)
            wanted = {"codes": ((*lead, rows, cols // 2), "uint8"), "sf": ((*lead, sf_rows, groups), "uint8")}
        if by_row:
            wanted["row_global"] = ((*lead, rows), "float32")
        if out is None:
            self.arrays = {name: caller.full("out", dims, dtype) for name, (dims, dtype) in wanted.items()}
        else:
            given = (out,) if format == "bf16" and not isinstance(out, (tuple, list)) else out
            if not isinstance(given, (tuple, list)) or len(given) != len(wanted):
                found = f"{len(given)} arrays" if isinstance(given, (tuple, list)) else type(given).__name__
                raise value_error("out", f"({', '.join(wanted)})", found)
            self.arrays = dict(zip(wanted, given))
        self.single = format == "bf16" and not by_row
        scale = None if by_row else _global_array(caller, global_scale)
        self.arguments = {name: caller.take_written(name, self.arrays.get(name)) for name in ("codes", "sf", "y", "row_global")}
        self.arguments |= {"format": format, "sf_layout": sf_layout, "global_scale": caller.take("global_scale", scale), "stream": caller.stream}

    def result(self):
        return self.arrays["y"] if self.single else tuple(self.arrays.values())


def quantize(x, *, format="nvfp4", global_scale=None, sf_layout="linear", norm_weight=None, norm_eps=1e-6, normalized=None, out=None, stream=None):
    """Quantises rows, optionally RMS-normalised first, by the run-time rule (docs/kernels/quantize.md).

    x             bfloat16 or float32 [rows, cols]; rows may be strided. cols a multiple of 16 ("fp8": of 128)
    format        "nvfp4"; "fp8": e4m3 with a ue8m0 byte per 128 columns; "bf16": rounded (after the norm)
    global_scale  "nvfp4" only. None: 1; a number or float32 [1]: given; float32 [rows]: per row; "row": amax(row) / 2688
    sf_layout     "linear" or "128x4" ("nvfp4" only)
    norm_weight   bfloat16 [cols]: RMS norm in front, with norm_eps
    normalized    bfloat16 [rows, cols] that also receives the normalised row

    Returns (codes, sf), and row_global float32 [rows] third with global_scale="row"; "bf16": y bfloat16 [rows, cols].
      codes uint8 [rows, cols / 2], "fp8": [rows, cols];  sf uint8, see the module, "fp8": [rows, cols / 128]
    out= takes the same arrays in the same order.
    """
    rows, cols = shape("x", x, 2)
    caller = Caller("x", x, stream)
    outputs = _Outputs(caller, (), rows, cols, format, global_scale, sf_layout, out)
    if normalized is not None:
        if format == "bf16":
            raise value_error("normalized", "None with format 'bf16', whose result it is", "an array")
        outputs.arguments["y"] = caller.take_written("normalized", normalized)
    _ops.quantize(
        x=caller.take("x", x), norm_weight=caller.take("norm_weight", norm_weight), norm_eps=float(norm_eps), **outputs.arguments
    )
    return outputs.result()


def swiglu_quantize(gate, up, rho=None, *, limit=10.0, format="nvfp4", global_scale=None, sf_layout="linear", out=None, stream=None):
    """rho * silu(min(gate, limit)) * clamp(up, -limit, limit), quantised from binary32 (docs/kernels/swiglu_quantize.md).

    gate, up   bfloat16 [rows, cols], with the same row stride: two halves of one array will do
    rho        float32 [rows] routing weights, or None: 1
    limit      0 < limit <= 80

    format, global_scale, sf_layout, out and the result are quantize's.
    """
    rows, cols = shape("gate", gate, 2)
    caller = Caller("gate", gate, stream)
    outputs = _Outputs(caller, (), rows, cols, format, global_scale, sf_layout, out)
    _ops.swiglu_quantize(
        gate=caller.take("gate", gate), up=caller.take("up", up), rho=caller.take("rho", rho), limit=float(limit), **outputs.arguments
    )
    return outputs.result()


def inverse_rope_quantize(
    x, cos_sin, positions, heads_per_group, *, format="nvfp4", global_scale=None, sf_layout="linear", check_positions=True, out=None, stream=None
):
    """Attention output, rotated back by the query's position, in the grouped layout of the output projection.

    x          bfloat16 [tokens, heads, head_dim], contiguous; the last rope_dim channels of each head are rotated, to bfloat16
    cos_sin    float32 [num_positions, rope_dim]: rope_dim / 2 cosines, then as many sines
    positions  int32 [tokens], rows of cos_sin
    check_positions  on a CUDA device checking copies positions to the host and waits; False skips it, and a position out of
                     range then reads past cos_sin. CPU arrays are always checked.

    Results as quantize's with a leading axis: codes uint8 [groups, tokens, heads_per_group * head_dim / 2], and so on; with
    "128x4" each group has its own scale tensor. A per-row global_scale is float32 [groups * tokens].
    """
    tokens, heads, head_dim = shape("x", x, 3)
    if not isinstance(heads_per_group, int) or heads_per_group <= 0 or heads % heads_per_group:
        raise value_error("heads_per_group", f"a divisor of num_heads {heads}", repr(heads_per_group))
    caller = Caller("x", x, stream)
    outputs = _Outputs(caller, (heads // heads_per_group,), tokens, heads_per_group * head_dim, format, global_scale, sf_layout, out)
    _ops.inverse_rope_quantize(
        x=caller.take("x", x),
        cos_sin=caller.take("cos_sin", cos_sin),
        positions=caller.take("positions", positions),
        heads_per_group=heads_per_group,
        check_positions=bool(check_positions),
        **outputs.arguments,
    )
    return outputs.result()


def _dequantize(codes, sf, indices, global_scale, sf_layout, dtype, check_indices, out, stream):
    rows, bytes_per_row = shape("codes", codes, 2)
    num_out = rows if indices is None else shape("indices", indices, 1)[0]
    choice("dtype", dtype, ("float32", "bfloat16"))
    choice("sf_layout", sf_layout, _LAYOUTS)
    caller = Caller("codes", codes, stream)
    y = caller.full("out", (num_out, 2 * bytes_per_row), dtype) if out is None else out
    _ops.dequantize(
        codes=caller.take("codes", codes),
        sf=caller.take("sf", sf),
        indices=caller.take("indices", indices),
        global_scale=caller.take("global_scale", _global_array(caller, global_scale)),
        sf_layout=sf_layout,
        check_indices=bool(check_indices),
        y=caller.take_written("out", y),
        stream=caller.stream,
    )
    return y


def dequantize(codes, sf, global_scale=None, *, sf_layout="linear", dtype="float32", out=None, stream=None):
    """(e2m1 * sf) * global, the product by global rounded once, then once to the result's type.

    codes         uint8 [rows, cols / 2]
    sf            uint8 [rows, cols / 16] ue4m3, or "128x4": padded as the module says, or flat
    global_scale  None: 1; a number or float32 [1]; float32 [rows]
    dtype         "float32" or "bfloat16"; out= decides for itself

    Returns y [rows, cols].
    """
    return _dequantize(codes, sf, None, global_scale, sf_layout, dtype, True, out, stream)


def dequantize_rows(codes, sf, indices, global_scale=None, *, sf_layout="linear", dtype="float32", check_indices=True, out=None, stream=None):
    """The rows that indices names; everything else as dequantize.

    indices        int32 [num_out]: rows of codes; -1 gives a row of zeros; anything else out of range is a ValueError
    check_indices  on a CUDA device checking copies indices to the host and waits (not inside a graph capture); False skips it:
                   indices out of range are then never read and give zeros. CPU arrays are always checked.

    Returns y [num_out, cols].
    """
    if indices is None:
        raise value_error("indices", "an array that exports DLPack", "None")
    return _dequantize(codes, sf, indices, global_scale, sf_layout, dtype, check_indices, out, stream)


def dequant_nvfp4(fp4_data, sf_data, gsa_data, **options):
    """dequantize(fp4_data, sf_data, gsa_data, **options): uint8 [rows, cols / 2], uint8 [rows, cols / 16], float32 [1] or [rows]."""
    return dequantize(fp4_data, sf_data, gsa_data, **options)


def dequant_nvfp4_selective(fp4_data, sf_data, gsa_data, indices, **options):
    """dequantize_rows(fp4_data, sf_data, indices, gsa_data, **options): as dequant_nvfp4, rows named by int32 indices."""
    return dequantize_rows(fp4_data, sf_data, indices, gsa_data, **options)


def compress_quantize(
    kind,
    value,
    gate,
    ape,
    norm_weight,
    cos_sin,
    state_value,
    state_gate,
    pages,
    slots,
    rope_rows,
    *,
    row_format,
    rows_per_page,
    positions=None,
    states=None,
    first_position=None,
    rms_eps=1e-6,
    check_indices=True,
    stream=None,
):
    """Compressor from projections to finished cache rows, in place (docs/kernels/compress_quantize.md).

    The one function whose CPU and CUDA results may differ: the kernel sums a window's softmax in another order, so a pooled value
    may round to the neighbouring bfloat16.

    kind           "csa" (ratio 4, dim 512, width 1024, 8 state rows), "hca" (128, 512, 512, 128), "indexer" (4, 128, 256, 8)
    value, gate    float32 [tokens, width] projections, without the position bias
    ape            float32 [ratio, width] position bias;  norm_weight bfloat16 [dim]
    cos_sin        float32 [num_positions, 64]: 32 cosines, then 32 sines
    state_value    float32 [num_states, state_rows, width], updated; initially 0
    state_gate     the same, updated; initially -inf
    pages          uint8 [num_pages, page bytes], written; its stride a multiple of 16. A page holds its rows' data, then their scales:
                   data + scale bytes a row: rows "bf16" 1024 + 0, "fp8" 576 + 8, "nvfp4" 352 + 32; keys "bf16" 256 + 0,
                   "fp8" 128 + 4, "fp4" 64 + 4
    row_format     "bf16", "fp8" or "nvfp4"; "indexer": "bf16", "fp8" or "fp4"

    Decoding, one token of each sequence: positions, states int32 [tokens] (no state twice); slots int32 [tokens], cache rows (none
    twice where windows complete), out of range: not stored; rope_rows int32 [tokens], rows of cos_sin for position window * ratio, used where a window completes.
    A chunk of one sequence: first_position; the state arrays without their first axis; slots and rope_rows int32 [completed windows].

    check_indices  checking CUDA index arrays copies them to the host and waits; False skips it, and a bad index then reaches memory it should
                   not. CPU arrays are always checked.
    """
    caller = Caller("value", value, stream)
    decoding = positions is not None and states is not None and first_position is None
    chunk = positions is None and states is None and first_position is not None
    if not decoding and not chunk:
        given = [n for n, v in (("positions", positions), ("states", states), ("first_position", first_position)) if v is not None]
        raise value_error("positions", "positions and states, or first_position", " and ".join(given) or "none of them")
    arrays = dict(value=value, gate=gate, ape=ape, norm_weight=norm_weight, cos_sin=cos_sin, state_value=state_value, state_gate=state_gate)
    arrays |= dict(pages=pages, slots=slots, rope_rows=rope_rows)
    if decoding:
        arrays |= dict(positions=positions, states=states)
    written = ("state_value", "state_gate", "pages")
    arguments = {name: (caller.take_written if name in written else caller.take)(name, array) for name, array in arrays.items()}
    arguments |= dict(kind=kind, row_format=row_format, rows_per_page=int(rows_per_page), rms_eps=float(rms_eps))
    arguments |= dict(check_indices=bool(check_indices), stream=caller.stream)
    if decoding:
        _ops.compress_decode(**arguments)
    else:
        _ops.compress_prefill(first_position=int(first_position), **arguments)
