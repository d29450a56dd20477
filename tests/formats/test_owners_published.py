"""Published SAEs, by the loaders that others have for their formats; and repositories that are on no package index."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from owners import CLOSE, assert_stated, filled, ours
from their_files import (
    D,
    K,
    L,
    read_batchtopk,
    rows,
)

import saefast

pytestmark = pytest.mark.peers

# Published SAEs' files, by the loaders that SAELens and circuit-tracer have for them

PUBLISHED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # Our SAE, SAELens' loader, and the repository and folder that tell it the rest.
    "gemma_scope": (
        dict(activation="jumprelu"), "gemma_2_sae_huggingface_loader", "google/gemma-scope-2b-pt-res",
        "layer_20/width_16k/average_l0_71",
    ),
    "gemma_scope_2": (
        dict(activation="jumprelu", metadata={"model_name": "gemma-v3-4b-pt"}), "gemma_3_sae_huggingface_loader",
        "google/gemma-scope-2-4b-pt", "resid_post/layer_9_width_16k_l0_small",
    ),
    "gemma_scope_2 transcoder": (
        dict(activation="jumprelu", d_out=D, skip=True, metadata={"model_name": "gemma-v3-4b-pt"}),
        "gemma_3_sae_huggingface_loader", "google/gemma-scope-2-4b-pt", "transcoder/layer_9_width_16k_l0_small_affine",
    ),
    "llama_scope": (
        dict(activation="batchtopk", metadata={"hook_name": "blocks.15.hook_resid_post"}),
        "llama_scope_sae_huggingface_loader", "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x",
    ),
    "qwen_scope": (
        dict(apply_b_dec_to_input=False), "qwen_scope_sae_huggingface_loader",
        f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}", "layer0.sae.pt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_we_write_and_saelens_reads_it_as_published(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    from sae_lens import SAE as theirs_class
    from sae_lens.registry import get_sae_class
    from safetensors.torch import load_file

    changes, loader, repository, folder = PUBLISHED[name]
    sae, x, file = ours(**changes), rows(), folder.endswith(".pt")
    saefast.save(sae, tmp_path if file else tmp_path / folder, format=name.partition(" ")[0])

    def local(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        assert repo_id == repository
        return str(tmp_path / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    monkeypatch.setattr(
        loaders, "get_safetensors_tensor_shapes",
        lambda repo_id, name: {key: list(value.shape) for key, value in load_file(tmp_path / name).items()},
    )  # fmt: skip
    cfg, state, _ = getattr(loaders, loader)(
        repository, folder, "cpu", False, {"d_in": D, "d_sae": L, "dtype": "float32"}
    )
    cfg = loaders.handle_config_defaulting(cfg)
    theirs = get_sae_class(cfg["architecture"])[0].from_dict(cfg)
    assert isinstance(theirs, theirs_class)
    theirs.load_state_dict(state)
    theirs.requires_grad_(False)
    torch.testing.assert_close(theirs.encode(x), sae.encode(x).detach(), **CLOSE)
    torch.testing.assert_close(theirs(x), sae(x).x_hat.detach(), **CLOSE)


@pytest.mark.parametrize(
    ("format", "file", "skip"),
    [
        ("gemma_scope", "params.npz", False),
        ("gemma_scope_2", "params.safetensors", False),
        ("gemma_scope_2", "params.safetensors", True),
    ],
)
def test_circuit_tracer_reads_gemma_scope(format: str, file: str, skip: bool, tmp_path: Path) -> None:
    single = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
    sae, x = ours(activation="jumprelu", d_out=D, skip=skip), rows()
    saefast.save(sae, tmp_path, format=format)
    load = getattr(single, f"load_{format}_transcoder")
    theirs = load(str(tmp_path / file), 0, device=torch.device("cpu"), dtype=torch.float32).requires_grad_(False)
    f = theirs.encode(x)
    torch.testing.assert_close(f, sae.encode(x).detach(), **CLOSE)
    torch.testing.assert_close(theirs.decode(f, x), sae(x).x_hat.detach(), **CLOSE)


# BatchTopK's and the Matryoshka SAEs' repositories are on no package index: CHECKOUTS names a folder of checkouts


def checked_out(repository: str, module: str) -> Any:
    """A module of a checkout, under a name of its own."""
    file = Path(os.environ.get("CHECKOUTS", ".")) / repository / f"{module}.py"
    if not file.is_file():
        pytest.skip(f"needs a checkout of bartbussmann/{repository} in the folder that CHECKOUTS names")
    spec = importlib.util.spec_from_file_location(f"{repository}_{module}", file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


SETTINGS: dict[str, Any] = {
    "seed": 49, "act_size": D, "dict_size": L, "device": "cpu", "dtype": torch.float32, "l1_coeff": 0, "top_k": K,
    "n_batches_to_dead": 5, "top_k_aux": 8, "aux_penalty": 1 / 32, "bandwidth": 0.001, "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre", "name": "run", "group_sizes": [8, 24, 32], "top_k_matryoshka": [2, 3],
}  # fmt: skip
REPOSITORIES = {
    "BatchTopK": {"VanillaSAE": "vanilla", "TopKSAE": "topk", "BatchTopKSAE": "batchtopk", "JumpReLUSAE": "jumprelu"},
    "matryoshka_sae": {
        "VanillaSAE": "vanilla", "TopKSAE": "topk", "BatchTopKSAE": "batch-topk",
        "GlobalBatchTopKMatryoshkaSAE": "global-matryoshka-topk", "JumpReLUSAE": "jumprelu",
    },
}  # fmt: skip
BOTH = [(repository, name) for repository, names in REPOSITORIES.items() for name in names]


class NoRun:
    """Where save_checkpoint logs to."""

    def log_artifact(self, artifact: Any) -> None:
        pass


@pytest.mark.parametrize("normed", [True, False], ids=["", "raw rows"])
@pytest.mark.parametrize(("repository", "name"), BOTH)
def test_a_repository_writes_and_we_read(
    repository: str, name: str, normed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = checked_out(repository, "sae")
    settings = SETTINGS | {"input_unit_norm": normed, "sae_type": REPOSITORIES[repository][name]}
    theirs = filled(getattr(code, name)(settings)).eval()
    if "threshold" in theirs.state_dict():
        theirs.threshold.fill_(0.3)
    monkeypatch.chdir(tmp_path)
    checked_out(repository, "logs").save_checkpoint(NoRun(), theirs, settings, 5)
    folder = tmp_path / "checkpoints" / "run_5"
    sae, x = saefast.load(folder), rows()
    found = theirs(x)
    torch.testing.assert_close(sae.encode(x).detach(), found["feature_acts"], **CLOSE)
    torch.testing.assert_close(sae(x).x_hat.detach(), found["sae_out"], **CLOSE)
    if "threshold" not in theirs.state_dict():
        assert_stated(read_batchtopk(folder), found["feature_acts"], found["sae_out"], x)
    # And back.
    format = sae.config.metadata["format"]
    assert format == ("matryoshka_sae" if "threshold" in theirs.state_dict() else "batchtopk")
    saefast.save(sae, tmp_path / "again", format=format)
    written = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    written["dtype"] = getattr(torch, written["dtype"].split(".")[-1])
    if isinstance(written.get("group_sizes"), str):
        written["group_sizes"] = json.loads(written["group_sizes"])
    again = getattr(code, name)(written)
    again.load_state_dict(torch.load(tmp_path / "again" / "sae.pt"))
    found = again.requires_grad_(False).eval()(x)
    torch.testing.assert_close(found["feature_acts"], sae.encode(x).detach(), **CLOSE)
    torch.testing.assert_close(found["sae_out"], sae(x).x_hat.detach(), **CLOSE)
