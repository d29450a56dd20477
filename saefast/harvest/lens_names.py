"""TransformerLens' names of places in a model, as modules of transformers: tables to read and to add to.

What a block is made of shows in its modules' names, so that one row serves all models that are built alike. Where no
row fits, a name is refused rather than guessed. `make peers` holds the rows to TransformerLens itself.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import nn

from saefast.errors import InputError
from saefast.places import Place

# The projections of a block, by their names in it: the first that is there counts.
_QUERY = (
    "self_attn.q_proj",
    "attn.q_proj",
    "attn.attention.q_proj",
    "attention.self.query",
    "attention.q_lin",
    "attention.q_proj",
)
_KEY = (
    "self_attn.k_proj",
    "attn.k_proj",
    "attn.attention.k_proj",
    "attention.self.key",
    "attention.k_lin",
    "attention.k_proj",
)
_VALUE = (
    "self_attn.v_proj",
    "attn.v_proj",
    "attn.attention.v_proj",
    "attention.self.value",
    "attention.v_lin",
    "attention.v_proj",
)
_ATTENTION_OUT = (
    "self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attn.c_proj", "attn.out_proj", "attn.Wo",
    "attn.attention.out_proj", "attention.o_proj", "attention.dense", "attention.output.dense", "attention.out_lin",
    "self_attention.dense",
)  # fmt: skip
_MLP_IN = (
    "mlp.gate_proj", "mlp.up_proj", "mlp.c_fc", "mlp.fc_in", "mlp.fc1", "mlp.dense_h_to_4h", "fc1", "ffn.up_proj",
    "ffn.lin1", "intermediate.dense",
)  # fmt: skip
_MLP_OUT = (
    "mlp.down_proj", "mlp.c_proj", "mlp.fc_out", "mlp.fc2", "mlp.Wo", "mlp.dense_4h_to_h", "fc2", "ffn.down_proj",
    "ffn.lin2", "output.dense",
)  # fmt: skip

# A name within blocks.N -> a side of the first of these modules of the block that is there; "" is the block itself.
IN_BLOCK: dict[str, tuple[Literal["in", "out"], tuple[str, ...]]] = {
    "hook_resid_pre": ("in", ("",)),
    "hook_in": ("in", ("",)),
    "hook_resid_post": ("out", ("",)),
    "hook_out": ("out", ("",)),
    "attn.hook_q": ("out", _QUERY),
    "attn.hook_k": ("out", _KEY),
    "attn.hook_v": ("out", _VALUE),
    "attn.hook_z": ("in", _ATTENTION_OUT),
    "mlp.hook_pre": ("out", _MLP_IN),
    "mlp.hook_post": ("in", _MLP_OUT),
}
# Names that depend on where the norms of a block stand: see LAYOUTS.
_BY_LAYOUT = ("hook_resid_mid", "hook_mlp_in", "hook_attn_out", "hook_mlp_out")

_NO_PART = "none of the modules that its blocks are made of is that alone"
_SIDE_BY_SIDE = "attention and MLP run side by side in its blocks, so that there is nothing between them"
_TWO_MEANINGS = (
    "its norms follow the sums, and TransformerLens' HookedEncoder and TransformerBridge differ in what it is"
)


class Layout(NamedTuple):
    """How blocks with these norms are built.

    norms: names of the block's children that are neither attention, MLP, dropout nor activation. mid: what takes the
    residual stream between attention and MLP. attn_out, mlp_out: what puts out that which is added to it, None where
    it is the last projection. missing: names that have no place here. why: the reason.
    """

    models: str
    norms: tuple[str, ...]
    mid: str | None
    attn_out: str | None = None
    mlp_out: str | None = None
    missing: tuple[str, ...] = ()
    why: str = ""

    @property
    def ln1(self) -> str | None:
        return self.norms[0] if self.norms and self.attn_out != self.norms[0] else None

    @property
    def ln2(self) -> str | None:
        return self.mid if self.mid in self.norms else None


_NO_MID = ("hook_resid_mid", "hook_mlp_in")
_NO_SUMS = (*_NO_MID, "hook_attn_out")
LAYOUTS = (
    Layout("Llama, Mistral, Qwen, Gemma 1, Phi-3, Mixtral, OLMo 1, BLOOM, NeoX ...",
           ("input_layernorm", "post_attention_layernorm"), "post_attention_layernorm"),
    Layout("GPT-2, GPT-Neo, GPT-BigCode", ("ln_1", "ln_2"), "ln_2"),
    Layout("OPT", ("self_attn_layer_norm", "final_layer_norm"), "final_layer_norm"),
    Layout("MPT", ("norm_1", "norm_2"), "norm_2"),
    Layout("ModernBERT", ("attn_norm", "mlp_norm"), "mlp_norm"),
    Layout("ViT", ("layernorm_before", "layernorm_after"), "layernorm_after"),
    Layout("CLIP, SigLIP", ("layer_norm1", "layer_norm2"), "layer_norm2"),
    Layout("ESM", ("LayerNorm",), "LayerNorm"),
    Layout("Gemma 2, Gemma 3",
           ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
           "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    Layout("GLM-4",
           ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
           "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
    Layout("OLMo 2, OLMo 3, EXAONE 4", ("post_attention_layernorm", "post_feedforward_layernorm"),
           "mlp", "post_attention_layernorm", "post_feedforward_layernorm"),
    Layout("Phi, Cohere, Falcon 7B", ("input_layernorm",), None, missing=_NO_MID, why=_SIDE_BY_SIDE),
    Layout("GPT-J, CodeGen", ("ln_1",), None, missing=_NO_MID, why=_SIDE_BY_SIDE),
    Layout("Falcon 40B", ("ln_attn", "ln_mlp"), None, missing=_NO_MID, why=_SIDE_BY_SIDE),
    Layout("BERT, RoBERTa, ELECTRA", (), None, missing=_NO_SUMS, why=_TWO_MEANINGS),
    Layout("DistilBERT", ("sa_layer_norm", "output_layer_norm"), None, missing=_NO_SUMS, why=_TWO_MEANINGS),
)  # fmt: skip
_PARTS = {
    "self_attn", "attn", "attention", "self_attention", "mlp", "block_sparse_moe", "ffn", "fc1", "fc2",
    "intermediate", "output", "act", "activation_fn",
}  # fmt: skip


def place_in_block(model: nn.Module, block: str, number: str, name: str) -> Place:
    """Where TransformerLens' blocks.`number`.`name` is, in the block at path `block`. Raises InputError."""
    module = model.get_submodule(block)
    found = _in_block(module, name)
    if isinstance(found, Place):
        return Place(f"{block}.{found.path}".rstrip("."), found.side)
    known = [other for other in (*IN_BLOCK, *_BY_LAYOUT) if isinstance(_in_block(module, other), Place)]
    nearest = [f"blocks.{number}.{other}" for other in difflib.get_close_matches(name, known, n=3, cutoff=0.0)]
    raise InputError(
        f"hook 'blocks.{number}.{name}' has no place in {type(model).__name__}: {found}; nearest: {', '.join(nearest)}"
    )


def embedding_place(model: nn.Module, blocks: str) -> Place:
    """Where TransformerLens' hook_embed is, for the list of blocks at path `blocks`: what is added to learned
    positions, or else what enters the first block.

    (BLOOM has a norm and Gemma a factor between the table and that; TransformerLens counts both as the embedding.)
    Raises InputError where tokens and positions are joined before either can be seen.
    """
    modules = dict(model.named_modules())
    paths = (*modules, *(path for path, _ in model.named_parameters()))
    holder = next((found for path in paths if (found := _positions(path, blocks)) is not None), None)
    if holder is None:
        return Place(f"{blocks}.0", "in")
    for name in ("wte", "embed_tokens"):
        path = f"{holder}.{name}".lstrip(".")
        if path in modules:
            return Place(path)
    raise InputError(
        f"hook 'hook_embed' has no place in {type(model).__name__}: {holder} joins tokens and positions, and what is"
        f" meant differs between TransformerLens' classes; nearest: {blocks}.0:in, all that enters the first block"
    )


def _positions(path: str, blocks: str) -> str | None:
    """Path of the module that adds positions for these blocks, not for another stack's, if they are at `path`."""
    holder, _, name = path.rpartition(".")
    if not re.fullmatch(r"wpe|embed_positions|pos(ition)?_(conv_)?embed(ding)?s?", name):
        return None
    outer = re.sub(r"(^|\.)embeddings$", "", holder)
    return holder if not outer or blocks.startswith(outer + ".") else None


def _in_block(block: nn.Module, name: str) -> Place | str:
    """The place within a block, or why there is none."""
    modules = dict(block.named_modules())
    if name in IN_BLOCK:
        side, paths = IN_BLOCK[name]
        return _first(modules, paths, side) or _NO_PART
    if name == "mlp.hook_pre_linear" and "mlp.gate_proj" in modules and "mlp.up_proj" in modules:
        return Place("mlp.up_proj")
    layout = _layout(block)
    if name in ("ln1.hook_normalized", "ln2.hook_normalized"):
        norm = layout and getattr(layout, name[:3])
        if norm and not list(modules[norm].parameters()):
            return Place(norm)
        return "TransformerLens takes it before the norm's weight, and no module of transformers puts that out"
    if name not in _BY_LAYOUT:
        return "no module of transformers takes it or puts it out"
    if layout is None:
        return f"saefast knows no blocks made of {', '.join(name for name, _ in block.named_children())}"
    return _oddity(block, name) or _by_layout(modules, layout, name)


def _by_layout(modules: Mapping[str, nn.Module], layout: Layout, name: str) -> Place | str:
    if name in layout.missing:
        return layout.why
    if name in _NO_MID:
        return Place(str(layout.mid), "in")
    if name == "hook_attn_out":
        paths = (layout.attn_out,) if layout.attn_out else _ATTENTION_OUT
    else:
        # Experts have no last projection of all; the whole MLP puts out their sum.
        paths = (layout.mlp_out,) if layout.mlp_out else (*_MLP_OUT, "mlp", "block_sparse_moe")
    return _first(modules, paths, "out") or _NO_PART


def _first(modules: Mapping[str, nn.Module], paths: tuple[str, ...], side: Literal["in", "out"]) -> Place | None:
    return next((Place(path, side) for path in paths if path in modules), None)


def _layout(block: nn.Module) -> Layout | None:
    norms = {name for name, _ in block.named_children() if name not in _PARTS and not name.endswith("dropout")}
    return next((layout for layout in LAYOUTS if set(layout.norms) == norms), None)


def _oddity(block: nn.Module, name: str) -> str:
    """What a block does otherwise than its layout says; "" for most."""
    if name in _NO_MID:
        if getattr(block, "use_parallel_residual", False):
            return _SIDE_BY_SIDE
        # BART's blocks have OPT's names, and norms after the sums.
        if hasattr(block, "final_layer_norm") and not getattr(block, "do_layer_norm_before", False):
            return "its blocks do not say whether their norms come before or after the sums"
    elif (factor := getattr(block, "residual_multiplier", 1)) != 1:
        return f"its blocks multiply it by {factor:g} before it is added"
    return ""
