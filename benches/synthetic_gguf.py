#!/usr/bin/env python3
"""Writes a GGUF file of a well-known shape with random weights, for engines that need a file.

Usage: benches/synthetic_gguf.py SHAPE TYPE OUT.gguf --vocabulary FROM.gguf [--layers N]

Needs `pip install gguf numpy`. SHAPE: llama-1b, llama-3b, llama-8b, llama-70b; TYPE: Q4_0, Q4_1, Q8_0,
Q4_K, Q6_K. Sizes and formats are those of the real model (the output matrix is Q6_K, as llama.cpp's
quantiser makes it), with the tokenizer of another file; what it says means nothing. The scales keep
activations near 1, so that no engine meets infinities or denormals. Only `benches/peer_llama_cpp.py`
needs it: `tandem bench --synthetic` makes its weights in memory.
"""
import argparse

import gguf
import numpy
from gguf import GGMLQuantizationType as Type

# embedding, feed-forward, layers, query heads, KV heads, elements of a head
SHAPES = {
    "llama-1b": (2048, 8192, 16, 32, 8, 64),
    "llama-3b": (3072, 8192, 28, 24, 8, 128),
    "llama-8b": (4096, 14336, 32, 32, 8, 128),
    "llama-70b": (8192, 28672, 80, 64, 8, 128),
}
# Root mean square of the integers that a random block holds, after its zero point or offset.
SPREAD = {Type.Q4_0: 4.6, Type.Q4_1: 4.6, Type.Q8_0: 74, Type.Q4_K: 4.6 * 32, Type.Q6_K: 18 * 74}
CONTEXT_TOKENS = 8192


class Writer:
    def __init__(self, options):
        self.shape = SHAPES[options.shape]
        self.type = Type[options.type]
        self.random = numpy.random.default_rng(1)
        self.file = gguf.GGUFWriter(options.out, "llama")
        self.tensors = []
        self.layers = options.layers or self.shape[2]
        self.metadata(options)
        self.vocabulary(options.vocabulary)

    def metadata(self, options):
        embedding, feed_forward, _, heads, kv_heads, head = self.shape
        file = self.file
        file.add_name(f"random {options.shape}")
        file.add_block_count(self.layers)
        file.add_context_length(CONTEXT_TOKENS)
        file.add_embedding_length(embedding)
        file.add_feed_forward_length(feed_forward)
        file.add_head_count(heads)
        file.add_head_count_kv(kv_heads)
        file.add_key_length(head)
        file.add_value_length(head)
        file.add_rope_dimension_count(head)
        file.add_rope_freq_base(500_000.0)
        file.add_layer_norm_rms_eps(1e-5)

    def vocabulary(self, path):
        setters = {
            "model": self.file.add_tokenizer_model,
            "pre": self.file.add_tokenizer_pre,
            "tokens": self.file.add_token_list,
            "merges": self.file.add_token_merges,
            "scores": self.file.add_token_scores,
            "token_type": self.file.add_token_types,
            "bos_token_id": self.file.add_bos_token_id,
            "eos_token_id": self.file.add_eos_token_id,
        }
        for name, setter in setters.items():
            field = gguf.GGUFReader(path).fields.get(f"tokenizer.ggml.{name}")
            if field is not None:
                setter(field.contents())
                if name == "tokens":
                    self.vocab_size = len(field.contents())
        self.file.add_vocab_size(self.vocab_size)

    def matrix(self, name, rows, cols, dtype=None):
        dtype = dtype or self.type
        elements, size = gguf.GGML_QUANT_SIZES[dtype]
        shape = [rows, cols // elements * size]
        self.file.add_tensor_info(name, shape, numpy.dtype(numpy.uint8), shape[0] * shape[1], dtype)
        self.tensors.append(lambda: self.blocks(rows, cols, dtype))

    def norm(self, name):
        cols = self.shape[0]
        self.file.add_tensor_info(name, [cols], numpy.dtype(numpy.float32), 4 * cols)
        self.tensors.append(lambda: numpy.ones(cols, numpy.float32))

    def blocks(self, rows, cols, dtype):
        elements, size = gguf.GGML_QUANT_SIZES[dtype]
        blocks = self.random.integers(0, 256, (rows * cols // elements, size), numpy.uint8)
        scale = 1 / (SPREAD[dtype] * cols**0.5)

        def put(offset, value):
            half = numpy.array([value], numpy.float16).view(numpy.uint8)
            blocks[:, offset : offset + 2] = half

        put(size - 2 if dtype == Type.Q6_K else 0, scale)
        if dtype == Type.Q4_1:
            put(2, -7.5 * scale)
        elif dtype == Type.Q4_K:
            put(2, 7.5 * scale)
        return blocks.reshape(rows, -1)

    def write(self):
        embedding, feed_forward, _, heads, kv_heads, head = self.shape
        self.matrix("token_embd.weight", self.vocab_size, embedding)
        self.norm("output_norm.weight")
        self.matrix("output.weight", self.vocab_size, embedding, Type.Q6_K)
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
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_ti_data_to_file()
        for tensor in self.tensors:
            self.file.write_tensor_data(tensor())
        self.file.close()


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=[dtype.name for dtype in SPREAD])
    parser.add_argument("out")
    parser.add_argument("--vocabulary", required=True)
    parser.add_argument("--layers", type=int)
    Writer(parser.parse_args()).write()


if __name__ == "__main__":
    main()
