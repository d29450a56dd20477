"""A character of several tokens is shown once, with the strongest of their activations."""

import numpy as np

from saefast.latents.characters import on_characters
from saefast.latents.database import Context, Example


def example(pieces: list[str], acts: list[float]) -> Example:
    values = np.array(acts, np.float32)
    peak = int(values.argmax())
    return Example(0, float(values[peak]), peak, values, Context(7, 3, 10, 10 + len(pieces), pieces))


def test_activations_of_parts_are_those_of_the_character() -> None:
    found = example(["a", "", "", "🦊", " b", "", "狐", "", ""], [1, 0, 5, 2, 3, 0, 4, 1, 0])
    shown = on_characters(found)
    assert shown.acts.tolist() == [1, 0, 0, 5, 3, 0, 4, 1, 0]
    assert shown.peak == 3
    assert (shown.act, shown.part, shown.context) == (5, 0, found.context)
    # What was read stays as it is.
    assert found.acts.tolist() == [1, 0, 5, 2, 3, 0, 4, 1, 0]


def test_marks_and_patches_keep_theirs() -> None:
    marked = example(["", "The", "", " fox"], [9, 1, 2, 3])
    assert on_characters(marked).acts.tolist() == [9, 1, 2, 3]
    assert on_characters(marked).peak == 0
    image = example([""] * 4, [0, 2, 0, 1])
    assert on_characters(image).acts.tolist() == [0, 2, 0, 1]
