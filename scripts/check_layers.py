#!/usr/bin/env python3
"""Checks that a folder of src/ includes only folders it may see (docs/architecture.md).

Run from anywhere; prints each violation as file:line and exits 1 if there is one.
"""
import pathlib
import re
import sys

MAY_INCLUDE = {
    "base": [],
    "text": ["base"],
    "codec": ["base"],
    "tensor": ["base", "codec"],
    "gpu": ["base", "codec", "tensor"],
    "ops": ["base", "codec", "tensor", "gpu"],
    "cache": ["base", "codec", "tensor", "gpu", "ops"],
    "checkpoint": ["base", "codec", "tensor"],
    "model": ["base", "codec", "tensor", "gpu", "ops", "cache", "checkpoint"],
    "engine": ["base", "codec", "text", "tensor", "gpu", "ops", "cache", "checkpoint", "model", "dsv4"],
}
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"/]+)/')
SUFFIXES = {".h", ".cpp", ".inl", ".cu", ".cuh"}


def main():
    source = pathlib.Path(__file__).resolve().parent.parent / "src"
    violations = []
    for path in sorted(p for p in source.rglob("*") if p.suffix in SUFFIXES):
        layer = path.relative_to(source).parts[0]
        if layer not in MAY_INCLUDE:
            violations.append(f"{path}: folder src/{layer} is not in the layer table")
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = INCLUDE.match(line)
            if match and match.group(1) != layer and match.group(1) not in MAY_INCLUDE[layer]:
                violations.append(f"{path}:{number}: src/{layer} may not include {match.group(1)}/")
    print("\n".join(violations) if violations else "layers: every include follows docs/architecture.md")
    return 1 if violations else 0


sys.exit(main())
