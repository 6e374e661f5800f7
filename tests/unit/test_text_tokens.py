"""Texts cut before a tokenizer's added tokens have the tokens that they have as a whole."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from daemon.trainer.chat import TextSample
from daemon.trainer.text_tokens import TextTokens, added_tokens, cut_before

CORPUS = ["Natalia sold clips to 48 of her friends in April.", "Ça va, naïve café \u2014 日本語 \U0001f642", "foo<|bar"]
# Some hold others, begin where others end, are looked for after normalisation, or are words.
PLAIN = ("<|a|>", "<|a|>b", "b<|", "<|b|>", "|><", "<|", "<s>", "<unk>", "日本")
NORMALISED = (AddedToken("<tool>", normalized=True), AddedToken("É", normalized=True))
KINDS_OF_ADDED: dict[str, list[AddedToken]] = {
    "plain": [AddedToken(name, normalized=False) for name in PLAIN],
    "special": [AddedToken(name, special=True) for name in PLAIN],
    "normalised among them": [*(AddedToken(name, normalized=False) for name in PLAIN[:4]), *NORMALISED],
    "take white space behind": [AddedToken(name, special=True, rstrip=True) for name in PLAIN],
    "take white space before": [AddedToken(name, special=True, lstrip=name == "<|b|>") for name in PLAIN],
    "words": [AddedToken(name, special=True, single_word=name == "<|b|>") for name in PLAIN],
    "none": [AddedToken("<s>", normalized=True)],
}
PIECES = st.sampled_from(
    [*PLAIN, "<tool>", " ", "\n", "  ", "ab", "a", "É", "E\u0301", "x<", "clips", "é", "日", "\U0001f642", ">"]
)
TEXT = st.lists(PIECES | st.text(max_size=3), max_size=14).map("".join)


def byte_level(normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(CORPUS, trainer)
    return made


def sentencepiece(scheme: str) -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *bytes_]))
    return made


def unigram() -> Tokenizer:
    """As T5 and, with a space put before by its normaliser, Llama 2 have it."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=80, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return made


def wordpiece() -> Tokenizer:
    """As BERT has it, which drops what it does not know and puts letters in lower case."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["<unk>"]))
    return made


MODELS = {
    "byte level": byte_level,
    "byte level, normalised": lambda: byte_level(normalizers.NFC()),
    "SentencePiece": lambda: sentencepiece("always"),
    "SentencePiece, first": lambda: sentencepiece("first"),
    "Unigram": unigram,
    "WordPiece": wordpiece,
}


@pytest.fixture(scope="module", params=[(model, added) for model in MODELS for added in KINDS_OF_ADDED])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    model, added = request.param
    made = MODELS[model]()
    made.add_tokens(KINDS_OF_ADDED[added])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@given(text=TEXT, ends=st.lists(st.integers(0, 60), min_size=2, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_text_that_is_cut_has_the_tokens_of_the_whole(tokenizer: Any, text: str, ends: list[int]) -> None:
    """The same ones, and those are learned that overlap what is learned of the text."""
    places = sorted({min(end, len(text)) for end in ends})
    spans = tuple(zip(places[::2], places[1::2], strict=False))
    [sample, again] = TextTokens(tokenizer).samples([TextSample(text, spans), TextSample(text, ())])
    whole = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    assert list(sample.ids) == list(again.ids) == whole.ids
    learned = {at for begin, end in sample.learned for at in range(begin, end)}
    assert learned == {
        at
        for at, (first, last) in enumerate(whole.offsets)
        if any(first < end and last > begin for begin, end in spans if begin < end) and first < last
    } | {at for at in learned if whole.offsets[at][0] == whole.offsets[at][1]}


def test_a_piece_begins_with_the_longest_added_token_that_stands_there() -> None:
    made = byte_level()
    made.add_tokens(KINDS_OF_ADDED["special"])
    pattern = added_tokens(PreTrainedTokenizerFast(tokenizer_object=made).backend_tokenizer)
    assert cut_before(pattern, "x<|a|>b y<|b|><|a|>") == ["x", "<|a|>b y", "<|b|>", "<|a|>"]
    assert cut_before(pattern, "") == []
    assert cut_before(None, "x<|a|>") == ["x<|a|>"]


@pytest.mark.parametrize("kind", ["take white space before", "words", "none"])
def test_a_text_is_not_cut_where_that_could_change_its_tokens(kind: str) -> None:
    made = byte_level()
    made.add_tokens(KINDS_OF_ADDED[kind])
    assert added_tokens(made) is None


def test_where_special_tokens_are_text_nothing_is_cut() -> None:
    made = byte_level()
    made.add_tokens(KINDS_OF_ADDED["special"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, split_special_tokens=True)
    [sample] = TextTokens(tokenizer).samples([TextSample("x<|a|>y", ((1, 6),))])
    assert made.token_to_id("<|a|>") not in sample.ids
    assert re.sub(r"\s", "", tokenizer.decode(sample.ids[slice(*sample.learned[0])])) == "<|a|>"
