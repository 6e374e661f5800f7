"""What each key of a row and of a turn means: used, refused, or not used.

A key is *refused* when a trainer that knows it would learn something else from the row than we would: the answers of a
preference row, pictures, finished tensors. Every key that is neither used nor refused is *not used*: the row is trained
without it, and the report counts it. A key without a value (null, "", [], {}, or only such inside) is as if absent.
docs/data.md is generated from these tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any

CONVERSATION_KEYS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat", "contents")
TRANSCRIPT_KEYS = ("chat", "sample")
SYSTEM_KEYS = (
    "system", "system_prompt", "system_message", "system_instruction", "systemInstruction", "system_text", "sys_prompt",
    "systemPrompt", "systemMessage", "preamble"
)  # fmt: skip
TOOLS_KEYS = ("tools", "functions")
ANSWER_KEYS = ("response", "completion", "output", "answer", "answers", "reply", "choices", "target", "solution")
HISTORY_KEY = "history"
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text", "parts", "message")
REASONING_KEYS = (
    "reasoning_content", "reasoning", "thinking", "thought", "thoughts", "think", "thinking_content", "reasoning_text",
    "chain_of_thought", "cot", "tool_plan", "thought_process", "rationale", "analysis", "reasoning_trace", "thinking_trace"
)  # fmt: skip
REASONING_DETAILS_KEYS = ("reasoning_details", "thinking_blocks")  # in which some services repeat it
MASK_KEYS = (
    "weight", "train", "training", "trainable", "loss", "loss_mask", "loss_scale", "loss_weight", "train_mask"
)  # fmt: skip
ROW_MASK_KEYS = (*MASK_KEYS, "weights", "loss_masks", "loss_scales", "loss_weights", "turn_mask")
SAMPLE_WEIGHT_KEYS = ("sample_weight", "example_weight")
USER_KEYS = ("human", "user", "input", "query", "question", "prompt", "instruction")  # of a turn that is a pair
ASSISTANT_KEYS = ("assistant", "gpt", "bot", "model", "output", "response", "answer", "completion")

ROLES: Mapping[str, str] = {  # how published files call a speaker, and the role that training sees
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "llm": "assistant",
    "claude": "assistant",
    "gemini": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_results": "tool",
    "tool_output": "tool",
    "function_response": "tool",
    "function_result": "tool",
    "environment": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
}
CALL_KEYS = ("tool_calls", "function_call", "function_calls")
CALL_NAME_KEYS = ("name", "tool_name", "function_name")
CALL_ARGUMENTS_KEYS = ("arguments", "parameters", "args", "kwargs", "input")
CALL_ROLES = frozenset({"function_call", "tool_call", "tool_calls"})  # whose content is the call


class Place(StrEnum):
    """Where a key stands."""

    ROW = "row"
    TURN = "turn"


@dataclass(frozen=True, kw_only=True)
class Used:
    """Keys that are read, and what they are."""

    names: tuple[str, ...]
    meaning: str
    place: Place


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Keys that change what a row means and are not supported; `applies` says for which values."""

    names: tuple[str, ...]
    meaning: str  # completes: `"rejected" ...`
    advice: str
    values: str  # `applies` in words
    applies: Callable[[Any, bool], bool]  # the value, and whether the row holds answers (else it is plain text)
    places: tuple[Place, ...] = (Place.ROW, Place.TURN)
    of_answers: bool = False  # in turns: in those of the assistant alone, whom a verdict is about

    def reason(self, key: str) -> str:
        """Why a row with this key is refused."""
        return f"{json.dumps(key)} {self.meaning}"


def speaker_name(said: str) -> str:
    """A speaker's name as ROLES has it, however it is capitalised or joined."""
    name = said.strip().casefold()
    return name if name in ROLES else _SPEAKERS.get(re.sub(r"[\s_-]", "", name), name)


_SPEAKERS = {name.replace("_", ""): name for name in ROLES}


def role_named(name: str) -> str | None:
    """The role that a speaker's name stands for; None when it is not known."""
    return ROLES.get(speaker_name(name))


def is_given(value: Any) -> bool:
    """Whether a key has a value; `datasets` fills those that a row lacks with null, at every depth."""
    if isinstance(value, dict):
        return any(map(is_given, value.values()))
    if isinstance(value, list):
        return any(map(is_given, value))
    return value is not None and value != ""


def is_number(value: Any) -> bool:
    """A JSON number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _any(value: Any, answers: bool) -> bool:
    return True


def _list(value: Any, answers: bool) -> bool:
    return isinstance(value, list)


def _list_or_object(value: Any, answers: bool) -> bool:
    return isinstance(value, list | dict)


def _text_or_list(value: Any, answers: bool) -> bool:
    return isinstance(value, str | list | dict)


def _answer_or_verdict(value: Any, answers: bool) -> bool:
    return isinstance(value, str | list | dict | bool)


def _scores(value: Any, answers: bool) -> bool:
    return answers and isinstance(value, list)


_YES = frozenset(("1", "true", "yes", "good", "desirable", "chosen", "preferred", "positive", "correct", "right"))
_NO = frozenset(
    (
        "false", "no", "bad", "undesirable", "rejected", "dispreferred", "negative", "incorrect", "wrong", "fail", "failed",
        "failure", "unacceptable", "poor", "dislike", "disliked", "down", "downvote", "downvoted", "thumb_down",
        "thumbs_down", "thumbsdown", "\N{THUMBS DOWN SIGN}",
    )
)  # fmt: skip
_VERDICTS = _YES | _NO | {"0"}


def _verdict(value: Any, answers: bool) -> bool:
    if isinstance(value, list):
        return any(_verdict(item, answers) for item in value)
    if isinstance(value, str):
        return answers and _word(value) in _VERDICTS
    return isinstance(value, bool) or (answers and is_number(value))


def _word(text: str) -> str:
    return text.strip().casefold().replace(" ", "_").replace("-", "_")


def _says_wrong(value: Any, answers: bool) -> bool:
    """Whether a value is false, a word for it, or beside answers 0 or less; or one of those that it holds."""
    return _holds_bad(value, answers, lambda number: number <= 0)


def _grades_below_zero(value: Any, answers: bool) -> bool:
    """As `_says_wrong`, but 0 is a grade as any other."""
    return _holds_bad(value, answers, lambda number: number < 0)


def _holds_bad(value: Any, answers: bool, is_bad: Callable[[float], bool]) -> bool:
    if isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        return any(_holds_bad(item, answers, is_bad) for item in inner)
    if isinstance(value, str):
        return _word(value) in _NO or (answers and (number := _number(value)) is not None and is_bad(number))
    return value is False or (answers and is_number(value) and is_bad(value))


def _number(text: str) -> float | None:
    """The number that a text is, as tables have them; None when it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _true(value: Any, answers: bool) -> bool:
    return value is True or (is_number(value) and value != 0)


def _false(value: Any, answers: bool) -> bool:
    return value is False or (is_number(value) and value == 0)


def _true_or_words(value: Any, answers: bool) -> bool:
    return value is True or isinstance(value, str | list)


def _other_speakers(value: Any, answers: bool) -> bool:
    """Whether someone else than the assistant is named."""
    names = value if isinstance(value, list) else [value]
    return any(isinstance(name, str) and role_named(name) != "assistant" for name in names)


def _harmony(value: Any, answers: bool) -> bool:
    return isinstance(value, str) and value.strip().casefold() in ("analysis", "commentary")


def _any_mask(value: Any, answers: bool) -> bool:
    if isinstance(value, str):  # NeMo's: the speaker who is not learned
        return role_named(value) == "assistant"
    return isinstance(value, bool | list) or is_number(value)


def _not_one(value: Any, answers: bool) -> bool:
    return is_number(value) and value != 1


def _labelled_parts(value: Any, answers: bool) -> bool:
    return isinstance(value, list) and any(
        isinstance(item, dict) and {"label", "text"} <= item.keys() for item in value
    )


def _boxes(value: Any, answers: bool) -> bool:
    return isinstance(value, dict) and not value.keys().isdisjoint({"bbox", "ref", "image_id"})


_WITHOUT_PAIRS = "keep the better answer as the assistant's turn (or the completion), and remove the other keys"

USED: tuple[Used, ...] = (
    Used(
        names=CONVERSATION_KEYS,
        meaning="the conversation: a list of turns; the first of these keys that has a value",
        place=Place.ROW,
    ),
    Used(names=("prompt", "completion"), meaning="text, or lists of turns", place=Place.ROW),
    Used(
        names=("instruction", "input", "output"),
        meaning="Alpaca: a user's turn, instruction and input with an empty line between, and the answer",
        place=Place.ROW,
    ),
    Used(names=("query", "response"), meaning="a user's turn and the answer", place=Place.ROW),
    Used(
        names=("query", "answers"),
        meaning="beside tools, as xLAM has them: a user's turn, and the calls that answer it",
        place=Place.ROW,
    ),
    Used(
        names=TRANSCRIPT_KEYS,
        meaning="a conversation in one text, as Glaive has it: `USER:`, `ASSISTANT:`, `FUNCTION RESPONSE:` at the beginning of"
        " lines, calls behind `<functioncall>`, and in the system text the definitions of the functions",
        place=Place.ROW,
    ),
    Used(names=("text",), meaning="a text that is learned as it stands", place=Place.ROW),
    Used(
        names=(HISTORY_KEY,),
        meaning="earlier turns, `[[user, assistant], ...]`, in rows of one question and one answer",
        place=Place.ROW,
    ),
    Used(
        names=SYSTEM_KEYS,
        meaning="the system text, wherever there are turns; it must not contradict one among them",
        place=Place.ROW,
    ),
    Used(
        names=TOOLS_KEYS,
        meaning="definitions of tools, wherever there are turns: in OpenAI's form, bare, or as JSON inside a string",
        place=Place.ROW,
    ),
    Used(
        names=ROW_MASK_KEYS,
        meaning="which turns are learned: a list with 0 or 1 for each turn or for each answer, or one of them for all",
        place=Place.ROW,
    ),
    Used(names=ROLE_KEYS, meaning="who speaks", place=Place.TURN),
    Used(names=CONTENT_KEYS, meaning="what is said: text, or a list of parts that are text", place=Place.TURN),
    Used(
        names=(*USER_KEYS, *ASSISTANT_KEYS),
        meaning="a question and its answer in one object, where no key says who speaks",
        place=Place.TURN,
    ),
    Used(
        names=(*REASONING_KEYS, *REASONING_DETAILS_KEYS),
        meaning="the assistant's reasoning before the content",
        place=Place.TURN,
    ),
    Used(
        names=("tool_calls", "function_call", "function_calls"),
        meaning="the assistant's calls; arguments are an object or JSON inside a string",
        place=Place.TURN,
    ),
    Used(
        names=("tool_call_id", "name", "tool_name"), meaning="which call or function a result is of", place=Place.TURN
    ),
    Used(names=TOOLS_KEYS, meaning="definitions of tools, in a system's or developer's turn", place=Place.TURN),
    Used(
        names=MASK_KEYS,
        meaning="0 or false: this answer is context and is not learned; 1 or true: it is",
        place=Place.TURN,
    ),
)

REFUSED: tuple[Refused, ...] = (
    Refused(
        names=(
            "chosen", "rejected", "chosen_response", "rejected_response", "rejected_responses", "chosen_output",
            "rejected_output", "chosen_answer", "rejected_answer", "chosen_message", "rejected_message", "chosen_messages",
            "rejected_messages", "chosen_conversation", "rejected_conversation", "chosen_conversations",
            "rejected_conversations", "conversations_chosen", "conversations_rejected", "chosen_completion",
            "rejected_completion", "chosen_text", "rejected_text", "answer_chosen", "answer_rejected", "response_chosen",
            "response_rejected", "chosen_score", "rejected_score", "score_chosen", "score_rejected", "chosen_rating",
            "rejected_rating", "preferred", "non_preferred", "preferred_output", "non_preferred_output",
            "preferred_response", "dispreferred", "dispreferred_response", "dispreferred_output", "better_response",
            "worse_response", "better_response_id", "safer_response_id", "response_0", "response_1", "response_a",
            "response_b", "response_j", "response_k", "response1", "response2", "answer_0", "answer_1", "output_1",
            "output_2", "conversation_a", "conversation_b", "human_ref_a", "human_ref_b", "positive_messages",
            "negative_messages", "overall_preference", "rejected_images",
        ),
        meaning="belongs to a pair of answers, one better and one worse (preference data: DPO, ORPO, reward models),"
        " which cannot be trained here",
        advice=_WITHOUT_PAIRS,
        values="any",
        applies=_any,
    ),
    Refused(
        names=(
            "positive", "negative", "better", "worse", "winner", "loser", "win", "lose", "accepted", "accepted_response",
        ),
        meaning="holds an answer or a text to prefer or to avoid (preference data), which cannot be trained here",
        advice=_WITHOUT_PAIRS,
        values="text, a list, true or false",
        applies=_answer_or_verdict,
    ),
    Refused(
        names=("completions", "responses", "candidates"),
        meaning="holds several answers or steps of one prompt (ranking, reward or step supervision), which cannot be"
        " trained here",
        advice="make a row of each answer that is to be learned",
        values="a list",
        applies=_list,
    ),
    Refused(
        names=(
            "label", "kto_tag", "kto_label", "desirable", "is_desirable", "is_chosen", "is_preferred", "is_rejected",
            "is_good", "is_bad", "good", "bad", "thumbs_up", "thumbs_down", "is_accepted",
        ),
        meaning="says whether the answer is good or bad, or which class it is of (KTO, reward models, classification); "
        "bad answers would be learned as good ones",
        advice="keep the rows whose answers are to be learned, and remove the key from them",
        values="true, false or a word for them; beside answers also numbers, and lists of these",
        applies=_verdict,
    ),
    Refused(
        names=(
            "correct", "is_correct", "correctness", "answer_correct", "answer_is_correct", "is_right", "passed", "is_passed",
            "pass", "success", "successful", "is_successful", "succeeded", "resolved", "solved", "is_solved", "valid",
            "is_valid", "approved", "is_approved", "acceptable", "is_acceptable", "helpful", "is_helpful", "is_safe",
            "is_response_safe", "liked", "is_liked", "upvoted", "accept", "verdict", "judgement", "judgment", "outcome",
            "reward", "correctness_math_verify",
        ),
        meaning="says that the answer is wrong or not wanted, and it would be learned as a right one",
        advice="leave out the rows whose answers are not to be learned",
        values="false or a word for it; beside answers also 0 and numbers below it; in lists and objects, any of these",
        applies=_says_wrong,
        of_answers=True,
    ),
    Refused(
        names=(
            "score", "rating", "user_rating", "feedback", "user_feedback", "human_feedback", "vote", "votes", "grade",
            "quality", "thumb", "thumbs",
        ),
        meaning="says that the answer is wrong or not wanted, and it would be learned as a right one",
        advice="leave out the rows whose answers are not to be learned",
        values="false or a word for it; beside answers also numbers below 0; in lists and objects, any of these",
        applies=_grades_below_zero,
        of_answers=True,
    ),
    Refused(
        names=(
            "incorrect", "is_incorrect", "wrong", "is_wrong", "failed", "is_failed", "invalid", "is_invalid", "disliked",
            "is_disliked", "downvoted", "is_hallucination", "hallucination", "hallucinated",
        ),
        meaning="says that the answer is wrong or not wanted, and it would be learned as a right one",
        advice="leave out the rows whose answers are not to be learned",
        values="true, or a number that is not 0",
        applies=_true,
        of_answers=True,
    ),
    Refused(
        names=(
            "scores", "ratings", "rewards", "ranks", "advantages", "step_labels", "step_rewards", "turn_rewards",
            "token_rewards",
        ),
        meaning="grades several answers, turns or steps (ranking, reward or step supervision), which cannot be trained"
        " here",
        advice="keep the rows and turns that are to be learned, and remove the key",
        values="a list beside answers",
        applies=_scores,
    ),
    Refused(
        names=("mask", "masks"),
        meaning="chooses what is learned, and trainers differ in whether 1 is learned or left out",
        advice='say it as "weight": 1 for turns that are learned, 0 for the others',
        values="true, false, a number, a list, or a name of the assistant",
        applies=_any_mask,
    ),
    Refused(
        names=(
            "masked", "is_masked", "mute", "muted", "ignore", "ignored", "ignore_loss", "no_loss", "skip_loss", "mask_loss",
            "skip", "skipped", "exclude", "excluded", "omit", "discard", "discarded", "no_train", "not_trained",
        ),
        meaning="leaves something out of what is learned, under a name of no known trainer",
        advice='say it as "weight": 0 in the turns that are not to be learned',
        values="true, or a number that is not 0",
        applies=_true,
    ),
    Refused(
        names=(
            "learn", "learned", "is_learned", "do_train", "is_trained", "trained", "to_train", "compute_loss",
            "calculate_loss", "has_loss", "use_loss", "supervise", "supervised", "mask_prompt", "mask_input", "mask_inputs",
        ),
        meaning="chooses what is learned, under a name of no known trainer",
        advice='say it as "weight": 0 in the turns that are not to be learned',
        values="false, or 0",
        applies=_false,
    ),
    Refused(
        names=(
            "train_on_input", "train_on_inputs", "train_on_prompt", "train_on_prompts", "mask_history", "last_turn_only",
            "only_last_turn", "train_on_last_turn", "train_on_last_turn_only", "train_last_turn_only",
        ),
        meaning="is a trainer's setting of what is learned, which is not read from rows",
        advice='set [data] train_on (for this file in its sidecar), or give the turns a "weight", and remove the key',
        values="true or text",
        applies=_true_or_words,
        places=(Place.ROW,),
    ),
    Refused(
        names=("roles_to_train", "train_on_roles"),
        meaning="is a trainer's setting of what is learned, which is not read from rows",
        advice='set [data] train_on (for this file in its sidecar), or give the turns a "weight", and remove the key',
        values="somebody else than the assistant",
        applies=_other_speakers,
        places=(Place.ROW,),
    ),
    Refused(
        names=("channel",),
        meaning="says that the turn is no answer but reasoning or a call (harmony), which is not read from there",
        advice='give reasoning as "reasoning_content" and calls as "tool_calls" of the answer\'s turn',
        values="analysis or commentary",
        applies=_harmony,
        places=(Place.TURN,),
    ),
    Refused(
        names=SAMPLE_WEIGHT_KEYS,
        meaning="weighs the row against others, which is not supported",
        advice="leave out rows that are not to be learned, and remove the key from the others",
        values="a number other than 1",
        applies=_not_one,
        places=(Place.ROW,),
    ),
    Refused(
        names=(
            "image", "images", "image_path", "image_paths", "image_url", "image_urls", "image_file", "image_files",
            "image_base64", "img", "imgs", "video", "videos", "video_path", "video_paths", "video_url", "video_urls",
            "audio", "audios", "audio_path", "audio_paths", "audio_url", "audio_urls", "input_audio", "speech",
            "media_path", "media_paths", "media_files", "multi_modal_data", "multimodal_data", "mm_data",
        ),
        meaning="holds pictures, video or sound, and only text can be trained",
        advice="leave such rows out, or remove the key if the text stands on its own",
        values="text, a list or an object",
        applies=_text_or_list,
    ),
    Refused(
        names=("picture", "pictures", "photo", "photos", "frames", "media", "medias", "attachment", "attachments"),
        meaning="holds pictures, video or sound, and only text can be trained",
        advice="leave such rows out, or remove the key if the text stands on its own",
        values="a list or an object",
        applies=_list_or_object,
    ),
    Refused(
        names=("objects",),
        meaning="holds boxes in a picture, and only text can be trained",
        advice="leave such rows out, or remove the key if the text stands on its own",
        values="an object with bbox or ref",
        applies=_boxes,
        places=(Place.ROW,),
    ),
    Refused(
        names=(
            "input_ids", "labels", "attention_mask", "position_ids", "token_type_ids", "completion_mask",
            "assistant_mask", "assistant_masks", "token_ids", "prompt_ids", "completion_ids", "prompt_input_ids",
            "completion_input_ids", "prompt_token_ids", "completion_token_ids", "decoder_input_ids",
            "special_tokens_mask", "inputs_embeds", "pixel_values", "input_features", "seq_lengths",
        ),
        meaning="holds finished tokens or their labels, which steers a trainer that knows it; rows are tokenised here",
        advice="give the text or the messages instead, and remove the key",
        values="any",
        applies=_any,
    ),
    Refused(
        names=("tokens",),
        meaning="holds finished tokens, and rows are tokenised here",
        advice="give the text or the messages instead, and remove the key",
        values="a list",
        applies=_list,
    ),
    Refused(
        names=("chat_template", "chat_template_kwargs", "enable_thinking"),
        meaning="steers a trainer's chat template for this row, which is not supported; the base model's own is used",
        advice="remove the key",
        values="any",
        applies=_any,
        places=(Place.ROW,),
    ),
    Refused(
        names=("suffix",),
        meaning="is text that comes behind the completion (fill in the middle), which is not supported",
        advice='write the row as it is to be learned, as one "text"',
        values="text",
        applies=_text_or_list,
        places=(Place.ROW,),
    ),
    Refused(
        names=("train_detail", "training_detail", "loss_spans"),
        meaning="chooses parts of a turn to learn; only whole turns can be chosen",
        advice='split the turn, or set "weight" to 0 or 1 for all of it',
        values="any",
        applies=_any,
        places=(Place.TURN,),
    ),
    Refused(
        names=("segments",),
        meaning="holds parts of a text of which only some are learned (axolotl's input_output), which is not supported",
        advice='give what is not learned as "prompt" and what is as "completion", or turns as "messages"',
        values="a list of objects with label and text",
        applies=_labelled_parts,
        places=(Place.ROW,),
    ),
    Refused(
        names=("refusal",),
        meaning="holds the assistant's refusal apart from its content",
        advice='put the words into "content", or leave the row out',
        values="text",
        applies=_text_or_list,
        places=(Place.TURN,),
    ),
)  # fmt: skip

_BY_NAME: Mapping[Place, Mapping[str, Refused]] = {
    place: {name.replace("_", ""): group for group in REFUSED if place in group.places for name in group.names}
    for place in Place
}


@lru_cache(maxsize=4096)
def refused(key: str, place: Place) -> Refused | None:
    """The group of refused keys that a key belongs to, however it is capitalised or joined."""
    name = key.casefold().replace("-", "_").replace(" ", "_")
    groups = _BY_NAME[place]
    group = groups.get(name.replace("_", ""))
    if group is not None:
        return group
    words = set(name.split("_"))
    if "rejected" in words or (words & _WORSE and words & _ANSWER):
        return groups["rejected"]  # the worse of two, of whatever kind
    if name in ROW_MASK_KEYS:
        return None
    if words & _MASKING:
        return replace(groups["masked"], applies=lambda value, answers: value is True)
    if words & _LEARNING:
        return replace(groups["learn"], applies=lambda value, answers: value is False)
    return None


_WORSE = frozenset(
    ("dispreferred", "nonpreferred", "unpreferred", "negative", "bad", "worse", "worst", "losing", "inferior")
)
_ANSWER = frozenset(
    (
        "response", "responses", "answer", "answers", "output", "outputs", "completion", "completions", "message",
        "messages", "conversation", "conversations", "text", "reply", "sample", "samples",
    )
)  # fmt: skip
_MASKING = frozenset(("mask", "masked"))  # words in keys that no known trainer reads, and their values if they mean it
_LEARNING = frozenset(("train", "trained", "learn", "learned", "loss", "supervised"))


def refuses(key: str, value: Any, place: Place, *, answers: bool) -> Refused | None:
    """Why a key with this value makes its row one that cannot be trained; None when it does not."""
    group = refused(key, place)
    return group if group is not None and is_given(value) and group.applies(value, answers) else None
