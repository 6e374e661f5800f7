"""What a row says is what is trained: every published spelling, by the words that are learned and those that are not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from daemon.dataset.keys import REFUSED, Place
from daemon.dataset.rows import Columns, Format, RowContent, Rules, check_row, detect_format
from daemon.dataset.strict_json import LineError

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
TWO = [*TURNS, {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
CALL = {"name": "f", "arguments": {"city": "Oslo"}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CHAT = Rules(prompt_completion="chat")


def read(row: dict[str, Any], rules: Rules | None = None) -> RowContent:
    rules = rules or Rules()
    format_ = detect_format(row, rules.columns)
    assert format_ is not None, "no format"
    return check_row(json.dumps(row).encode(), format_, rules)


def transcript(content: RowContent) -> list[str]:
    """A line a turn: speaker, `*` when it is learned, reasoning in `<>`, text, and calls."""
    if content.kind == "text":
        return [f"text*: {content.text}"]
    if isinstance(content.prompt, str):
        return [f"prompt: {content.prompt}", f"completion*: {content.completion}"]
    before = len(content.prompt or [])
    lines = []
    for index, message in enumerate(content.messages or [*(content.prompt or []), *(content.completion or [])]):
        learned = message["role"] == "assistant" and message.get("weight") != 0 and index >= before
        calls = [
            f"{c['function']['name']}({json.dumps(c['function']['arguments'])})" for c in message.get("tool_calls", ())
        ]
        thought = f"<{message['reasoning_content']}>" if "reasoning_content" in message else ""
        said = " ".join(part for part in (thought, message["content"] or "", *calls) if part)
        lines.append(f"{message['role']}{'*' if learned else ''}: {said}".rstrip())
    return lines


def muted(key: str, off: Any = False, on: Any = True) -> dict[str, Any]:
    return {"messages": [TWO[0], {**TWO[1], key: off}, TWO[2], {**TWO[3], key: on}]}


def said(**turn: Any) -> dict[str, Any]:
    """A row whose answer is this turn."""
    return {"messages": [TURNS[0], {"role": "assistant", **turn}]}


MUTED = ["user: Q", "assistant: A", "user: Q2", "assistant*: A2"]
PLAIN = ["user: Q", "assistant*: A"]
CALLED = ["user: Q", 'assistant*: f({"city": "Oslo"})']

LEARNED = {
    # masks of single turns
    "openai_weight": (muted("weight", 0, 1), MUTED),
    "weight_as_float": (muted("weight", 0.0, 1.0), MUTED),
    "axolotl_train": (muted("train"), MUTED),
    "axolotl_training": (muted("training"), MUTED),
    "verl_trainable": (muted("trainable"), MUTED),
    "swift_loss": (muted("loss"), MUTED),
    "swift_loss_scale": (muted("loss_scale", 0, 1), MUTED),
    "loss_mask_of_a_turn": (muted("loss_mask", 0, 1), MUTED),
    "llama_factory_loss_weight": (muted("loss_weight", 0.0, 1.0), MUTED),
    "null_masks_mask_nothing": (muted("weight", None, None), ["user: Q", "assistant*: A", "user: Q2", "assistant*: A2"]),
    "masks_in_sharegpt": (
        {"conversations": [{"from": "human", "value": "Q", "train": False}, {"from": "gpt", "value": "A", "train": False},
                           {"from": "human", "value": "Q2"}, {"from": "gpt", "value": "A2", "train": True}]}, MUTED,
    ),
    "masks_in_a_completion_of_turns": (
        {"prompt": TWO[:1], "completion": [{**TWO[1], "weight": 0}, TWO[2], TWO[3]]}, MUTED,
    ),
    "row_mask_of_turns": ({"messages": TWO, "loss_mask": [0, 0, 0, 1]}, MUTED),
    "row_mask_of_answers": ({"messages": TWO, "loss_mask": [0, 1]}, MUTED),
    "row_mask_of_booleans": ({"conversations": TWO, "train": [False, True]}, MUTED),
    "row_mask_agrees_with_turns": ({**muted("weight", 0, 1), "weights": [0, 1]}, MUTED),
    "row_weight_one": ({"messages": TURNS, "weight": 1}, PLAIN),
    "row_weight_zero": ({"messages": TURNS, "weight": 0}, ["user: Q", "assistant: A"]),
    "row_mask_with_history": (
        {"instruction": "Q2", "output": "A2", "history": [["Q", "A"]], "loss_mask": [0, 1]}, MUTED,
    ),
    "masks_of_a_table": (muted("weight", "0", "1"), MUTED),
    "masks_in_words_of_a_table": (muted("train", "False", "True"), MUTED),
    "row_mask_in_words": ({"messages": TWO, "loss_mask": ["false", "true"]}, MUTED),
    "a_note_called_train": ({"messages": TURNS, "train": "2024", "loss_scale": "default"}, PLAIN),
    "unknown_masks_that_change_nothing": ({"messages": [TURNS[0], {**TURNS[1], "learn": True, "is_masked": False, "do_train": True}]}, PLAIN),
    "settings_that_change_nothing": ({"messages": TURNS, "train_on_inputs": False, "mask_history": False, "mask_prompt": True, "roles_to_train": ["gpt"], "is_train": True}, PLAIN),
    "harmonys_last_channel": (said(content="A", channel="final", recipient="all"), PLAIN),
    "nemo_mask_names_the_user": ({"mask": "User", "conversations": [{"from": "User", "value": "Q"}, {"from": "Assistant", "value": "A"}]}, PLAIN),
    # earlier turns and system texts
    "history": (
        {"instruction": "And in miles?", "input": "", "output": "0.62 miles", "history": [["How long is a km?", "1000 m"]]},
        ["user: How long is a km?", "assistant*: 1000 m", "user: And in miles?", "assistant*: 0.62 miles"],
    ),
    "history_of_queries": ({"query": "Q2", "response": "A2", "history": [["Q", "A"]]}, ["user: Q", "assistant*: A", "user: Q2", "assistant*: A2"]),
    "history_of_turns": ({"instruction": "Q2", "output": "A2", "history": TURNS}, ["user: Q", "assistant*: A", "user: Q2", "assistant*: A2"]),
    "history_of_pairs_by_name": ({"query": "Q2", "response": "A2", "history": [{"query": "Q", "response": "A"}, None]}, ["user: Q", "assistant*: A", "user: Q2", "assistant*: A2"]),
    "history_in_text": ({"instruction": "Q2", "output": "A2", "history": '[["Q", "A"]]'}, ["user: Q", "assistant*: A", "user: Q2", "assistant*: A2"]),
    "history_with_a_mask": ({"instruction": "Q2", "output": "A2", "history": [{**TURNS[0]}, {**TURNS[1], "weight": 0}]}, MUTED),
    "history_null": ({"instruction": "Q", "output": "A", "history": None}, PLAIN),
    "history_one_sided": ({"instruction": "Q", "output": "A", "history": [[None, "Hi"], ["", ""]]}, ["assistant*: Hi", *PLAIN]),
    "system_beside_messages": ({"system": "S", "messages": TURNS}, ["system: S", *PLAIN]),
    "system_prompt_beside_sharegpt": ({"system_prompt": "S", "conversations": TURNS}, ["system: S", *PLAIN]),
    "system_in_parts": ({"system": [{"type": "text", "text": "S"}], "messages": TURNS}, ["system: S", *PLAIN]),
    "preamble_of_cohere": ({"preamble": "S", "messages": [{"role": "User", "message": "Q"}, {"role": "Chatbot", "message": "A"}]}, ["system: S", *PLAIN]),
    "system_in_camel_case": ({"systemPrompt": "S", "messages": TURNS}, ["system: S", *PLAIN]),
    "system_said_twice_alike": ({"system": "S", "messages": [{"role": "system", "content": " S"}, *TURNS]}, ["system:  S", *PLAIN]),
    "system_beside_a_developer": ({"system": "S", "messages": [{"role": "developer", "content": "D"}, *TURNS]}, ["system: S", "developer: D", *PLAIN]),
    "system_beside_prompt_of_turns": ({"system": "S", "prompt": TURNS[:1], "completion": TURNS[1:]}, ["system: S", *PLAIN]),
    "system_of_alpaca": ({"instruction": "Q", "output": "A", "system": "S"}, ["system: S", *PLAIN]),
    "alpaca_without_instruction": ({"instruction": "", "input": "Q", "output": "A"}, PLAIN),
    "alpaca_with_input": ({"instruction": "Do", "input": "Q", "output": "A"}, ["user: Do\n\nQ", "assistant*: A"]),
    # spellings of turns
    "role_content_in_conversations": ({"conversations": TURNS}, PLAIN),
    "role_value_in_conversations": ({"conversations": [{"role": "user", "value": "Q"}, {"role": "assistant", "value": "A"}]}, PLAIN),
    "from_value_in_messages": ({"messages": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, PLAIN),
    "conversation_of_pairs": ({"system": "S", "conversation": [{"human": "Q", "assistant": "A"}]}, ["system: S", *PLAIN]),
    "pairs_of_input_and_output": ({"conversation": [{"input": "Q", "output": "A"}]}, PLAIN),
    "pairs_of_question_and_answer": ({"conversation": [{"question": "Q", "answer": "A"}]}, PLAIN),
    "pairs_of_prompt_and_completion": ({"dialog": [{"prompt": "Q", "completion": "A"}]}, PLAIN),
    "turns_filled_up_with_null": ({"messages": [None, *TURNS, None], "id": 1}, PLAIN),
    "one_part_alone": ({"messages": [{"role": "user", "content": {"type": "text", "text": "Q"}}, TURNS[1]]}, PLAIN),
    "speakers_named_by_their_product": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "claude", "value": "A"}]}, PLAIN),
    "masks_of_pairs": ({"conversation": [{"human": "Q", "assistant": "A", "loss": False}]}, ["user: Q", "assistant: A"]),
    "dialogue": ({"dialogue": TURNS}, PLAIN),
    "capital_roles": ({"conversations": [{"from": "Human", "value": "Q"}, {"from": "Assistant", "value": "A"}]}, PLAIN),
    "gemini": (
        {"systemInstruction": {"role": "system", "parts": [{"text": "S"}]},
         "contents": [{"role": "user", "parts": [{"text": "Q"}]}, {"role": "model", "parts": [{"text": "A"}]}]},
        ["system: S", *PLAIN],
    ),
    "bedrock": ({"schemaVersion": "x", "system": [{"text": "S"}], "messages": [{"role": "user", "content": [{"text": "Q"}]}, TURNS[1]]}, ["system: S", *PLAIN]),
    "turns_in_text": ({"messages": json.dumps(TURNS)}, PLAIN),
    "turns_in_text_under_another_key": ({"conversation": json.dumps(TURNS)}, PLAIN),
    "prompt_and_completion_of_turns_in_text": ({"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(TURNS[1:])}, PLAIN),
    "a_prompt_that_begins_as_json": ({"prompt": '[{"a": 1}]', "completion": "A"}, ['prompt: [{"a": 1}]', "completion*: A"]),
    "role_model": ({"messages": [TURNS[0], {"role": "model", "content": "A"}]}, PLAIN),
    "developer": ({"messages": [{"role": "developer", "content": "D"}, *TURNS]}, ["developer: D", *PLAIN]),
    "begins_and_ends_with_any_turn": (
        {"conversations": [{"from": "gpt", "value": "G"}, {"from": "human", "value": "q1"}, {"from": "human", "value": "q2"},
                           {"from": "gpt", "value": "A1"}, {"from": "gpt", "value": "A2"}, {"from": "human", "value": "bye"}]},
        ["assistant*: G", "user: q1", "user: q2", "assistant*: A1", "assistant*: A2", "user: bye"],
    ),
    "parts_to_learn": (said(content=[{"type": "text", "text": "A", "train": True}]), PLAIN),
    "text_parts": (said(content=[{"type": "text", "text": "A"}, {"type": "output_text", "text": "B", "image_url": None}]), ["user: Q", "assistant*: AB"]),
    "parts_of_plain_strings": (said(content=["A", "B"]), ["user: Q", "assistant*: AB"]),
    "a_part_with_null": (said(content=[{"type": "text", "text": None}, {"type": "text", "text": "A"}]), PLAIN),
    "a_part_that_is_null": (said(content=[None, {"type": "text", "text": "A"}]), PLAIN),
    "a_part_with_value": (said(content=[{"type": "text", "value": "A"}]), PLAIN),
    # reasoning
    "reasoning_content": (said(content="A", reasoning_content="T"), ["user: Q", "assistant*: <T> A"]),
    "reasoning": (said(content="A", reasoning="T"), ["user: Q", "assistant*: <T> A"]),
    "thinking": (said(content="A", thinking="T"), ["user: Q", "assistant*: <T> A"]),
    "thinking_part": (said(content=[{"type": "thinking", "thinking": "T"}, {"type": "text", "text": "A"}]), ["user: Q", "assistant*: <T> A"]),
    "reasoning_twice_alike": (said(content="A", reasoning="T", reasoning_content="T"), ["user: Q", "assistant*: <T> A"]),
    "reasoning_details": (said(content="A", reasoning_details=[{"type": "reasoning.text", "text": "T"}]), ["user: Q", "assistant*: <T> A"]),
    "reasoning_with_its_details": (said(content="A", reasoning="T", reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}]), ["user: Q", "assistant*: <T> A"]),
    "plan_before_a_call": (said(tool_plan="T", tool_calls=[CALL]), ["user: Q", 'assistant*: <T> f({"city": "Oslo"})']),
    "not_masked": ({"messages": [TURNS[0], {**TURNS[1], "masked": False, "ignore": 0}]}, PLAIN),
    "thinking_blocks": (said(content="A", thinking_blocks=[{"type": "thinking", "thinking": "T", "signature": "s"}]), ["user: Q", "assistant*: <T> A"]),
    "reasoning_under_other_names": (said(content="A", rationale="T"), ["user: Q", "assistant*: <T> A"]),
    "a_part_that_gemini_marks_as_thought": (
        {"contents": [{"role": "user", "parts": [{"text": "Q"}]}, {"role": "model", "parts": [{"text": "T", "thought": True}, {"text": "A"}]}]},
        ["user: Q", "assistant*: <T> A"],
    ),
    "reasoning_that_stands_in_the_content_too": (said(content="<think>\nT\n</think>\n\nA", reasoning_content="T"), ["user: Q", "assistant*: <T> A"]),
    "reasoning_beside_an_empty_think": (said(content="<think>\n\n</think>\n\nA", thinking="T"), ["user: Q", "assistant*: <T> A"]),
    "reasoning_null": (said(content="A", thinking=None), PLAIN),
    "reasoning_without_content": (said(content=None, reasoning_content="T"), ["user: Q", "assistant*: <T>"]),
    "reasoning_inline_stays_text": (said(content="<think>T</think>A"), ["user: Q", "assistant*: <think>T</think>A"]),
    # calls
    "tool_calls": (said(content=None, tool_calls=[{"id": "c", "type": "function", "function": CALL}]), CALLED),
    "tool_calls_with_arguments_in_text": (said(tool_calls=[{"function": {"name": "f", "arguments": '{"city": "Oslo"}'}}]), CALLED),
    "bare_tool_calls": (said(content="", tool_calls=[CALL]), CALLED),
    "tool_calls_with_parameters": (said(tool_calls=[{"name": "f", "parameters": {"city": "Oslo"}}]), CALLED),
    "tool_calls_with_args": (said(tool_calls=[{"name": "f", "args": {"city": "Oslo"}}]), CALLED),
    "tool_calls_with_input": (said(tool_calls=[{"name": "f", "input": {"city": "Oslo"}}]), CALLED),
    "tool_calls_with_kwargs": (said(tool_calls=[{"function": {"name": "f", "kwargs": {"city": "Oslo"}}}]), CALLED),
    "tool_calls_by_tool_name": (said(tool_calls=[{"tool_name": "f", "arguments": {"city": "Oslo"}}]), CALLED),
    "tool_calls_with_a_functions_name": (said(tool_calls=[{"function": "f", "arguments": {"city": "Oslo"}}]), CALLED),
    "function_call_in_camel_case": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "functionCall", "value": json.dumps(CALL)}, {"from": "Tool Response", "value": "1"}]}, [*CALLED, "tool: 1"]),
    "calls_and_results_of_anthropic": (
        {"system": "S", "messages": [TURNS[0],
            {"role": "assistant", "content": [{"type": "text", "text": "Hm."}, {"type": "tool_use", "id": "c", "name": "f", "input": {"city": "Oslo"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "1"}]}, {"type": "text", "text": "And?"}]},
            TURNS[1]]},
        ["system: S", "user: Q", 'assistant*: Hm. f({"city": "Oslo"})', "tool: 1", "user: And?", "assistant*: A"],
    ),
    "a_call_of_anthropic_alone": (said(content=[{"type": "thinking", "thinking": "T"}, {"type": "tool_use", "name": "f", "input": {"city": "Oslo"}}]), ["user: Q", 'assistant*: <T> f({"city": "Oslo"})']),
    "calls_in_tags": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "tool_call", "value": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"}]}, CALLED,
    ),
    "tool_calls_in_text": (said(tool_calls=json.dumps([CALL])), CALLED),
    "tool_calls_with_filled_nulls": (said(content=None, tool_calls=[{"id": None, "function": {"name": "f", "arguments": {"city": "Oslo", "stock": None}}}]), CALLED),
    "nulls_in_text_are_meant": (said(tool_calls=[{"function": {"name": "f", "arguments": '{"x": null}'}}]), ["user: Q", 'assistant*: f({"x": null})']),
    "tool_calls_empty": (said(content="A", tool_calls=[], function_call=None), PLAIN),
    "function_call_of_a_message": (said(function_call={"name": "f", "arguments": '{"city": "Oslo"}'}), CALLED),
    "function_call_of_sharegpt": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": json.dumps(CALL)}]}, CALLED),
    "tool_call_turns_of_swift": (
        {"messages": [TURNS[0], {"role": "tool_call", "content": json.dumps(CALL)}, {"role": "tool_call", "content": json.dumps(CALL)},
                      {"role": "tool_response", "content": "1"}, {"role": "tool_response", "content": "2"}]},
        ["user: Q", 'assistant*: f({"city": "Oslo"}) f({"city": "Oslo"})', "tool: 1", "tool: 2"],
    ),
    "parallel_calls": (said(tool_calls=[CALL, CALL]), ["user: Q", 'assistant*: f({"city": "Oslo"}) f({"city": "Oslo"})']),
    "hermes_call_stays_text": (said(content='<tool_call>\n{"name": "f"}\n</tool_call>'), ["user: Q", 'assistant*: <tool_call>\n{"name": "f"}\n</tool_call>']),
    "results_under_every_role": (
        {"messages": [*({"role": role, "content": "R"} for role in ("tool", "function", "observation", "ipython", "tool_response")), TURNS[1]]},
        ["tool: R"] * 5 + ["assistant*: A"],
    ),
    "a_result_that_is_an_object": ({"messages": [{"role": "tool", "content": {"c": 12}}, TURNS[1]]}, ['tool: {"c": 12}', "assistant*: A"]),
    "a_result_that_is_a_list": ({"messages": [{"role": "tool", "content": [{"type": "cafe"}, 1]}, TURNS[1]]}, ['tool: [{"type": "cafe"}, 1]', "assistant*: A"]),
    "a_result_in_parts": ({"messages": [{"role": "tool", "content": [{"type": "text", "text": "R"}]}, TURNS[1]]}, ["tool: R", "assistant*: A"]),
    "calls_of_xlam": ({"id": 1, "query": "Q", "tools": json.dumps([TOOL["function"]]), "answers": json.dumps([CALL])}, CALLED),
    "a_result_that_is_null": ({"messages": [{"role": "tool", "content": None}, TURNS[1]]}, ["tool:", "assistant*: A"]),
    "glaive": (
        {"system": 'SYSTEM: Use these - \n{"name": "f", "parameters": {}}\n\n{"name": "g", "parameters": {}}\n',
         "chat": "USER: Q\n\n\nASSISTANT: Sure. <functioncall> {\"name\": \"f\", \"arguments\": '{\"city\": \"Oslo\"}'} <|endoftext|>\n\n\n"
                 'FUNCTION RESPONSE: {"r": 1}\n\n\nASSISTANT: A\nUSER: is what I said <|endoftext|>\n\n\n\nUSER: Q2\n\n\nASSISTANT: A2 <|endoftext|>\n\n\n'},
        ["system: Use these -", "user: Q", 'assistant*: Sure. f({"city": "Oslo"})', 'tool: {"r": 1}',
         "assistant*: A\nUSER: is what I said", "user: Q2", "assistant*: A2"],
    ),
    "glaive_in_one_text": (
        {"sample": 'SYSTEM: S {"name": "f"}\n\nUSER: Q\nASSISTANT: <functioncall> {"name": "f", "arguments": {"city": "Oslo"}}\nFUNCTION RESPONSE: 1\nASSISTANT: A'},
        ["system: S", *CALLED, "tool: 1", "assistant*: A"],
    ),
    "glaive_without_functions": ({"system": "SYSTEM: You have no functions.\n", "chat": "USER: Q\n\n\nASSISTANT: A <|endoftext|>"}, ["system: You have no functions.", *PLAIN]),
    "glaive_call_without_arguments": ({"chat": 'USER: Q\n\n\nASSISTANT: <functioncall> {"name": "f"} <|endoftext|>'}, ["user: Q", "assistant*: f({})"]),
    "glaive_call_with_an_apostrophe": (
        {"chat": "USER: Q\n\n\nASSISTANT: <functioncall> {\"name\": \"f\", \"arguments\": '{\"a\": \"it\\'s\"}'}"}, ["user: Q", 'assistant*: f({"a": "it\'s"})'],
    ),
    # what is as if absent
    "null_keys_decide_nothing": ({"messages": None, "conversations": [], "prompt": "Q", "completion": "A", "text": None}, ["prompt: Q", "completion*: A"]),
    "empty_columns_decide_nothing": ({"prompt": "", "completion": "", "text": "A"}, ["text*: A"]),
    "null_and_empty_refuse_nothing": ({"messages": TURNS, "label": None, "images": [], "rejected": "", "objects": {"bbox": []}, "chosen": [None]}, PLAIN),
    "keys_of_turns_filled_with_null": (
        {"messages": [{**turn, "tool_calls": None, "weight": None, "name": None, "images": [], "refusal": None} for turn in TURNS]}, PLAIN,
    ),
    "a_label_that_is_a_topic": ({"messages": TURNS, "label": "maths"}, PLAIN),
    "answers_to_choose_from_that_became_messages": ({"messages": TURNS, "generations": ["x", "y"]}, PLAIN),
    "one_score": ({"messages": TURNS, "score": 0.5, "scores": 3}, PLAIN),
    "verdicts_that_say_yes": ({"messages": TURNS, "correct": True, "reward": 1, "feedback": "thumbs up", "is_wrong": False}, PLAIN),
    "verdicts_on_what_is_no_answer": (
        {"messages": [{**TURNS[0], "valid": False}, {"role": "tool", "content": "E", "success": False, "reward": 0, "failed": True}, TURNS[1]]},
        ["user: Q", "tool: E", "assistant*: A"],
    ),
    "metrics": ({"messages": TURNS, "score": 0.87, "rating": 1, "votes": 0, "quality": "B", "feedback": "Be more brief.", "grade": 3.5}, PLAIN),
    "an_outcome_that_is_told": ({"messages": TURNS, "outcome": "The parcel was sent.", "verdict": {"by": "A"}}, PLAIN),
    "a_score_of_a_text": ({"text": "A", "score": -3, "reward": 0}, ["text*: A"]),
    "markup_is_text": (
        {"messages": [{"role": "user", "content": "<video>\n<source src='a'>\n</video>"}, {"role": "assistant", "content": "<image>"}]},
        ["user: <video>\n<source src='a'>\n</video>", "assistant*: <image>"],
    ),
    "a_placeholder_among_words": ({"instruction": "What does <image> mean in LLaVA?", "output": "A"}, ["user: What does <image> mean in LLaVA?", "assistant*: A"]),
    "a_class_of_a_text": ({"text": "A", "label": 1}, ["text*: A"]),
    "a_loss_that_was_measured": ({"text": "A", "loss": 0.43}, ["text*: A"]),
    # prompt and completion
    "joined_as_it_stands": ({"prompt": "Q", "completion": " A"}, ["prompt: Q", "completion*:  A"]),
    "turns_to_complete": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, PLAIN),
}  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), LEARNED.values(), ids=LEARNED)
def test_what_is_learned_of_a_row_and_what_is_its_context(row: dict[str, Any], expected: list[str]) -> None:
    """Starred turns are learned, all others are context; nothing else is said."""
    assert transcript(read(row)) == expected


REFUSALS = {
    # preferences
    "dpo": ({"prompt": "Q", "completion": "x", "chosen": "A", "rejected": "B"}, '"chosen"', "preference data"),
    "llama_factory_ranking": ({"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]}, '"chosen"', "preference data"),
    "swift_rejected_response": ({"messages": TURNS, "rejected_response": "B"}, '"rejected_response"', "preference data"),
    "swift_rejected_messages": ({"messages": TURNS, "rejected_messages": TURNS}, '"rejected_messages"', "preference data"),
    "openai_preference": ({"messages": TURNS, "preferred_output": TURNS, "non_preferred_output": TURNS}, '"preferred_output"', "preference data"),
    "other_capitals": ({"messages": TURNS, "Rejected": "B"}, '"Rejected"', "preference data"),
    "kto_label_false": ({"messages": TURNS, "label": False}, '"label"', "KTO"),
    "kto_label_true": ({"prompt": "Q", "completion": "A", "label": True}, '"label"', "KTO"),
    "kto_label_of_a_table": ({"prompt": "Q", "completion": "A", "label": "0"}, '"label"', "KTO"),
    "kto_label_in_words": ({"prompt": "Q", "completion": "A", "label": "False"}, '"label"', "KTO"),
    "kto_tag": ({"instruction": "Q", "output": "A", "kto_tag": False}, '"kto_tag"', "KTO"),
    "a_class": ({"messages": TURNS, "label": 1}, '"label"', "classification"),
    "several_classes": ({"messages": TURNS, "label": [1, 3]}, '"label"', "classification"),
    "ranked_answers": ({"messages": TURNS[:1], "responses": ["A", "B"], "scores": [1, 2]}, '"responses"', "several answers"),
    "scores_of_turns": ({"messages": TURNS, "scores": [1, 2]}, '"scores"', "grades"),
    "step_supervision": ({"prompt": "Q", "completion": "A", "completions": ["a", "b"], "labels": [True, False]}, '"completions"', "several answers or steps"),
    # verdicts on the answer
    "correct_false": ({"messages": TURNS, "correct": False}, '"correct"', "says that the answer is wrong"),
    "is_correct_zero": ({"query": "Q", "response": "A", "is_correct": 0}, '"is_correct"', "says that the answer is wrong"),
    "is_correct_in_camel_case": ({"messages": TURNS, "isCorrect": False}, '"isCorrect"', "says that the answer is wrong"),
    "reward_below_zero": ({"messages": TURNS, "reward": -1}, '"reward"', "says that the answer is wrong"),
    "reward_of_nothing": ({"prompt": "Q", "completion": "A", "reward": 0.0}, '"reward"', "says that the answer is wrong"),
    "reward_of_a_table": ({"prompt": "Q", "completion": "A", "reward": "-0.5"}, '"reward"', "says that the answer is wrong"),
    "score_below_zero": ({"instruction": "Q", "output": "A", "score": -2}, '"score"', "says that the answer is wrong"),
    "feedback_in_a_word": ({"messages": TURNS, "feedback": "Thumbs down"}, '"feedback"', "says that the answer is wrong"),
    "feedback_in_a_sign": ({"messages": TURNS, "feedback": "\N{THUMBS DOWN SIGN}"}, '"feedback"', "says that the answer is wrong"),
    "feedback_in_an_object": ({"messages": TURNS, "feedback": {"score": -1, "text": ""}}, '"feedback"', "says that the answer is wrong"),
    "rating_of_a_turn": (said(content="A", rating="bad"), '"rating"', "says that the answer is wrong"),
    "helpsteer_correctness": ({"query": "Q", "response": "A", "correctness": 0, "coherence": 4}, '"correctness"', "says that the answer is wrong"),
    "beavertails": ({"query": "Q", "response": "A", "is_safe": False}, '"is_safe"', "says that the answer is wrong"),
    "trajectory_not_resolved": ({"messages": TURNS, "resolved": False}, '"resolved"', "says that the answer is wrong"),
    "is_wrong": ({"messages": TURNS, "is_wrong": True}, '"is_wrong"', "says that the answer is wrong"),
    "outcome": ({"messages": TURNS, "outcome": "failed"}, '"outcome"', "says that the answer is wrong"),
    "label_in_a_word": ({"messages": TURNS, "label": "incorrect"}, '"label"', "good or bad"),
    "a_negative_answer": ({"instruction": "Q", "output": "A", "negative_output": "B"}, '"negative_output"', "preference data"),
    "a_bad_answer": ({"instruction": "Q", "output": "A", "bad_response": "B"}, '"bad_response"', "preference data"),
    "dispreferred_completion": ({"prompt": "Q", "completion": "A", "dispreferred_completion": "B"}, '"dispreferred_completion"', "preference data"),
    "win_and_lose": ({"prompt": "Q", "completion": "A", "win": "A", "lose": "B"}, '"win"', "preference data"),
    # answers that would be lost
    "an_answer_beside_messages": ({"messages": [*TURNS, {"role": "user", "content": "Q2"}], "response": "A2"}, '"response"', "would not be learned"),
    "a_logged_completion": ({"messages": TURNS[:1], "choices": [{"message": TURNS[1]}]}, '"choices"', "would not be learned"),
    "a_completion_of_other_kind": ({"prompt": TURNS[:1], "completion": "A"}, "completion", "expected a list of messages"),
    "a_prompt_of_other_kind": ({"prompt": "Q", "completion": TURNS[1:]}, "prompt", "expected a list of messages"),
    # masks under names of no known trainer, and settings of trainers
    "learn_false": ({"messages": [TURNS[0], {**TURNS[1], "learn": False}]}, '"learn"', "chooses what is learned"),
    "compute_loss_zero": ({"messages": [TURNS[0], {**TURNS[1], "compute_loss": 0}]}, '"compute_loss"', "chooses what is learned"),
    "a_name_with_train": ({"messages": [TURNS[0], {**TURNS[1], "train_this_turn": False}]}, '"train_this_turn"', "chooses what is learned"),
    "a_name_with_mask": ({"messages": [TURNS[0], {**TURNS[1], "mask_this": True}]}, '"mask_this"', "leaves something out"),
    "skip_true": ({"messages": [TURNS[0], {**TURNS[1], "skip": True}]}, '"skip"', "leaves something out"),
    "a_row_to_exclude": ({"text": "A", "exclude": True}, '"exclude"', "leaves something out"),
    "axolotl_train_on_inputs": ({"messages": TURNS, "train_on_inputs": True}, '"train_on_inputs"', "a trainer's setting"),
    "llama_factory_mask_history": ({"messages": TURNS, "mask_history": True}, '"mask_history"', "a trainer's setting"),
    "axolotl_roles_to_train": ({"messages": TURNS, "roles_to_train": ["assistant", "tool"]}, '"roles_to_train"', "a trainer's setting"),
    "swift_loss_scale_by_name": ({"messages": TURNS, "loss_scale": "last_round"}, "loss_scale", "0 or 1"),
    "harmony_analysis": (said(content="T", channel="analysis"), '"channel"', "harmony"),
    # not text
    "frames": ({"messages": TURNS, "frames": ["a.png"]}, '"frames"', "only text"),
    "multi_modal_data": ({"messages": TURNS, "multi_modal_data": {"image": ["a"]}}, '"multi_modal_data"', "only text"),
    "attachments_of_a_turn": ({"messages": [{**TURNS[0], "attachments": [{"file": "a.pdf"}]}, TURNS[1]]}, '"attachments"', "only text"),
    "placeholder_of_llava": ({"conversations": [{"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": "A"}]}, "<image>", "only text"),
    "placeholder_of_llama_factory": ({"instruction": "<video>Who is it?", "output": "A"}, "<video>", "only text"),
    "placeholder_on_its_line": ({"messages": [{"role": "user", "content": "Look:\n<audio> <audio>\nand listen"}, TURNS[1]]}, "<audio>", "only text"),
    "placeholder_of_qwen": ({"messages": [{"role": "user", "content": "<|vision_start|><|image_pad|><|vision_end|>Q"}, TURNS[1]]}, "<|vision_start|>", "only text"),
    "placeholder_of_phi": ({"prompt": "<|image_1|>\nQ", "completion": "A"}, "<|image_1|>", "only text"),
    "placeholder_in_parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "[IMG]"}, {"type": "text", "text": "Q"}]}, TURNS[1]]}, "[IMG]", "only text"),
    "images": ({"messages": TURNS, "images": ["a.png"]}, '"images"', "only text"),
    "image_of_sharegpt": ({"conversations": TURNS, "image": "a.jpg"}, '"image"', "only text"),
    "videos": ({"messages": TURNS, "videos": ["a.mp4"]}, '"videos"', "only text"),
    "audio_of_a_turn": (said(content="A", audio={"id": "x"}), '"audio"', "only text"),
    "images_of_a_turn": (said(content="A", images=["a.png"]), '"images"', "only text"),
    "image_part": (said(content=[{"type": "image_url", "image_url": {"url": "u"}}]), "image_url", "only text"),
    "boxes": ({"messages": TURNS, "objects": {"bbox": [[1, 2]], "ref": []}}, '"objects"', "only text"),
    # tokens and steering
    "input_ids": ({"text": "A", "input_ids": [1, 2]}, '"input_ids"', "finished tokens"),
    "labels": ({"messages": TURNS, "labels": [-100, 2]}, '"labels"', "finished tokens"),
    "template_arguments": ({"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False}}, '"chat_template_kwargs"', "chat template"),
    "enable_thinking": ({"messages": TURNS, "enable_thinking": False}, '"enable_thinking"', "chat template"),
    "fill_in_the_middle": ({"prompt": "Q", "completion": "A", "suffix": "B"}, '"suffix"', "fill in the middle"),
    # masks that do not fit
    "fraction": (muted("weight", 0.5), "messages[1].weight", "0 or 1"),
    "fraction_of_swift": (muted("loss_scale", 2.0), "messages[1].loss_scale", "0 or 1"),
    "a_users_turn_to_learn": ({"messages": [{**TURNS[0], "train": True}, TURNS[1]]}, "messages[0].train", "only the assistant's turns"),
    "mask_of_tokens": ({"messages": TWO, "loss_mask": [0, 0, 0, 1, 1]}, "loss_mask", "5 values for 4 turns"),
    "mask_of_the_user": ({"messages": TURNS, "loss_mask": [1, 1]}, "loss_mask[0]", "only the assistant's turns"),
    "masks_contradict": (said(content="A", weight=1, train=False), "messages[1].train", "contradict"),
    "row_mask_contradicts": ({**muted("weight", 0, 1), "loss_mask": [1, 1]}, "loss_mask[0]", "contradicts"),
    "parts_of_a_turn": (said(content="A", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}]), "train_detail", "whole turns"),
    "a_muted_part": (said(content=[{"type": "text", "text": "a", "train": False}, {"type": "text", "text": "b"}]), "content[0].train", "only whole turns"),
    "a_weighed_part": (said(content=[{"type": "text", "text": "a", "weight": 0.5}]), "content[0].weight", "only whole turns"),
    "axolotl_segments": ({"segments": [{"label": False, "text": "Q"}, {"label": True, "text": "A"}], "text": "QA"}, '"segments"', "only some are learned"),
    "a_turn_alone": ({"text": "Q", "role": "prompter", "message_id": "1"}, "role", "one turn of a conversation"),
    "a_number_for_an_answer": ({"prompt": "2+2=", "completion": 4}, "completion", "found a number"),
    "row_weight": ({"messages": TURNS, "weight": 0.3}, "weight", "0 or 1"),
    "sample_weight": ({"prompt": "Q", "completion": "A", "sample_weight": 2}, "sample_weight", "weighs the row"),
    "a_text_not_to_learn": ({"text": "A", "weight": 0}, "weight", "nothing of the row is learned"),
    "a_completion_not_to_learn": ({"prompt": "Q", "completion": "A", "train": False}, "train", "nothing of the row is learned"),
    "nemo_mask_names_the_assistant": ({"messages": TURNS, "mask": "Assistant"}, '"mask"', "trainers differ"),
    "a_mask_of_unclear_meaning": ({"messages": [TURNS[0], {**TURNS[1], "mask": 1}]}, "messages[1].mask", "trainers differ"),
    "a_turn_to_ignore": ({"messages": [TURNS[0], {**TURNS[1], "masked": True}]}, "messages[1].masked", "leaves something out"),
    "any_rejected_answer": ({"conversations": TURNS, "rejected_value": "B"}, '"rejected_value"', "preference data"),
    "thumbs_down": ({"messages": TURNS, "thumbs_up": False}, '"thumbs_up"', "good or bad"),
    # contradictions, and what has no place
    "two_systems": ({"system": "S", "messages": [{"role": "system", "content": "other"}, *TURNS]}, "system", "contradicts"),
    "two_roles": ({"messages": [{"role": "user", "from": "gpt", "content": "Q"}]}, "messages[0].from", "contradict"),
    "two_contents": (said(content="A", value="B"), "messages[1].value", "contradict"),
    "reasoning_that_contradicts_the_content": (said(content="<think>U</think>A", reasoning="T"), "messages[1].content", "contradicts"),
    "two_arguments": (said(tool_calls=[{"name": "f", "arguments": {"a": 1}, "input": {"b": 1}}]), "tool_calls[0].input", "contradict"),
    "an_empty_role": ({"messages": [{"role": "", "content": "Q"}]}, "messages[0].role", "it is empty"),
    "conversations_in_a_conversation": ({"conversations": [{"a": "b"}, TURNS]}, "conversations[0]", "'role' is missing"),
    "geminis_calls": ({"contents": [{"role": "model", "parts": [{"functionCall": {"name": "f"}}]}]}, "parts[0]", "a call or a result"),
    "two_reasonings": (said(content="A", reasoning="T", thinking="U"), "messages[1].thinking", "contradict"),
    "calls_twice": (said(tool_calls=[CALL], function_call=CALL), "function_call", "given twice"),
    "tools_twice": ({"messages": TURNS, "tools": [TOOL], "functions": [{"name": "g"}]}, "tools", "differ"),
    "system_beside_text": ({"prompt": "Q", "completion": "A", "system": "S"}, '"system"', "no place"),
    "tools_beside_text": ({"prompt": "Q", "completion": "A", "tools": [TOOL]}, '"tools"', "no place"),
    "history_beside_text": ({"prompt": "Q", "completion": "A", "history": [["a", "b"]]}, '"history"', "no place"),
    "history_beside_messages": ({"messages": TURNS, "history": [["a", "b"]]}, '"history"', "earlier turns"),
    "history_in_another_form": ({"instruction": "Q", "output": "A", "history": ["a", "b"]}, "history[0]", "pair"),
    "glaive_call_that_is_none": ({"chat": "USER: Q\nASSISTANT: <functioncall> f(1)"}, "chat", "is not a call"),
    "glaive_arguments_that_are_none": ({"chat": "USER: Q\nASSISTANT: <functioncall> {\"name\": \"f\", \"arguments\": '{a: 1}'}"}, "chat", "should hold JSON"),
    "glaive_functions_that_are_none": ({"system": 'SYSTEM: S {"name": "f",}', "chat": "USER: Q\nASSISTANT: A"}, "system", "not JSON objects"),
    "glaive_with_another_system": ({"system": "SYSTEM: S", "chat": "SYSTEM: T\nUSER: Q\nASSISTANT: A"}, "system", "contradicts"),
    "refusal": (said(content="A", refusal="I can not"), '"refusal"', "refusal"),
    "turns_in_text_that_are_none": ({"messages": "[{'role': 'user'}]"}, "messages", "should hold JSON"),
    "turns_that_are_all_null": ({"messages": [None], "text": None}, "messages", "the list is empty"),
    "a_completion_of_null": ({"prompt": TURNS[:1], "completion": [None]}, "completion", "the list is empty"),
    "unknown_role": ({"messages": [{"role": "narrator", "content": "x"}]}, "messages[0].role", "unknown role 'narrator'"),
    "a_result_with_a_picture": ({"messages": [{"role": "tool", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]}, "image_url", "only text"),
    "a_users_call": ({"messages": [{"role": "user", "content": [{"type": "tool_use", "name": "f", "input": {}}]}]}, "content[0]", "in a turn of the user"),
    "a_call_of_anthropic_twice": (said(content=[{"type": "tool_use", "name": "f", "input": {}}], tool_calls=[CALL]), "messages[1]", "given twice"),
    "a_call_without_a_name": (said(tool_calls=[{"function": {"arguments": "{}"}}]), "tool_calls[0].function", "function's name"),
    "a_user_who_calls": ({"messages": [{**TURNS[0], "function_call": CALL}]}, "messages[0].function_call", "only the assistant"),
    "an_answer_without_content": (said(content=None), "messages[1].content", "needs content"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "named", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_a_row_that_would_be_trained_into_something_else_is_refused_by_name(
    row: dict[str, Any], named: str, reason: str
) -> None:
    """With the key or its path, and what it means."""
    with pytest.raises(LineError) as caught:
        read(row)
    assert named in caught.value.reason
    assert reason in caught.value.reason


@pytest.mark.parametrize("group", REFUSED, ids=lambda group: group.names[0])
def test_every_refused_key_is_refused_with_what_to_do(group: Any) -> None:
    """In rows and in turns, whatever the row holds otherwise."""
    values = (True, False, 2, -1, ["x"], "good", "analysis", "user", {"bbox": [1]}, [{"label": True, "text": "x"}])
    for name in group.names:
        value = next(value for value in values if group.applies(value, True))
        rows = {Place.ROW: {"messages": TURNS, name: value}, Place.TURN: said(content="A", **{name: value})}
        for place in group.places:
            with pytest.raises(LineError) as caught:
                read(rows[place])
            assert f'"{name}"' in caught.value.reason
            assert caught.value.hint == group.advice


def test_keys_that_are_neither_used_nor_refused_are_named() -> None:
    """At row level, in turns, in calls and in parts; those without a value are not."""
    row = {
        "id": 7,
        "source": "web",
        "empty": None,
        "conversations": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Q", "cache_control": {"type": "x"}}],
                "timestamp": 1,
            },
            {"role": "assistant", "tool_calls": [{"index": 0, "function": CALL}], "thinking": "T", "logprobs": None},
        ],
    }
    assert read(row).unused_keys == (
        "conversations[].content[].cache_control",
        "conversations[].timestamp",
        "conversations[].tool_calls[].index",
        "id",
        "source",
    )
    assert read({"text": "A", "messages": None, "system": "S"}).unused_keys == ("system",)
    assert read({"messages": TURNS, "prompt": "Q"}).unused_keys == ("prompt",)


def test_reasoning_of_a_speaker_who_has_none_is_named() -> None:
    """Templates have no place for a user's reasoning."""
    assert read({"messages": [{**TURNS[0], "reasoning": "T"}, TURNS[1]]}).unused_keys == ("messages[].reasoning",)


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [TOOL["function"]],
        [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
        [{"functionDeclarations": [TOOL["function"]]}],
        json.dumps([TOOL["function"]]),
        [json.dumps(TOOL)],
        TOOL,
        [{"type": "function", **TOOL["function"]}],
        [{**TOOL, "function": {**TOOL["function"], "strict": None}}, None],
    ],
)
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_in_every_form_become_openai_s(tools: Any, key: str) -> None:
    """Under both names, in rows and in a system's turn; nulls that `datasets` filled in are gone."""
    assert read({"messages": TURNS, key: tools}).tools == [TOOL]
    assert read({"messages": [{"role": "system", "content": None, key: tools}, *TURNS]}).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "", "  ", [None], "[]"])
def test_no_tools_are_no_tools(tools: Any) -> None:
    """However that is written."""
    assert read({"messages": TURNS, "tools": tools}).tools is None


def test_results_keep_the_call_and_the_function_they_are_of() -> None:
    """Under OpenAI's names, old and new, and Ollama's."""
    messages = read(
        {
            "messages": [
                {"role": "assistant", "function_call": {**CALL, "arguments": "{}"}},
                {"role": "function", "name": "f", "content": "1"},
                {"role": "tool", "tool_call_id": "c1", "content": "2"},
                {"role": "tool", "tool_name": "f", "content": "3"},
            ]
        }
    ).messages
    assert messages == [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "name": "f", "content": "1"},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "tool", "name": "f", "content": "3"},
    ]  # fmt: skip
    result = {"type": "tool_result", "tool_use_id": "c2", "content": "4"}
    assert read({"messages": [{"role": "user", "content": [result]}, TURNS[1]]}).messages == [
        {"role": "tool", "content": "4", "tool_call_id": "c2"},
        TURNS[1],
    ]


def test_prompt_and_completion_as_chat_are_a_user_s_and_an_assistant_s_turn() -> None:
    """With the system text, the tools and the earlier turns that joined text has no place for."""
    row = {"prompt": "Q2", "completion": "A2", "system": "S", "tools": [TOOL], "history": [["Q", "A"]]}
    content = read(row, CHAT)
    assert content.kind == "messages"
    assert transcript(content) == ["system: S", "user: Q", "assistant*: A", "user: Q2", "assistant*: A2"]
    assert content.tools == [TOOL]
    assert not content.unused_keys


def test_columns_as_chat_are_turns_as_well() -> None:
    """`[data.columns]` and `[data] prompt_completion` go together; turns and texts are left as they are."""
    rules = Rules(columns=Columns(prompt="question", completion="answer"), prompt_completion="chat")
    assert transcript(read({"question": "Q", "answer": "A", "id": 1}, rules)) == PLAIN
    assert transcript(read({"prompt": TURNS[:1], "completion": TURNS[1:]}, CHAT)) == PLAIN
    assert transcript(read({"text": "A"}, CHAT)) == ["text*: A"]


def test_a_column_that_is_named_means_what_its_owner_says() -> None:
    """Who names `chosen` as the completion means it; the other half of the pair is still refused."""
    rules = Rules(columns=Columns(prompt="prompt", completion="chosen"))
    assert read({"prompt": "Q", "chosen": "A"}, rules).completion == "A"
    with pytest.raises(LineError, match="rejected"):
        read({"prompt": "Q", "chosen": "A", "rejected": "B"}, rules)


@pytest.mark.parametrize("format_", [Format.MESSAGES, Format.SHAREGPT])
def test_a_roles_value_of_any_kind_is_a_bad_row_and_nothing_worse(format_: Format) -> None:
    """Lists and objects where words belong."""
    key = "messages" if format_ is Format.MESSAGES else "conversations"
    for odd in ([1], {"a": 1}, 7, True, [["user"]]):
        for turn in ({"role": odd, "content": "x"}, {"role": "user", "content": odd}, {"from": odd, "value": odd}):
            line = json.dumps({key: [turn]}).encode()
            with pytest.raises(LineError):
                check_row(line, format_, Rules())
