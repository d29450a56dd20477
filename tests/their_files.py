"""Files of other libraries, written as their owners write them, and what these compute with them, in plain torch.

A statement is read from a folder by torch and safetensors alone, in float64. Tests hold our numbers to it, for files
that are written here and for files that saefast writes; `make peers` holds the owners' own packages to it, too.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import saefast
from saefast.models.sae import SAE

# Columns of a row, latents, latents of a token, rows.
D, L, K, B = 16, 64, 5, 40
Tensors = dict[str, Tensor]


class Statement(NamedTuple):
    """What an SAE of theirs computes, in float64."""

    encode: Callable[[Tensor], Tensor]
    """x (B, D) -> f (B, L)."""
    decode: Callable[[Tensor, Tensor], Tensor]
    """f, x -> x_hat."""


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    """float32 numbers from the test's own seed."""
    return torch.randn(*shape, dtype=torch.float32) * scale


def rows(n: int = B, d: int = D) -> Tensor:
    return drawn(n, d) + 0.5


def double(tensors: Tensors) -> Tensors:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def best(pre: Tensor, k: int) -> Tensor:
    """The k largest of each row, the others 0."""
    found = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, found.indices, found.values)


def assert_same(sae: SAE, theirs: Statement, x: Tensor, folded: Callable[[Tensor], Tensor] | None = None) -> None:
    """Our encode, decode and forward against the statement.

    An fp32 sum of D or L numbers of about 1 is off by no more than L · 2^-24 · a few, which is 1e-5.

    Args:
        folded: makes a code of theirs of one of ours.
    """
    close: dict[str, float] = dict(rtol=1e-5, atol=1e-5)
    f = sae.encode(x).detach()
    expected = theirs.encode(x.double())
    assert int((expected != 0).sum()) > len(x), "nothing is on"
    torch.testing.assert_close((f if folded is None else folded(f)).double(), expected, **close)
    x_hat = theirs.decode(expected, x.double())
    torch.testing.assert_close(sae.decode(f, x).detach().double(), x_hat, **close)
    torch.testing.assert_close(sae(x).x_hat.detach().double(), x_hat, **close)


def there_and_back(sae: SAE, folder: Path, format: str, read: Callable[[Path], Statement], x: Tensor) -> SAE:
    """Saves in a format; what is on disk is the same by the statement, and by our own reading, which is returned."""
    saefast.save(sae, folder, format=format)
    assert_same(sae, read(folder), x)
    again = saefast.load(folder)
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again(x).x_hat, sae(x).x_hat, rtol=1e-5, atol=1e-5)
    return again


# sparsify


def write_sparsify(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    cfg = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": L, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D,
    } | changes  # fmt: skip
    tensors = {
        "encoder.weight": drawn(L, D, scale=D**-0.5), "encoder.bias": drawn(L, scale=0.1), "b_dec": drawn(D, scale=0.5),
        "W_dec": torch.nn.functional.normalize(drawn(L, D), dim=1),
    }  # fmt: skip
    if cfg["skip_connection"]:
        tensors["W_skip"] = drawn(D, D, scale=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")


def read_sparsify(folder: Path) -> Statement:
    cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    w = double(load_file(folder / "sae.safetensors"))

    def encode(x: Tensor) -> Tensor:
        x = x if cfg["transcode"] else x - w["b_dec"]
        pre = x @ w["encoder.weight"].T + w["encoder.bias"]
        if cfg.get("signed"):
            return best(pre.abs(), cfg["k"]).sign() * pre
        if cfg["activation"] == "groupmax":
            groups = pre.relu().unflatten(1, (cfg["k"], -1))
            return torch.where(groups == groups.amax(2, keepdim=True), groups, 0).flatten(1)
        return best(pre.relu(), cfg["k"])

    def decode(f: Tensor, x: Tensor) -> Tensor:
        y = f @ w["W_dec"] + w["b_dec"]
        return y + x @ w["W_skip"].T if "W_skip" in w else y

    return Statement(encode, decode)


# dictionary_learning


def dictionary_learning_tensors(name: str, threshold: float = 0.3) -> Tensors:
    """A state_dict of one of its classes."""
    linear = {"encoder.weight": drawn(L, D, scale=D**-0.5), "decoder.weight": unit_columns(drawn(D, L))}
    bias = drawn(L, scale=0.1)
    counted = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    plain = {"W_enc": drawn(D, L, scale=D**-0.5), "b_enc": bias, "W_dec": drawn(L, D), "b_dec": drawn(D)}
    match name:
        case "AutoEncoder":
            return {"bias": drawn(D), **linear, "encoder.bias": bias}
        case "AutoEncoderNew":
            linear["decoder.weight"] = drawn(D, L)
            return {**linear, "encoder.bias": bias, "decoder.bias": drawn(D)}
        case "GatedAutoEncoder":
            own = {"r_mag": drawn(L, scale=0.2), "gate_bias": bias, "mag_bias": drawn(L, scale=0.2)}
            return {"decoder_bias": drawn(D), **own, **linear}
        case "JumpReluAutoEncoder":
            return plain | {"threshold": torch.rand(L, dtype=torch.float32)}
        case "MatryoshkaBatchTopKSAE":
            return plain | counted | {"group_sizes": torch.tensor([8, 24, 32])}
    return {"b_dec": drawn(D), **counted, "decoder.weight": linear["decoder.weight"], **linear, "encoder.bias": bias}


def unit_columns(W: Tensor) -> Tensor:
    return torch.nn.functional.normalize(W, dim=0)


def write_dictionary_learning(folder: Path, name: str, tensors: Tensors | None = None, **trainer: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dictionary_learning_tensors(name) if tensors is None else tensors, folder / "ae.pt")
    counted = name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
    about: dict[str, Any] = {
        "dict_class": name, "trainer_class": "SomeTrainer", "activation_dim": D, "dict_size": L, "lr": 1e-3, "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped", "wandb_name": "x", "submodule_name": "resid_post_layer_3",
    } | ({"k": K} if counted else {})  # fmt: skip
    config = {"trainer": about | trainer, "buffer": {"d_submodule": D, "ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")


def read_dictionary_learning(folder: Path) -> Statement:
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["trainer"]["dict_class"]
    w = double(torch.load(folder / "ae.pt", weights_only=True))
    plain = "W_enc" in w
    W_enc = w["W_enc"] if plain else w["encoder.weight"].T
    W_dec = w["W_dec"] if plain else w["decoder.weight"].T
    b_enc = w.get("b_enc", w.get("encoder.bias", w.get("gate_bias")))
    b_dec = next(w[key] for key in ("b_dec", "bias", "decoder.bias", "decoder_bias") if key in w)
    if name == "AutoEncoder":
        # What from_pretrained does.
        norms = W_dec.norm(dim=1)
        W_dec, W_enc, b_enc = W_dec / norms[:, None], W_enc * norms, b_enc * norms

    def encode(x: Tensor) -> Tensor:
        x = x if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - b_dec
        if name == "GatedAutoEncoder":
            return (x @ W_enc + b_enc > 0) * (w["r_mag"].exp() * (x @ W_enc) + w["mag_bias"]).relu()
        pre = x @ W_enc + b_enc
        if name == "AutoEncoderTopK":
            return best(pre.relu(), int(w["k"]))
        return pre.relu() * (pre > w["threshold"]) if "threshold" in w else pre.relu()

    return Statement(encode, lambda f, x: f @ W_dec + b_dec)


# BatchTopK's repository, and the Matryoshka SAEs'


def write_batchtopk(folder: Path, sae_type: str, tensors: Tensors | None = None, **changes: Any) -> None:
    """As logs.save_checkpoint does: what is no number becomes text."""
    W_enc = drawn(D, L, scale=D**-0.5)
    made = {"b_dec": drawn(D), "b_enc": drawn(L, scale=0.2), "W_enc": W_enc, "W_dec": unit_columns(W_enc).T}
    if sae_type == "jumprelu":
        made["jumprelu.log_threshold"] = torch.rand(L, dtype=torch.float32).log()
    cfg: dict[str, Any] = {
        "seed": 49, "batch_size": 4096, "lr": 3e-4, "l1_coeff": 0, "beta1": 0.9, "dtype": "torch.float32",
        "model_name": "gpt2-small", "site": "resid_pre", "layer": 8, "act_size": D, "dict_size": L, "device": "cpu",
        "input_unit_norm": True, "sae_type": sae_type, "n_batches_to_dead": 5, "top_k": K, "top_k_aux": 512,
        "aux_penalty": 1 / 32, "bandwidth": 0.001, "hook_point": "blocks.8.hook_resid_pre", "name": "run",
    } | changes  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(made | (tensors or {}), folder / "sae.pt")
    (folder / "config.json").write_text(json.dumps(cfg, indent=4), encoding="utf-8")


def read_batchtopk(folder: Path) -> Statement:
    """In evaluation, where the Matryoshka repository's classes serve by their threshold."""
    cfg = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    w = double(torch.load(folder / "sae.pt", weights_only=True))
    kind = cfg["sae_type"]

    def normed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not cfg["input_unit_norm"]:
            return x, x.new_zeros(()), x.new_ones(())
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        return (x - mean) / (std + 1e-5), mean, std

    def encode(x: Tensor) -> Tensor:
        x = normed(x)[0]
        if kind == "jumprelu":
            pre = (x @ w["W_enc"] + w["b_enc"]).relu()
            return pre * (pre > w["jumprelu.log_threshold"].exp())
        x = x - w["b_dec"]
        if kind == "vanilla":
            return (x @ w["W_enc"] + w["b_enc"]).relu()
        acts = (x @ w["W_enc"]).relu()
        if "threshold" in w:
            return torch.where(acts > w["threshold"], acts, 0)
        return best(acts, cfg["top_k"]) if kind == "topk" else best(acts.flatten(), cfg["top_k"] * len(x)).view_as(acts)

    def decode(f: Tensor, x: Tensor) -> Tensor:
        _, mean, std = normed(x)
        return (f @ w["W_dec"] + w["b_dec"]) * std + mean

    return Statement(encode, decode)


# circuit-tracer


def write_circuit_tracer(folder: Path, layer: int = 0, kind: str = "relu", skip: bool = False, **settings: Any) -> None:
    tensors = {
        "W_enc": drawn(L, D, scale=D**-0.5), "W_dec": drawn(L, D), "b_enc": drawn(L, scale=0.2), "b_dec": drawn(D),
    }  # fmt: skip
    if kind == "jumprelu":
        tensors["activation_function.threshold"] = torch.rand(L, dtype=torch.float32)
    if skip:
        tensors["W_skip"] = drawn(D, D, scale=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"layer_{layer}.safetensors")
    write_yaml(folder, model_kind="transcoder_set", **settings)


def write_yaml(folder: Path, **settings: Any) -> None:
    about: dict[str, Any] = {
        "model_name": "Qwen/Qwen3-0.6B", "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out",
        "scan": "qwen3-0.6b",
    } | settings  # fmt: skip
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in about.items())
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def read_circuit_tracer(file: Path) -> Statement:
    w, text = double(load_file(file)), (file.parent / "config.yaml").read_text(encoding="utf-8")
    lines = dict(line.split(": ", 1) for line in text.splitlines())

    def encode(x: Tensor) -> Tensor:
        pre = x @ w["W_enc"].T + w["b_enc"]
        if lines.get("activation") == '"topk"':
            return best(pre, int(lines["k"]))
        limit = w.get("activation_function.threshold")
        return pre.relu() if limit is None else pre * (pre > limit)

    def decode(f: Tensor, x: Tensor) -> Tensor:
        y = f @ w["W_dec"] + w["b_dec"]
        return y + x @ w["W_skip"].T if "W_skip" in w else y

    return Statement(encode, decode)


def write_across(folder: Path, layers: int, thresholds: bool, d: int = 6, latents: int = 12) -> None:
    """A cross-layer transcoder of theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(layers):
        encoder = {f"W_enc_{i}": drawn(latents, d), f"b_enc_{i}": drawn(latents, scale=0.2), f"b_dec_{i}": drawn(d)}
        if thresholds:
            encoder[f"threshold_{i}"] = torch.rand(latents, dtype=torch.float32)
        save_file(encoder, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": drawn(latents, layers - i, d)}, folder / f"W_dec_{i}.safetensors")
    write_yaml(folder, model_kind="cross_layer_transcoder")


def read_across(folder: Path) -> Statement:
    """Of inputs of all layers side by side, and codes and outputs alike."""
    count = len(list(folder.glob("W_enc_*.safetensors")))
    w: Tensors = {}
    for i in range(count):
        w |= double(load_file(folder / f"W_enc_{i}.safetensors")) | double(load_file(folder / f"W_dec_{i}.safetensors"))

    def encode(x: Tensor) -> Tensor:
        codes = []
        for i, part in enumerate(x.chunk(count, dim=1)):
            pre = part @ w[f"W_enc_{i}"].T + w[f"b_enc_{i}"]
            codes.append(pre * (pre > w[f"threshold_{i}"]) if f"threshold_{i}" in w else pre.relu())
        return torch.cat(codes, dim=1)

    def decode(f: Tensor, x: Tensor) -> Tensor:
        codes = f.chunk(count, dim=1)
        parts = [sum(codes[i] @ w[f"W_dec_{i}"][:, m - i] for i in range(m + 1)) for m in range(count)]
        return torch.cat(parts, dim=1) + torch.cat([w[f"b_dec_{m}"] for m in range(count)])  # type: ignore[arg-type]

    return Statement(encode, decode)
