"""Every chat template that TRL ships, over conversations of every shape, against the rule.

The rule is computed here by `apply_chat_template` alone: what stands before a learned turn is the prompt for it, and what
is learned is how the template itself goes on. What each cell comes to is pinned in tests/data/trainer/templates.json, which
docs/templates.md is generated from: `python -m tests.oracle.test_templates` writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from daemon.dataset.rows import Row
from daemon.recipe import DataSettings
from daemon.trainer.chat import ConversationError, Note, Split, split
from daemon.trainer.chat_template import ChatTemplate
from daemon.trainer.encode import EncodedRow, Encoder, what_to_learn
from tests.support.families import SHAPES, Message, family_tokenizer

trl = pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.oracle

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FAMILIES = tuple(sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training")))
TOKENIZER = Path(__file__).parents[1] / "data" / "trainer" / "tokenizer"
PINNED = Path(__file__).parents[1] / "data" / "trainer" / "templates.json"

# How these families want what a row holds, found by reading their templates.
PARTS = {"idefics3", "llava_next", "smolvlm"}
ARGUMENTS_AS_TEXT = {"deepseekv3", "deepseek_r1_distill"}
ABSENT_CONTENT = {"glm4moe", "gptoss", "lfm2_2_5", "lfm2_2_5_v2", "qwen3_vl"}
DEVELOPERS = {
    "cohere2": False,
    "diffusion_gemma": True,
    "gptoss": True,
}  # whether they know the role; else by its occurrence
SWITCHES = ({}, {"enable_thinking": True}, {"enable_thinking": False})
# Their prompts open a thought that finished answers do not show: what the model has to write is that form by hand.
OPEN_A_THOUGHT = {"deepseekv3", "deepseek_r1_distill"}
# GLM-4's turns end where the next begins; its own generation configuration names those tokens as ends.
ENDS_WITH_THE_NEXT = {"glm4moe"}
# A turn's beginning is known from the prompt; where finished conversations are rendered anew, its text is their end.
RENDERED_ANEW = {"gptoss": ("text and call", "reasoning and call"), "qwen3": ("two assistants in a row",)}

# TRL's training variants mark what we learn, but for a turn's beginning that the prompt writes. Elsewhere, and why:
EVERY_SHAPE = tuple(SHAPES)
OLD_REASONING = ("reasoning in two turns", "reasoning in one of two", "reasoning in the text")
UNCLOSED = "its finished answers lack the thought that the prompt opens, so the model would never close it"
FORGOTTEN = "its earlier turns are without their reasoning, so the model would learn not to reason there"
NOT_TRLS: dict[str, tuple[tuple[str, ...], str]] = {
    "deepseekv3": (EVERY_SHAPE, UNCLOSED),
    "deepseek_r1_distill": (EVERY_SHAPE, UNCLOSED),
    "gptoss": (EVERY_SHAPE, "its earlier turns end with <|end|>, where the model has to write <|return|>"),
    **{family: (OLD_REASONING, FORGOTTEN) for family in FAMILIES if family.startswith(("glm4moe", "nemotron"))},
    "diffusion_gemma": (
        (*OLD_REASONING, *(shape for shape in SHAPES if "call" in shape), "null content"),
        f"{FORGOTTEN}; its calls are without the <|tool_response> that the template ends them with",
    ),
    "llava_next": (EVERY_SHAPE, "its answers are without the space that the template writes behind </s>"),
}


@lru_cache
def tokenizer_of(family: str, variant: str = "") -> Any:
    return family_tokenizer(
        AutoTokenizer.from_pretrained(TOKENIZER), (TEMPLATES / f"{family}{variant}.jinja").read_text()
    )


@cache
def found(family: str, shape: str) -> Split | str:
    """What the product makes of it, or why it refuses."""
    messages, tools = SHAPES[shape]
    template = ChatTemplate(tokenizer_of(family)).for_tools(tools)
    try:
        return split(template, messages, tools, what_to_learn(messages, 0, "auto"))
    except ConversationError as error:
        return str(error)


def outcome(family: str, shape: str) -> str:
    """A cell of the table."""
    made = found(family, shape)
    if isinstance(made, str):
        return f"refused: {made}"
    notes = ", ".join(sorted(note.name.lower().replace("_", " ") for note in made.notes))
    many = "" if len(made.samples) == 1 else f", {len(made.samples)} samples"
    return f"exact{many}" + (f" ({notes})" if notes else "")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_cell_is_what_the_table_says(family: str) -> None:
    pinned = json.loads(PINNED.read_text())
    assert {shape: outcome(family, shape) for shape in SHAPES} == pinned[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_learned_turn_is_what_the_model_would_write_after_what_it_would_be_given(family: str) -> None:
    for shape, (messages, _) in SHAPES.items():
        made = found(family, shape)
        if isinstance(made, str):
            continue
        learned = [(sample.text, begin, end) for sample in made.samples for begin, end in sample.learned]
        heard = [
            at for at, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0
        ]
        if Note.OPENING in made.notes:
            heard = heard[1:]
        for at in heard:
            fitting = [place for place in learned if is_turn(family, shape, at, *place)]
            assert len(fitting) == 1, (shape, at, learned)
            learned.remove(fitting[0])
        assert not learned, (shape, learned)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_few_samples_as_the_rule_needs(family: str) -> None:
    """No sample is the beginning of another, up to its last learned token."""
    for shape in SHAPES:
        made = found(family, shape)
        if isinstance(made, str):
            continue
        parts = [
            (sample.text, sample.learned[-1][1] if sample.learned else len(sample.text)) for sample in made.samples
        ]
        for text, end in parts:
            assert sum(other.startswith(text[:end]) for other, _ in parts) == 1, shape


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_tokens_are_those_of_the_learned_text(family: str) -> None:
    tokenizer = tokenizer_of(family)
    for shape, (messages, tools) in SHAPES.items():
        made = found(family, shape)
        row = Row(kind="messages", messages=messages, tools=tools, line=1, content_digest="")
        [encoded] = Encoder(tokenizer, DataSettings()).encode([row])
        if isinstance(made, str) or not isinstance(encoded, EncodedRow):
            assert isinstance(made, str), shape
            assert not isinstance(encoded, EncodedRow), shape
            continue
        assert {tokenizer.convert_ids_to_tokens(id_) for id_ in encoded.end_ids} == made.ends, shape
        for text, sample in zip(made.samples, encoded.samples, strict=True):
            assert list(sample.ids) == tokenizer(text.text, add_special_tokens=False)["input_ids"], shape
            said = "".join(tokenizer.decode(sample.ids[begin:end]) for begin, end in sample.learned)
            assert said == "".join(text.text[begin:end] for begin, end in text.learned), shape


@pytest.mark.parametrize("family", [family for family in FAMILIES if (TEMPLATES / f"{family}_training.jinja").exists()])
def test_trls_training_variant_marks_the_same(family: str) -> None:
    """But for the beginning that the prompt writes, and where NOT_TRLS says why."""
    compared = 0
    differing, reason = NOT_TRLS.get(family, ((), ""))
    for shape, (messages, _) in SHAPES.items():
        made = found(family, shape)
        if isinstance(made, str) or Note.OPENING in made.notes or any("weight" in message for message in messages):
            continue
        theirs = marked_by_trl(family, shape)
        if theirs is None or shape in differing:
            assert theirs is None or reason
            continue
        compared += 1
        for sample in made.samples:
            for begin, end in sample.learned:
                before, ours, theirs = theirs.partition(sample.text[begin:end])
                assert ours, (shape, sample.text[begin:end], before)
                assert not any(word in before for word in ("apple", "Green", "hat", "town", "Fruit", "skins")), (
                    shape,
                    before,
                )
        assert not theirs, (shape, theirs)
    assert compared or differing == EVERY_SHAPE


def is_turn(family: str, shape: str, at: int, text: str, begin: int, end: int) -> bool:
    """Whether a learned span is the turn `at`, by the rule."""
    messages, tools = SHAPES[shape]
    tokenizer = tokenizer_of(family)
    for switches in SWITCHES:
        given = rendered(tokenizer, family, messages[:at], tools, add_generation_prompt=True, **switches)
        if given != text[:begin]:
            continue
        whole = rendered(tokenizer, family, messages[: at + 1], tools, **switches)
        if any(
            text[begin:end] == form for form in forms(family, shape, messages[at], given, whole, tokenizer.eos_token)
        ):
            return True
    return False


def forms(family: str, shape: str, message: Message, given: str | None, whole: str | None, eos: str) -> Iterator[str]:
    """What the model would write after `given`, where the template finishes it to `whole`."""
    if given is None or whole is None:
        return
    if whole.startswith(given):
        own = whole[len(given) :]
        if family in ENDS_WITH_THE_NEXT:
            yield own + ("<|observation|>" if message.get("tool_calls") else "<|user|>")
        else:
            yield own
            if family.startswith("phi3"):  # EOS closes a whole conversation only
                yield own.removesuffix(eos)
    elif family in OPEN_A_THOUGHT:
        thought, answer = in_two(message)
        bare = given.removesuffix("<think>\n")
        cut = whole[len(bare) :].lstrip("\n")
        assert whole.startswith(bare)
        assert cut.startswith(answer)
        yield f"{thought}\n</think>\n\n{cut}"
        if message.get("tool_calls") and not cut.endswith(eos):  # one call has no end of its own in this template
            yield f"{thought}\n</think>\n\n{cut}"
    elif shape in RENDERED_ANEW.get(family, ()):
        prompt = given[given.rindex("<|im_start|>assistant" if family == "qwen3" else "<|start|>assistant") :]
        yield whole[whole.rindex(prompt if family == "qwen3" else "<|channel|>" + final(whole)) :].removeprefix(prompt)


def final(whole: str) -> str:
    """How the last turn of gpt-oss begins: with its reasoning where it has any."""
    parts = whole.split("<|start|>assistant<|channel|>")
    return "<|start|>assistant<|channel|>".join(
        parts[-2:] if parts[-2].startswith("analysis") and "commentary" not in parts[-2] else parts[-1:]
    )


def in_two(message: Message) -> tuple[str, str]:
    """What was thought, and what is said."""
    content = message.get("content") or ""
    inline = re.fullmatch(r"<think>\n(.*)\n</think>\n\n(.*)", content, re.DOTALL)
    return (inline[1], inline[2]) if inline else (message.get("reasoning_content", ""), content)


def marked_by_trl(family: str, shape: str) -> str | None:
    """What TRL's training variant marks; None where it refuses the conversation."""
    messages, tools = SHAPES[shape]
    tokenizer = tokenizer_of(family, "_training")
    try:
        out = tokenizer.apply_chat_template(
            [as_taken(family, message, training=True) for message in messages],
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception:  # whatever its author raises
        return None
    marked = zip(out["input_ids"], out["assistant_masks"], strict=True)
    return str(tokenizer.decode([token for token, yes in marked if yes]))


def rendered(tokenizer: Any, family: str, messages: list[Message], tools: Any, **options: Any) -> str | None:
    """What apply_chat_template makes of it, also of no message; None where it refuses."""
    plain = [as_taken(family, message) for message in messages]
    source, names = tokenizer.get_chat_template(None, tools), tokenizer.special_tokens_map
    try:
        [text], _ = render_jinja_template(conversations=[plain], tools=tools, chat_template=source, **names, **options)
    except Exception:  # whatever its author raises
        return None
    return str(text)


def as_taken(family: str, message: Message, *, training: bool = False) -> Message:
    """A message in the form that the family takes."""
    taken = {key: value for key, value in message.items() if key != "weight"}
    if taken["role"] == "developer" and not writes_any_role(family):
        taken["role"] = "system"
    if calls := taken.get("tool_calls"):
        if family in ARGUMENTS_AS_TEXT and not training:
            taken["tool_calls"] = [
                {**one, "function": {**one["function"], "arguments": json.dumps(one["function"]["arguments"])}}
                for one in calls
            ]
        if not taken["content"]:
            taken["content"] = None if family == "deepseek_r1_distill" else ""
            if family in ABSENT_CONTENT:
                del taken["content"]
    elif family in PARTS:
        taken["content"] = [{"type": "text", "text": taken["content"]}]
    if family in THOUGHT_APART and taken["role"] == "assistant":
        thought, answer = in_two(taken)
        if answer != (taken.get("content") or ""):
            taken |= {"reasoning_content": thought, "content": answer}
    return taken


# These read reasoning in a field of its own alone, and write it between tags.
THOUGHT_APART = {"lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "qwen3_8"}
THOUGHT_APART |= {family for family in FAMILIES if family.startswith("nemotron")}


@lru_cache
def writes_any_role(family: str) -> bool:
    """Whether the template writes any role that it is given."""
    tokenizer = tokenizer_of(family)
    text = [{"type": "text", "text": "qx"}] if family in PARTS else "qx"
    try:
        return "qx" in tokenizer.apply_chat_template(
            [{"role": "stranger", "content": text}, {"role": "user", "content": text and "a"}], tokenize=False
        )
    except Exception:  # whatever its author raises
        return False


if __name__ == "__main__":
    table = {family: {shape: outcome(family, shape) for shape in SHAPES} for family in FAMILIES}
    PINNED.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
