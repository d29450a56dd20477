"""Which SAEs each format holds, found by writing every kind in every format, reading it back and comparing numbers.

python tests/formats_matrix.py      writes the tables of docs/formats.md anew; a test holds them to what is found
"""

import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import saefast
from saefast.errors import InputError
from saefast.formats import Format, formats
from saefast.models.sae import SAE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "formats.md"
D, L, K = 12, 48, 4
YES, NO = "yes", "–"
# Fields in which an SAE that comes back has to be what it was.
WHAT = ("activation", "matryoshka", "hierarchical", "d_out", "skip", "n_layers", "crosscode_widths", "input_norm")
# Every kind of SAE that saefast has, as the page calls it.
KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk, ranked by decoder norms": dict(rescale_acts_by_decoder_norm=True),
    "topk, nested (matryoshka)": dict(matryoshka=(8, L)),
    "topk, for many k (hierarchical)": dict(hierarchical=(2, 4)),
    "topk, layer norm": dict(input_norm="layer_norm"),
    "topk, constant norm": dict(input_norm="constant_norm"),
    "groupmax": dict(activation="groupmax"),
    "batchtopk": dict(activation="batchtopk"),
    "batchtopk, ranked by decoder norms": dict(activation="batchtopk", rescale_acts_by_decoder_norm=True),
    "batchtopk, nested (matryoshka)": dict(activation="batchtopk", matryoshka=(8, L)),
    "batchtopk, layer norm": dict(activation="batchtopk", input_norm="layer_norm"),
    "jumprelu": dict(activation="jumprelu"),
    "jumprelu, layer norm": dict(activation="jumprelu", input_norm="layer_norm"),
    "gated": dict(activation="gated"),
    "relu": dict(activation="relu"),
    "transcoder, topk": dict(d_out=D),
    "transcoder, topk, skip": dict(d_out=D, skip=True),
    "transcoder, topk, other width": dict(d_out=7),
    "transcoder, groupmax": dict(activation="groupmax", d_out=D),
    "transcoder, batchtopk": dict(activation="batchtopk", d_out=D),
    "transcoder, jumprelu": dict(activation="jumprelu", d_out=D),
    "transcoder, jumprelu, skip": dict(activation="jumprelu", d_out=D, skip=True),
    "transcoder, jumprelu, other width": dict(activation="jumprelu", d_out=7),
    "transcoder, relu": dict(activation="relu", d_out=D),
    "transcoder, relu, skip": dict(activation="relu", d_out=D, skip=True),
    "transcoder, gated": dict(activation="gated", d_out=D),
    "crosscoder, batchtopk": dict(activation="batchtopk", crosscode_widths=(6, 6)),
    "crosscoder, relu": dict(activation="relu", crosscode_widths=(6, 6)),
    "cross-layer transcoder, topk": dict(n_layers=2),
    "cross-layer transcoder, relu": dict(n_layers=2, activation="relu"),
    "cross-layer transcoder, jumprelu": dict(n_layers=2, activation="jumprelu"),
}


def made(kind: str, biased: bool = True) -> SAE:
    """An SAE of a kind, with numbers in all that it has, b_enc left out if not biased, and decoder rows of any norm."""
    sae = SAE(saefast.SAEConfig(d_in=D, n_latents=L, k=K, unit_norm_decoder=False, **KINDS[kind]), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            # Zeros that a cross-layer transcoder keeps stay zeros.
            there = parameter != 0 if name == "W_dec" else torch.ones_like(parameter, dtype=torch.bool)
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator) * there
        for name, buffer in sae.named_buffers():
            if name == "threshold":
                buffer.fill_(0.4)
        if not biased:
            sae.b_enc.zero_()
    return sae.requires_grad_(False)


def cell(kind: str, one: Format, folder: Path) -> str:
    """What becomes of a kind of SAE in a format: it comes back as it was, as another kind that does the same, or not.

    Raises:
        AssertionError: what comes back has other numbers.
    """
    for sae, note in ((made(kind), ""), (made(kind, biased=False), ", b_enc 0")):
        try:
            saefast.save(sae, folder, one.name)
        except InputError:
            continue
        again = saefast.load(folder)
        assert again.config.metadata.get("format", "saefast") == one.name, f"{kind} in {one.name} is told for another"
        return came_back(sae, again, kind) + note
    return NO


def came_back(sae: SAE, again: SAE, kind: str) -> str:
    """What an SAE came back as. Raises AssertionError where it has other numbers."""
    without = "threshold" in again.state_dict() and float(again.get_buffer("threshold")) < 0
    if without:
        sae.get_buffer("threshold").fill_(-1)
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(2))
    f = sae.encode(x)
    assert int((f > 0).sum()) > len(x) // 2, kind
    # fp32 sums of a few ten numbers, and scales that were folded into weights.
    g = again.encode(x)
    torch.testing.assert_close(again.decode(g, x), sae.decode(f, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(f > 0, g > 0), kind
    note = ", without its threshold" if without else ""
    units = "" if torch.allclose(f, g, rtol=1e-4, atol=1e-5) else " in units of its own"
    same = all(getattr(again.config, name) == getattr(sae.config, name) for name in WHAT)
    return (YES if same else f"as {named(again)}") + units + note


def named(sae: SAE) -> str:
    """A kind of SAE in a few words."""
    c = sae.config
    layer = "CLT of " if c.n_layers else "transcoder of " if sae.architecture.has_target else ""
    return layer + c.activation


def mapped(one: Format, folder: Path) -> str:
    """Whether the matrices of what a format holds can be left in the file."""
    try:
        saefast.load(folder, format=one.name, map=True)
    except InputError:
        return NO
    return YES


def tables() -> dict[str, str]:
    """The page's tables, by the names of their places."""
    held: dict[str, dict[str, str]] = {}
    lines = ["| format | files | saved | mapped |", "|---|---|---|---|"]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as place:
        warnings.simplefilter("ignore")
        for name, one in formats.items():
            held[name] = {kind: cell(kind, one, Path(place, name, kind)) for kind in KINDS}
            first = next((kind for kind, found in held[name].items() if found != NO), None)
            about = f"{one.about}. It needs {one.layout}"
            leaves = NO if first is None else mapped(one, Path(place, name, first))
            lines.append(f"| `{name}` | {about} | {YES if first else NO} | {leaves} |")
    rows = [f"| | {' | '.join(f'`{name}`' for name in held)} |", "|---|" + "---|" * len(held)]
    rows += [f"| {kind} | {' | '.join(found[kind] for found in held.values())} |" for kind in KINDS]
    return {"formats": "\n".join(lines), "kinds": "\n".join(rows)}


def with_tables(page: str, found: dict[str, str]) -> str:
    """The page with these tables in their places."""
    for name, text in found.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert len(place.findall(page)) == 1, name
        page = place.sub(lambda mark, text=text: f"{mark[1]}{text}\n{mark[2]}", page)
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    sys.exit(0)
