"""Chats written out as a model was trained to read them: by its tokenizer's own template."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saefast.errors import InputError
from saefast.harvest.documents import Refused, whole_characters


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages, each a mapping."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(message, Mapping) for message in value)


def chat_ids(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> np.ndarray:
    """Token ids (n,) int64 of a chat, with the special tokens that the template puts into it and no others.

    Raises:
        InputError: there is no tokenizer, or it has no template.
        Refused: this chat is none, or the template does not take it.
    """
    _check(tokenizer)
    if "role" not in messages[0]:
        raise Refused(f"has messages of {', '.join(map(str, messages[0]))}, expected role and content")
    try:
        written = tokenizer.apply_chat_template([_said(message) for message in messages], tokenize=False)
    except ImportError as error:
        raise InputError(f"chats need what the tokenizer's template is written in: {_line(error)}") from None
    except Exception as error:  # templates raise what they like: roles that do not alternate, fields that are missing
        raise Refused(f"is a chat that the tokenizer's template refuses ({_line(error)})") from None
    encoded = tokenizer(
        whole_characters(written),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return np.asarray(encoded["input_ids"], dtype=np.int64)


def _check(tokenizer: Any) -> None:
    if tokenizer is None:
        raise InputError("the text holds chats, which a tokenizer writes out: read it with text.documents(tokenizer)")
    # Some tokenizers write chats by code of their own and have no such attribute.
    if not hasattr(tokenizer, "apply_chat_template") or not getattr(tokenizer, "chat_template", "code"):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise InputError(
            f"the text holds chats, and tokenizer {name!r} has no chat template: set tokenizer.chat_template, take the"
            " model that was trained on chats, or name a column of plain text with text_column"
        )


def _said(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the keys that hold nothing: Arrow gives each message of a column all the keys of the others."""
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
