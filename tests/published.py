"""Small published folders, as `transformers` and `tokenizers` write them, with random weights."""

import json
import pathlib

import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from nanolm.hub.proof import untie
from nanolm.hub.task_heads import KINDS, NAMES, TASK_HEADS

LINES = ["the quick brown fox jumps over the lazy dog", "héllo wörld 中文 def f(x): return x\n"] * 8
VOCAB, LENGTH = 320, 48
SHAPES = {
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": LENGTH}),
    "llama": (
        "LlamaForCausalLM",
        {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "max_position_embeddings": LENGTH,
        },
    ),
    "llama-tied": (
        "LlamaForCausalLM",
        {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 48,
            "max_position_embeddings": LENGTH,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
    "bert": (
        "BertForPreTraining",
        {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "max_position_embeddings": LENGTH,
        },
    ),
}
SHAPES["bert-mlm"] = ("BertForMaskedLM", SHAPES["bert"][1])
SHAPES["bert-trunk"] = ("BertModel", SHAPES["bert"][1])
SHAPES["qwen3"] = ("Qwen3ForCausalLM", SHAPES["llama"][1] | {"head_dim": 16})
SHAPES["roberta"] = (
    "RobertaForMaskedLM",
    SHAPES["bert"][1]
    | {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
)
SHAPES["distilbert"] = (
    "DistilBertForMaskedLM",
    {
        "n_layers": 2,
        "n_heads": 4,
        "dim": 32,
        "hidden_dim": 48,
        "max_position_embeddings": LENGTH,
    },
)
SHAPES["distilbert-trunk"] = ("DistilBertModel", SHAPES["distilbert"][1])
ALBERT = SHAPES["bert"][1] | {"embedding_size": 12}
SHAPES["albert"] = ("AlbertForPreTraining", ALBERT)
SHAPES["albert-trunk"] = ("AlbertModel", ALBERT)
SHAPES["modernbert"] = (
    "ModernBertForMaskedLM",
    SHAPES["bert"][1] | {"num_hidden_layers": 4, "local_attention": 12, "pad_token_id": 0},
)
SHAPES["t5"] = (
    "T5ForConditionalGeneration",
    {
        "num_layers": 2,
        "num_heads": 4,
        "d_model": 32,
        "d_kv": 12,
        "d_ff": 48,
        "n_positions": LENGTH,
    },
)
LABELS = {
    "classify": {"id2label": {0: "no", 1: "yes", 2: "perhaps"}},
    "tag": {"id2label": {0: "O", 1: "B-X", 2: "I-X", 3: "B-Y", 4: "I-Y"}},
    "regress": {"id2label": {0: "warmth"}},
}
PADDING = {"llama": {"pad_token_id": 0}, "qwen3": {"pad_token_id": 0}}
HEADED = {
    f"{family}-{task}": (
        f"{NAMES[family]}For{KINDS[task]}",
        SHAPES[family][1] | PADDING.get(family, {}) | LABELS.get(task, {}),
    )
    for family, heads in TASK_HEADS.items()
    for task in heads
}
"""Folders of fine-tuned models."""
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SHAPES["t5-gated"] = (SHAPES["t5"][0], SHAPES["t5"][1] | GATED)
T5_SPECIALS = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(8))]
ROBERTA_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def byte_bpe(specials: list[str]) -> Tokenizer:
    """Byte-level BPE as GPT-2's."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet),
    )
    return found


def word_piece() -> Tokenizer:
    """WordPiece as BERT's."""
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer()
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    found.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    found.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials)
    )
    return found


def write_published(folder: pathlib.Path, shape: str, **options) -> transformers.PreTrainedModel:
    """A folder as a model's authors publish it; returns the model, in evaluation mode."""
    name, keys = (SHAPES | HEADED)[shape]
    model_class = getattr(transformers, name)
    config = model_class.config_class(vocab_size=VOCAB, **keys)
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    if not keys.get("tie_word_embeddings", True):
        untie(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data * 0.5 + 0.08 * noise + 0.3 * (parameter.data == 1)
    model.save_pretrained(folder, **options)
    if "tie_word_embeddings" in keys:  # transformers' T5 forgets it; published files tell it
        edit_config(folder, tie_word_embeddings=keys["tie_word_embeddings"])
    write_tokenizer(folder, shape)
    return model.eval()


def write_tokenizer(folder: pathlib.Path, shape: str) -> None:
    """WordPiece for BERT and its kin, RoBERTa's frame for RoBERTa, sentinels for T5, and for the
    others GPT-2's bytes."""
    if "bert" in shape and "roberta" not in shape:
        tokenizer = word_piece()
        if shape.startswith("albert"):  # whose own class in transformers makes a unigram of it
            names = ["input_ids", "token_type_ids", "attention_mask"]
            words = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": names}
            words |= {"pad_token": "[PAD]"}
            (folder / "tokenizer_config.json").write_text(json.dumps(words))
    elif "roberta" in shape:
        tokenizer = byte_bpe(ROBERTA_SPECIALS)
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    elif shape.startswith("t5"):
        tokenizer = byte_bpe(T5_SPECIALS)
    else:
        tokenizer = byte_bpe(["<|endoftext|>"])
        end = {"__type": "AddedToken", "content": "<|endoftext|>", "special": True}
        names = {"bos_token": "<|endoftext|>", "eos_token": end}
        names["tokenizer_class"] = "PreTrainedTokenizerFast"  # not Qwen's, which normalises text
        if shape.startswith("llama-") and shape in HEADED:  # Llama's begins every text
            first = processors.TemplateProcessing(
                single="<|endoftext|> $A",
                pair="<|endoftext|> $A <|endoftext|> $B",
                special_tokens=[("<|endoftext|>", 0)],
            )
            tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), first])
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer.save(str(folder / "tokenizer.json"))


def edit_config(folder: pathlib.Path, **keys) -> None:
    """Changes keys of config.json; a key that is None is taken out."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
