"""A model is told to be the same with its head and without, in every architecture that has both."""

import architectures
import pytest

from saefast.harvest.identity import identity_of, why_other
from saefast.harvest.language_models import load_model

WITH_HEADS = [name for name, (kind, _, _) in architectures.MODELS.items() if kind.endswith(("CausalLM", "LMHeadModel"))]


@pytest.mark.parametrize("name", WITH_HEADS)
def test_heads_come_and_go(tmp_path, name):
    model = architectures.build(name)
    model.save_pretrained(tmp_path)
    whole = identity_of(model, None)
    without, again = (
        identity_of(load_model(tmp_path, head=head), None) for head in ("AutoModel", "AutoModelForCausalLM")
    )
    assert again == whole
    assert why_other(without, whole) == why_other(whole, without) == ""
    assert sum(part[-1].isdigit() for part in without["weights"]) == 2
    assert set(without["weights"]) <= set(whole["weights"])
