#!/usr/bin/env python3
"""Draws the JSON of a bench as one SVG: achieved GFLOP/s over rows, one line per case, with the machine's roof.

usage: dsv4 bench gemm --json > gemm.json; scripts/plot_bench.py gemm.json [more.json ...] -o docs/kernels/gemm.svg
       dsv4 bench moe --backend cuda --json > moe.json; scripts/plot_bench.py moe.json -o docs/kernels/moe_sm90.svg
The MoE bench on CUDA (also the JSON lines of dsv4_bench_gpu_moe) is drawn as time over tokens, with the floor of each case.
Needs nothing but Python: the SVG is written by hand. Both axes are logarithmic.
"""
import argparse
import json
import math
import sys
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 520, 70, 280, 40, 50
COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"]


def load_moe(path):
    """Documents of the CUDA MoE bench -> its rows and ceilings, or None for any other file."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if text.startswith('{"'):  # lines: ceilings, then rows
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        ceilings = next((line for line in lines if line["op"] == "moe_ceilings"), None)
        return [line for line in lines if line["op"] == "moe"], ceilings
    document = json.loads(text)
    if document.get("backend") != "cuda":
        return None
    return document["results"], document["ceilings"]


def load_moe_series(paths):
    """-> ({label: [(tokens, us, floor)]}, title)."""
    series, titles = {}, []
    for path in paths:
        rows, ceilings = load_moe(path)
        if ceilings:
            titles.append(f"{ceilings['device']}: read stream {ceilings['read_gb_s']:.0f} GB/s, BF16 matmul {ceilings['matmul_tflops']:.0f} TFLOP/s")
        for row in rows:
            label = f"{row['shape']} {row['routing']} {row['act']}" + ("" if row["tier"] == "auto" else f" {row['tier']}")
            series.setdefault(label, []).append((row["tokens"], row["us"], row["floor_us"]))
    return {label: sorted(points) for label, points in series.items()}, "; ".join(dict.fromkeys(titles)) or "MoE layer"


def load_series(paths):
    """-> ({label: [(rows, gflops, roof)]}, title). The roof is the speed of a call that takes exactly its floor."""
    series, titles = {}, []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        titles.append(f"{document['isa']}, {document['threads']} threads, {document['shape']} shapes, "
                      f"read stream {document['ceilings']['read_all_gbs']:.1f} GB/s")
        for result in document["results"]:
            if result["gflops"] <= 0 or result["share_of_floor"] <= 0:
                continue
            label = f"{result['op']} {result['name']}"
            if len(paths) > 1:
                label = f"{document['isa']} {label}"
            roof = result["gflops"] / result["share_of_floor"]
            series.setdefault(label, []).append((result["rows"], result["gflops"], roof))
    return {label: sorted(points) for label, points in series.items()}, "; ".join(dict.fromkeys(titles))


def log_scale(low, high, begin, end):
    span = math.log(high) - math.log(low) or 1.0
    return lambda value: begin + (math.log(value) - math.log(low)) / span * (end - begin)


def ticks(low, high, factors):
    power = 10 ** math.floor(math.log10(low))
    while power <= high:
        for factor in factors:
            if low <= power * factor <= high:
                yield power * factor
        power *= 10


def draw(series, title, x_name, y_name):
    rows = [r for points in series.values() for r, _, _ in points]
    speeds = [s for points in series.values() for _, g, roof in points for s in (g, roof)]
    x = log_scale(min(rows), max(rows), LEFT, WIDTH - RIGHT)
    y = log_scale(min(speeds) * 0.8, max(speeds) * 1.25, HEIGHT - BOTTOM, TOP)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
           f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{x_name}</text>',
           f'<text x="16" y="{HEIGHT / 2}" transform="rotate(-90 16 {HEIGHT / 2})" text-anchor="middle">{y_name}</text>']
    for value in sorted(set(rows)):
        out.append(f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#eee"/>'
                   f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value}</text>')
    for value in ticks(min(speeds) * 0.8, max(speeds) * 1.25, (1, 2, 5)):
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#eee"/>'
                   f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for idx, (label, points) in enumerate(series.items()):
        colour = COLOURS[idx % len(COLOURS)]
        for column, style in ((1, 'stroke-width="2"'), (2, 'stroke-width="1" stroke-dasharray="3 3" opacity="0.6"')):
            path = " ".join(f"{x(p[0]):.1f},{y(p[column]):.1f}" for p in points)
            out.append(f'<polyline fill="none" stroke="{colour}" {style} points="{path}"/>')
        out += [f'<circle cx="{x(r):.1f}" cy="{y(g):.1f}" r="3" fill="{colour}"/>' for r, g, _ in points]
        at = TOP + 16 * idx
        out.append(f'<line x1="{WIDTH - RIGHT + 12}" x2="{WIDTH - RIGHT + 32}" y1="{at}" y2="{at}" stroke="{colour}" stroke-width="2"/>'
                   f'<text x="{WIDTH - RIGHT + 38}" y="{at + 4}" font-size="11">{escape(label)}</text>')
    out.append(f'<text x="{WIDTH - RIGHT + 12}" y="{HEIGHT - BOTTOM}" font-size="11">dashed: the floor (bytes or operations)</text></svg>')
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="+", help="JSON files of dsv4 bench --json")
    parser.add_argument("-o", "--output", required=True, help="SVG to write")
    args = parser.parse_args()
    is_moe = load_moe(args.inputs[0]) is not None
    series, title = load_moe_series(args.inputs) if is_moe else load_series(args.inputs)
    if not series:
        sys.exit("no results in the input")
    with open(args.output, "w", encoding="utf-8") as file:
        file.write(draw(series, title, *(("tokens", "us") if is_moe else ("rows of activations", "GFLOP/s"))))


if __name__ == "__main__":
    main()
