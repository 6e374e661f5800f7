"""Texts put together from remembered words have the tokens that the tokenizer's library gives them, or are left to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from daemon.trainer import word_tokens
from daemon.trainer.text_tokens import added_tokens, cut_before
from daemon.trainer.word_tokens import WordTokens, rewrite

CORPUS = [
    "Natalia sold clips to 48 of her friends in April.",
    "It's 1,234.50; don't they'll THEY'LL",
    "\n\n  x = y[3]\r\n",
]
SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>")
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_QWEN3_5 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def cutting(*patterns: str, behavior: str = "isolated", invert: bool = False, use_regex: bool = False) -> Any:
    steps = [pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert) for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*steps, last])


# As published tokenizers of these families cut their texts.
CUTS: dict[str, Callable[[], Any]] = {
    "GPT-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "Qwen2": lambda: cutting(_QWEN2),
    "Llama 3": lambda: cutting(_LLAMA3),
    "Qwen3.5": lambda: cutting(_QWEN3_5),
    "cl100k": lambda: cutting(_CL100K, behavior="removed", invert=True),
    "o200k": lambda: cutting(_O200K),
    "DeepSeek-V3": lambda: cutting(*_DEEPSEEK),
    "SmolLM2": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "numbers whole": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
NORMALIZERS = {"none": None, "NFC": normalizers.NFC()}
SETTLED = st.characters(max_codepoint=0xFF) | st.sampled_from("\u2010\u2018\u2019\u201c\u201d\u2026\u2014\u2033\u203a")
WORDS = st.sampled_from(
    [
        "'s",
        "'LL",
        " don't",
        "\n\n",
        "\r\n",
        "  ",
        "\t",
        " 12345",
        "x1y",
        "É",
        "ß",
        "\x85",
        "\xa0",
        "\x1c",
        "²",
        "</",
        "clips",
    ]
)
TEXT = st.lists(SETTLED | WORDS, max_size=24).map("".join)


def tokenizer_of(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return made


def words_of(made: Tokenizer) -> WordTokens | None:
    return WordTokens.of(made, added_tokens(made))


@pytest.fixture(
    scope="module",
    params=[(cut, normal) for cut in CUTS for normal in NORMALIZERS if cut == "Qwen2" or normal == "none"],
)
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, WordTokens]:
    cut, normal = request.param
    made = tokenizer_of(CUTS[cut](), NORMALIZERS[normal])
    words = words_of(made)
    assert words is not None
    return made, words


@given(text=TEXT)
@settings(max_examples=60, deadline=None)
def test_words_have_the_tokens_of_the_text_that_they_make_up(both: tuple[Tokenizer, WordTokens], text: str) -> None:
    """Of every text in settled characters, however its words meet."""
    made, words = both
    assert list(words.ids(text) or ()) == made.encode(text, add_special_tokens=False).ids


def test_a_piece_may_begin_with_an_added_token() -> None:
    made = tokenizer_of(CUTS["Llama 3"]())
    words = words_of(made)
    assert words is not None
    text = "<|im_start|>user\nclips  <|im_end|><|im_start|>"
    pieces = cut_before(added_tokens(made), text)
    found = [id_ for piece in pieces for id_ in words.ids(piece) or ()]
    assert pieces[0] == "<|im_start|>user\nclips  "
    assert found == made.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["日本", "naïve \u0416", "e\u0301", "\u017f", "\U0001f642", "\u2028", "\u212a"])
def test_a_text_with_other_characters_is_left_to_the_library(text: str) -> None:
    """Its two engines may know them by different tables of Unicode, or as one another's capitals."""
    words = words_of(tokenizer_of(CUTS["Qwen2"]()))
    assert words is not None
    assert words.ids(f"clips {text}") is None


def test_what_no_match_has_is_dropped_by_the_library_alone() -> None:
    made = tokenizer_of(cutting(r"[^\p{N}]|\p{N}", behavior="removed", invert=True))
    words = words_of(made)
    assert words is not None
    made = tokenizer_of(cutting(r"\p{L}+", behavior="removed", invert=True))
    assert words_of(made) is None


OTHERS: dict[str, Callable[[], Tokenizer]] = {
    "a space before": lambda: tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "lower case": lambda: tokenizer_of(CUTS["GPT-2"](), normalizers.Lowercase()),
    "compatible forms": lambda: tokenizer_of(CUTS["GPT-2"](), normalizers.NFKC()),
    "white space alone": lambda: tokenizer_of(pre_tokenizers.Whitespace()),
    "matches beside one another": lambda: tokenizer_of(cutting(r"\s+", behavior="merged_with_next")),
    "no cut": lambda: tokenizer_of(pre_tokenizers.Sequence([])),
    "a pattern that looks back": lambda: tokenizer_of(cutting(r"(?<=a)b+")),
    "chance": lambda: _with(tokenizer_of(CUTS["GPT-2"]()), dropout=0.1),
    "added after normalisation": lambda: _adding(AddedToken("<tool>", normalized=True)),
    "added, with white space behind": lambda: _adding(AddedToken("<tool>", special=True, rstrip=True)),
    "added in the midst of words": lambda: _adding(AddedToken("don", normalized=False)),
    "no bytes": lambda: _knowing_letters(),
    "a program of its own": lambda: tokenizer_of_program(),
}


class Halves:
    """A step written in Python, of which the library tells nothing."""

    def pre_tokenize(self, text: Any) -> None:
        text.split(lambda _, part: [part[: len(str(part)) // 2], part[len(str(part)) // 2 :]])


def tokenizer_of_program() -> Tokenizer:
    made = tokenizer_of(CUTS["GPT-2"]())
    made.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Halves())
    return made


def _with(made: Tokenizer, *, dropout: float) -> Tokenizer:
    model = made.model
    model.dropout = dropout
    made.model = model
    return made


def _adding(token: AddedToken) -> Tokenizer:
    made = tokenizer_of(CUTS["GPT-2"]())
    made.add_tokens([token])
    return made


def _knowing_letters() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<s>"))
    made.pre_tokenizer = CUTS["GPT-2"]()
    made.train_from_iterator(["clips"], trainers.BpeTrainer(special_tokens=["<s>"]))
    return made


@pytest.mark.parametrize("kind", OTHERS)
def test_a_tokenizer_that_is_not_known_to_work_word_by_word_is_left_to_the_library(kind: str) -> None:
    assert words_of(OTHERS[kind]()) is None


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "^a",
            "a$",
            r"\ba",
            r"\w+",
            r"\d+",
            ".",
            "(a)b",
            "(?<!a)b",
            "(?=a)",
            "(?>a)",
            r"(a)\1",
            r"\P{L}",
            r"\p{Han}+",
        ),
        *("[[:alpha:]]", "[a&&b]", r"[\S]", r"[\w]", r"[\r-a]", "[a-c-e]", r"\X", r"\h", r"\u0041", "a{1,2}+", "a*?"),
        *("(?i:é)", r"(?i:\p{L})", "(?m:a)", "(?i)a"),
    ],
)
def test_a_pattern_that_engines_may_read_differently_is_not_rewritten(pattern: str) -> None:
    assert rewrite(pattern) is None


def test_words_are_remembered_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokenizer_of(CUTS["GPT-2"]())
    words = words_of(made)
    assert words is not None
    monkeypatch.setattr(word_tokens, "_MAX_WORDS", 10)
    words._words.clear()
    words._words[""] = b""
    text = " ".join(f"clips{at}" for at in range(40)) + "y" * 100
    assert list(words.ids(text) or ()) == made.encode(text, add_special_tokens=False).ids
    assert len(words._words) <= 10
    assert max(map(len, words._words)) < 100
