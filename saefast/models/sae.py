"""SAE, SAEOutput: the model, its sparse and dense interface, and its file."""

import copy
import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saefast import ambient
from saefast.data.shardfile import Column, map_tensor, read_header, read_metadata, verify_seal, write_file
from saefast.errors import InputError
from saefast.files import parse_json, read_json, usable, write_json
from saefast.models.architecture import Architecture
from saefast.models.config import DTYPES, SAEConfig
from saefast.models.init import init_weights
from saefast.models.pointwise import gathered
from saefast.ops import spmm
from saefast.ops.code import Code, padded
from saefast.ops.encoder import Encoder
from saefast.ops.mixed import pays_off
from saefast.ops.reference import accumulate_dtype
from saefast.ops.selected import selected
from saefast.placement import pick_device, require_device, require_memory
from saefast.schema import Seed, check_argument
from saefast.typed import typed

WEIGHTS, CONFIG = "sae.safetensors", "config.json"


class SAEOutput(NamedTuple):
    """What `SAE.forward` returns."""

    x_hat: Tensor
    """(..., d_out) the reconstruction."""
    acts: Tensor
    """(..., K) activations of the latents that are on; 0 where fewer than K are."""
    idx: Tensor
    """(..., K) int32 ids of those latents, distinct within a row."""


class SAE(nn.Module):
    """A sparse autoencoder. acts, idx = choice(W_enc (x - b_dec) + b_enc); x_hat = Σ acts · W_dec[idx] + b_dec.

    With `SAEConfig.input_norm` the x in it is the normalised row, and x_hat gets back what was taken from it.

    Parameters: W_enc, W_dec (n_latents, d_in), b_enc (n_latents,), b_dec (d_in,), of other shapes where the
    architecture says so, and those that it adds (`Architecture.shapes`, `Architecture.parameters`). A latent is a row
    in both matrices. Buffers: what it keeps (`Architecture.buffers`), in float32 for weights of any dtype.

    Args:
        config: shape and kind.
        seed: of the random weights; None draws from torch's global generator.
    """

    @typed
    @ambient.plainly(grad=True)
    def __init__(self, config: SAEConfig, seed: int | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        dtype = DTYPES[config.dtype]
        check_argument("seed", seed, Seed | None)
        device = require_device(device)
        shapes = config.architecture().shapes()
        weights = sum(math.prod(shapes[name]) for name in ("W_enc", "W_dec")) * dtype.itemsize
        require_memory(device, weights, f"an SAE of n_latents = {config.n_latents} and d_in = {config.d_in}")
        if torch.device(device).type == "meta":  # a shape to load weights into
            W_enc, W_dec = (torch.empty(shapes[name], dtype=dtype, device="meta") for name in ("W_enc", "W_dec"))
        else:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            W_enc, W_dec = init_weights(
                shapes["W_enc"], shapes["W_dec"], config.init, generator, dtype=dtype, device=device
            )
        if W_dec.device.type != "meta":
            write_own_columns_(W_dec, config.architecture())
        self.W_enc, self.W_dec = nn.Parameter(W_enc), nn.Parameter(W_dec)
        self.b_enc, self.b_dec = (
            nn.Parameter(torch.zeros(shapes[name], device=device, dtype=dtype)) for name in ("b_enc", "b_dec")
        )
        for name, value in self.architecture.parameters().items():
            self.register_parameter(name, nn.Parameter(value.to(device, dtype)))
        for name, buffer in self.architecture.buffers().items():
            self.register_buffer(name, buffer.to(device))
        self._shadow: tuple[Any, Tensor] | None = None

    @property
    def architecture(self) -> Architecture:
        return self.config.architecture()

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed: d_in, but for transcoders."""
        return len(self.b_dec)

    def own(self) -> dict[str, Tensor]:
        """The parameters that the architecture adds to the four, by name."""
        return {name: getattr(self, name) for name in self.architecture.parameters()}

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    @typed
    @ambient.plainly()
    def encode_sparse(self, x: Tensor, *, mixed: bool = False) -> tuple[Tensor, Tensor]:
        """x (..., d_in) -> acts (..., K) fp32 (fp64 for fp64 weights) and idx (..., K) int32, distinct in a row.

        K is k where every token has k latents, and otherwise what the token with the most of them has; acts are 0 in
        the places that a token leaves over.

        Args:
            mixed: let bf16 products choose candidates where that is faster (see `saefast.ops.mixed`): for many batches,
                because a copy of W_enc in bf16 is made, and kept. Values, order and ties stay those of x's products.

        Raises:
            InputError: x's last dimension is not d_in, or x is on another device.
        """
        flat = self._flatten(x)
        norms = self._norms() if self.architecture.ranks_by_norm else None
        shadow = self._copied() if mixed and pays_off(self.W_enc) else None
        code = padded(self._serve(flat, norms, shadow), self.config.n_latents)
        acts, idx = self._activations(flat, code), code.idx
        if norms is not None:
            acts = acts * norms[idx.long()]
        shape = (*x.shape[:-1], idx.shape[1])
        return acts.reshape(shape), idx.reshape(shape)

    @typed
    @ambient.plainly()
    def encode_latents(self, x: Tensor, latents: Tensor) -> Tensor:
        """x (..., d_in) -> (..., S), the activations of some latents, as `encode` has them; differentiable.

        Where each latent is on by itself (relu, jumprelu, gated, batchtopk with its threshold) no other row of W_enc is
        touched. Where latents compete, all have to be ranked.

        Args:
            latents: (S,) int64, distinct ids.
        """
        kind, buffers = accumulate_dtype(self.dtype), dict(self.named_buffers())
        flat, norms = self._flatten(x).to(kind), self._norms_of(latents)
        own = {name: value.to(kind) for name, value in gathered(self.own() | {"b_enc": self.b_enc}, latents).items()}
        pre = self._products(flat, latents) + own["b_enc"]
        found = self.architecture.alone(pre, own, norms, buffers)
        if found is None:
            return self.picked(*self.encode_sparse(x), latents)
        return (found if norms is None else found * norms).reshape(*x.shape[:-1], len(latents))

    @typed
    @ambient.plainly()
    def decode_latents(self, change: Tensor, latents: Tensor, x: Tensor) -> Tensor:
        """change (..., S) of the activations of some latents -> (..., d_out), what it adds to the reconstruction of x.

        Exactly the difference of two decodes, of S rows of W_dec. Sums are in float32 (float64 for float64 weights).

        Args:
            latents: (S,) int64, distinct ids. x: (..., d_in) what was encoded.
        """
        kind, norms = accumulate_dtype(self.dtype), self._norms_of(latents)
        flat = change.reshape(-1, len(latents)).to(kind)
        if norms is not None:
            flat = flat / torch.where(norms > 0, norms, 1)
        added, norm = flat @ self.W_dec[latents].to(kind), self.architecture.row_norm(self._rows(x))
        added = added if norm is None else added * norm.spread.to(kind)
        return added.reshape(*change.shape[:-1], self.d_out)

    def _products(self, flat: Tensor, latents: Tensor) -> Tensor:
        """flat (B, d_in) -> (B, S), what the rows of W_enc of some latents make of the columns that they read."""
        found = flat.new_zeros(len(flat), len(latents))
        for block in self.architecture.blocks():
            here = ((latents >= block.latents.start) & (latents < block.latents.stop)).nonzero()[:, 0]
            W_enc = self.W_enc[latents[here]].to(flat.dtype)
            found = found.index_copy(1, here, flat[:, block.reads] @ W_enc.T)
        return found

    def _norms_of(self, latents: Tensor) -> Tensor | None:
        """(S,) what the activations of some latents are measured in; None is 1."""
        if not self.architecture.ranks_by_norm:
            return None
        found = self.architecture.norms(self.W_dec[latents], dict(self.named_buffers())).sum(1)
        return found.to(accumulate_dtype(self.dtype))

    def picked(self, acts: Tensor, idx: Tensor, latents: Tensor) -> Tensor:
        """Of a code acts, idx (..., K), the activations (..., S) of some latents, 0 where they have none."""
        order = latents.argsort()
        place = torch.searchsorted(latents[order], idx.long()).clamp_max(len(latents) - 1)
        place = order[place]
        there = torch.where(latents[place] == idx, acts, 0)
        return acts.new_zeros(*acts.shape[:-1], len(latents)).scatter_add(-1, place, there)

    @typed
    def with_k(self, k: int) -> "SAE":
        """This SAE serving k latents a token: another object over the very same parameters.

        Any k will do where latents are ranked (topk); one trained with `SAEConfig.hierarchical` is made for it.

        Raises:
            InputError: k is part of what was trained (groupmax, batchtopk, ...), or out of bounds.
        """
        found = copy.copy(self)
        found.config = self.architecture.with_k(k)
        return found

    def _activations(self, flat: Tensor, code: Code) -> Tensor:
        """The activations of a code (B, K) of flat (B, d_in), differentiable."""
        pointwise = self.architecture.pointwise
        if pointwise is None or code.pre is None:
            return selected(flat, self.W_enc, self.b_enc, code)
        pre = selected(flat, self.W_enc, self.b_enc, code._replace(acts=code.pre), clip=False)
        own = gathered(self.own() | {"b_enc": self.b_enc}, code.idx.long())
        return torch.where(code.acts > 0, pointwise.activate(pre, own), 0)

    @torch.no_grad()
    def _serve(self, flat: Tensor, norms: Tensor | None, shadow: Tensor | None) -> Code:
        """The architecture's choice for flat (B, d_in), activations in units of 1."""
        own = {name: value.detach() for name, value in self.own().items()}
        encoder = Encoder(flat.detach(), self.W_enc.detach(), self.b_enc.detach(), norms, shadow, own)
        return self.architecture.serve(encoder, dict(self.named_buffers()))

    def _copied(self) -> Tensor:
        """W_enc in bf16, as it is now."""
        now = (self.W_enc.data_ptr(), self.W_enc._version)
        if self._shadow is None or self._shadow[0] != now:
            self._shadow = now, self.W_enc.detach().to(torch.bfloat16)
        return self._shadow[1]

    @typed
    @ambient.plainly()
    def decode_sparse(self, acts: Tensor, idx: Tensor, x: Tensor | None = None) -> Tensor:
        """acts, idx (..., K) -> x_hat (..., d_out).

        Args:
            x: (..., d_in) what was encoded; only what the architecture takes straight from it (a skip, an input norm)
                needs it.

        Raises:
            InputError: other shapes, dtypes and ids; no x where it is needed.
        """
        if acts.dim() == 0 or acts.shape != idx.shape:
            raise InputError(f"acts is {tuple(acts.shape)}, idx {tuple(idx.shape)}: expected one shape (..., k)")
        require_real("acts", acts)
        require_real("idx", idx)
        n_rows = math.prod(acts.shape[:-1])  # reshape cannot tell where K is 0
        flat_acts, flat_idx = acts.reshape(n_rows, acts.shape[-1]), idx.reshape(n_rows, idx.shape[-1])
        if self.architecture.ranks_by_norm:
            flat_acts = flat_acts / self._units()[flat_idx.long()]
        x_hat = spmm(flat_acts, flat_idx, self.W_dec) + self.b_dec
        return self._completed(x_hat.reshape(*acts.shape[:-1], self.d_out), x)

    def _completed(self, x_hat: Tensor, x: Tensor | None) -> Tensor:
        """x_hat (..., d_out) as decoded -> with what x itself gives: a skip, or the norm that was taken from it."""
        rows = self.W_enc.new_zeros(0, self.config.d_in) if x is None else self._rows(x)
        direct, norm = self.architecture.direct(rows.to(self.dtype), self.own()), self.architecture.row_norm(rows)
        if direct is None and norm is None:
            return x_hat
        if x is None:
            does = "adds a linear map of it to" if norm is None else "gives its mean and norm back to"
            raise InputError(f"x is not given: this SAE {does} what the code decodes to; pass x too")
        if x.shape[:-1] != x_hat.shape[:-1]:
            n_rows = tuple(x_hat.shape[:-1])
            raise InputError(f"x has shape {tuple(x.shape)}, the code is of {n_rows} rows: expected x of as many")
        flat = x_hat.reshape(len(rows), x_hat.shape[-1])
        flat = flat if norm is None else norm.undone(flat).to(x_hat.dtype)
        return (flat if direct is None else flat + direct).view_as(x_hat)

    @typed
    @ambient.plainly()
    def encode(self, x: Tensor) -> Tensor:
        """Dense activations (..., n_latents), for tools that want them; a (B, L) tensor, so mind its size."""
        acts, idx = self.encode_sparse(x)
        dense = acts.new_zeros(*acts.shape[:-1], self.config.n_latents)
        return dense.scatter(-1, idx.long(), acts)

    @typed
    @ambient.plainly()
    def decode(self, f: Tensor, x: Tensor | None = None) -> Tensor:
        """Dense activations (..., n_latents) -> x_hat (..., d_out). x: as in `decode_sparse`."""
        if f.dim() == 0 or f.shape[-1] != self.config.n_latents:
            raise InputError(f"f has shape {tuple(f.shape)}: expected (..., n_latents = {self.config.n_latents})")
        if f.device != self.device:
            raise InputError(f"f is on {f.device}, the SAE on {self.device}: move one with .to()")
        require_real("f", f)
        if self.architecture.ranks_by_norm:
            f = f / self._units()
        return self._completed(f.to(self.dtype) @ self.W_dec + self.b_dec, x)

    @typed
    @ambient.plainly()
    def forward(self, x: Tensor) -> SAEOutput:
        acts, idx = self.encode_sparse(x)
        return SAEOutput(self.decode_sparse(acts, idx, x), acts, idx)

    @ambient.plainly()
    def decoder_norms(self) -> Tensor:
        """(n_latents,) norms of the decoder's rows."""
        return self.W_dec.norm(dim=1)

    def _units(self) -> Tensor:
        """(n_latents,) what activations are measured in: the norms, 1 for a row of zeros, which decodes to zeros."""
        norms = self._norms()
        return torch.where(norms > 0, norms, 1)

    def _norms(self) -> Tensor:
        """(n_latents,) norms of the decoder's rows as the architecture takes them."""
        return self.architecture.norms(self.W_dec, dict(self.named_buffers())).sum(1)

    @ambient.plainly(grad=False)
    def normalize_decoder_(self) -> None:
        """Scales every decoder row to unit norm."""
        self.W_dec.div_(self.decoder_norms().clamp_min(torch.finfo(self.dtype).eps)[:, None])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "SAE":
        """What .to() and its like do: buffers follow to another device, and keep their dtype."""
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            # On the meta device it had no values.
            self._buffers[name] = (moved if buffer.is_meta else buffer).to(moved.device, buffer.dtype)  # type: ignore[union-attr]
        self._shadow = None
        return self

    def _flatten(self, x: Tensor) -> Tensor:
        """x (..., d_in) as (B, d_in) in the weights' dtype, normalised and centred if the config says so."""
        rows = self._rows(x)
        norm = self.architecture.row_norm(rows)
        flat = (rows if norm is None else norm.normed(rows)).to(self.dtype)
        return flat - self.b_dec if self.config.apply_b_dec_to_input else flat

    def _rows(self, x: Tensor) -> Tensor:
        """x (..., d_in) as (B, d_in), in its own dtype or the weights', whichever is finer."""
        if x.dim() == 0 or x.shape[-1] != self.config.d_in:
            raise InputError(f"x has shape {tuple(x.shape)}: expected (..., d_in = {self.config.d_in})")
        if x.device != self.device:
            raise InputError(f"x is on {x.device}, the SAE on {self.device}: move one with .to()")
        require_real("x", x)
        return x.reshape(-1, self.config.d_in).to(torch.promote_types(x.dtype, self.dtype))

    @typed
    def save(self, path: str | Path) -> None:
        """Writes `sae.safetensors` (weights and config, one atomic file) and a readable `config.json` into a folder.

        Raises:
            InputError: as `save_weights`, or the folder cannot be written, or its config.json is of something else.
        """
        folder = usable(path)
        check_config_file(folder)
        try:
            self.save_files(folder)
        except OSError as error:
            raise InputError(f"cannot write {folder} ({error.strerror or error}): choose another folder") from error

    def save_files(self, folder: Path) -> None:
        """What `save` writes. Raises OSError where the folder cannot be written; the caller makes a message of it."""
        self.save_weights(folder / WEIGHTS)
        write_json(folder / CONFIG, self.config_as_is().to_dict())

    def save_weights(self, file: str | Path) -> None:
        """Writes weights and config into one safetensors file, whole or not at all; `load` reads it.

        The dtype is the one the parameters have now, not the config's. The file carries a digest of all its
        bytes (see `saefast.data.shardfile.write_file`).

        Raises:
            InputError: parameters on the meta device, of several dtypes or of one that SAEConfig.dtype cannot name.
        """
        facts = {"format": "saefast", "config": json.dumps(self.config_as_is().to_dict())}
        columns = {name: Column.of(tensor) for name, tensor in self.state_dict().items()}
        write_file(usable(file), columns, facts, sealed=True)

    def config_as_is(self) -> SAEConfig:
        """The config with the dtype that the parameters have, which `.to(dtype)` may have changed."""
        found = {parameter.dtype for parameter in self.parameters()}
        names = [name for name, dtype in DTYPES.items() if dtype in found]
        if len(found) != 1 or not names:
            raise InputError(f"parameters are of {', '.join(map(str, found))}: expected one of {', '.join(DTYPES)}")
        if self.device.type == "meta":
            raise InputError("the SAE is on the meta device, where tensors have no values: there is nothing to save")
        return dataclasses.replace(self.config, dtype=names[0])


def write_own_columns_(W_dec: Tensor, architecture: Architecture) -> None:
    """Zeros in the columns that latents do not write; rows keep their norm."""
    for block in architecture.blocks():
        rows, own = W_dec[block.latents], block.writes
        if own.stop - own.start < rows.shape[1]:
            norms = rows.norm(dim=1, keepdim=True)
            rows[:, : own.start] = 0
            rows[:, own.stop :] = 0
            rows *= norms / rows.norm(dim=1, keepdim=True)


def require_real(name: str, tensor: Tensor) -> None:
    """Raises InputError for a tensor that is sparse or complex."""
    if tensor.layout != torch.strided:
        raise InputError(f"{name} is {tensor.layout}: expected a dense tensor; pass {name}.to_dense()")
    if tensor.is_complex():
        raise InputError(f"{name} is {tensor.dtype}: expected real numbers; pass {name}.real, or {name}.abs()")


def check_config_file(folder: Path) -> None:
    """Raises InputError where a folder's config.json is there and is not an SAE's: it belongs to another program."""
    file = folder / CONFIG
    try:
        ours = not os.path.lexists(file) or {"d_in", "n_latents"} <= dict(read_json(file)).keys()
    except (InputError, TypeError, ValueError):
        ours = False
    if not ours:
        raise InputError(f"{file} is there and is no SAE's config: it is not overwritten; choose another folder")


@typed
@ambient.plainly(grad=True)
def load(path: str | Path, device: torch.device | str = "cpu", *, verify: bool = True) -> SAE:
    """Loads what `SAE.save` wrote: a folder that holds `sae.safetensors`, or that file itself.

    Args:
        path: the folder or file.
        device: where the weights go.
        verify: compare the file with its digest, which reads it once more; a file written before there were digests
            is loaded with a warning.

    Raises:
        InputError: nothing there, a file cut short, damaged, or of another format or shape; a device that is not there.
    """
    file = usable(path)
    file = file / WEIGHTS if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"{file} does not exist: expected a folder written by SAE.save, holding {WEIGHTS}")
    place = pick_device(str(device))
    facts = read_metadata(file)
    if facts.get("format") != "saefast":
        raise InputError(f"{file} was not written by saefast (format {facts.get('format', '')[:60]!a})")
    entries = read_header(file)
    if verify and not verify_seal(file, {"format", "config"}):
        warnings.warn(f"{file} has no digest, so damage to it cannot be seen: save it again", RuntimeWarning, 2)
    # Copies, so that writing into the file later does not change an SAE that was loaded from it.
    tensors = {name: map_tensor(file, entry).to(place, copy=True) for name, entry in entries.items()}
    sae = SAE(config_in(file, facts, tensors), device="meta")
    sae.load_state_dict(tensors, assign=True)
    return sae.requires_grad_(True)


def config_in(file: Path, facts: dict[str, str], tensors: Mapping[str, Any]) -> SAEConfig:
    """The config in a file's header, once the tensors are known to be of its shapes and of one dtype, which it gets.

    Args:
        tensors: by name, with a shape and a dtype each.
    """
    try:
        config = SAEConfig.from_dict(parse_json(facts.get("config", ""), "its config"))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    architecture = config.architecture()
    expected = architecture.shapes()
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    kept: dict[str, Tensor] = {}
    if expected.items() <= found.items():  # others are made in sizes that the file has, and not in any that it claims
        kept = architecture.buffers()
        expected |= {name: tuple(t.shape) for name, t in (architecture.parameters() | kept).items()}
    dtypes = {tensor.dtype for name, tensor in tensors.items() if name not in kept}
    names = [name for name, dtype in DTYPES.items() if {dtype} == dtypes]
    if expected != found or not names:
        kinds = ", ".join(map(str, dtypes))
        raise InputError(f"{file} holds {found} of {kinds}, its config asks for {expected}: the file was altered")
    return dataclasses.replace(config, dtype=names[0])
