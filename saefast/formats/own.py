"""saefast's own format: `sae.safetensors`, which `SAE.save` writes with the config and a digest in its header."""

import warnings
from pathlib import Path

from torch import Tensor

from saefast.data.shardfile import read_header, verify_seal
from saefast.errors import InputError
from saefast.formats.format import Described, Format, Piece
from saefast.formats.source import Source
from saefast.models.sae import CONFIG, SAE, WEIGHTS, config_in

_FACTS = {"format", "config"}
# What `saefast eval` leaves in a run's folder.
EVALUATED = "latents.safetensors"


class Own(Format):
    """See `SAE.save`."""

    name = "saefast"
    about = "saefast: weights and config in one file, with a digest of both"
    layout = f"{WEIGHTS} as SAE.save writes it, with the config in its header"
    signs = (WEIGHTS, CONFIG, "W_enc", "W_dec", "b_enc", "b_dec")

    def recognises(self, source: Source) -> bool:
        file = _file(source)
        try:
            return file in source.files and source.facts(file).get("format") == "saefast"
        except InputError:
            # Damage to what may be ours is worth a word; a file of any other kind is not ours.
            if Path(file).suffix == ".safetensors":
                raise
            return False

    def check(self, source: Source) -> None:
        file = source.folder / _file(source)
        if not verify_seal(file, _FACTS):
            warnings.warn(f"{file} has no digest, so damage to it cannot be seen: save it again", RuntimeWarning, 5)

    def describe(self, source: Source) -> Described:
        file = _file(source)
        if source.facts(file).get("format") != "saefast":
            raise InputError(f"{source.folder / file} was not written by saefast: expected {self.layout}")
        entries = read_header(source.folder / file)
        config = config_in(source.folder / file, source.facts(file), entries)
        return Described(config, {name: Piece(file, name) for name in entries})

    def density(self, source: Source) -> Tensor | None:
        if EVALUATED not in source.files or not {"counts", "n_rows"} <= source.entries(EVALUATED).keys():
            return None
        return source.values(EVALUATED, "counts").float() / max(source.number(EVALUATED, "n_rows"), 1)

    def write(self, sae: SAE, folder: Path) -> list[str]:
        sae.save(folder)
        return []


def _file(source: Source) -> str:
    return source.alone or WEIGHTS
