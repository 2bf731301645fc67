"""Small tokenizers of the tokenizers library, in directories as those of the models that have their kind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "The lake has trout, perch and pike; the river has trout only.",
    "It's 12:30 o'clock, we've 1234 fish and don't know more...\n\n  What now?\t",
    "Größe, naïve café, Ärger; 東京 に 行きました 😀 \u0645\u0631\u062d\u0628\u0627",
    "unhappiness, unknowable, knowingly, happily and happier",
] * 3
_SPLIT = (  # of Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _byte_bpe(special: list[str], pre_tokenizer: Any, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _split_and_bytes(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def write_gpt2(folder: Path) -> None:
    """vocab.json and merges.txt alone, as OpenAI published them."""
    tokenizer = _byte_bpe(["<|endoftext|>"], pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.model.save(str(folder))
    _write(folder, "config.json", {"model_type": "gpt2"})


def write_roberta(folder: Path) -> None:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = _byte_bpe(special, pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    ids = [("</s>", tokenizer.token_to_id("</s>")), ("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.RobertaProcessing(*ids, add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder, "config.json", {"model_type": "roberta"})
    names = {f"{name}_token": text for name, text in zip(("bos", "pad", "eos", "unk"), special, strict=False)}
    _write(
        folder, "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer", "cls_token": "<s>"} | names
    )
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    _write(folder, "special_tokens_map.json", {"mask_token": mask, "sep_token": "</s>", **names})


def write_llama3(folder: Path) -> None:
    tokenizer = _byte_bpe([], _split_and_bytes(_SPLIT), ignore_merges=True)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(special)
    bos = tokenizer.token_to_id(special[0])
    template = processors.TemplateProcessing(
        single=f"{special[0]} $A",
        pair=f"{special[0]} $A {special[0]} $B:1",
        special_tokens=[(special[0], bos)],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder,
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special[0],
            "eos_token": special[1],
            "clean_up_tokenization_spaces": False,
        },
    )
    _write(folder, "special_tokens_map.json", {"bos_token": special[0], "eos_token": {"content": special[1]}})
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's, as beside Llama 3
    _write(folder, "config.json", {"model_type": "llama"})


def write_qwen(folder: Path) -> None:
    """Composed characters; its tokens and their ids are in tokenizer_config.json too."""
    tokenizer = _byte_bpe([], _split_and_bytes(_SPLIT.replace("{1,3}", "")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    off = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    _write(
        folder,
        "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(text)): {"content": text, **off} for text in special
            },
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
        },
    )
    _write(folder, "config.json", {"model_type": "qwen2"})


def _word_piece(lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=220, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def write_bert(folder: Path) -> None:
    """With truncation and padding, as sentence-transformers writes them, and capitals."""
    tokenizer = _word_piece(lowercase=False)
    ids = [(text, tokenizer.token_to_id(text)) for text in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    _write(folder, "config.json", {"model_type": "bert"})


def write_modernbert(folder: Path) -> None:
    """BERT's marks and names around byte-level pieces."""
    tokenizer = _byte_bpe([], pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.normalizer = normalizers.NFC()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    tokenizer.add_special_tokens([*special, AddedToken("[MASK]", lstrip=True)])
    ids = [(text, tokenizer.token_to_id(text)) for text in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{text[1:-1].lower()}_token": text for text in (*special, "[MASK]")}
    _write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    _write(folder, "config.json", {"model_type": "modernbert"})


def write_vocab_txt(folder: Path) -> None:
    """vocab.txt alone."""
    _word_piece(lowercase=True).model.save(str(folder))
    _write(folder, "config.json", {"model_type": "bert"})


def _write(folder: Path, name: str, value: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(value))


WRITERS: dict[str, Callable[[Path], None]] = {
    "gpt2": write_gpt2,
    "roberta": write_roberta,
    "llama3": write_llama3,
    "qwen": write_qwen,
    "bert": write_bert,
    "modernbert": write_modernbert,
    "vocab.txt": write_vocab_txt,
}
