#!/usr/bin/env python3
"""Tokens/s of one model under several limits of the GPU's memory: a curve without cliffs, or not.

Usage: benches/vram_curve.py SHAPE:TYPE [--limits 0,1GiB,1.5GiB,2GiB,3GiB,4GiB] [--streams 1,8]
           [--prompts 512,2048] [--gen 24] [--repetitions 2] [--tandem target/release/tandem]
           [-- BENCH OPTIONS]

Runs `tandem bench --synthetic` twice for each limit: streams, and prompts, which need KV of
another size. A limit of 0 is the CPU alone. Prints a Markdown table: bytes of weights on the GPU,
layers whose feed-forward network and whose attention's weights are spilled (of streams / of
prompts), and tokens/s with what `tandem probe` lets predict in brackets, where it has run before.
"""
import argparse
import json
import subprocess
import sys

GIB = 1 << 30


def arguments():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("shape")
    parser.add_argument("--limits", default="0,1GiB,1.5GiB,2GiB,3GiB,4GiB")
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--prompts", default="512,2048")
    parser.add_argument("--gen", type=int, default=24, help="tokens that each stream generates")
    parser.add_argument("--repetitions", default="2")
    parser.add_argument("--tandem", default="target/release/tandem")
    own, options = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, options = own[:at], own[at + 1 :]
    return argparse.Namespace(**vars(parser.parse_args(own)), options=options)


def bench(options, limit, tests):
    """Records of `tests`, or why there are none."""
    place = ["--set", "gpu.device=off"]
    if limit != "0":
        place = ["--set", "gpu.device=0", "--vram-limit", limit]
    command = [options.tandem, "bench", "--json", "-q", "--synthetic", options.shape, "--no-roof"]
    command += ["--no-ops", "-r", options.repetitions, *place, *tests, *options.options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return [], done.stderr.strip().splitlines()[-1:]
    return [json.loads(line) for line in done.stdout.splitlines()], []


def spilled(records):
    if not records:
        return "–"
    first = records[0]
    return f"{first['n_layers_ffn_spilled']} + {first['n_layers_attention_spilled']}"


def speed(record):
    measured, predicted = record["avg_ts"], record.get("predicted_ts")
    digits = 1 if measured < 100 else 0
    told = f"{measured:,.{digits}f}"
    return told if predicted is None else f"{told} ({predicted:,.{digits}f})"


def row(options, limit):
    streams, prompts = options.streams.split(","), options.prompts.split(",")
    decode = ["-p", "0", "-n", str(options.gen), "--n-parallel", options.streams]
    decoded, why = bench(options, limit, decode)
    read, why_read = bench(options, limit, ["-p", options.prompts, "-n", "0"])
    for reason in why + why_read:
        print(f"{limit}: {reason}", file=sys.stderr)
    resident = max((record["device_weight_bytes"] for record in decoded + read), default=0)
    cells = [limit, "–" if limit == "0" else f"{resident / GIB:.2f}"]
    cells.append("–" if limit == "0" else f"{spilled(decoded)} / {spilled(read)}")
    for records, wanted in [(decoded, streams), (read, prompts)]:
        speeds = [speed(record) for record in records]
        cells += speeds + ["–"] * (len(wanted) - len(speeds))
    return cells


def main():
    options = arguments()
    heads = ["limit", "GiB on the GPU", "layers spilled: FFN + attention"]
    heads += [f"{count} stream{'s' * (count != '1')}" for count in options.streams.split(",")]
    heads += [f"prompt {tokens}" for tokens in options.prompts.split(",")]
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads), flush=True)
    for limit in options.limits.split(","):
        print("| " + " | ".join(row(options, limit)) + " |", flush=True)


if __name__ == "__main__":
    main()
