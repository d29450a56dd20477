"""Decoder inputs of encoder-decoder models, so that a decoder row is of the token that it is stored with.

Left to itself such a model either refuses to run its decoder, or makes it read the text shifted by one: at position p
it has read the token before p. Here it reads the start token and then the whole text, as the model's own shift of
labels would have it, one position more than the text has tokens: what it has at position p + 1 is of token p.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.places import Place


class Decoder:
    """What the decoder of an encoder-decoder model reads. alone: all hooks are in the encoder, whose rows do not depend
    on what the decoder reads: then it is given one token. Raises InputError where the start token is not known.
    """

    def __init__(self, model: nn.Module, places: Iterable[Place]) -> None:
        inside = _encoder_paths(model)
        self._alone = all(any(f"{place.path}.".startswith(path) for path in inside) for place in places)
        start = _start_token(model)
        if start is None and not self._alone:
            raise InputError(
                f"this {type(model).__name__} does not say with which token its decoder begins: "
                "set model.config.decoder_start_token_id, or hook modules of its encoder alone"
            )
        self._start = start or 0
        self._limit: Any = getattr(model.config, "max_position_embeddings", None)

    def inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """decoder_input_ids (batch, length + 1) for ids and mask (batch, length), and their mask.

        Raises InputError where that is more than the model has positions.
        """
        first = torch.full((len(ids), 1), self._start, dtype=ids.dtype, device=ids.device)
        own = torch.ones((len(ids), 1), dtype=torch.int64, device=mask.device)
        if not self._alone:
            self._check_length(ids.shape[1] + 1)
            first, own = torch.cat([first, ids], 1), torch.cat([own, mask.long()], 1)
        # The start token is often the padding token, which a model may leave out where it is given no mask.
        return {"decoder_input_ids": first, "decoder_attention_mask": own}

    def of_tokens(self, value: Tensor, length: int) -> Tensor:
        """Of a place's values (batch, length or length + 1, d) those of the batch's own tokens."""
        return value[:, 1:] if not self._alone and value.shape[1] == length + 1 else value

    def _check_length(self, length: int) -> None:
        if isinstance(self._limit, int) and 0 < self._limit < length:
            raise InputError(
                f"sequences of {length - 1} tokens are {length} with the decoder's start token before them, "
                f"but this model reads at most {self._limit}: lower ctx_len to {self._limit - 1}"
            )


def decoder_of(model: nn.Module, places: Iterable[Place]) -> Decoder | None:
    """The decoder of a model that takes decoder_input_ids, None for any other."""
    takes = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return Decoder(model, places) if takes and getattr(model.config, "is_encoder_decoder", False) else None


def _start_token(model: nn.Module) -> int | None:
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        if isinstance(token := getattr(config, "decoder_start_token_id", None), int):
            return token
    return None


def _encoder_paths(model: Any) -> list[str]:
    """Where the encoder is in the model, each with a dot at its end."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return [f"{path}." for path, module in model.named_modules() if module is encoder and path]
