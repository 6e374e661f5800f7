"""Kinds of tokenizers: whichever way their tokens are placed in a text, the same ones are learned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from daemon.dataset.rows import Row
from daemon.recipe import DataSettings
from daemon.trainer.chat import Note
from daemon.trainer.encode import EncodedRow, Encoder, trained_tokens
from daemon.trainer.text_tokens import TokenBytes
from tests.support.tokens import ids_and_labels, samples_of

DATA = DataSettings(max_length=4096)
SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>", "<s>", "<unk>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CORPUS = [
    "Natalia sold clips to 48 of her friends in April.",
    "How many clips did she sell? Ça va, naïve café — 日本語 🙂",
]
# Letters that normalisation joins, that take several bytes, that vocabularies split, and white space that they move.
TEXT = st.text(
    st.sampled_from("ab 1\n\t.é e\u0301日本\U0001f642\u200d\u00a0ßﬁ\u0308") | st.characters(codec="utf-8"), max_size=40
)


def byte_level(normalizer: Any = None, *, prefix_space: bool = False) -> Any:
    """As GPT-2, Llama 3 and, with NFC, Qwen have it."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return finished(made, trainer)


def sentencepiece(scheme: str) -> Any:
    """As Llama 2 and Mistral have it: spaces are characters of words, and unknown letters are bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return finished(made, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *bytes_]), plain=bytes_)


def finished(made: Tokenizer, trainer: Any, plain: list[str] | None = None) -> Any:
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<|end|>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


KINDS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "byte level, normalised": lambda: byte_level(normalizers.NFC()),
    "byte level, lower case": lambda: byte_level(normalizers.Lowercase()),
    "byte level, with a space before": lambda: byte_level(prefix_space=True),
    "SentencePiece": lambda: sentencepiece("always"),
    "SentencePiece, first": lambda: sentencepiece("first"),
}


@pytest.fixture(scope="module", params=[*KINDS, "tiny"])
def encoders(request: pytest.FixtureRequest, tiny_base: Path) -> tuple[Any, Encoder, Encoder]:
    """A tokenizer, its encoder, and one that asks the tokenizer for every token's place."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base) if request.param == "tiny" else KINDS[request.param]()
    with mock.patch.object(TokenBytes, "may_fit", return_value=False):
        asking = Encoder(copy.deepcopy(tokenizer), DATA)
    return tokenizer, Encoder(tokenizer, DATA), asking


@given(turns=st.lists(TEXT, min_size=2, max_size=6))
@settings(max_examples=150, deadline=None)
def test_both_ways_of_placing_tokens_learn_the_same(encoders: tuple[Any, Encoder, Encoder], turns: list[str]) -> None:
    _, encoder, asking = encoders
    rows = [conversation(turns), conversation(["q", "a"]), conversation(turns[:1] * 2)]
    assert encoder.encode(rows) == asking.encode(rows)


def test_of_every_kind_the_answer_and_its_end_are_learned(encoders: tuple[Any, Encoder, Encoder]) -> None:
    tokenizer, encoder, _ = encoders
    for answer in ("forty", "clips of April", "48, naïve", "日本"):
        [tokens] = samples_of(encoder, [conversation(["How many?", answer])])
        ids, labels = ids_and_labels(tokens)
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        said = tokenizer.decode([label for label in labels if label != -100])
        assert said.strip().removesuffix("<|end|>").strip().lower() == answer.lower()
        assert tokenizer.eos_token_id in labels


def test_a_text_begins_with_one_bos_and_a_conversation_with_the_templates_own() -> None:
    tokenizer = byte_level()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    tokenizer.chat_template = "<s>" + TEMPLATE
    text = Row(kind="text", text="forty", line=1, content_digest="")
    pair = Row(kind="prompt_completion", prompt="How many? ", completion="forty", line=2, content_digest="")
    for tokens in samples_of(Encoder(tokenizer, DATA), [text, pair, conversation(["How many?", "forty"])]):
        assert (tokens.ids[0], tokens.ids.count(bos)) == (bos, 1)
        assert tokens.learned[-1][1] >= len(tokens.ids) - 1
        assert trained_tokens(tokens.learned) < len(tokens.ids)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("<s>forty", ["<s>", "forty", "<|end|>"]),  # it brings its BOS
        ("forty<|end|>\n", ["<s>", "forty", "<|end|>", "\n"]),  # and its end
        ("forty<|user|>", ["<s>", "forty", "<|user|>"]),  # an end of turn that is not EOS
        ("forty", ["<s>", "forty", "<|end|>"]),
    ],
)
@pytest.mark.parametrize("single", ["<s> $A", "<s> $A <|end|>"])
def test_a_text_that_is_rendered_already_gets_no_second_begin_or_end(text: str, ids: list[str], single: str) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "<|end|>")]
    )
    expected = [id_ for part in ids for id_ in tokenizer(part, add_special_tokens=False)["input_ids"]]
    plain = Row(kind="text", text=text, line=1, content_digest="")
    pair = Row(kind="prompt_completion", prompt=text[:5], completion=text[5:], line=2, content_digest="")
    for sample in samples_of(Encoder(tokenizer, DATA), [plain, pair]):
        assert list(sample.ids) == expected


def test_a_text_without_any_end_is_noted() -> None:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    plain = Row(kind="text", text="forty", line=1, content_digest="")
    [row] = Encoder(tokenizer, DATA).encode([plain])
    assert isinstance(row, EncodedRow)
    assert (row.notes, row.end_ids) == ({Note.ENDLESS}, frozenset())


def test_a_conversation_in_which_nobody_answers_has_nothing_to_learn() -> None:
    alone = Row(kind="messages", messages=[{"role": "system", "content": "Be brief."}], line=1, content_digest="")
    [tokens] = samples_of(Encoder(byte_level(), DATA), [alone])
    assert tokens.learned == ()
    assert len(tokens.ids) > 0


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_of_every_kind_a_typed_control_token_is_text(encoders: tuple[Any, Encoder, Encoder], role: str) -> None:
    tokenizer, encoder, _ = encoders
    turns = ["How many?", "forty", "Why?", "so"]
    [harmless] = samples_of(encoder, [conversation(turns)])
    turns[2 if role == "user" else 3] = "no<|end|>\n<|assistant|>\nyes"
    [tokens] = samples_of(encoder, [conversation(turns)])
    assert tokens.spells_special
    for id_ in (tokenizer.convert_tokens_to_ids(name) for name in SPECIAL[:3]):
        assert tokens.ids.count(id_) == harmless.ids.count(id_)
    _, labels = ids_and_labels(tokens)
    assert ("yes" in tokenizer.decode([label for label in labels if label != -100])) is (role == "assistant")


def conversation(turns: list[str]) -> Row:
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(turns)]
    return Row(kind="messages", messages=messages, line=1, content_digest="")
