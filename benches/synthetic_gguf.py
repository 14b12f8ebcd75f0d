#!/usr/bin/env python3
"""Writes a GGUF file of a well-known shape with random weights, for engines that need a file.

Usage: benches/synthetic_gguf.py SHAPE TYPE OUT.gguf [--vocabulary FROM.gguf] [--layers N]

SHAPE: llama-1b, llama-3b, llama-8b, llama-70b; TYPE: Q4_0, Q4_1, Q8_0, Q4_K, Q6_K. Sizes and
formats are those of the real model (the output matrix is Q6_K, as llama.cpp's quantiser makes it), with the
tokenizer of another file, or a made-up one of the real one's size to which nearly each byte is a
token. What such a model says means nothing. The scales keep activations near 1, so that no engine
meets infinities or denormals. Random blocks repeat after a few MiB, so an 8B is written in seconds,
into memory if OUT lies in /dev/shm. `tandem bench --synthetic` needs no file.
"""
import argparse
import mmap
import random
import struct

# embedding, feed-forward, layers, query heads, KV heads, elements of a head
SHAPES = {
    "llama-1b": (2048, 8192, 16, 32, 8, 64),
    "llama-3b": (3072, 8192, 28, 24, 8, 128),
    "llama-8b": (4096, 14336, 32, 32, 8, 128),
    "llama-70b": (8192, 28672, 80, 64, 8, 128),
}
# GGUF's number, elements and bytes of a block, where its scale lies, and the root mean square of
# the integers that a random block holds, after its zero point or offset.
TYPES = {
    "Q4_0": (2, 32, 18, 0, 4.6),
    "Q4_1": (3, 32, 20, 0, 4.6),
    "Q8_0": (8, 32, 34, 0, 74),
    "Q4_K": (12, 256, 144, 0, 4.6 * 32),
    "Q6_K": (14, 256, 210, 208, 18 * 74),
}
# What a block's offset is, in scales; it follows the scale.
OFFSETS = {"Q4_1": -7.5, "Q4_K": 7.5}
CONTEXT_TOKENS = 8192
VOCABULARY_TOKENS = 128_256
# Random blocks that a matrix repeats: a prime, so that they don't repeat with the rows.
POOL_BLOCKS = 65_537
ALIGNMENT = 32
U32, I32, F32, STRING, ARRAY = 4, 5, 6, 8, 9
# Bytes of a value of each of GGUF's types that have a size.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
NORMAL, CONTROL = 1, 3


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def field(key, kind, value):
    return string(key) + struct.pack("<I", kind) + value


def number(key, value):
    kind, form = (F32, "<f") if isinstance(value, float) else (U32, "<I")
    return field(key, kind, struct.pack(form, value))


def array(key, kind, values):
    return field(key, ARRAY, struct.pack("<IQ", kind, len(values)) + b"".join(values))


def made_up_vocabulary():
    """Fields of a byte-level BPE with one merge, how many these are, and its tokens' number."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in visible]
    # GPT-2 writes a byte that can't be seen as the next free letter from U+0100 on.
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(0x100 + at) for at, byte in enumerate(rest)}
    tokens = [letters[byte] for byte in range(256)]
    space = letters[0x20]
    tokens += [f"{space}t"]
    tokens += [f"{space}word{at}" for at in range(len(tokens), VOCABULARY_TOKENS - 2)]
    tokens += ["<|begin|>", "<|end|>"]
    kinds = [NORMAL] * (len(tokens) - 2) + [CONTROL] * 2
    name = "tokenizer.ggml."
    fields = [
        field(name + "model", STRING, string("gpt2")),
        field(name + "pre", STRING, string("llama-bpe")),
        array(name + "tokens", STRING, [string(token) for token in tokens]),
        array(name + "token_type", I32, [struct.pack("<i", kind) for kind in kinds]),
        array(name + "merges", STRING, [string(f"{space} t")]),
        number(name + "bos_token_id", len(tokens) - 2),
        number(name + "eos_token_id", len(tokens) - 1),
    ]
    return b"".join(fields), len(fields), len(tokens)


def vocabulary_of(path):
    """The same of another file."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    (count,) = struct.unpack_from("<Q", data, 16)
    at, fields, tokens = 24, [], None

    def skip_string(at):
        return at + 8 + struct.unpack_from("<Q", data, at)[0]

    def skip(kind, at):
        if kind == STRING:
            return skip_string(at)
        if kind != ARRAY:
            return at + SIZES[kind]
        kind, length = struct.unpack_from("<IQ", data, at)
        at += 12
        if kind in SIZES:
            return at + length * SIZES[kind]
        for _ in range(length):
            at = skip(kind, at)
        return at

    for _ in range(count):
        start, value = at, skip_string(at)
        key = data[at + 8 : value].decode()
        at = skip(struct.unpack_from("<I", data, value)[0], value + 4)
        if key.startswith("tokenizer.ggml."):
            fields.append(data[start:at])
        if key == "tokenizer.ggml.tokens":
            (tokens,) = struct.unpack_from("<Q", data, value + 8)
    return b"".join(fields), len(fields), tokens


class Writer:
    def __init__(self, options):
        self.shape = SHAPES[options.shape]
        self.type = options.type
        self.layers = options.layers or self.shape[2]
        self.random = random.Random(1)
        self.tensors = []
        self.pools = {}
        of = made_up_vocabulary() if not options.vocabulary else vocabulary_of(options.vocabulary)
        self.vocabulary, self.vocabulary_fields, self.vocab_size = of
        self.model(f"random {options.shape}")

    def metadata(self, name):
        embedding, feed_forward, _, heads, kv_heads, head = self.shape
        return [
            field("general.architecture", STRING, string("llama")),
            field("general.name", STRING, string(name)),
            number("llama.vocab_size", self.vocab_size),
            number("llama.block_count", self.layers),
            number("llama.context_length", CONTEXT_TOKENS),
            number("llama.embedding_length", embedding),
            number("llama.feed_forward_length", feed_forward),
            number("llama.attention.head_count", heads),
            number("llama.attention.head_count_kv", kv_heads),
            number("llama.attention.key_length", head),
            number("llama.attention.value_length", head),
            number("llama.attention.layer_norm_rms_epsilon", 1e-5),
            number("llama.rope.dimension_count", head),
            number("llama.rope.freq_base", 500_000.0),
        ]

    def model(self, name):
        embedding, feed_forward, _, heads, kv_heads, head = self.shape
        self.fields = self.metadata(name)
        self.matrix("token_embd.weight", self.vocab_size, embedding)
        self.norm("output_norm.weight")
        self.matrix("output.weight", self.vocab_size, embedding, "Q6_K")
        for layer in range(self.layers):
            block = f"blk.{layer}."
            self.norm(block + "attn_norm.weight")
            self.matrix(block + "attn_q.weight", heads * head, embedding)
            self.matrix(block + "attn_k.weight", kv_heads * head, embedding)
            self.matrix(block + "attn_v.weight", kv_heads * head, embedding)
            self.matrix(block + "attn_output.weight", embedding, heads * head)
            self.norm(block + "ffn_norm.weight")
            self.matrix(block + "ffn_gate.weight", feed_forward, embedding)
            self.matrix(block + "ffn_up.weight", feed_forward, embedding)
            self.matrix(block + "ffn_down.weight", embedding, feed_forward)

    def matrix(self, name, rows, cols, kind=None):
        kind = kind or self.type
        _, elements, size, _, _ = TYPES[kind]
        blocks = rows * cols // elements
        self.tensors.append((name, (cols, rows), kind, blocks * size))

    def norm(self, name):
        cols = self.shape[0]
        self.tensors.append((name, (cols,), "F32", 4 * cols))

    def pool(self, kind, cols):
        """Random blocks of a matrix with rows of so many elements, as bytes."""
        if (kind, cols) not in self.pools:
            _, _, size, at, spread = TYPES[kind]
            pool = bytearray(self.random.randbytes(POOL_BLOCKS * size))
            scale = 1 / (spread * cols**0.5)
            for at, value in [(at, scale), (at + 2, OFFSETS.get(kind, 0) * scale)]:
                if value:
                    low, high = struct.pack("<e", value)
                    pool[at::size] = bytes([low]) * POOL_BLOCKS
                    pool[at + 1 :: size] = bytes([high]) * POOL_BLOCKS
            self.pools[kind, cols] = memoryview(pool)
        return self.pools[kind, cols]

    def header(self):
        fields = b"".join(self.fields) + self.vocabulary
        count = len(self.fields) + self.vocabulary_fields
        parts, offset = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), count), fields], 0
        for name, dims, kind, size in self.tensors:
            number = TYPES[kind][0] if kind in TYPES else 0
            shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
            parts += [string(name), shape, struct.pack("<IQ", number, offset)]
            offset += size + -size % ALIGNMENT
        return b"".join(parts)

    def write(self, path):
        with open(path, "wb", buffering=0) as file:
            header = self.header()
            file.write(header + bytes(-len(header) % ALIGNMENT))
            for _, dims, kind, size in self.tensors:
                if kind == "F32":
                    file.write(struct.pack("<f", 1.0) * dims[0])
                else:
                    self.repeat(file, self.pool(kind, dims[0]), size)
                file.write(bytes(-size % ALIGNMENT))

    def repeat(self, file, pool, size):
        while size > 0:
            size -= file.write(pool[:size])


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=TYPES)
    parser.add_argument("out")
    parser.add_argument("--vocabulary")
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    Writer(options).write(options.out)


if __name__ == "__main__":
    main()
