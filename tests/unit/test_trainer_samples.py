"""What is learned, and after which context, with a small template of each kind that published models have.

`«...»` encloses what is learned.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from daemon.dataset.rows import Row
from daemon.job import FailureKind
from daemon.recipe import DataSettings
from daemon.trainer.chat import ConversationError, Learn, Note, Split, assistant_turns, split
from daemon.trainer.chat_template import ChatTemplate
from daemon.trainer.encode import EncodedRow, Encoder, RefusedRow, what_to_learn
from daemon.trainer.errors import RunFailure
from daemon.trainer.tokenise import tokenise
from tests.support.tokens import itself

DATA = DataSettings(max_length=4096, held_out_fraction=0.0)

HEAD = "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
TAIL = "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
NESTING = HEAD + "{{ m.content }}" + TAIL
# Reasoning stands in the turns behind the last question alone, as with Qwen3 and its like.
LAST_QUESTION = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
FORGETS = (
    LAST_QUESTION + HEAD + "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{{ m.content }}" + TAIL
)
# The system's text is part of the last question, as with Mistral's.
MOVES = (
    LAST_QUESTION + "{% set sys = messages[0].content + ': ' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'user' and loop.last or messages[loop.index0 + 2:] | selectattr('role', 'eq', 'user') | list == [] and"
    " m.role == 'user' %}{{ sys }}{% endif %}{{ m.content }}" + TAIL
)
# The prompt opens a thought, and finished answers have none, as with DeepSeek-R1's.
OPENS = (
    HEAD + "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# With a switch, and an empty thought where there is none, as with Nemotron's.
SWITCHED = (
    HEAD + "{% if m.role == 'assistant' %}{{ '<think>\n' + m.reasoning_content + '\n</think>' if m.reasoning_content"
    " else '<think></think>' }}{% endif %}{{ m.content }}{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|assistant|>' + ('<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\n') }}"
    "{% endif %}"
)
# EOS closes every conversation, as with Phi-3's.
CLOSES = (
    HEAD
    + "{{ m.content + '<|tool|>' }}{% endfor %}"
    + ("{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}")
)
# A turn ends where the next begins, as with GLM's.
NO_END = HEAD + "{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
PARTS = HEAD + "{% for part in m.content %}{{ part.text }}{% endfor %}" + TAIL
CALLS = (
    "{% for tool in tools or [] %}{{ tool.function.name }}({{ tool.function.parameters.properties.keys() | join }}):"
    " {{ tool.function.description }}|{% endfor %}" + HEAD + "{{ m['content'] }}{% for call in m.tool_calls or [] %}"
    "{{ '[' + call.function.name + ' ' + call.function.arguments + ']' }}{% endfor %}" + TAIL
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('A user has to begin') }}{% endif %}" + NESTING
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|system|>Be nice.<|end|>' }}{% endif %}" + NESTING


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def says(content: str | None, reasoning: str = "", **others: Any) -> dict[str, Any]:
    thought = {"reasoning_content": reasoning} if reasoning else {}
    return {"role": "assistant", "content": content, **thought, **others}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "c00000001", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, description: str, *parameters: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {parameter: {"type": "string"} for parameter in parameters}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


@pytest.fixture(scope="module")
def tiny(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def divided(tokenizer: Any, template: str, messages: list[Any], tools: Any = None, train_on: str = "auto") -> Split:
    one = ChatTemplate(with_template(tokenizer, template)).for_tools(tools)
    return split(one, messages, tools, what_to_learn(messages, 0, train_on))


def shown(found: Split) -> list[str]:
    """Each sample with what is learned marked."""
    texts = []
    for sample in found.samples:
        text = sample.text
        for begin, end in reversed(sample.learned):
            text = f"{text[:begin]}«{text[begin:end]}»{text[end:]}"
        texts.append(text)
    return texts


CHAT = [user("one?"), says("1"), user("two?"), says("2")]
THINKING = [user("one?"), says("1", "un"), user("two?"), says("2", "deux")]

KINDS: dict[str, tuple[str, list[Any], list[str]]] = {
    "turns that nest share one sample": (
        NESTING,
        CHAT,
        ["<|user|>one?<|end|><|assistant|>«1<|end|>»<|user|>two?<|end|><|assistant|>«2<|end|>»"],
    ),
    "what follows the last answer is part of the sample": (
        NESTING,
        CHAT[:3],
        ["<|user|>one?<|end|><|assistant|>«1<|end|>»<|user|>two?<|end|>"],
    ),
    "without reasoning the template's form of an answer without": (
        FORGETS,
        CHAT,
        [
            "<|user|>one?<|end|><|assistant|>«<think></think>1<|end|>»",
            "<|user|>one?<|end|><|assistant|>1<|end|><|user|>two?<|end|><|assistant|>«<think></think>2<|end|>»",
        ],
    ),
    "reasoning is learned in each turn and not seen by the next": (
        FORGETS,
        THINKING,
        [
            "<|user|>one?<|end|><|assistant|>«<think>un</think>1<|end|>»",
            "<|user|>one?<|end|><|assistant|>1<|end|><|user|>two?<|end|><|assistant|>«<think>deux</think>2<|end|>»",
        ],
    ),
    "turns behind one question nest, those before it do not": (
        FORGETS,
        [*CHAT, says("3")],
        [
            "<|user|>one?<|end|><|assistant|>«<think></think>1<|end|>»",
            "<|user|>one?<|end|><|assistant|>1<|end|><|user|>two?<|end|><|assistant|>«<think></think>2<|end|>»<|assistant|>"
            "«<think></think>3<|end|>»",
        ],
    ),
    "the system's text stands where it stands for each answer": (
        MOVES,
        [system("Be brief"), *CHAT],
        [
            "<|user|>Be brief: one?<|end|><|assistant|>«1<|end|>»",
            "<|user|>one?<|end|><|assistant|>1<|end|><|user|>Be brief: two?<|end|><|assistant|>«2<|end|>»",
        ],
    ),
    "a thought that the prompt opens is closed": (
        OPENS,
        CHAT,
        [
            "<|user|>one?<|end|><|assistant|><think>\n«\n</think>\n\n1<|end|>»",
            "<|user|>one?<|end|><|assistant|>1<|end|><|user|>two?<|end|><|assistant|><think>\n«\n</think>\n\n2<|end|>»",
        ],
    ),
    "a thought that the prompt opens and the template forgets is learned": (
        OPENS,
        THINKING,
        [
            "<|user|>one?<|end|><|assistant|><think>\n«un\n</think>\n\n1<|end|>»",
            "<|user|>one?<|end|><|assistant|>1<|end|><|user|>two?<|end|><|assistant|><think>\n«deux\n</think>\n\n2<|end|>»",
        ],
    ),
    "a thought inside the text is the same": (
        OPENS,
        [user("one?"), says("<think>\nun\n</think>\n\n1")],
        ["<|user|>one?<|end|><|assistant|><think>\n«un\n</think>\n\n1<|end|>»"],
    ),
    "with a switch each answer is asked for as it was given": (
        SWITCHED,
        [user("one?"), says("1", "un"), user("two?"), says("2")],
        [
            "<|user|>one?<|end|><|assistant|><think>\n«un\n</think>1<|end|>»<|user|>two?<|end|><|assistant|><think></think>"
            "«2<|end|>»",
        ],
    ),
    "what closes a conversation is learned behind the last answer alone": (
        CLOSES,
        CHAT,
        ["<|user|>one?<|tool|><|assistant|>«1<|tool|>»<|user|>two?<|tool|><|assistant|>«2<|tool|><|end|>»"],
    ),
    "without an end of turn the next turn's beginning is the end": (
        NO_END,
        CHAT,
        ["<|user|>one?<|assistant|>«1<|user|>»two?<|assistant|>«2<|user|>»"],
    ),
    "a template that takes parts is given parts": (
        PARTS,
        CHAT[:2],
        ["<|user|>one?<|end|><|assistant|>«1<|end|>»"],
    ),
    "a call's arguments are text where the template joins them, and no content is no text": (
        CALLS,
        [
            user("sky?"),
            says(None, tool_calls=[call("look", at="up")]),
            {"role": "tool", "content": "blue"},
            says("Blue."),
        ],
        [
            '<|user|>sky?<|end|><|assistant|>«[look {"at": "up"}]<|end|>»<|tool|>blue<|end|><|assistant|>«Blue.<|end|>»',
        ],
    ),
    "muted turns are context": (
        FORGETS,
        [user("one?"), says("1", "un", weight=0), user("two?"), says("2", "deux")],
        ["<|user|>one?<|end|><|assistant|>1<|end|><|user|>two?<|end|><|assistant|>«<think>deux</think>2<|end|>»"],
    ),
    "an answer that the template can ask for at the very beginning": (
        NESTING,
        [says("Hello."), user("one?"), says("1")],
        ["<|assistant|>«Hello.<|end|>»<|user|>one?<|end|><|assistant|>«1<|end|>»"],
    ),
    "an opening answer behind a made-up system text is not learned": (
        DEFAULT_SYSTEM,
        [says("Hello."), user("one?"), says("1")],
        ["<|system|>Be nice.<|end|><|assistant|>Hello.<|end|><|user|>one?<|end|><|assistant|>«1<|end|>»"],
    ),
    "an opening answer behind a system text is": (
        DEFAULT_SYSTEM,
        [system("Be brief."), says("Hello."), user("one?"), says("1")],
        ["<|system|>Be brief.<|end|><|assistant|>«Hello.<|end|>»<|user|>one?<|end|><|assistant|>«1<|end|>»"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_of_each_kind_of_template(tiny: Any, kind: str) -> None:
    template, messages, expected = KINDS[kind]
    assert shown(divided(tiny, template, messages)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_turn_alone_is_learned_as_it_is_among_all(tiny: Any, kind: str) -> None:
    template, messages, expected = KINDS[kind]
    [text] = shown(divided(tiny, template, messages, train_on="last_turn"))
    last = expected[-1]
    begin = last.rindex("«")
    assert text == last[:begin].replace("«", "").replace("»", "") + last[begin:]


REFUSED: dict[str, tuple[str, list[Any], str]] = {
    "reasoning of a learned turn": (NESTING, THINKING, "the chat template leaves out reasoning of message 2, which is"),
    "a call of a learned turn": (
        NESTING,
        [user("sky?"), says("", tool_calls=[call("look", at="up")])],
        "the chat template leaves out tool calls of message 2, which is to be learned",
    ),
    "the template's own refusal": (
        STRICT,
        [system("Be brief."), user("one?"), says("1")],
        "the chat template refuses the conversation: A user has to begin",
    ),
    "an answer that does not continue the prompt": (
        "{{ messages | length }}" + NESTING,
        CHAT,
        "the chat template asks for message 2 with '1<|user|>one?<|end|><|assistant|>' and then renders it as",
    ),
    "an error in the template": (
        "{{ messages[0].content + 1 }}",
        CHAT,
        "the chat template fails on the conversation: can only concatenate str",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_shown_right_is_refused_with_a_sentence(tiny: Any, kind: str) -> None:
    template, messages, sentence = REFUSED[kind]
    with pytest.raises(ConversationError) as caught:
        divided(tiny, template, messages)
    assert str(caught.value).startswith(sentence)


NOTED: dict[str, tuple[str, list[Any], Any, set[Note]]] = {
    "nothing": (CALLS, CHAT, None, set()),
    "old reasoning": (FORGETS, THINKING, None, {Note.OLD_REASONING}),
    "tools that no template line mentions": (NESTING, CHAT, [tool("look", "Look.", "at")], {Note.NO_TOOLS}),
    "a parameter's name": (CALLS, CHAT, [tool("look", "Look.", "where")], set()),
    "a system text": (
        NESTING.replace("for m in messages", "for m in messages if m.role != 'system'"),
        [system("Be brief."), *CHAT],
        None,
        {Note.NO_SYSTEM},
    ),
    "a result, although the answer says it again": (
        CALLS.replace("for m in messages", "for m in messages if m.role != 'tool'"),
        [user("sky?"), says(None, tool_calls=[call("look")]), {"role": "tool", "content": "blue"}, says("blue")],
        None,
        {Note.NO_RESULT},
    ),
    "an opening answer": (DEFAULT_SYSTEM, [says("Hello."), *CHAT], None, {Note.OPENING}),
    "no end": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        CHAT,
        None,
        {Note.ENDLESS},
    ),
    "both ways of a switch": (SWITCHED, THINKING[:2] + CHAT[2:], None, {Note.THINKING_OFF}),
}


@pytest.mark.parametrize("kind", NOTED)
def test_what_is_lost_from_a_context_is_noted(tiny: Any, kind: str) -> None:
    template, messages, tools, notes = NOTED[kind]
    assert divided(tiny, template, messages, tools).notes == notes


def test_a_function_without_description_is_one_with_an_empty_one_where_the_template_needs_it(tiny: Any) -> None:
    needs = (
        "{% for tool in tools %}{{ tool.function.name + ': ' + tool.function.description + ' ' }}{% endfor %}" + NESTING
    )
    bare = [{"type": "function", "function": {"name": "look"}}]
    [sample] = divided(tiny, needs, CHAT[:2], bare).samples
    assert sample.text.startswith("look:  <|user|>one?")


def test_learned_ends_are_named(tiny: Any) -> None:
    assert divided(tiny, NESTING, CHAT).ends == {"<|end|>"}
    assert divided(tiny, CLOSES, CHAT).ends == {"<|tool|>"}
    assert divided(tiny, NO_END, CHAT).ends == {"<|user|>"}


def test_a_conversation_learned_whole_has_to_nest(tiny: Any) -> None:
    assert shown(divided(tiny, NESTING, CHAT, train_on="all"))[0].startswith("«<|user|>one?")
    with pytest.raises(
        ConversationError, match="renders message 2 differently once the conversation goes on"
    ) as caught:
        divided(tiny, FORGETS, CHAT, train_on="all")
    assert 'train_on = "assistant"' in caught.value.hint
    muted = [user("one?"), says("1", weight=0), user("two?"), says("2")]
    [text] = shown(divided(tiny, NESTING, muted, train_on="all"))
    assert text == "«<|user|>one?<|end|><|assistant|>»1<|end|>«<|user|>two?<|end|><|assistant|>2<|end|>»"


def conversation(line: int, messages: list[Any], digest: str = "80" * 16) -> Row:
    return Row(kind="messages", messages=messages, line=line, content_digest=digest)


def test_a_rows_samples_stay_on_its_side_of_the_split_and_are_counted(tiny: Any) -> None:
    rows = [conversation(n, CHAT, f"{n * 9:02x}" + "80" * 15) for n in range(28)]
    data = DATA.model_copy(update={"held_out_fraction": 0.4})
    found = tokenise(rows, with_template(tiny, FORGETS), data, read=itself)
    assert found.train_rows + found.held_out_rows == 28
    assert found.held_out_rows > 0
    assert (len(found.train), len(found.held_out)) == (2 * found.train_rows, 2 * found.held_out_rows)
    trained, held = ({example.line for example in side} for side in (found.train, found.held_out))
    assert not trained & held


def test_a_row_at_fault_is_named_or_skipped_as_any_bad_row(tiny: Any) -> None:
    rows = [conversation(n, CHAT) for n in (1, 2, 3)] + [conversation(4, [system("x"), *CHAT])]
    strict = with_template(tiny, STRICT)
    with pytest.raises(RunFailure, match="line 4: the chat template refuses the conversation: A user has to") as caught:
        tokenise(rows, strict, DATA, read=itself)
    assert caught.value.kind is FailureKind.BAD_DATA
    skipping = DATA.model_copy(update={"on_bad_rows": "skip", "max_bad_fraction": 0.25})
    found = tokenise(rows, strict, skipping, read=itself)
    assert (found.train_rows, [row.line for row in found.refused]) == (3, [4])
    with pytest.raises(
        RunFailure, match=r"1 of 4 rows cannot be trained as they should, more than max_bad_fraction = 0.2"
    ):
        tokenise(rows, strict, skipping.model_copy(update={"max_bad_fraction": 0.2}), read=itself)


def test_each_row_is_encoded_or_refused_in_its_place(tiny: Any) -> None:
    strict = with_template(tiny, STRICT)
    good, bad = conversation(1, CHAT), conversation(2, [system("x"), *CHAT])
    plain = Row(kind="text", text="plain", line=3, content_digest="")
    found = Encoder(strict, DATA).encode([good, bad, plain, good])
    assert [type(one) for one in found] == [EncodedRow, RefusedRow, EncodedRow, EncodedRow]
    assert [one.line for one in found] == [1, 2, 3, 1]
    assert found[0] == found[3]


def test_what_is_learned_of_turns_is_the_union_over_samples_whatever_is_muted(tiny: Any) -> None:
    """Muting one turn changes nothing about how the others are learned."""
    turns = assistant_turns(CHAT)
    one = ChatTemplate(with_template(tiny, FORGETS)).for_tools(None)
    alone = [shown(split(one, CHAT, None, Learn(turns=(at,)))) for at in turns]
    together = shown(split(one, CHAT, None, Learn(turns=tuple(turns))))
    assert [text for [text] in alone] == together
