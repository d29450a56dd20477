"""Files of SAEs that their authors have published, written here, and what their authors' code computes with them.

As tests/their_files.py, for Gemma Scope, Gemma Scope 2, Llama Scope and Qwen Scope, whose weights alone are public.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from their_files import D, K, L, Statement, best, double, drawn
from torch import Tensor

# Layers of a cross-layer transcoder, and latents of each.
M, F = 3, 16


def drawn_tensors(d_out: int = D) -> dict[str, Tensor]:
    return {
        "W_enc": drawn(D, L, scale=D**-0.5), "W_dec": drawn(L, d_out, scale=L**-0.5), "b_enc": drawn(L, scale=0.3),
        "b_dec": drawn(d_out), "threshold": torch.rand(L, dtype=torch.float32) + 0.2,
    }  # fmt: skip


def write_npz(folder: Path, tensors: dict[str, Tensor], compressed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    (np.savez_compressed if compressed else np.savez)(folder / "params.npz", **arrays)


def jumprelu(w: dict[str, Tensor], size: float = 1.0) -> Statement:
    """JumpReLU of upper-case tensors; inputs are `size` times those of training."""

    def encode(x: Tensor) -> Tensor:
        pre = x / size @ w["W_enc"] + w["b_enc"]
        return pre.relu() * (pre > w["threshold"])

    def decode(f: Tensor, x: Tensor) -> Tensor:
        y = f @ (w["W_dec"] * size) + w["b_dec"]
        return y + x @ w["affine_skip_connection"] if "affine_skip_connection" in w else y

    return Statement(encode, decode)


def read_npz(folder: Path) -> Statement:
    with np.load(folder / "params.npz") as arrays:
        return jumprelu({name: torch.from_numpy(arrays[name]).double() for name in arrays})


def of(repository: str, inside: str) -> Path:
    """As the hub's cache has it."""
    return Path(f"models--google--gemma-scope-{repository}") / "snapshots" / "0a1b2c" / inside


def write_2(folder: Path, hook: str, out: str | None = None, skip: bool = False, config: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name.lower(): tensor for name, tensor in drawn_tensors().items()}
    if skip:
        tensors["affine_skip_connection"] = drawn(D, D, scale=0.3)
    save_file(tensors, folder / "params.safetensors")
    cfg = {
        "hf_hook_point_in": hook, "hf_hook_point_out": out or hook, "width": L, "model_name": "google/gemma-3-4b-pt",
        "architecture": "jump_relu", "l0": 7, "affine_connection": skip, "type": "transcoder" if out else "sae",
    }  # fmt: skip
    if config:
        (folder / "config.json").write_text(json.dumps(cfg), encoding="utf-8")


def read_2(folder: Path) -> Statement:
    found = double(load_file(folder / "params.safetensors"))
    upper = {"w_enc": "W_enc", "w_dec": "W_dec"}
    return jumprelu({upper.get(name, name): tensor for name, tensor in found.items()})


def write_clt(folder: Path, skip: bool = False) -> list[dict[str, Tensor]]:
    """Earlier layers' decoder rows hold numbers that nobody is to use."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = []
    for i in range(M):
        tensors = {
            "w_enc": drawn(D, F, scale=D**-0.5), "w_dec": drawn(F, M, D, scale=F**-0.5), "b_enc": drawn(F, scale=0.3),
            "b_dec": drawn(D), "threshold": torch.rand(F, dtype=torch.float32),
        }  # fmt: skip
        if skip:
            tensors["affine_skip_connection"] = drawn(D, D, scale=0.3)
        save_file(tensors, folder / f"params_layer_{i}.safetensors")
        layers.append(double(tensors))
    cfg = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "type": "clt", "l0": 5}
    (folder / "config.json").write_text(json.dumps(cfg), encoding="utf-8")
    return layers


def across(layers: list[dict[str, Tensor]]) -> Statement:
    """Latents of layer i read its columns, and write those of its own output and all later ones."""

    def encode(x: Tensor) -> Tensor:
        found = []
        for part, w in zip(x.chunk(M, dim=1), layers, strict=True):
            pre = part @ w["w_enc"] + w["b_enc"]
            found.append(pre.relu() * (pre > w["threshold"]))
        return torch.cat(found, dim=1)

    def decode(f: Tensor, x: Tensor) -> Tensor:
        codes = f.chunk(M, dim=1)
        outputs = [
            sum(codes[i] @ layers[i]["w_dec"][:, m] for i in range(m + 1)) + layers[m]["b_dec"] for m in range(M)
        ]
        return torch.cat(outputs, dim=1)

    return Statement(encode, decode)


def read_clt(folder: Path) -> Statement:
    return across([double(load_file(folder / f"params_layer_{i}.safetensors")) for i in range(M)])


HOOK = "blocks.8.hook_resid_post"


def write_llama(folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> None:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    made = {
        "encoder.weight": drawn(L, D, scale=D**-0.5), "encoder.bias": drawn(L, scale=0.3),
        "decoder.weight": drawn(D, L, scale=D**-0.5), "decoder.bias": drawn(D),
    } | (tensors or {})  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, folder / "checkpoints/final.safetensors")
    cfg: dict[str, Any] = {
        "hook_point_in": HOOK, "hook_point_out": HOOK, "use_decoder_bias": True, "d_model": D, "d_sae": L,
        "apply_decoder_bias_to_pre_encoder": False, "act_fn": "jumprelu", "jump_relu_threshold": 0.2021484375,
        "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 6.3125, "out": 6.3125},
        "sparsity_include_decoder_norm": True, "top_k": 50, "use_glu_encoder": False, "expansion_factor": L // D,
    } | changes  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(cfg), encoding="utf-8")


def read_llama(folder: Path) -> Statement:
    """`from_pretrained` of the release: rows' scales and decoder norms are folded in, then the activation."""
    cfg = json.loads((folder / "hyperparams.json").read_text(encoding="utf-8"))
    w = double(load_file(folder / "checkpoints/final.safetensors"))
    W_enc, W_dec, b_enc = w["encoder.weight"], w["decoder.weight"], w["encoder.bias"]
    b_dec = w.get("decoder.bias", torch.zeros(D, dtype=torch.float64))
    if cfg["norm_activation"] == "dataset-wise":
        inward, outward = (math.sqrt(D) / cfg["dataset_average_activation_norm"][side] for side in ("in", "out"))
        b_enc, b_dec, W_dec = b_enc / inward, b_dec / outward, W_dec * inward / outward
    if cfg.get("sparsity_include_decoder_norm", True):
        norms = W_dec.norm(dim=0)
        W_dec, W_enc, b_enc = W_dec / norms, W_enc * norms[:, None], b_enc * norms
    threshold = cfg.get("jump_relu_threshold", 0)

    def size(x: Tensor) -> Tensor:
        one = torch.ones_like(x[:, :1])
        return math.sqrt(D) / x.norm(dim=1, keepdim=True) if cfg["norm_activation"] == "token-wise" else one

    def encode(x: Tensor) -> Tensor:
        x = x * size(x)
        x = x - b_dec if cfg["apply_decoder_bias_to_pre_encoder"] else x
        pre = x @ W_enc.T + b_enc
        if cfg["act_fn"] == "topk" and threshold <= 0:
            return best(pre.relu(), cfg["top_k"])
        return pre.relu() if cfg["act_fn"] == "relu" else pre.where(pre > threshold, 0)

    return Statement(encode, lambda f, x: (f @ W_dec.T + b_dec) / size(x))


def write_qwen(file: Path, changes: dict[str, Any] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "W_enc": drawn(L, D, scale=D**-0.5), "W_dec": drawn(D, L), "b_enc": drawn(L, scale=0.1), "b_dec": drawn(D),
    }  # fmt: skip
    torch.save(tensors | (changes or {}), file)
    return file


def read_qwen(folder: Path) -> Statement:
    (file,) = folder.glob("layer*.sae.pt")
    found = torch.load(file, weights_only=True)
    w = double({name: item for name, item in found.items() if isinstance(item, Tensor)})

    def encode(x: Tensor) -> Tensor:
        return best(x @ w["W_enc"].T + w["b_enc"], found.get("k", K)).relu()

    return Statement(encode, lambda f, x: f @ w["W_dec"].T + w["b_dec"])
