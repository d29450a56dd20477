"""Loading onto a GPU: weights go there some rows at a time, and the same bits come out as on the CPU."""

import pytest
import torch

import saefast
from saefast.errors import InputError


def saved(tmp_path, name, **changes):
    sae = saefast.SAE(saefast.SAEConfig(d_in=64, n_latents=1 << 16, k=4, init="kaiming", **changes), seed=0)
    assert saefast.save(sae, tmp_path / name, name) == []
    return sae, tmp_path / name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["saefast", "saelens"])
def test_weights_are_on_the_gpu_once(name, tmp_path):
    sae, folder = saved(tmp_path, name)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = saefast.load(folder, "cuda")
    for key, value in sae.state_dict().items():
        found = loaded.state_dict()[key]
        assert found.device.type == "cuda"
        assert torch.equal(found.cpu(), value)
    # 2 · 16 MiB of weights, and no more than a piece of 16 MiB beside them.
    held = sum(parameter.nbytes for parameter in loaded.parameters())
    assert torch.cuda.max_memory_allocated() - before < held + (1 << 24) + (1 << 20)


@pytest.mark.gpu
def test_a_file_is_not_mapped_into_a_gpu(tmp_path):
    _, folder = saved(tmp_path, "saefast")
    with pytest.raises(InputError, match="map is True, but device is cuda"):
        saefast.load(folder, "cuda", map=True)
