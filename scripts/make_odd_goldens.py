#!/usr/bin/env python3
"""Freezes tests/golden/model/odd_configs.safetensors: expected logits of synthetic checkpoints with unusual dimensions.

Usage: make_odd_goldens.py PATH_TO_DSV4     (needs numpy)
For each entry of odd_configs.json: `dsv4 synth` with seed 1 writes the BF16 weights, scripts/reference_model.py computes the
logits of NUM_TOKENS fixed ids, and those of the last NUM_KEPT positions are kept as binary32.
"""
import json
import pathlib
import struct
import subprocess
import sys
import tempfile

import numpy as np

from reference_model import ReferenceModel

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests/golden/model"
NUM_TOKENS, NUM_KEPT = 150, 8


def main():
    parts = []
    for number, changes in enumerate(json.loads((GOLDEN / "odd_configs.json").read_text())):
        with tempfile.TemporaryDirectory() as temp:
            config = json.loads((GOLDEN.parent.parent.parent / "models/demo/config.json").read_text())
            config.update(changes)
            config.pop("quantization_config", None)
            config = {key: value for key, value in config.items() if value is not None}
            path = pathlib.Path(temp) / "config.json"
            path.write_text(json.dumps(config))
            subprocess.run([sys.argv[1], "synth", temp + "/model", "--config", str(path), "--seed", "1", "-q"], check=True)
            ids = np.array([(t * t * 31 + t * 7 + number) % config["vocab_size"] for t in range(NUM_TOKENS)], np.int64)
            logits = ReferenceModel(temp + "/model").forward(ids)[-NUM_KEPT:].astype(np.float32)
        parts.append((f"{number}.input_ids", "I64", ids))
        parts.append((f"{number}.logits_last{NUM_KEPT}", "F32", logits))
    header, data = {}, b""
    for name, dtype, array in parts:
        content = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (GOLDEN / "odd_configs.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


main()
