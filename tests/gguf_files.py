"""Small GGUF files, written by the format's own package, with random weights and a vocabulary that
was trained here."""

import io
import json
import pathlib

import gguf
import numpy as np
import sentencepiece
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from tests.published import LINES, byte_bpe

WIDTH, INNER, LAYERS, HEADS, KV_HEADS, LENGTH = 64, 96, 2, 4, 2, 48
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level_vocabulary() -> dict:
    """Values of a byte-level BPE vocabulary, by GGUF's keys."""
    model = json.loads(byte_bpe(SPECIALS).to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3 if piece in SPECIALS else 1 for piece in pieces],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT,
    }


def sentencepiece_model(lines=LINES, **options) -> sentencepiece.SentencePieceProcessor:
    """A BPE model as Llama's: bytes for what has no piece, a space before every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_vocabulary(model, *, prefix: bool | None = None) -> dict:
    """Values of a SentencePiece vocabulary, by GGUF's keys."""
    ids = range(model.get_piece_size())
    kinds = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}
    found = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(index) for index in ids],
        "tokenizer.ggml.scores": [model.get_score(index) for index in ids],
        "tokenizer.ggml.token_type": [
            next((kind for ask, kind in kinds.items() if getattr(model, ask)(index)), 1)
            for index in ids
        ],
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
    }
    return found if prefix is None else found | {"tokenizer.ggml.add_space_prefix": prefix}


def shape_values(arch: str, **more) -> dict:
    """Values of the model itself."""
    return {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": LENGTH,
        f"{arch}.embedding_length": WIDTH,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 5000.0,
        **more,
    }


def their_model(arch: str, vocab_size: int, *, tied: bool = False):
    """transformers' model of these sizes, with random weights, in evaluation mode."""
    name = {"llama": "Llama", "qwen3": "Qwen3"}[arch]
    config = getattr(transformers, f"{name}Config")(
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH // HEADS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.1 * noise + 0.8 * (parameter == 1))
    if tied:
        model.tie_weights()
    return model


def turned(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys as llama.cpp's converter puts them: feature i of the first half of a
    head, then feature i of the second."""
    width = len(rows) // heads
    order = [
        head * width + half * (width // 2) + index
        for head in range(heads)
        for index in range(width // 2)
        for half in (0, 1)
    ]
    return rows[order]


NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
NAMES_QWEN3 = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, LAYERS)


def arrays(model, arch: str) -> dict[str, np.ndarray]:
    """A model's tensors by the names that the package gguf gives them, each once."""
    table = NAMES if arch == "llama" else NAMES_QWEN3
    found = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name = table.get_name(key, try_suffixes=(".weight",))
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        array = tensor.numpy()
        found[name] = turned(array, heads) if heads and arch == "llama" else array
    return found


def write_gguf(
    path: pathlib.Path, values: dict, tensors: dict, arch: str = "llama", kind: Kind = Kind.F32
) -> None:
    """A file of these values and tensors; matrices of a kind, norms as they are."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, array in tensors.items():
        matrix = array.ndim > 1 and kind != Kind.F32
        writer.add_tensor(
            name,
            gguf.quants.quantize(array, kind) if matrix else array,
            raw_dtype=kind if matrix else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small_gguf(path: pathlib.Path, arch: str = "llama", kind: Kind = Kind.F32, **options):
    """A whole small file; returns transformers' model with the numbers that its quantised ones
    stand for."""
    vocabulary = options.pop("vocabulary", None) or byte_level_vocabulary()
    model = their_model(arch, len(vocabulary["tokenizer.ggml.tokens"]), **options)
    values = shape_values(arch, **{f"{arch}.attention.key_length": WIDTH // HEADS}) | vocabulary
    tensors = arrays(model, arch)
    write_gguf(path, values, tensors, arch, kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and kind != Kind.F32:
                rounded = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(rounded, kind).copy()))
    return model
