"""Activations on characters of several tokens: where the text is that they are of."""

from saefast.latents.database import Example


def on_characters(example: Example) -> Example:
    """An example as it is shown: the last token of a character, which has its text, has the strongest activation of all
    of its tokens, and the others have none.

    Marks of the tokenizer have no text either, and keep their activations: what is said in several tokens is no ASCII.
    """
    acts, peak = example.acts.copy(), example.peak
    parts: list[int] = []
    for place, piece in enumerate(example.context.pieces):
        if not piece:
            parts.append(place)
            continue
        if parts and piece[0] > "\x7f":
            acts[place] = max(acts[place], acts[parts].max())
            acts[parts] = 0
            peak = place if peak in parts else peak
        parts = []
    return example._replace(acts=acts, peak=peak)
