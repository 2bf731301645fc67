"""T5, 1.0 and 1.1: read, computed, continued and written as transformers does."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from support.huggingface_models import VOCAB_SIZE, loaded, randomize, save_model, weights
from support.tiny_models import build_any
from torch import Tensor

from distft.checkpoint.formats.huggingface_config import parse_config
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.formats.huggingface_t5 import t5_name
from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.sources import StateSource, read_state
from distft.engine.memory import allocate
from distft.errors import ConfigError
from distft.model.encoder_decoder_config import EncoderDecoderConfig
from distft.model.generation import generate
from distft.model.heads import LANGUAGE_MODEL, ClassificationHead, Heads
from distft.model.with_heads import ModelWithHeads
from distft.tokenizer import Tokenizer, TokenizerTrainConfig, train_tokenizer

CLASS = "AutoModelForSeq2SeqLM"
T5: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "1.0": {"num_decoder_layers": 3},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "1.1 with the embedding as its output": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "1.1 with silu": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
}
SOURCES = [[5, 6, 7, 8, 9, 1], [4, 3, 2, 1, *[11] * 14], [3]]
TARGETS = [[1, 2, 3, 4, 5, 6, 7], [9], [4, 5]]


def make_hf_model(kind: str) -> Any:
    import transformers

    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**T5, **KINDS[kind]}))
    if "as its output" not in kind and not KINDS[kind].get("tie_word_embeddings", True):
        # Of its own, as in the published 1.1; since transformers 5 a new model has it tied.
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB_SIZE, T5["d_model"]))
    randomize(model)
    return model.eval()


def build(config: EncoderDecoderConfig, source: StateSource, heads: Heads = LANGUAGE_MODEL) -> ModelWithHeads:
    with torch.device("meta"):
        module = config.build(heads)
    allocate(module, torch.device("cpu"), torch.float32)
    for name, param in module.named_parameters():
        read_state(source, name, WEIGHT, param.detach().view(-1), 0)
    return module.eval()


def opened(path: Path) -> tuple[HuggingFaceCheckpoint, ModelWithHeads]:
    source = HuggingFaceCheckpoint.open(str(path))
    return source, build(EncoderDecoderConfig.model_validate(source.manifest.config["model"]), source)


def padded(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def own_logits(model: ModelWithHeads) -> list[Tensor]:
    """Of the tokens behind each source, from rows of source and target."""
    pairs = list(zip(SOURCES, TARGETS, strict=True))
    lengths = torch.tensor([len(source) + len(target) for source, target in pairs])
    ids = padded([source + target for source, target in pairs])
    is_prefix = torch.arange(ids.shape[1]) < torch.tensor([len(source) for source in SOURCES])[:, None]
    logits = model.logits(ids, is_prefix=is_prefix, lengths=lengths)
    return [
        row[len(source) - 1 : length]
        for row, source, length in zip(logits, SOURCES, lengths.tolist(), strict=True)
    ]


def hf_logits(model: Any) -> list[Tensor]:
    mask = padded([[1] * len(source) for source in SOURCES])
    decoder_ids = padded([[0, *target] for target in TARGETS])
    logits = model(input_ids=padded(SOURCES), attention_mask=mask, decoder_input_ids=decoder_ids).logits
    return [row[: len(target) + 1] for row, target in zip(logits, TARGETS, strict=True)]


def assert_equal_logits(model: ModelWithHeads, hf_model: Any) -> None:
    with torch.no_grad():
        for found, expected in zip(own_logits(model), hf_logits(hf_model), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_read_computes_the_same_logits(tmp_path: Path, kind: str) -> None:
    hf_model = make_hf_model(kind)
    hf_model.save_pretrained(tmp_path)
    source, model = opened(tmp_path)
    assert source.find_damage() == []
    assert source.notes == []
    is_tied = kind in {"1.0", "1.1 with the embedding as its output"}
    assert model.config.model_dump()["tie_embeddings"] == is_tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != is_tied
    assert_equal_logits(model, hf_model)


@pytest.mark.parametrize("kind", ["1.0", "1.1"])
def test_greedy_generation_gives_the_same_tokens(tmp_path: Path, kind: str) -> None:
    hf_model = make_hf_model(kind)
    hf_model.save_pretrained(tmp_path)
    _, model = opened(tmp_path)
    mask = padded([[1] * len(source) for source in SOURCES])
    # Its cache has as many layers as the encoder, so that of 1.0, with more in the decoder, goes without.
    expected = hf_model.generate(
        input_ids=padded(SOURCES),
        attention_mask=mask,
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        use_cache=False,
    )
    assert generate(model, SOURCES, max_new_tokens=9, temperature=0) == expected[:, 1:].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"pad_vocab_to": 8, "dropout": 0.1, "start_id": 2},
        {"mlp": "geglu_tanh", "tie_embeddings": False, "num_decoder_layers": 1},
        {"mlp": "gelu", "scale_logits": False},
        {"mlp": "swiglu", "tie_embeddings": False, "scale_logits": True},
    ],
)
def test_a_model_that_is_written_computes_the_same_logits_and_comes_back(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    config = EncoderDecoderConfig.model_validate(
        {
            "vocab_size": VOCAB_SIZE,
            "max_seq_len": 40,
            "d_model": 24,
            "head_dim": 5,
            "num_heads": 4,
            "num_encoder_layers": 2,
            **options,
        }
    )
    model = build_any(config)
    randomize(model)
    checkpoint = save_model(model, tmp_path / "own")  # type: ignore[arg-type]
    target = tmp_path / "hf"
    notes = write_huggingface(checkpoint, str(target))
    assert notes == [f"{checkpoint.path} has no tokenizer, so the export has none."]
    hf_model = loaded(target, CLASS)
    assert hf_model.config.decoder_start_token_id == config.start_id
    if config.start_id == 0:
        assert_equal_logits(model, hf_model)
    source, again = opened(target)
    assert source.find_damage() == []
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in again.named_parameters()] == names
    own = {name: param.detach() for name, param in model.named_parameters()}
    for name, values in weights(source, names).items():
        assert torch.equal(values, own[name]), name


def test_a_model_that_is_written_generates_and_takes_labels_as_it_is(tmp_path: Path) -> None:
    config = EncoderDecoderConfig(
        vocab_size=VOCAB_SIZE, max_seq_len=40, d_model=24, num_heads=4, num_encoder_layers=2, start_id=3
    )
    model = build_any(config)
    randomize(model)
    checkpoint = save_model(model, tmp_path / "own")  # type: ignore[arg-type]
    write_huggingface(checkpoint, str(tmp_path / "hf"))
    hf_model = loaded(tmp_path / "hf", CLASS)
    source = torch.tensor([[5, 6, 7, 8, 9, 1]])
    found = hf_model.generate(source, max_new_tokens=7, do_sample=False)
    assert found[:, 1:].tolist() == generate(model, source, max_new_tokens=7, temperature=0)
    labels = torch.tensor([[4, 2, -100]])
    loss = hf_model(input_ids=source, labels=labels).loss
    own = model.logits(torch.tensor([[5, 6, 7, 8, 9, 1, 4]]), is_prefix=torch.arange(7)[None] < 6)[0, 5:]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(own, labels[0, :2]))


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm"])
def test_its_tokenizer_ends_a_source_as_training_did(tmp_path: Path, objective: str) -> None:
    import transformers

    lines = ["the cat sat on a mat and saw it", "a dog and a bird saw the tree"] * 20
    tokenizer = train_tokenizer(lines, TokenizerTrainConfig(vocab_size=300), tmp_path / "tokenizer.model")
    model = build_any(
        EncoderDecoderConfig(
            vocab_size=tokenizer.vocab_size, max_seq_len=40, d_model=8, num_heads=2, num_encoder_layers=1
        )
    )
    checkpoint = save_model(model, tmp_path / "own", tokenizer=tokenizer, objective={"type": objective})  # type: ignore[arg-type]
    write_huggingface(checkpoint, str(tmp_path / "hf"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    end = [tokenizer.eos_id] if objective == "span_corruption" else []  # of prefix_lm a source is a part
    assert theirs(lines[0]).input_ids == [*tokenizer.encode(lines[0]), *end]
    assert theirs.pad_token_id == loaded(tmp_path / "hf", CLASS).config.pad_token_id


def test_its_sentencepiece_model_and_its_sentinels_are_read(tmp_path: Path) -> None:
    import transformers

    model, lines = io.BytesIO(), ["the cat sat on a mat and saw it", "a dog and a bird saw the tree"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20),
        model_writer=model,
        model_type="unigram",
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    own = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(own.id_to_piece(index), own.get_score(index)) for index in range(own.get_piece_size())]
    sentinels = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(9))]
    theirs = transformers.T5Tokenizer(vocab=[*pieces, *sentinels], extra_ids=9)
    make_hf_model("1.0").save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    record = HuggingFaceCheckpoint.open(str(tmp_path)).manifest.tokenizer
    assert record is not None
    assert (record.file, record.document_start) == ("spiece.model", ())
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, None)
    assert tokenizer.vocab_size == len(pieces) + 9
    for text, _ in sentinels:
        assert tokenizer.piece_id(text) == theirs.convert_tokens_to_ids(text)
    for text in lines:
        assert [*tokenizer.encode(text), tokenizer.eos_id] == theirs(text).input_ids


def test_copies_of_the_embedding_are_no_tensors_of_their_own(tmp_path: Path) -> None:
    make_hf_model("1.1").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    copies = {
        f"{stack}.embed_tokens.weight": tensors["shared.weight"].clone() for stack in ("encoder", "decoder")
    }
    save_file({**tensors, **copies}, tmp_path / "model.safetensors")
    assert HuggingFaceCheckpoint.open(str(tmp_path)).find_damage() == []


def test_a_bias_that_transformers_ignores_is_left_out(tmp_path: Path) -> None:
    make_hf_model("1.0").save_pretrained(tmp_path)
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors = {**load_file(tmp_path / "model.safetensors"), name: torch.zeros(8, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = HuggingFaceCheckpoint.open(str(tmp_path))
    assert source.find_damage() == []
    assert source.notes == [f"{tmp_path}: {name} left out: transformers does not read it either."]


def test_a_new_model_begins_as_a_t5_does() -> None:
    import transformers

    sizes = {**T5, "d_model": 96, "d_ff": 200, "d_kv": 32, "num_layers": 1}
    torch.manual_seed(1)
    expected = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).state_dict()
    spec = parse_config({"model_type": "t5", **sizes})
    assert isinstance(spec.model, EncoderDecoderConfig)
    model = build_any(spec.model)
    for name, param in model.named_parameters():
        values = expected[t5_name(name, spec.model)]
        assert param.shape == values.shape
        if param.ndim > 1:  # the error of a standard deviation is its 1 / sqrt(2 n)
            assert float(param.detach().std() / values.std()) == pytest.approx(
                1, abs=6 / (2 * param.numel()) ** 0.5
            ), name
        else:
            assert torch.equal(param, values)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"feed_forward_proj": "gated-tanh"},
            "feed_forward_proj='gated-tanh' is not supported: it must be one of",
        ),
        ({"is_decoder": True}, "is_decoder is not supported"),
        ({"architectures": ["T5EncoderModel"]}, r"must be one of T5ForConditionalGeneration, T5Model\."),
        ({"decoder_start_token_id": VOCAB_SIZE}, "decoder_start_token_id=53 is not an id of vocab_size=53"),
        ({"relative_attention_num_buckets": 7}, "num_buckets=7 must be a multiple of 4"),
    ],
)
def test_options_that_distft_lacks_are_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    make_hf_model("1.0").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(ConfigError, match=problem):
        HuggingFaceCheckpoint.open(str(tmp_path))


def test_what_transformers_has_not_is_refused_or_left_out(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "max_seq_len": 9,
        "d_model": 8,
        "num_heads": 2,
        "num_encoder_layers": 1,
    }
    exact = build_any(EncoderDecoderConfig.model_validate({**sizes, "mlp": "geglu"}))
    checkpoint = save_model(exact, tmp_path / "exact")  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"nearest is t5, where\nmodel.mlp=geglu would have to be geglu_tanh"
    ):
        write_huggingface(checkpoint, str(tmp_path / "hf"))
    with pytest.raises(ConfigError, match=r"model.type=encoder_decoder would have to be transformer"):
        write_huggingface(checkpoint, str(tmp_path / "hf"), architecture="llama")
    classifier = build_any(
        EncoderDecoderConfig.model_validate(sizes), {"classifier": ClassificationHead(num_labels=2)}
    )
    checkpoint = save_model(classifier, tmp_path / "classifier", label_names=["a", "b"])  # type: ignore[arg-type]
    notes = write_huggingface(checkpoint, str(tmp_path / "none"))
    assert notes[0] == "The classifier is left out: T5's of transformers read another hidden state."
    assert loaded(tmp_path / "none", "AutoModel").config.architectures == ["T5Model"]
