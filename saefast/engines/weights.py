"""Weights: the four parameters as the fused engine keeps them, with their optimiser's state.

Rows without a gradient are left alone and settled later, in closed form (`saefast.optim.state.DriftTable`). A row of
W_dec is settled before it is read. W_enc is read whole at every step, so a row left alone there lacks at most
lr · |m| / √v · r / (1 - r), r = β1 / √β2 (9 learning rates at the defaults), until all of W_enc is settled, every
`settle_every` steps.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from saefast.engines.base import PARAMETERS
from saefast.engines.config import TrainConfig
from saefast.engines.resample import Fresh
from saefast.models.sae import SAE
from saefast.ops.mixed import pays_off
from saefast.ops.reference import accumulate_dtype
from saefast.optim.dispatch import row_ops
from saefast.optim.state import AdamStep, AnyMatrix, DriftTable, LeanMatrix, Matrix, Norm

# Decoder rows whose norms are taken at a time, where they are read in another dtype than they are kept in.
_ROWS = 1 << 14


class Weights:
    """W_enc, W_dec, b_enc and b_dec, and what the optimiser keeps of them.

    Args:
        sae: whose parameters these are. "adam-lean" makes them bfloat16.
        dense: every row takes part in every update, so none is ever left alone.
        mixed: keep a bf16 copy of W_enc; None is where that makes encoding faster.

    Attributes:
        matrices: by parameter's name, the architecture's own last; live views of the SAE's parameters.
        step: updates done.
    """

    def __init__(self, sae: SAE, config: TrainConfig, dense: bool, mixed: bool | None) -> None:
        self.sae, self.config, self.dense = sae, config, dense
        self.lean = config.optimizer == "adam-lean"
        self.step = 0
        self.drift = self._new_table()
        self.own = tuple(sae.architecture.parameters())
        self.matrices = self._lean() if self.lean else self._full(mixed)
        self._versions: tuple[int, ...] = ()

    def _new_table(self) -> DriftTable:
        return DriftTable(self.config.beta1, self.config.beta2, self.config.eps, self.sae.device)

    def _full(self, mixed: bool | None) -> dict[str, AnyMatrix]:
        sae, norms = self.sae, self._keeps_norms
        if mixed is None:
            mixed = pays_off(sae.W_enc.data)
        state: dict[str, AnyMatrix] = {
            "W_enc": Matrix.of(sae.W_enc.data, shadow=mixed),
            "W_dec": Matrix.of(sae.W_dec.data, norms=norms),
        }
        return state | {name: Matrix.of(getattr(sae, name).data) for name in self._few}

    def _lean(self) -> dict[str, AnyMatrix]:
        sae, norms = self.sae, self._keeps_norms
        sae.to(torch.bfloat16)
        sae.config = dataclasses.replace(sae.config, dtype="bfloat16")
        seeds = [2 * self.config.seed, 2 * self.config.seed + 1]
        state: dict[str, AnyMatrix] = {"W_enc": LeanMatrix.of(sae.W_enc.data, seeds[0])}
        state["W_dec"] = LeanMatrix.of(sae.W_dec.data, seeds[1], norms=norms)
        # All others are few: they train in float32, and the SAE gets them rounded.
        return state | {name: Matrix.of(getattr(sae, name).detach().float()) for name in self._few}

    @property
    def _few(self) -> tuple[str, ...]:
        """The parameters that are small beside the two matrices."""
        return ("b_enc", "b_dec", *self.own)

    @property
    def _keeps_norms(self) -> bool:
        """Whether the row updates note the norm of every decoder row. They know the norm of a whole row alone."""
        return self.sae.architecture.ranks_by_norm and not self._in_parts

    @property
    def _in_parts(self) -> bool:
        """Whether a decoder row has a norm for each of several parts."""
        return self.sae.architecture.norms(self.sae.W_dec.detach()[:1]).shape[1] > 1

    def norms(self) -> Tensor | None:
        """(L,) what latents are ranked by: norms of the decoder's rows as they lie there; None where they are not."""
        architecture = self.sae.architecture
        if not architecture.ranks_by_norm or not self._in_parts:
            return self.dec.norms
        W_dec = self.dec.w
        parts = [architecture.norms(rows.to(accumulate_dtype(W_dec.dtype))) for rows in W_dec.split(_ROWS)]
        return torch.cat(parts).sum(1)

    @property
    def enc(self) -> AnyMatrix:
        return self.matrices["W_enc"]

    @property
    def dec(self) -> AnyMatrix:
        return self.matrices["W_dec"]

    @property
    def b_enc(self) -> Tensor:
        """(L,)."""
        return self.matrices["b_enc"].w[0]

    @property
    def b_dec(self) -> Tensor:
        """(D,)."""
        return self.matrices["b_dec"].w[0]

    def own_values(self) -> dict[str, Tensor]:
        """The architecture's own parameters by name, as they are trained."""
        return {name: self.matrices[name].w.view(getattr(self.sae, name).shape) for name in self.own}

    def bind(self) -> None:
        """Points at the SAE's weights of now, and renews copies of them if somebody else changed them."""
        parameters = [getattr(self.sae, name) for name in (*PARAMETERS, *self.own)]
        versions = tuple(number for p in parameters for number in (p.data_ptr(), p._version))
        if versions != self._versions:
            for p, matrix in zip(parameters, self.matrices.values(), strict=True):
                if p.dtype == matrix.w.dtype:
                    matrix.w = p.data.view(matrix.w.shape)
                elif not torch.equal(matrix.w.view(p.shape).to(p.dtype), p.data):
                    matrix.w.view(p.shape).copy_(p.data)  # a bias, which the SAE holds rounded
                matrix.copies_changed()
            self._versions = versions

    def constants(self, step: int, lr: float, **changes: Any) -> AdamStep:
        """What the row operations of update `step` (from 1) need to know; of `step` past updates, to settle rows."""
        c, table = self.config, self.drift
        return AdamStep(step, c.beta1, c.beta2, lr, c.eps, table.drift, table.drift_eps, **changes)

    def _now(self, **changes: Any) -> AdamStep:
        # Past updates are in the drift table: no rate enters here.
        return self.constants(self.step, 0.0, **changes)

    def _kept_norm(self) -> Norm:
        """How the decoder rows that are not updated keep their norm."""
        kinds = {"post_step": Norm.after_update, "never": Norm.never}
        return kinds.get(self.config.decoder_norm, Norm.before_update)

    def settle_decoder(self, latents: Tensor) -> None:
        """Makes the decoder rows of latents (n,) int32 what dense training would have by now, for them to be read."""
        backend = row_ops(self.dec.w)
        if not self.dense:
            backend.catch_up(self.dec, self._now(norm=self._kept_norm()), latents)
        if self.config.decoder_norm == "pre_forward":
            # Where all rows take part in the update, all have to be at unit norm before it.
            backend.normalise_rows(self.dec, self._now(), None if self.dense else latents)

    def normalise_decoder(self) -> None:
        """Unit norm for all rows of W_dec."""
        row_ops(self.dec.w).normalise_rows(self.dec, self._now())

    def settle_encoder(self) -> None:
        """Brings all of W_enc up to date, and what ranks its activations."""
        backend = row_ops(self.enc.w)
        backend.catch_up(self.enc, self._now())
        if self.sae.architecture.ranks_by_norm:
            backend.catch_up(self.dec, self._now(norm=self._kept_norm()))

    def settle_all(self) -> None:
        backend = row_ops(self.enc.w)
        backend.catch_up(self.enc, self._now())
        backend.catch_up(self.dec, self._now(norm=self._kept_norm()))

    def restart(self, fresh: Fresh, alive: Tensor, own: dict[str, Tensor]) -> None:
        """Latents begin anew, with the second moment that those alive (L,) bool have on average, or 0.

        Args:
            own: what the architecture's own parameters are in them, by name.
        """
        ids, like = fresh.latents, None if fresh.zeroed else alive
        self.enc.restart(ids, fresh.W_enc, like, self.step, self.config.beta2)
        self.dec.restart(ids, fresh.W_dec, like, self.step, self.config.beta2)
        for name, value in ({"b_enc": fresh.b_enc} | own).items():
            numbers = self.matrices[name]
            numbers.w[0, ids] = value.to(numbers.w.dtype)
            numbers.m[0, ids] = 0
            numbers.v[0, ids] = 0.0 if like is None else numbers.v[0, like].mean()
        self.copy_biases()

    def updated(self, lr: float) -> None:
        """Takes note that an update with this rate has been made."""
        self.drift.add(lr)
        self.step += 1
        self.copy_biases()

    def copy_biases(self) -> None:
        """Gives the SAE those parameters that train in another dtype than its own."""
        if self.lean:
            for name in self._few:
                parameter = getattr(self.sae, name)
                parameter.data.copy_(self.matrices[name].w.view(parameter.shape))

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state by name, live."""
        found: dict[str, Tensor] = {}
        for name, matrix in self.matrices.items():
            found |= {f"adam.{name}.{key}": tensor for key, tensor in matrix.state().items()}
        if self.lean:
            found |= {f"master.{name}": self.matrices[name].w for name in self._few}
        return found

    def table_of(self, drift: Tensor) -> DriftTable:
        """A drift table from what `DriftTable.state` gave."""
        table = self._new_table()
        table.load(drift)
        return table

    def restored(self, table: DriftTable, step: int) -> None:
        """The tensors of `tensors` were given the values of another moment: `step` updates done, this drift."""
        self.drift, self.step, self._versions = table, step, ()


class Scratch:
    """Memory kept from step to step: fresh pages cost more than what is written to them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        found = self._kept.get(name)
        if found is None or found.shape != shape:
            found = self._kept[name] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return found
