#!/usr/bin/env python3
"""Measures docs/quality.md's tables: perplexity of the demo checkpoint under every weight format and every precision setting.

Usage: quality_table.py PATH_TO_DSV4 [--windows 24] [--out quality.json]
Needs ../shared (the BF16 demo checkpoint and the held-out text). About 30 s a row on two cores; prints Markdown.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def perplexity(dsv4, folder, windows, *settings):
    command = [dsv4, "eval", "ppl", "-m", str(folder), "--text", str(SHARED / "golden/heldout.txt"), "--ctx", "1024",
               "--windows", str(windows), "--json", "-q", *settings]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["perplexity"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dsv4")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--out")
    args = parser.parse_args()
    results = {"weights": [], "settings": []}
    with tempfile.TemporaryDirectory(prefix="dsv4_quality_") as temp:
        folders = {("bf16", "-"): SHARED / "demo-model"}
        for dense in ("keep", "fp8", "nvfp4"):
            for scale in ("modelopt", "mse", "4over6"):
                if dense == "fp8" and scale != "modelopt":
                    continue
                folder = pathlib.Path(temp) / f"{dense}-{scale}"
                subprocess.run([args.dsv4, "quantize", str(SHARED / "demo-model"), str(folder), "--dense", dense, "--scale", scale, "-q"],
                               check=True, capture_output=True)
                folders[(f"nvfp4 experts, dense {dense}", scale)] = folder
        base = None
        print("| weights | scale rule | perplexity | against BF16 |\n|---|---|---|---|")
        for (weights, scale), folder in folders.items():
            value = perplexity(args.dsv4, folder, args.windows, "--exact")
            base = base or value
            results["weights"].append({"weights": weights, "scale": scale, "perplexity": value})
            print(f"| {weights} | {scale} | {value:.3f} | {100 * (value / base - 1):+.2f} % |", flush=True)
        experts = folders[("nvfp4 experts, dense keep", "modelopt")]
        exact = results["weights"][1]["perplexity"]
        print("\n| --act | --kv | --index | perplexity | against --exact |\n|---|---|---|---|---|")
        for act in ("a16", "a4"):
            for kv in ("bf16", "fp8", "nvfp4"):
                for index in ("bf16", "fp8", "fp4"):
                    value = perplexity(args.dsv4, experts, args.windows, "--act", act, "--kv", kv, "--index", index)
                    results["settings"].append({"act": act, "kv": kv, "index": index, "perplexity": value})
                    print(f"| {act} | {kv} | {index} | {value:.3f} | {100 * (value / exact - 1):+.2f} % |", flush=True)
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


sys.exit(main())
