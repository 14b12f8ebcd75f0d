#!/usr/bin/env python3
"""Writes tests/data/dequantize.bin: random blocks of every type and their values by gguf-py. Types
that GGUF has not get theirs from numpy and from ml_dtypes, whose float8_e4m3fn is the definition.

    pip install gguf numpy ml_dtypes && python3 cpu_kernels/tests/make_dequantize_data.py

Record: u32 GGUF type id, u32 elements, u32 bytes, the bytes, the f32 values; little-endian.
"""

import pathlib
import struct

import ml_dtypes
import numpy
from gguf import GGMLQuantizationType as T
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize

# Offsets of the f16 fields: random bits there would mostly be huge, tiny or NaN.
F16_FIELDS = {
    T.F16: [0], T.BF16: [], T.F32: [],
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0],
    T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
    T.IQ4_NL: [0], T.IQ4_XS: [0],
}
ELEMENTS = 512

rng = numpy.random.default_rng(20240229)
records = []
for dtype, fields in F16_FIELDS.items():
    block_elements, block_bytes = GGML_QUANT_SIZES[dtype]
    blocks = ELEMENTS // block_elements
    raw = rng.integers(0, 256, (blocks, block_bytes), dtype=numpy.uint8)
    for offset in fields:
        scales = rng.normal(0, 0.02, (blocks, 1)).astype(numpy.float16)
        raw[:, offset:offset + 2] = scales.view(numpy.uint8)
    if dtype in (T.F32, T.BF16):
        plain = rng.normal(0, 1, ELEMENTS).astype(numpy.float32)
        raw = plain.view(numpy.uint8).reshape(-1, 4)
        raw = raw if dtype == T.F32 else numpy.ascontiguousarray(raw[:, 2:])
    values = dequantize(raw.reshape(-1) if block_elements == 1 else raw.reshape(1, -1), dtype)
    values = numpy.asarray(values, dtype=numpy.float32).reshape(-1)
    assert values.size == ELEMENTS, (dtype, values.size)
    body = raw.tobytes()
    records.append(struct.pack("<III", int(dtype), ELEMENTS, len(body)) + body + values.tobytes())

OWN_IDS = 0x54440000


def nibbles(raw):
    """[blocks, 16n] bytes -> [blocks, 32n]: low nibbles of 16 bytes, then their high ones."""
    groups = raw.reshape(len(raw), -1, 16)
    return numpy.concatenate([groups & 15, groups >> 4], axis=2).reshape(len(raw), -1)


def int4(elements, groups, zeros_at, quants_at):
    """Blocks with `groups` pairs of scale and zero point: one has a byte, two share it."""
    blocks = ELEMENTS // elements
    raw = rng.integers(0, 256, (blocks, quants_at + elements // 2), dtype=numpy.uint8)
    scales = rng.normal(0, 0.02, (blocks, groups)).astype(numpy.float16)
    raw[:, :2 * groups] = scales.view(numpy.uint8)
    byte = raw[:, zeros_at:zeros_at + 1] & (15 if groups == 1 else 255)
    raw[:, zeros_at:zeros_at + 1] = byte
    zeros = byte if groups == 1 else numpy.concatenate([byte & 15, byte >> 4], axis=1)
    each = elements // groups
    less = nibbles(raw[:, quants_at:]).astype(numpy.float64)
    less -= numpy.repeat(zeros, each, axis=1)
    return raw, less * numpy.repeat(scales.astype(numpy.float64), each, axis=1)


def e4m3(elements):
    """Blocks with an f32 that is 256 times the scale."""
    blocks = ELEMENTS // elements
    codes = rng.integers(0, 256, (blocks, elements), dtype=numpy.uint8)
    codes[codes & 127 == 127] = 126  # no NaN
    scales = rng.normal(0, 0.02, (blocks, 1)).astype(numpy.float32)
    stored = (scales * numpy.float32(256)).view(numpy.uint8)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(numpy.float32) * scales
    return numpy.concatenate([stored, codes], axis=1), values


OWN = [int4(128, 1, 2, 3), int4(64, 1, 2, 3), int4(64, 2, 4, 5), e4m3(128), e4m3(32)]
for index, (raw, values) in enumerate(OWN):
    body, values = raw.tobytes(), values.astype(numpy.float32).tobytes()
    assert len(values) == 4 * ELEMENTS, index
    records.append(struct.pack("<III", OWN_IDS + index, ELEMENTS, len(body)) + body + values)

target = pathlib.Path(__file__).parent / "data" / "dequantize.bin"
target.write_bytes(b"".join(records))
print(target, target.stat().st_size, "bytes")
