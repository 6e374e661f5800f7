"""Rows of a dataset: which formats there are, what a row must hold, and the three kinds that training sees.

A file has one format. Whatever it is, a row becomes one of three kinds: chat `messages` as OpenAI writes them, a
`prompt` with its `completion` (text, or lists of messages), or plain `text`. The pass over a dropped file and the
trainer's reading go through `normalise`, so a row that is skipped by one is skipped by the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from daemon.dataset.conversation import Conversation, Message, read_system, refuse_placeholder
from daemon.dataset.identity import RowIdentity, identify
from daemon.dataset.keys import (
    ANSWER_KEYS,
    CONVERSATION_KEYS,
    HISTORY_KEY,
    ROW_MASK_KEYS,
    SYSTEM_KEYS,
    TOOLS_KEYS,
    TRANSCRIPT_KEYS,
    Place,
    is_given,
    refuses,
    role_named,
)
from daemon.dataset.masks import apply_row_masks, is_mask
from daemon.dataset.media import placeholder_in
from daemon.dataset.source import TooLong, open_dataset
from daemon.dataset.strict_json import LineError, column_of, parse_object
from daemon.dataset.tools import calls_of, one_of
from daemon.dataset.transcript import is_transcript, read_transcript, read_transcript_system
from daemon.dataset.values import JsonPath, RowError, UnusedKeys, embedded, optional_text, required, text_of

if TYPE_CHECKING:  # the settings' machinery would double what a child that reads rows imports
    from daemon.limits import LimitSettings
    from daemon.recipe import ColumnSettings, DataSettings

ONE_TURN = "the row is one turn of a conversation"
WHOLE_CONVERSATION = 'write a whole conversation on one line: {"messages": [...]}'
AS_CHAT = '[data] prompt_completion = "chat"'

Kind = Literal["messages", "prompt_completion", "text"]


class Format(StrEnum):
    """What the rows of one file look like."""

    MESSAGES = "messages"  # {"messages": [{"role", "content"}], "tools"?, "system"?}
    PROMPT_COMPLETION = "prompt_completion"  # {"prompt", "completion"}: both text, or both lists of messages
    TEXT = "text"  # {"text"}
    ALPACA = "alpaca"  # {"instruction", "input"?, "output", "system"?, "history"?}
    QUERY_RESPONSE = "query_response"  # {"query", "response", "system"?, "history"?}
    FUNCTION_CALLS = "function_calls"  # {"query", "tools", "answers"}: the answers are calls, as xLAM has them
    GLAIVE = "glaive"  # {"system"?, "chat"}: the turns in one text, `USER: ...`, `ASSISTANT: ...`
    SHAREGPT = "sharegpt"  # {"conversations": [{"from", "value"}], "tools"?, "system"?}
    COLUMNS = "columns"  # any flat columns, named by [data.columns]


FORMAT_KEYS: Mapping[Format, tuple[str, ...]] = {  # in order of detection
    Format.MESSAGES: ("messages",),
    Format.SHAREGPT: ("conversations",),
    Format.PROMPT_COMPLETION: ("prompt", "completion"),
    Format.ALPACA: ("instruction", "output"),
    Format.QUERY_RESPONSE: ("query", "response"),
    Format.TEXT: ("text",),
}
_CONTEXT_KEYS = frozenset((*SYSTEM_KEYS, *TOOLS_KEYS, *ROW_MASK_KEYS))
_PAIR_KEYS: Mapping[Format, tuple[str, ...]] = {
    Format.ALPACA: ("instruction", "input", "output"),
    Format.QUERY_RESPONSE: ("query", "response"),
}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """`[data.columns]`: which column of a flat file is which."""

    prompt: str | None = None
    completion: str | None = None
    text: str | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The columns that a row must have."""
        return tuple(name for name in (self.prompt, self.completion, self.text) if name is not None)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The part of `[data]` that decides which rows are good and what they become.

    Plain data, which a child process can be told without the settings' machinery.
    """

    columns: Columns = field(default_factory=Columns)
    prompt_completion: str = "as_is"
    train_on: str = "auto"
    on_bad_rows: str = "reject"
    max_bad_fraction: float = 0.01
    max_line_bytes: int = 16 * 2**20
    max_expansion: float = 100.0
    max_rows: int = 0  # of `[limits]`, as the next two; 0: any number
    max_file_bytes: int = 0
    max_expanded_bytes: int = 0

    @classmethod
    def of(cls, data: Rules | DataSettings, limits: LimitSettings | None = None) -> Rules:
        """The rules that settings or a recipe's `[data]` hold; with `limits`, bounded by the administrator's."""
        if isinstance(data, Rules):
            return data
        names = data.columns
        return cls(
            columns=Columns(prompt=names.prompt, completion=names.completion, text=names.text),
            prompt_completion=data.prompt_completion,
            train_on=data.train_on,
            on_bad_rows=data.on_bad_rows,
            max_bad_fraction=data.max_bad_fraction,
            max_line_bytes=data.max_line_bytes,
            max_expansion=data.max_expansion,
            max_rows=limits.max_rows if limits else 0,
            max_file_bytes=limits.max_file_bytes if limits else 0,
            max_expanded_bytes=limits.max_expanded_bytes if limits else 0,
        )


@dataclass(frozen=True, kw_only=True)
class RowContent:
    """What a row holds, as one of the three kinds; the fields of the other kinds are None."""

    kind: Kind
    messages: list[Message] | None = None  # kind messages
    prompt: str | list[Message] | None = None  # kind prompt_completion; both text, or both messages
    completion: str | list[Message] | None = None
    text: str | None = None  # kind text
    tools: list[dict[str, Any]] | None = None  # function definitions, for messages and lists of messages
    unused_keys: tuple[str, ...] = ()  # given keys that nothing is made of, sorted; of turns as `messages[].key`


@dataclass(frozen=True, kw_only=True)
class Row(RowContent):
    """One row that can be trained.

    Messages hold `role`, `content` (text; None only beside `tool_calls`) and where given `name`, `weight`,
    `tool_call_id`, `reasoning_content` and `tool_calls`, whose `arguments` are objects, as chat templates expect them.
    """

    line: int  # 1-based
    content_digest: str  # `daemon.dataset.identity`: the same wherever the row stands, and however it is written
    prompt_digest: str = ""  # of what the row answers; empty: nothing that has another answer


def detect_format(row: Mapping[str, Any], columns: Columns | ColumnSettings) -> Format | None:
    """The format that a file with this first row has; None when there is none.

    Configured columns come first: who names them means them. Keys that are null never decide, and empty ones only where
    there is nothing else.
    """
    named = [name for name in (columns.prompt, columns.completion, columns.text) if name is not None]
    if named and all(name in row for name in named):
        return Format.COLUMNS
    possible = [format_ for format_, keys in FORMAT_KEYS.items() if all(row.get(key) is not None for key in keys)]
    if is_given(row.get("query")) and is_given(row.get("tools")) and _holds_json(row.get("answers")):
        return Format.FUNCTION_CALLS
    for format_ in possible:
        if any(is_given(row[key]) for key in FORMAT_KEYS[format_]):
            return format_
    if any(_holds_turns(row.get(key)) for key in CONVERSATION_KEYS):
        return Format.SHAREGPT
    if any(is_transcript(row.get(key)) for key in TRANSCRIPT_KEYS):
        return Format.GLAIVE
    return possible[0] if possible else None


def check_row(line: bytes, format_: Format, data: Rules | DataSettings) -> RowContent:
    """The row on `line`. Raises LineError, with the column of the value that is wrong."""
    value = parse_object(line)
    try:
        return normalise(value, format_, data)
    except RowError as error:
        raise LineError(column_of(line, error.path), str(error), error.hint) from error


def normalise(row: Mapping[str, Any], format_: Format, data: Rules | DataSettings) -> RowContent:
    """One parsed row as one of the three kinds. Raises RowError."""
    columns = data.columns
    is_text = format_ is Format.TEXT or (format_ is Format.COLUMNS and columns.text is not None)
    named = (columns.prompt, columns.completion, columns.text) if format_ is Format.COLUMNS else ()
    for key, value in row.items():
        if key not in named and (group := refuses(key, value, Place.ROW, answers=not is_text)) is not None:
            raise RowError((key,), group.reason(key), group.advice)
    if is_text:
        return _text(row, columns.text if format_ is Format.COLUMNS and columns.text is not None else "text")
    if format_ in (Format.MESSAGES, Format.SHAREGPT):
        return _conversation(row, format_)
    if format_ is Format.ALPACA:
        return _pair(row, _question(row), text_of(row, "output"), _PAIR_KEYS[format_])
    if format_ is Format.QUERY_RESPONSE:
        return _pair(row, text_of(row, "query"), text_of(row, "response"), _PAIR_KEYS[format_])
    if format_ is Format.FUNCTION_CALLS:
        return _function_calls(row)
    if format_ is Format.GLAIVE:
        return _transcript(row)
    keys = (columns.prompt or "prompt", columns.completion or "completion")
    return _prompt_completion(row, *(keys if format_ is Format.COLUMNS else ("prompt", "completion")), data)


def _asked(content: RowContent) -> Iterator[str]:
    """What users say in a row."""
    if isinstance(content.prompt, str):
        yield content.prompt
    else:
        turns = content.completion if isinstance(content.completion, list) else []
        for message in (*(content.messages or content.prompt or ()), *turns):
            if message["role"] == "user":
                yield message["content"]


def mentions_media(content: RowContent) -> bool:
    """Whether what is asked, or a plain text, holds the placeholder of a picture, video or sound."""
    texts = (content.text,) if content.text is not None else _asked(content)
    return any(placeholder_in(text) is not None for text in texts)


def identity_of(content: RowContent) -> RowIdentity:
    """What a row is, of whatever kind: a prompt and its completion are a question and its answer."""
    if content.kind == "text":
        return identify([{"role": "", "content": content.text}], None)
    if content.kind == "messages":
        return identify(content.messages or (), content.tools)
    turns: list[Message] = []
    for role, part in (("user", content.prompt), ("assistant", content.completion)):
        turns += part if isinstance(part, list) else [{"role": role, "content": part}]
    return identify(turns, content.tools)


def joins_words(content: RowContent) -> bool:
    """Whether prompt and completion, joined as they stand, meet without white space between."""
    prompt, completion = content.prompt, content.completion
    return isinstance(prompt, str) and isinstance(completion, str) and _meet(prompt, completion)


def _meet(before: str, behind: str) -> bool:
    return bool(before) and bool(behind) and not before[-1].isspace() and not behind[0].isspace()


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How many parts of a row would be learned, and how many of those are empty or only white space."""

    learned: int
    empty: int


def count_answers(content: RowContent, train_on: str) -> Answers:
    """The answers of a row that are to be learned under `[data] train_on`."""
    if content.kind == "messages":
        return _count_turns(content.messages or [], train_on)
    if isinstance(content.completion, list):
        return _count_turns(content.completion, train_on)
    words = content.text if content.kind == "text" else content.completion
    return Answers(learned=1, empty=0 if str(words or "").strip() else 1)


def _count_turns(messages: list[Message], train_on: str) -> Answers:
    """The turns that the trainer learns under `train_on`: never those with weight 0."""
    turns = [message for message in messages if message["role"] == "assistant" or train_on == "all"]
    if train_on == "last_turn":
        turns = turns[-1:]
    learned = [message for message in turns if message.get("weight") != 0]
    return Answers(learned=len(learned), empty=sum(1 for message in learned if not _says_something(message)))


def _says_something(message: Message) -> bool:
    return bool((message["content"] or "").strip()) or "tool_calls" in message or "reasoning_content" in message


Line = tuple[int, bytes | TooLong]  # its number, from 1, and what stands there


@dataclass(frozen=True)
class RowReader:
    """Reads a dataset that passed, line by line; lines can be read elsewhere than where they are made rows.

    Under on_bad_rows = "skip" exactly the rows are left out that the pass left out; else a bad row, which the pass would
    have refused, raises LineError.
    """

    path: Path
    format: Format
    data: Rules | DataSettings

    def lines(self) -> Iterator[Line]:
        """In file order, one at a time; memory does not grow with the file. Raises SourceError, OSError."""
        with open_dataset(self.path, max_expansion=self.data.max_expansion) as source:
            yield from source.lines(self.data.max_line_bytes)

    def row(self, line: Line) -> Row | None:
        """The row on a line; None for one that is left out, and for a blank line. Raises LineError."""
        number, text = line
        try:
            if isinstance(text, TooLong):
                raise LineError(1, str(text))
            if not text.strip():
                return None  # a blank line is no row
            content = check_row(text, self.format, self.data)
        except LineError as error:
            if self.data.on_bad_rows == "skip":
                return None
            raise LineError(error.column, f"line {number}, column {error.column}: {error.reason}") from error
        identity = identity_of(content)
        return Row(line=number, content_digest=identity.digest, prompt_digest=identity.prompt, **vars(content))


def iter_rows(path: str | Path, format_: str, data: Rules | DataSettings) -> Iterator[Row]:
    """The rows of a dataset that passed, in file order, one at a time. Raises as RowReader does."""
    reader = RowReader(Path(path), Format(format_), data)
    return (row for line in reader.lines() if (row := reader.row(line)) is not None)


def _conversation(row: Mapping[str, Any], format_: Format) -> RowContent:
    expected = FORMAT_KEYS[format_][0]
    key = next((key for key in CONVERSATION_KEYS if _holds_turns(row.get(key))), expected)
    conversation = Conversation()
    conversation.read(_turns(required(row, key), (key,)), (key,))
    if isinstance(row.get(HISTORY_KEY), list) and is_given(row[HISTORY_KEY]):
        raise RowError(
            (HISTORY_KEY,),
            f'"{HISTORY_KEY}" holds earlier turns beside a conversation, and their order is not known',
            f'put the earlier turns into "{key}"',
        )
    if conversation.messages[-1]["role"] in ("user", "tool"):
        for name in ANSWER_KEYS:
            if isinstance(row.get(name), str | list | dict) and is_given(row[name]):
                raise RowError(
                    (name,),
                    f'"{name}" holds an answer beside a conversation that has none at its end, and would not be learned',
                    f'put it at the end of "{key}" as a turn of the assistant, or remove the key',
                )
    messages, tools = conversation.finish(row)
    unused = _unused(row, _CONTEXT_KEYS | {key}, conversation)
    return RowContent(kind="messages", messages=messages, tools=tools, unused_keys=unused)


def _pair(row: Mapping[str, Any], question: str, answer: str, keys: tuple[str, ...]) -> RowContent:
    """A question and its answer as two turns, behind the turns of `history`."""
    conversation = Conversation()
    if is_given(row.get(HISTORY_KEY)):
        conversation.read_history(row[HISTORY_KEY], (HISTORY_KEY,))
    conversation.say("user", question)
    conversation.say("assistant", answer)
    messages, tools = conversation.finish(row)
    unused = _unused(row, _CONTEXT_KEYS | {HISTORY_KEY, *keys}, conversation)
    return RowContent(kind="messages", messages=messages, tools=tools, unused_keys=unused)


def _function_calls(row: Mapping[str, Any]) -> RowContent:
    """A question that is answered by calls of the row's tools."""
    conversation = Conversation()
    conversation.say("user", text_of(row, "query"))
    calls = calls_of(required(row, "answers"), ("answers",), conversation.unused)
    conversation.messages.append({"role": "assistant", "content": None, "tool_calls": calls})
    messages, tools = conversation.finish(row)
    unused = _unused(row, _CONTEXT_KEYS | {"query", "answers"}, conversation)
    return RowContent(kind="messages", messages=messages, tools=tools, unused_keys=unused)


def _transcript(row: Mapping[str, Any]) -> RowContent:
    """A conversation in one text; the system text may hold the definitions of the tools."""
    key = next((key for key in TRANSCRIPT_KEYS if is_transcript(row.get(key))), None)
    if key is None:
        raise RowError((), "a text with USER: and ASSISTANT: in lines of their own is missing")
    conversation = read_transcript(row[key], (key,))
    given = dict(row)
    if isinstance(row.get("system"), str):
        given["system"], tools = read_transcript_system(row["system"], ("system",))
        conversation.tools = one_of((conversation.tools, tools), "tools")
    messages, tools = conversation.finish(given)
    unused = _unused(row, _CONTEXT_KEYS | {key}, conversation)
    return RowContent(kind="messages", messages=messages, tools=tools, unused_keys=unused)


def _question(row: Mapping[str, Any]) -> str:
    """Alpaca's instruction and input with an empty line between; either alone where the other is empty."""
    parts = (text_of(row, "instruction"), optional_text(row, "input"))
    return "\n\n".join(part for part in parts if part.strip())


def _prompt_completion(
    row: Mapping[str, Any], prompt_key: str, completion_key: str, data: Rules | DataSettings
) -> RowContent:
    prompt = _turns(required(row, prompt_key), (prompt_key,))
    completion = _turns(required(row, completion_key), (completion_key,))
    if isinstance(prompt, list):
        if not isinstance(completion, list):
            raise RowError(
                (completion_key,),
                "expected a list of messages, as the prompt is one",
                f'write it as "{completion_key}": [{{"role": "assistant", "content": ...}}]',
            )
        return _turns_to_complete({**row, prompt_key: prompt, completion_key: completion}, prompt_key, completion_key)
    if isinstance(prompt, str) and _is_conversation(completion):
        raise RowError(
            (prompt_key,),
            "expected a list of messages, as the completion is one",
            f'write it as "{prompt_key}": [{{"role": "user", "content": ...}}]',
        )
    prompt, completion = text_of(row, prompt_key), text_of(row, completion_key)
    refuse_placeholder(prompt, (prompt_key,))
    if data.prompt_completion == "chat":
        return _pair(row, prompt, completion, (prompt_key, completion_key))
    if (system := read_system(row, UnusedKeys())) is not None:
        raise _has_no_place(system[0])
    for key in (*TOOLS_KEYS, HISTORY_KEY):
        if is_given(row.get(key)) and (key != HISTORY_KEY or isinstance(row[key], list)):
            raise _has_no_place(key)
    conversation = _one_answer(row, completion)
    unused = _unused(row, _CONTEXT_KEYS | {prompt_key, completion_key}, conversation)
    return RowContent(kind="prompt_completion", prompt=prompt, completion=completion, unused_keys=unused)


def _turns_to_complete(row: Mapping[str, Any], prompt_key: str, completion_key: str) -> RowContent:
    """A prompt and a completion that are lists of messages."""
    conversation = Conversation()
    conversation.read(row[prompt_key], (prompt_key,))
    before = len(conversation.messages)
    conversation.read(row[completion_key], (completion_key,))
    conversation.calls_alone.discard(before)  # calls of the completion are not the prompt's
    first = conversation.messages[before]
    if isinstance(row.get(HISTORY_KEY), list) and is_given(row[HISTORY_KEY]):
        raise RowError((HISTORY_KEY,), "earlier turns beside a prompt of turns", f'put them into "{prompt_key}"')
    messages, tools = conversation.finish(row)
    middle = next(index for index, message in enumerate(messages) if message is first)
    return RowContent(
        kind="prompt_completion",
        prompt=messages[:middle],
        completion=messages[middle:],
        tools=tools,
        unused_keys=_unused(row, _CONTEXT_KEYS | {prompt_key, completion_key}, conversation),
    )


def _text(row: Mapping[str, Any], key: str) -> RowContent:
    text = text_of(row, key)
    if key == "text" and isinstance(row.get("role"), str) and role_named(row["role"]) is not None:
        raise RowError(("role",), ONE_TURN, WHOLE_CONVERSATION)
    conversation = _one_answer({name: value for name, value in row.items() if name != key}, text)
    return RowContent(kind="text", text=text, unused_keys=_unused(row, frozenset((*ROW_MASK_KEYS, key)), conversation))


def _one_answer(row: Mapping[str, Any], text: str) -> Conversation:
    """A row without turns as one answer, so that its masks are read as any others. Raises RowError."""
    conversation = Conversation()
    conversation.say("assistant", text)
    apply_row_masks(row, conversation.messages, conversation.unused)
    if conversation.messages[0].get("weight") == 0:
        key = next(key for key in ROW_MASK_KEYS if is_given(row.get(key)) and is_mask(key, row[key]))
        raise RowError((key,), "it says that nothing of the row is learned", "leave such rows out")
    return conversation


def _unused(row: Mapping[str, Any], used: frozenset[str], conversation: Conversation) -> tuple[str, ...]:
    left = [key for key in row if key not in used and is_given(row[key])]
    return tuple(sorted({*left, *conversation.unused})) if left or conversation.unused else ()


def _is_conversation(value: Any) -> bool:
    """Whether a value is a list of turns; whether they are sound is seen when they are read."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _holds_turns(value: Any) -> bool:
    """The same of a list that may also be JSON inside a string, as tables have them."""
    return _is_conversation(value) or (isinstance(value, str) and _TURNS_IN_TEXT.match(value) is not None)


def _turns(value: Any, path: JsonPath) -> Any:
    """A list of turns out of the string that it may be in; any other value as it is. Raises RowError."""
    return embedded(value, path) if isinstance(value, str) and _TURNS_IN_TEXT.match(value) else value


_TURNS_IN_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value|speaker)["']\s*:""")


def _holds_json(value: Any) -> bool:
    return _is_conversation(value) or (isinstance(value, str) and value.lstrip()[:1] in ("[", "{"))


def _has_no_place(key: str) -> RowError:
    return RowError(
        (key,),
        f'"{key}" has no place where prompt and completion are joined as they stand',
        f"set {AS_CHAT}, which makes turns of them, or put it into the prompt",
    )
