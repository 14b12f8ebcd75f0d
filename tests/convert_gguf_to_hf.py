#!/usr/bin/env python3
"""Writes a llama model from a GGUF file as Hugging Face folders, in the layouts that servers use.

    pip install numpy gguf safetensors ml_dtypes
    python3 tests/convert_gguf_to_hf.py .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf \
        .cache/models/hf-smollm2-135m

Folders: f16, bf16; fp8 (a scale per row, as compressed-tensors has it), fp8-block (blocks like
DeepSeek's); awq and gptq (4 bits, groups of 64); each quantised one with a twin NAME-floats in F32
of the numbers that its bits stand for. Files f16.gguf and bf16.gguf hold the weights of the folders
of that name.

Published checkpoints of these kinds can't be fetched here. The layouts are those of AutoAWQ
(version gemm), AutoGPTQ (checkpoint_format gptq: zero points less one) and safetensors; quants are
rounded to nearest, without the calibration that those tools are for. tokenizer.json is written from
the GGUF vocabulary: a GGUF file has no other.
"""

import json
import pathlib
import sys

import gguf
import ml_dtypes
import numpy
from gguf.quants import dequantize
from safetensors.numpy import save_file

GROUP = 64
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def field(reader, key, default=None):
    found = reader.get_field(key)
    return default if found is None else found.contents()


def module_of(name):
    if name.startswith("blk."):
        _, layer, part = name.split(".", 2)
        return f"model.layers.{layer}.{LAYER[part]}"
    return {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[
        name
    ]


def read(reader):
    """Modules and their weights in f32, query and key rows in Hugging Face's order."""
    heads, kv_heads = field(reader, "llama.attention.head_count"), field(
        reader, "llama.attention.head_count_kv"
    )
    weights = {}
    for tensor in reader.tensors:
        stem, suffix = tensor.name.rsplit(".", 1)
        assert suffix == "weight", tensor.name
        values = numpy.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=numpy.float32)
        values = values.reshape([int(extent) for extent in reversed(tensor.shape)])
        if stem.endswith(("attn_q", "attn_k")):
            n = heads if stem.endswith("attn_q") else kv_heads
            split = values.reshape(n, values.shape[0] // n // 2, 2, values.shape[1])
            values = split.swapaxes(1, 2).reshape(values.shape)
        weights[module_of(stem)] = values
    return weights


def config_of(reader, weights):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": field(reader, "llama.block_count"),
        "hidden_size": field(reader, "llama.embedding_length"),
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_attention_heads": field(reader, "llama.attention.head_count"),
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "max_position_embeddings": field(reader, "llama.context_length"),
        "rms_norm_eps": float(field(reader, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(field(reader, "llama.rope.freq_base", 10000.0)),
        "vocab_size": weights["model.embed_tokens"].shape[0],
        "tie_word_embeddings": "lm_head" not in weights,
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float16",
    }


def tokenizer_of(reader):
    """tokenizer.json and tokenizer_config.json of a byte-level vocabulary cut as SmolLM's."""
    assert field(reader, "tokenizer.ggml.pre") in ("smollm", "starcoder", "refact", "command-r")
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(
        reader, "tokenizer.ggml.token_type"
    )
    control = [id for id, kind in enumerate(kinds) if kind in (3, 4)]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id,
                "content": tokens[id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kinds[id] == 3,
            }
            for id in control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": field(reader, "tokenizer.ggml.merges"),
        },
    }
    name = lambda role: tokens[field(reader, f"tokenizer.ggml.{role}_token_id")]
    settings = {
        "bos_token": name("bos"),
        "eos_token": name("eos"),
        "add_bos_token": bool(field(reader, "tokenizer.ggml.add_bos_token", False)),
        "chat_template": field(reader, "tokenizer.chat_template"),
    }
    return tokenizer, settings


def is_quantised(module):
    return module.startswith("model.layers.") and module.endswith("_proj")


def int4(weight):
    """Quants [in, out], zero points and f16 scales [groups, out]; rounded to nearest."""
    inputs = weight.T.reshape(weight.shape[1] // GROUP, GROUP, weight.shape[0])
    low, high = numpy.minimum(inputs.min(1), 0), numpy.maximum(inputs.max(1), 0)
    scales = numpy.maximum((high - low) / 15, 1e-6).astype(numpy.float16)
    wide = scales.astype(numpy.float32)
    # From 1: version 1 of GPTQ can't store 0.
    zeros = numpy.clip(numpy.rint(-low / wide), 1, 15).astype(numpy.uint32)
    quants = numpy.clip(numpy.rint(inputs / wide[:, None]) + zeros[:, None], 0, 15)
    quants = quants.astype(numpy.uint32).reshape(weight.shape[1], weight.shape[0])
    less = quants.astype(numpy.float64) - numpy.repeat(zeros.astype(numpy.float64), GROUP, axis=0)
    stands_for = less * numpy.repeat(scales.astype(numpy.float64), GROUP, axis=0)
    return quants, zeros, scales, stands_for.T.astype(numpy.float32)


def packed(values, axis, order=range(8)):
    """Eight values along an axis in an int32: nibble i has value order[i]."""
    values = numpy.moveaxis(values, axis, -1)
    values = values.reshape(*values.shape[:-1], values.shape[-1] // 8, 8)
    words = sum(values[..., source] << (4 * i) for i, source in enumerate(order))
    return numpy.ascontiguousarray(numpy.moveaxis(words, -1, axis)).view(numpy.int32)


def awq(module, weight):
    quants, zeros, scales, stands_for = int4(weight)
    return {
        f"{module}.qweight": packed(quants, 1, AWQ_ORDER),
        f"{module}.qzeros": packed(zeros, 1, AWQ_ORDER),
        f"{module}.scales": scales,
    }, stands_for


def gptq(module, weight):
    quants, zeros, scales, stands_for = int4(weight)
    return {
        f"{module}.qweight": packed(quants, 0),
        f"{module}.qzeros": packed(zeros - 1, 1),
        f"{module}.scales": scales,
        f"{module}.g_idx": (numpy.arange(weight.shape[1]) // GROUP).astype(numpy.int32),
    }, stands_for


def fp8(module, weight):
    scale = (numpy.abs(weight).max(1, keepdims=True) / 448).astype(ml_dtypes.bfloat16)
    wide = scale.astype(numpy.float32)
    codes = numpy.clip(weight / wide, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    tensors = {f"{module}.weight": codes, f"{module}.weight_scale": scale}
    return tensors, codes.astype(numpy.float32) * wide


def fp8_block(module, weight):
    rows, cols = weight.shape
    row_blocks, col_blocks = -(-rows // 128), -(-cols // 32)
    padded = numpy.zeros((row_blocks * 128, col_blocks * 32), numpy.float32)
    padded[:rows, :cols] = numpy.abs(weight)
    scales = padded.reshape(row_blocks, 128, col_blocks, 32).max((1, 3)) / numpy.float32(448)
    wide = numpy.repeat(numpy.repeat(scales, 128, 0), 32, 1)[:rows, :cols]
    codes = numpy.clip(weight / wide, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    tensors = {
        f"{module}.weight": codes,
        f"{module}.weight_scale_inv": scales.astype(numpy.float32),
    }
    return tensors, codes.astype(numpy.float32) * wide


QUANTISERS = {
    "awq": (
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
    "gptq": (
        gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": False,
            "checkpoint_format": "gptq",
        },
    ),
    "fp8": (
        fp8,
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 8,
                        "type": "float",
                        "strategy": "channel",
                        "symmetric": True,
                    },
                }
            },
        },
    ),
    "fp8-block": (
        fp8_block,
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 32]},
    ),
}


def save(tensors, path):
    # safetensors wants tensors whose memory is their own.
    save_file({name: numpy.ascontiguousarray(value) for name, value in tensors.items()}, path)


def write_folder(folder, config, texts, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, settings = texts
    for name, value in (
        ("config", config),
        ("tokenizer", tokenizer),
        ("tokenizer_config", settings),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": config["eos_token_id"]})
    )
    save(tensors, folder / "model.safetensors")


def write_gguf(reader, weights, dtype, path):
    """The same file with weights of one float type; vectors stay in F32."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, found in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = found.types[0]
        inner = found.types[1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, found.contents(), kind, inner)
    heads, kv_heads = field(reader, "llama.attention.head_count"), field(
        reader, "llama.attention.head_count_kv"
    )
    for tensor in reader.tensors:
        stem = tensor.name.rsplit(".", 1)[0]
        values = weights[module_of(stem)]
        if stem.endswith(("attn_q", "attn_k")):
            n = heads if stem.endswith("attn_q") else kv_heads
            split = values.reshape(n, 2, values.shape[0] // n // 2, values.shape[1])
            values = split.swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values.astype(numpy.float32))
        elif dtype == "f16":
            writer.add_tensor(tensor.name, values.astype(numpy.float16))
        else:
            raw = values.astype(ml_dtypes.bfloat16).view(numpy.uint8)
            writer.add_tensor(tensor.name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    source, target = sys.argv[1], pathlib.Path(sys.argv[2])
    reader = gguf.GGUFReader(source)
    weights = read(reader)
    config, texts = config_of(reader, weights), tokenizer_of(reader)
    kinds = {"f16": numpy.float16, "bf16": ml_dtypes.bfloat16}
    for name, dtype in kinds.items():
        # Vectors stay in f32 in both forms, so that all weights are the same numbers.
        cast = lambda value: value.astype(dtype if value.ndim > 1 else numpy.float32)
        tensors = {f"{module}.weight": cast(value) for module, value in weights.items()}
        write_folder(target / name, config, texts, tensors)
        write_gguf(reader, weights, name, target / f"{name}.gguf")
    for name, (quantise, quantization) in QUANTISERS.items():
        tensors, twin = {}, {}
        for module, value in weights.items():
            plain = value.astype(numpy.float16)
            if is_quantised(module):
                made, stands_for = quantise(module, value)
                tensors.update(made)
                twin[f"{module}.weight"] = stands_for
            else:
                tensors[f"{module}.weight"] = twin[f"{module}.weight"] = plain
        quantised = {**config, "quantization_config": quantization}
        write_folder(target / name, quantised, texts, tensors)
        write_folder(target / f"{name}-floats", config, texts, twin)
        print(name)


main()
