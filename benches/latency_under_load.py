#!/usr/bin/env python3
"""Inter-token time of running streams while a long prompt prefills beside them.

Usage: benches/latency_under_load.py SOCKET [--streams 4] [--prompt-tokens 8000]

Talks to a running service, started with `--speculative off`: then a token of a stream is a step.
Some clients ask for one short answer after the other; after a while one more request brings a long
prompt. Prints the streams' inter-token times before it and during its prefill, and their ratio: the
same run, so the ratio does not depend on what else the machine does, and answers of the same
lengths, so that it does not depend on their own contexts either.
"""
import argparse
import json
import socket
import statistics
import threading
import time


class Client:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.lines = self.socket.makefile("rb")
        self.hello = json.loads(self.lines.readline())

    def send(self, method, params):
        line = json.dumps({"id": 1, "method": method, "params": params})
        self.socket.sendall(line.encode() + b"\n")

    def events(self):
        for line in self.lines:
            message = json.loads(line)
            if "error" in message:
                raise SystemExit(f"refused: {message['error']}")
            event = message.get("params", {})
            yield time.perf_counter(), event
            if event.get("type") in ("done", "error"):
                return

    def call(self, method, params):
        self.send(method, params)
        return json.loads(self.lines.readline())["result"]


def stream(path, index, answers, stop):
    """Asks for short answers until told to stop; `answers` gets each one's token times."""
    client = Client(path)
    number = 0
    while not stop.is_set():
        number += 1
        stamps = []
        answers.append(stamps)
        client.send("generate", {
            "prompt": f"Story number {index}.{number}:", "max_tokens": 200, "temperature": 0.8,
            "seed": number, "ignore_eos": True,
        })
        for at, event in client.events():
            if event.get("type") == "delta":
                stamps.extend([at] * len(event["token_ids"]))


def gaps(stamps, start, end):
    inside = [at for at in stamps if start <= at <= end]
    return [1e3 * (b - a) for a, b in zip(inside, inside[1:])]


def describe(name, values):
    values = sorted(values)
    p99 = values[min(len(values) - 1, int(len(values) * 0.99))]
    mean = statistics.mean(values)
    print(f"{name:18} n={len(values):5}  median {statistics.median(values):7.2f} ms  "
          f"mean {mean:7.2f} ms  p99 {p99:7.2f} ms  max {values[-1]:7.2f} ms")
    return statistics.median(values), mean, p99


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=8000)
    arguments = parser.parse_args()

    probe = Client(arguments.socket)
    words = "the quick brown fox jumps over the lazy dog near a quiet river bank and "
    tokens = probe.call("tokenize", {"text": words * (arguments.prompt_tokens // 8)})["tokens"]
    prompt = tokens[: arguments.prompt_tokens]

    stop, answers, threads = threading.Event(), [], []
    for index in range(arguments.streams):
        thread = threading.Thread(target=stream, args=(arguments.socket, index, answers, stop))
        thread.start()
        threads.append(thread)
    time.sleep(2)
    before = time.perf_counter()
    time.sleep(4)

    client = Client(arguments.socket)
    start = time.perf_counter()
    client.send("generate", {"prompt_tokens": prompt, "max_tokens": 1, "temperature": 0})
    first = None
    for at, event in client.events():
        if event.get("type") == "delta" and first is None:
            first = at
    end = first or time.perf_counter()
    stop.set()
    for thread in threads:
        thread.join()

    quiet = [gap for stamps in answers for gap in gaps(stamps, before, start)]
    busy = [gap for stamps in answers for gap in gaps(stamps, start, end)]
    print(f"{arguments.streams} streams; a prompt of {len(prompt)} tokens prefilled in "
          f"{end - start:.2f} s ({len(prompt) / (end - start):.0f} tokens/s)")
    median, mean, p99 = describe("undisturbed", quiet)
    median_busy, mean_busy, p99_busy = describe("during the prefill", busy)
    print(f"ratio: median {median_busy / median:.2f}, mean {mean_busy / mean:.2f}, "
          f"p99 {p99_busy / p99:.2f}")


main()
