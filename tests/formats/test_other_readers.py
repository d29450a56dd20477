"""Published weights that have no package of their own: SAELens' and circuit-tracer's readers of them against ours.

`make peers` runs this. What they read of files as published, and of files that we write, comes to our numbers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from public_files import F, M, write_2, write_clt, write_llama, write_npz, write_qwen
from public_files import drawn_tensors as drawn_npz
from safetensors.torch import load_file
from their_files import B, D, K, L, rows
from torch import Tensor

import saefast
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

pytestmark = pytest.mark.peers
CLOSE: dict[str, float] = dict(rtol=1e-5, atol=1e-5)
PRE, POST = "model.layers.5.pre_feedforward_layernorm.output", "model.layers.5.post_feedforward_layernorm.output"
GEMMA, GEMMA_2 = "google/gemma-scope-2b-pt-res", "google/gemma-scope-2-4b-pt"
QWEN = f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"

Reader = Callable[[str, str], Any]


@pytest.fixture
def saelens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Reader]:
    """Their reader of a name, of repositories that lie in tmp_path."""
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    lens = pytest.importorskip("sae_lens")

    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        return str(tmp_path / repo_id / (subfolder or "") / filename)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in load_file(tmp_path / repo_id / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)

    def reader(name: str) -> Reader:
        def read(repo_id: str, folder: str) -> Any:
            sizes = {} if name == "gemma_3_sae" else {"d_in": D, "d_sae": L}
            sizes |= {"d_out": D} if "transcoder" in name else {}
            load = getattr(loaders, f"{name}_huggingface_loader")
            cfg, state, _ = load(repo_id, folder, device="cpu", cfg_overrides={"dtype": "float32", **sizes})
            cfg = loaders.handle_config_defaulting(cfg)
            found = lens.SAE.from_dict(cfg)
            found.process_state_dict_for_loading(state)
            found.load_state_dict(state, assign=True)
            return found.requires_grad_(False)

        return read

    return reader


def assert_reads_alike(theirs: Any, sae: SAE, x: Tensor, scale: float = 1.0) -> None:
    """scale: their activations in units of ours."""
    f = theirs.encode(x)
    assert int((f != 0).sum()) > len(x)
    torch.testing.assert_close(sae.encode(x).detach() * scale, f, **CLOSE)
    skip = "W_skip" in dict(sae.named_parameters())
    torch.testing.assert_close(sae(x).x_hat.detach(), theirs(x) if skip else theirs.decode(f), **CLOSE)


def ours(**changes: Any) -> SAE:
    sae = SAE(SAEConfig(**dict(d_in=D, n_latents=L, k=K) | changes), seed=0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        if "threshold" in dict(sae.named_buffers()):
            sae.get_buffer("threshold").fill_(0.6)
    return sae


@pytest.mark.parametrize("inside", ["layer_20/width_16k/average_l0_71", "embedding/width_4k/average_l0_21"])
def test_gemma_scope(inside: str, saelens: Any, tmp_path: Path) -> None:
    write_npz(tmp_path / GEMMA / inside, drawn_npz())
    sae = saefast.load(tmp_path / GEMMA / inside)
    theirs = saelens("gemma_2_sae")(GEMMA, inside)
    assert_reads_alike(theirs, sae, rows() * (D**0.5 if "embedding" in inside else 1))
    for name in ("model_name", "hook_name", "prepend_bos", "context_size"):
        assert sae.config.metadata[name] == getattr(theirs.cfg.metadata, name), name


def test_gemma_scope_transcoders(saelens: Any, tmp_path: Path) -> None:
    repository, inside = "google/gemma-scope-2b-pt-transcoders", "layer_3/width_16k/average_l0_5"
    write_npz(tmp_path / repository / inside, drawn_npz())
    sae = saefast.load(tmp_path / repository / inside)
    theirs = saelens("gemma_2_transcoder")(repository, inside)
    assert_reads_alike(theirs, sae, rows())
    for name in ("model_name", "hook_name", "hook_name_out"):
        assert sae.config.metadata[name] == getattr(theirs.cfg.metadata, name), name


@pytest.mark.parametrize("name", ["jumprelu", "batchtopk", "relu"])
def test_what_we_write_as_gemma_scope(name: str, saelens: Any, tmp_path: Path) -> None:
    sae, inside = ours(activation=name), "layer_2/width_16k/average_l0_5"
    saefast.save(sae, tmp_path / GEMMA / inside, format="gemma_scope")
    assert_reads_alike(saelens("gemma_2_sae")(GEMMA, inside), sae, rows())


SITES: dict[str, tuple[str, dict[str, Any]]] = {
    "resid_post/layer_5_width_16k_l0_big": ("model.layers.5.output", {}),
    "mlp_out/layer_5_width_16k_l0_big": (POST, {}),
    "transcoder/layer_5_width_16k_l0_big": (PRE, dict(out=POST)),
    "transcoder/layer_5_width_16k_l0_big_affine": (PRE, dict(out=POST, skip=True)),
}


@pytest.mark.parametrize("inside", SITES)
def test_gemma_scope_2_and_what_we_write_as_it(inside: str, saelens: Any, tmp_path: Path) -> None:
    hook, settings = SITES[inside]
    write_2(tmp_path / GEMMA_2 / inside, hook, **settings)
    sae, theirs, x = saefast.load(tmp_path / GEMMA_2 / inside), saelens("gemma_3_sae")(GEMMA_2, inside), rows()
    assert_reads_alike(theirs, sae, x)
    for name in ("model_name", "hook_name", "hf_hook_name", "hook_name_out", "hf_hook_name_out"):
        assert sae.config.metadata.get(name) == getattr(theirs.cfg.metadata, name, None), name
    saefast.save(sae, tmp_path / "ours" / inside, format="gemma_scope_2")
    assert_reads_alike(saelens("gemma_3_sae")("ours", inside), sae, x)


def test_llama_scope_and_what_we_write_as_it(saelens: Any, tmp_path: Path) -> None:
    """Decoder rows of unit norm, which they take for granted."""
    repository, inside = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L8R-8x"
    unit = torch.nn.functional.normalize(torch.randn(D, L), dim=0)
    write_llama(tmp_path / repository / inside, {"decoder.weight": unit}, jump_relu_threshold=0.3)
    sae, x, factor = saefast.load(tmp_path / repository / inside), rows(), D**0.5 / 6.3125
    theirs = saelens("llama_scope_sae")(repository, inside)
    theirs.fold_activation_norm_scaling_factor(factor)
    assert_reads_alike(theirs, sae, x, scale=factor)
    assert sae.config.metadata["hook_name"] == theirs.cfg.metadata.hook_name
    saefast.save(sae, tmp_path / "ours" / inside, format="llama_scope")
    theirs = saelens("llama_scope_sae")("ours", inside)
    theirs.fold_activation_norm_scaling_factor(1.0)
    assert_reads_alike(theirs, sae, x)


def test_qwen_scope_and_what_we_write_as_it(saelens: Any, tmp_path: Path) -> None:
    file = write_qwen(tmp_path / QWEN / "layer7.sae.pt")
    sae, theirs, x = saefast.load(file), saelens("qwen_scope_sae")(QWEN, "layer7.sae.pt"), rows()
    assert_reads_alike(theirs, sae, x)
    for name in ("model_name", "hook_name", "hf_hook_name"):
        assert sae.config.metadata[name] == getattr(theirs.cfg.metadata, name), name
    other = QWEN.replace("1.7B", "8B")
    saefast.save(sae, tmp_path / other, format="qwen_scope")
    assert_reads_alike(saelens("qwen_scope_sae")(other, "layer7.sae.pt"), sae, x)


# circuit-tracer


@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer_reads_transcoders_of_gemma_scope_2(skip: bool, tmp_path: Path) -> None:
    single = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
    write_2(tmp_path / "a", PRE, out=POST, skip=skip)
    sae, x, place = saefast.load(tmp_path / "a"), rows(), torch.device("cpu")
    saefast.save(sae, tmp_path / "b", format="gemma_scope_2")
    for folder in ("a", "b"):
        theirs = single.load_gemma_scope_2_transcoder(str(tmp_path / folder / "params.safetensors"), 5, device=place)
        f = theirs.encode(x).detach()
        torch.testing.assert_close(sae.encode(x).detach(), f, **CLOSE)
        torch.testing.assert_close(sae(x).x_hat.detach(), theirs.decode(f, x).detach(), **CLOSE)


def test_circuit_tracer_reads_transcoders_of_gemma_scope(tmp_path: Path) -> None:
    single = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
    write_npz(tmp_path / "a", drawn_npz())
    sae, x = saefast.load(tmp_path / "a"), rows()
    saefast.save(sae, tmp_path / "b", format="gemma_scope")
    for folder in ("a", "b"):
        file = str(tmp_path / folder / "params.npz")
        theirs = single.load_gemma_scope_transcoder(file, 5, device=torch.device("cpu"))
        f = theirs.encode(x).detach()
        torch.testing.assert_close(sae.encode(x).detach(), f, **CLOSE)
        torch.testing.assert_close(sae(x).x_hat.detach(), theirs.decode(f).detach(), **CLOSE)


def test_circuit_tracer_reads_cross_layer_transcoders_of_gemma_scope_2(tmp_path: Path) -> None:
    clt = pytest.importorskip("circuit_tracer.transcoder.cross_layer_transcoder")
    write_clt(tmp_path / "a")
    sae, x = saefast.load(tmp_path / "a"), rows(B, M * D)
    saefast.save(sae, tmp_path / "b", format="gemma_scope_2")
    layers = x.view(B, M, D).transpose(0, 1)
    for folder in ("a", "b"):
        # Their version 0.5.0 stops one short of the last of these.
        paths = {i: str(tmp_path / folder / f"params_layer_{min(i, M - 1)}.safetensors") for i in range(M + 1)}
        theirs = clt.load_gemma_scope_2_clt(paths, device=torch.device("cpu"), dtype=torch.float32)
        f = theirs.encode(layers).detach()
        assert f.shape == (M, B, F)
        torch.testing.assert_close(sae.encode(x).detach(), f.transpose(0, 1).flatten(1), **CLOSE)
        x_hat = theirs.decode(f).detach().transpose(0, 1).flatten(1)
        torch.testing.assert_close(sae(x).x_hat.detach(), x_hat, **CLOSE)
