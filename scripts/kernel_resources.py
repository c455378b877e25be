#!/usr/bin/env python3
"""Registers, stack, spills, static shared memory and matrix instructions of every kernel, per architecture, as a Markdown table.

    scripts/kernel_resources.py [--nvcc NVCC] [--cuobjdump CUOBJDUMP] [--archs 90a,100a,120a] [--jobs N] [-o docs/results/kernel_resources.md]

Compiles each src/**/*_cuda.cu for every architecture (and *_sm90.cu, *_sm100.cu for theirs) with -Xptxas -v and the flags of
src/gpu/CMakeLists.txt. Compiled is not tested: the table shows what a compiler said, nothing ran.
"""
import argparse
import collections
import concurrent.futures
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "--expt-relaxed-constexpr", "--fmad=false", "-O3", "-diag-suppress=20012,20013,20014,20015,177", "-Xptxas", "-v"]


def demangle(names):
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = []
    for line in text.splitlines():
        line = re.sub(r"\(anonymous namespace\)::|dsv4::|^void ", "", line)
        depth, end = 0, len(line)
        for i, c in enumerate(line):  # cut the argument list, which starts at the first ( outside template brackets
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0 and i > 0:
                end = i
                break
        short.append(re.sub(r"\((?:CompressorKind|int|bool)\)", "", line[:end]))
    return short


def matrix_instructions(cuobjdump, objects):
    """-> {mangled kernel: "104 HGMMA, 48 HMMA"}, from the machine code."""
    sass = subprocess.run([cuobjdump, "-sass", objects], capture_output=True, text=True, check=True).stdout
    counts, name = {}, None
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif match := re.search(r"\s([A-Z]+MMA)[.\s]", line):
            counts.setdefault(name, collections.Counter())[match[1]] += 1
    return {name: ", ".join(f"{n} {what}" for what, n in sorted(found.items())) for name, found in counts.items()}


def resources(nvcc, cuobjdump, source, arch):
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-I", str(ROOT / "src"), "-c", str(source), "-o", f"{folder}/o.o"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{source} for {arch} does not compile:\n{done.stderr}")
        matrix = matrix_instructions(cuobjdump, f"{folder}/o.o")
    rows, name = [], None
    for line in done.stderr.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            name, frame = match[1], (0, 0, 0)
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            frame = tuple(int(g) for g in match.groups())
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            smem = re.search(r"(\d+) bytes smem", line)
            rows.append((name, int(match[1]), *frame, int(smem[1]) if smem else 0, matrix.get(name, "")))
            name = None
    return [(short, *row[1:]) for short, row in zip(demangle([row[0] for row in rows]), rows)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--cuobjdump", default="cuobjdump")
    parser.add_argument("--archs", default="90a,100a,120a")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("-o", "--output", default=str(ROOT / "docs/results/kernel_resources.md"))
    arguments = parser.parse_args()
    archs = arguments.archs.split(",")
    version = subprocess.run([arguments.nvcc, "--version"], capture_output=True, text=True, check=True).stdout.split("release ")[1].split(",")[0]
    lines = ["# Registers, stack and spills of every kernel", "",
             f"Made by `scripts/kernel_resources.py` with nvcc {version}. Each cell: registers; stack frame, spill stores + spill loads in bytes where not 0;",
             "static shared memory in bytes where not 0 (dynamic: the structs Shared and SharedStorage of the sources); matrix instructions of the machine code. **sm_100a and sm_120a are compiled only.**", "",
             "| source | kernel | " + " | ".join(f"sm_{a}" for a in archs) + " |", "|---|---|" + "---|" * len(archs)]
    sources = sorted([*ROOT.glob("src/**/*_cuda.cu"), *ROOT.glob("src/**/*_sm90.cu"), *ROOT.glob("src/**/*_sm100.cu")])
    own = {"_sm90.cu": ["90a"], "_sm100.cu": ["100a"]}
    wanted = [(source, arch) for source in sources for arch in next((v for k, v in own.items() if source.name.endswith(k)), archs)]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        results = dict(zip(wanted, pool.map(lambda job: resources(arguments.nvcc, arguments.cuobjdump, *job), wanted)))
    for source in sources:
        table = {}
        for arch in (a for s, a in wanted if s == source):
            for kernel, registers, stack, stores, loads, smem, matrix in results[source, arch]:
                cell = f"{registers}" + (f"; stack {stack}, spills {stores}+{loads}" if stack or stores or loads else "") + (f"; smem {smem}" if smem else "")
                cell += f"; {matrix}" if matrix else ""
                table.setdefault(kernel, {})[arch] = cell
        for kernel, cells in table.items():
            lines.append(f"| {source.relative_to(ROOT / 'src')} | `{kernel}` | " + " | ".join(cells.get(a, "-") for a in archs) + " |")
    pathlib.Path(arguments.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
