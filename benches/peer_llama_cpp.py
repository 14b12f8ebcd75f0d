#!/usr/bin/env python3
"""Tandem beside llama.cpp: the same file, the same threads, one run, alternating; medians.

Usage: benches/peer_llama_cpp.py MODEL.gguf [--threads 2] [--prompt 256] [--gen 64]
           [--batch 1,8,16] [--rounds 3] [--tandem target/release/tandem] [--json]

Needs `pip install llama-cpp-python`, which builds llama.cpp for this machine's CPU. Each round runs
each engine once in a process of its own, one after the other, and swaps the order from round to
round, so that a machine that slows down hurts both. Prints tokens/s of both and the ratio of the
medians: a prompt of so many tokens, and so many streams that each generate so many tokens, counted
together. llama.cpp gets its best settings for a CPU: weights repacked at load (its default) and
flash attention as asked with --flash-attn (both ways are tried by default, the better one counts).
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time


def arguments():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt", type=int, default=256, help="tokens; 0 leaves it out")
    parser.add_argument("--gen", type=int, default=64, help="tokens that each stream generates")
    parser.add_argument("--batch", default="1,8,16", help="streams, a list")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tandem", default="target/release/tandem")
    parser.add_argument("--flash-attn", choices=["on", "off", "best"], default="best")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer-worker", choices=["on", "off"], help=argparse.SUPPRESS)
    return parser.parse_args()


class Peer:
    """llama.cpp through its C interface: one context, batches made by hand."""

    def __init__(self, options):
        import llama_cpp

        self.api = llama_cpp
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self.quiet = quiet
        llama_cpp.llama_log_set(quiet, None)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(options.model.encode(), model)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {options.model}")
        streams = max(streams_of(options))
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = max(options.prompt, streams * (options.gen + 16)) + 256
        context.n_batch = context.n_ubatch = 512
        context.n_seq_max = streams
        context.kv_unified = False
        context.n_ctx = context.n_ctx * (streams if not context.kv_unified else 1)
        context.n_threads = context.n_threads_batch = options.threads
        context.flash_attn_type = 1 if options.peer_worker == "on" else 0
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise SystemExit("llama.cpp makes no context")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.random = random.Random(1)

    def clear(self):
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def decode(self, rows):
        """One step: rows of (sequence, position, whether logits are wanted)."""
        self.batch.n_tokens = len(rows)
        for index, (sequence, position, wanted) in enumerate(rows):
            self.batch.token[index] = self.random.randrange(self.vocab_size)
            self.batch.pos[index] = position
            self.batch.n_seq_id[index] = 1
            self.batch.seq_id[index][0] = sequence
            self.batch.logits[index] = wanted
        code = self.api.llama_decode(self.context, self.batch)
        if code != 0:
            raise SystemExit(f"llama_decode returns {code}")
        self.api.llama_synchronize(self.context)

    def prefill(self, tokens):
        self.clear()
        start = time.perf_counter()
        for first in range(0, tokens, 512):
            last = min(tokens, first + 512)
            self.decode([(0, at, at == tokens - 1) for at in range(first, last)])
        return tokens / (time.perf_counter() - start)

    def generate(self, streams, tokens):
        self.clear()
        self.decode([(stream, 0, True) for stream in range(streams)])
        start = time.perf_counter()
        for position in range(1, tokens + 1):
            self.decode([(stream, position, True) for stream in range(streams)])
        return streams * tokens / (time.perf_counter() - start)


def peer_worker(options):
    peer = Peer(options)
    peer.generate(1, 4)
    rates = {}
    if options.prompt:
        peer.prefill(options.prompt)
        rates["prompt"] = peer.prefill(options.prompt)
    for streams in streams_of(options):
        rates[str(streams)] = peer.generate(streams, options.gen)
    json.dump(rates, sys.stdout)


def run_peer(options, flash_attn):
    command = [sys.executable, *sys.argv, "--peer-worker", flash_attn]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def run_tandem(options):
    rates = {}
    for row in bench(options, "0", str(options.gen), options.batch):
        rates[str(row["n_parallel"])] = row["avg_ts"]
    if options.prompt:
        rates["prompt"] = bench(options, str(options.prompt), "0", "1")[0]["avg_ts"]
    return rates


def bench(options, prompt, gen, streams):
    command = [
        options.tandem, "bench", options.model, "--output", "json", "--repetitions", "1",
        "--quiet", "--threads", str(options.threads), "--n-prompt", prompt, "--n-gen", gen,
        "--n-parallel", streams, "--set", "gpu.device=off",
    ]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def streams_of(options):
    return [int(streams) for streams in options.batch.split(",")]


def compare(options):
    modes = ["on", "off"] if options.flash_attn == "best" else [options.flash_attn]
    runs = {"tandem": []} | {mode: [] for mode in modes}
    for round_index in range(options.rounds):
        order = list(runs)
        for engine in order if round_index % 2 == 0 else reversed(order):
            rates = run_tandem(options) if engine == "tandem" else run_peer(options, engine)
            runs[engine].append(rates)
    tests = (["prompt"] if options.prompt else []) + options.batch.split(",")
    rows = []
    for test in tests:
        ours = statistics.median(rates[test] for rates in runs["tandem"])
        theirs = max(statistics.median(rates[test] for rates in runs[mode]) for mode in modes)
        name = f"pp{options.prompt}" if test == "prompt" else f"tg{options.gen} x {test}"
        rows.append({"test": name, "llama.cpp": theirs, "tandem": ours, "ratio": ours / theirs})
    return rows


def main():
    options = arguments()
    if options.peer_worker:
        return peer_worker(options)
    rows = compare(options)
    if options.json:
        return print(json.dumps(rows, indent=1))
    print(f"{os.path.basename(options.model)}, {options.threads} threads, "
          f"median of {options.rounds} rounds, tokens/s")
    print("| test | llama.cpp | Tandem | ratio |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['test']} | {row['llama.cpp']:.1f} | {row['tandem']:.1f} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
