#!/usr/bin/env python3
"""Writes tests/data/dequantize.bin: random blocks of every type and their values by gguf-py.

    pip install gguf numpy && python3 cpu_kernels/tests/make_dequantize_data.py

Record: u32 GGUF type id, u32 elements, u32 bytes, the bytes, the f32 values; little-endian.
"""

import pathlib
import struct

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

target = pathlib.Path(__file__).parent / "data" / "dequantize.bin"
target.write_bytes(b"".join(records))
print(target, target.stat().st_size, "bytes")
