#!/usr/bin/env python3
"""Cuts tests/golden/model/demo_nvfp4.safetensors out of ../shared/golden/demo-quantised.safetensors.

The cut holds what tests need without ../shared: input_ids [700] and the expected logits of the last 16 positions on the
bundled model's weights (NVFP4 experts and dense matrices, fp32 activations), made by an independent implementation.
"""
import json
import pathlib
import struct

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT.parent / "shared/golden/demo-quantised.safetensors"
TARGET = ROOT / "tests/golden/model/demo_nvfp4.safetensors"
NUM_POSITIONS = 16


def main():
    raw = SOURCE.read_bytes()
    header_bytes = struct.unpack_from("<Q", raw)[0]
    header = json.loads(raw[8 : 8 + header_bytes])

    def data(name):
        begin, end = header[name]["data_offsets"]
        return raw[8 + header_bytes + begin : 8 + header_bytes + end]

    vocab = header["nvfp4-all.logits_last64"]["shape"][1]
    parts = [
        ("input_ids", "I64", header["input_ids"]["shape"], data("input_ids")),
        ("logits_last16", "F32", [NUM_POSITIONS, vocab], data("nvfp4-all.logits_last64")[-NUM_POSITIONS * vocab * 4 :]),
    ]
    out_header, offset = {}, 0
    for name, dtype, shape, content in parts:
        out_header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(content)]}
        offset += len(content)
    text = json.dumps(out_header).encode()
    text += b" " * (-len(text) % 8)
    TARGET.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(content for *_, content in parts))


main()
