"""What hook names mean: paths, blocks by number in the right stack, TransformerLens' names, patterns."""

import warnings
from collections.abc import Iterable

import architectures
import pytest
import tiny_models
import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.harvest.hooks import expand_hooks, expand_names, find_hook
from saefast.places import Place

pytest.importorskip("transformers")
BLOCKS = {"bert": "encoder.layer", "gpt2": "h", "llama": "layers"}
IDS = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_models.model(kind) for kind in BLOCKS}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_hook_names_of_every_habit_find_the_block(models, kind, head):
    model = tiny_models.model(kind, head=True) if head else models[kind]
    prefix = f"{model.base_model_prefix}." if head else ""
    block = f"{prefix}{BLOCKS[kind]}.2"
    full = {"bert": "bert.encoder.layer.2", "gpt2": "transformer.h.2", "llama": "model.layers.2"}[kind]
    names = ("layers.2", "model.layers.2", full, f"{BLOCKS[kind]}.2", "blocks.2.hook_resid_post", "layer.2", "blocks.2")
    from_the_end = (
        "layers.-1",
        "layer.-1",
        full.replace(".2", ".-1"),
        "blocks.-1.hook_resid_post",
        "blocks.-1.hook_out",
    )
    for name in (*names, *from_the_end):
        assert find_hook(model, name).path == block, name
    inner = {"bert": "attention.self", "gpt2": "mlp.c_fc", "llama": "mlp.gate_proj"}[kind]
    for name in (f"layers.0.{inner}", f"layers.-3.{inner}"):
        assert find_hook(model, name).path == f"{prefix}{BLOCKS[kind]}.0.{inner}"
    assert find_hook(model, f"layers.1.{inner}@-1:in").path == f"{prefix}{BLOCKS[kind]}.1.{inner}@-1:in"


def test_several_places_are_one_hook_and_a_path_finds_the_same_places(models):
    hook = find_hook(models["llama"], "layers.0+layers.-1.mlp:in+blocks.1.attn.hook_z")
    assert hook.places == (Place("layers.0"), Place("layers.2.mlp", "in"), Place("layers.1.self_attn.o_proj", "in"))
    assert hook.path == "layers.0+layers.2.mlp:in+layers.1.self_attn.o_proj:in"
    assert find_hook(models["llama"], hook.path).places == hook.places
    with pytest.raises(InputError, match=r"hook 'layers.0\+layers.-3' names layers.0 twice"):
        find_hook(models["llama"], "layers.0+layers.-3")


def test_unknown_hooks_come_with_the_nearest_names(models):
    with pytest.raises(
        InputError, match=r"hook 'layers.7' is no module of BertModel; nearest: encoder.layer.0 ... encoder.layer.2$"
    ):
        find_hook(models["bert"], "layers.7")
    with pytest.raises(InputError, match=r"nearest: h.1.attn, "):
        find_hook(models["gpt2"], "h.1.atn")
    for name in ("", ".", "layers.-4", "blocks.3.hook_resid_pre", "layers.", "layers.1+", "model.layers.-9.mlp"):
        with pytest.raises(InputError, match="is no module of"):
            find_hook(models["llama"], name)


class Blocks(nn.Module):
    """Three blocks with sixteen experts each, beside a short list of something else."""

    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(3))
        for layer in self.layers:
            layer.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(16))
        self.vision = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))


def test_experts_and_towers_are_not_taken_for_the_blocks():
    model = Blocks()
    assert find_hook(model, "blocks.2.hook_resid_post").path == "layers.2"
    with pytest.raises(InputError, match=r"nearest: layers.0 \.\.\. layers.2"):
        find_hook(model, "layers.3")


def test_convolutions_before_the_blocks_are_not_taken_for_them():
    model = architectures.build("wav2vec2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_hook(model, "layers.-1").path == "encoder.layers.1"
    assert len(model.feature_extractor.conv_layers) == 3


@pytest.mark.parametrize(
    ("name", "block", "other"),
    [
        ("qwen2vl", "model.language_model.layers", "model.visual.blocks"),
        ("gemma3 with vision", "model.language_model.layers", "model.vision_tower.encoder.layers"),
        ("llava", "model.language_model.layers", "model.vision_tower.encoder.layers"),
        ("clip", "text_model.encoder.layers", "vision_model.encoder.layers"),
    ],
)
def test_short_names_mean_the_blocks_that_read_text_and_say_so(name, block, other):
    model = architectures.build(name)
    for short, path in (("layers.1", f"{block}.1"), ("blocks.-1.hook_resid_pre", f"{block}.1:in")):
        with pytest.warns(RuntimeWarning) as said:
            assert find_hook(model, short).path == path
        assert str(said[0].message).startswith(f"hook {short} is {path}, not {other}.1: name the whole path")
    with pytest.warns(RuntimeWarning) as said:
        assert [hook.path for hook in expand_hooks(model, ["layers.*"])] == [f"{block}.0", f"{block}.1"]
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (f"{block}.1", f"{other}.-1"):
            assert find_hook(model, path).path == path.replace("-1", "3")


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("bart", "encoder.layers", "decoder.layers"),
        ("t5", "encoder.block", "decoder.block"),
        ("whisper", "encoder.layers", "decoder.layers"),
    ],
)
def test_where_encoder_and_decoder_have_blocks_one_is_to_be_named(name, encoder, decoder):
    model = architectures.build(name)
    for short in ("layers.1", "layers.3", "blocks.0.hook_resid_post", "hook_embed", "layers.*"):
        with pytest.raises(InputError, match=rf"could be of {encoder} or of {decoder} of this"):
            expand_hooks(model, [short])
    assert find_hook(model, f"{decoder}.-1").path == f"{decoder}.{len(model.get_submodule(decoder)) - 1}"
    assert [hook.path for hook in expand_hooks(model, [f"{encoder}.*"])] == [f"{encoder}.0", f"{encoder}.1"]


def values(model: nn.Module, places: Iterable[Place]) -> dict[Place, Tensor]:
    """(tokens, d) at each place in one forward pass over IDS."""
    found, handles = {}, []
    for place in places:
        module = model.get_submodule(place.path)

        def take(given, place=place):
            tensor = given[0] if isinstance(given, tuple) else given
            found[place] = tensor.detach().clone().reshape(IDS.shape[1], -1)

        if place.side == "out":
            handles.append(module.register_forward_hook(lambda _m, _a, out, take=take: take(out)))
        else:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, take=take: take(args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )
            )
    with torch.no_grad():
        model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return found


SEQUENTIAL = [
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "neox one after the other",
    "opt", "bloom", "neo", "mixtral", "olmo", "olmo2", "olmoe", "stablelm", "mpt", "glm4", "exaone4", "bigcode",
    "qwen2moe", "esm", "modernbert",
]  # fmt: skip
PARALLEL = ["phi", "neox", "gptj", "falcon", "falcon with two norms", "cohere", "codegen"]


@pytest.mark.parametrize("name", [*SEQUENTIAL, *PARALLEL])
def test_what_a_block_adds_to_the_residual_stream_is_what_attn_out_and_mlp_out_say(name):
    model = architectures.build(name)
    parts = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"]
    if name in PARALLEL:
        parts.remove("hook_resid_mid")
        for missing in ("hook_resid_mid", "hook_mlp_in"):
            with pytest.raises(InputError, match=f"'blocks.1.{missing}' has no place in .* side by side in its blocks"):
                find_hook(model, f"blocks.1.{missing}")
    (places,) = zip(*(find_hook(model, f"blocks.1.{part}").places for part in parts), strict=True)
    found = values(model, places)
    x = {part: found[place] for part, place in zip(parts, places, strict=True)}
    added = x["hook_attn_out"] + x["hook_mlp_out"]
    assert torch.allclose(x["hook_resid_pre"] + added, x["hook_resid_post"], atol=1e-4)
    if name in SEQUENTIAL:
        assert torch.allclose(x["hook_resid_pre"] + x["hook_attn_out"], x["hook_resid_mid"], atol=1e-4)
        assert find_hook(model, "blocks.1.hook_mlp_in").path == find_hook(model, "blocks.1.hook_resid_mid").path
    assert not torch.allclose(x["hook_attn_out"], x["hook_mlp_out"], atol=1e-1)


@pytest.mark.parametrize("name", [*SEQUENTIAL, *PARALLEL, "bert", "distilbert"])
def test_hook_z_times_the_last_projection_is_what_attention_gives(name):
    model = architectures.build(name)
    (z,) = find_hook(model, "blocks.0.attn.hook_z").places
    out = Place(z.path)
    found = values(model, [z, out])
    weight, bias = model.get_submodule(z.path).weight, model.get_submodule(z.path).bias
    by_hand = found[z] @ (weight.T if type(model.get_submodule(z.path)).__name__ != "Conv1D" else weight)
    assert torch.allclose(by_hand + (0 if bias is None else bias), found[out], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "pre", "post", "q"),
    [
        ("gpt2", "mlp.c_fc", "mlp.c_proj:in", None),
        ("llama", "mlp.gate_proj", "mlp.down_proj:in", "self_attn.q_proj"),
        ("phi", "mlp.fc1", "mlp.fc2:in", "self_attn.q_proj"),
        ("neox", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h:in", None),
        ("gptj", "mlp.fc_in", "mlp.fc_out:in", "attn.q_proj"),
        ("neo", "mlp.c_fc", "mlp.c_proj:in", "attn.attention.q_proj"),
        ("opt", "fc1", "fc2:in", "self_attn.q_proj"),
        ("mpt", "ffn.up_proj", "ffn.down_proj:in", None),
        ("bert", "intermediate.dense", "output.dense:in", "attention.self.query"),
        ("phi3", None, "mlp.down_proj:in", None),
        ("mixtral", None, None, "self_attn.q_proj"),
    ],
)
def test_places_inside_attention_and_mlp(name, pre, post, q):
    model = architectures.build(name)
    block = find_hook(model, "layers.1").path
    for asked, path in (("mlp.hook_pre", pre), ("mlp.hook_post", post), ("attn.hook_q", q)):
        if path is not None:
            assert find_hook(model, f"blocks.1.{asked}").path == f"{block}.{path}"
            continue
        with pytest.raises(InputError, match=f"'blocks.1.{asked}' has no place in {type(model).__name__}: none of the"):
            find_hook(model, f"blocks.1.{asked}")


def test_the_embedding_is_what_positions_are_added_to_or_what_enters_the_first_block():
    for name, path in (
        ("gpt2", "transformer.wte"),
        ("neo", "transformer.wte"),
        ("opt", "model.decoder.embed_tokens"),
        ("llama", "model.layers.0:in"),
        ("gemma2", "model.layers.0:in"),
        ("bloom", "transformer.h.0:in"),
        ("gptj", "transformer.h.0:in"),
    ):
        assert find_hook(architectures.build(name), "hook_embed").path == path, name


@pytest.mark.parametrize(
    ("name", "asked", "why"),
    [
        (
            "bert",
            "blocks.0.hook_resid_mid",
            "HookedEncoder and TransformerBridge differ in what it is; nearest: blocks.0.",
        ),
        ("bert", "blocks.0.hook_attn_out", "HookedEncoder and TransformerBridge differ"),
        ("distilbert", "blocks.0.hook_attn_out", "HookedEncoder and TransformerBridge differ"),
        ("bert", "hook_embed", "bert.embeddings joins tokens and positions, .* nearest: bert.encoder.layer.0:in"),
        ("esm", "hook_embed", "esm.embeddings joins tokens and positions"),
        ("vit", "hook_embed", "embeddings joins tokens and positions"),
        ("clip", "hook_embed", "text_model.embeddings joins tokens and positions"),
        ("wav2vec2", "hook_embed", "encoder joins tokens and positions"),
        ("opt with late norms", "blocks.0.hook_resid_mid", "do not say whether their norms come before or after"),
        ("granite", "blocks.0.hook_attn_out", "multiply it by 0.5 before it is added"),
        ("granite", "blocks.0.hook_mlp_out", "multiply it by 0.5 before it is added"),
        (
            "mamba",
            "blocks.0.hook_resid_mid",
            "saefast knows no blocks made of norm, mixer; nearest: blocks.0.hook_resid_p",
        ),
        ("llama", "blocks.0.ln1.hook_normalized", "before the norm's weight"),
        ("gpt2", "blocks.0.ln2.hook_normalized", "before the norm's weight"),
        (
            "gpt2",
            "blocks.0.attn.hook_pattern",
            "no module of transformers takes it or puts it out; nearest: blocks.0.attn",
        ),
        ("gpt2", "blocks.0.hook_mlp_out:in", "means transformer.h.0.mlp.c_proj here, which has no input of its own"),
    ],
)
def test_names_of_transformer_lens_that_have_no_place_are_refused_in_one_line(name, asked, why):
    with pytest.raises(InputError, match=why) as refused:
        find_hook(architectures.build(name), asked)
    assert "\n" not in str(refused.value)


def test_norms_without_weights_put_out_what_transformer_lens_calls_normalized():
    model = architectures.build("olmo")
    for asked, norm in (("ln1", "input_layernorm"), ("ln2", "post_attention_layernorm")):
        (place,) = find_hook(model, f"blocks.1.{asked}.hook_normalized").places
        assert place == Place(f"model.layers.1.{norm}")
        (x,) = values(model, [place]).values()
        assert torch.allclose(x.mean(1), torch.zeros(len(x)), atol=1e-5)
        assert torch.allclose(x.var(1, correction=0), torch.ones(len(x)), atol=1e-3)


def test_a_pattern_is_one_hook_for_each_block_that_has_it(models):
    model = models["llama"]
    hooks = expand_hooks(model, ["layers.*", "blocks.*.hook_mlp_out", "layers.*.self_attn+layers.*.mlp:in"])
    assert [hook.name for hook in hooks[:4]] == ["layers.0", "layers.1", "layers.2", "blocks.0.hook_mlp_out"]
    assert [hook.path for hook in hooks[3:5]] == ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]
    assert hooks[-1].name == hooks[-1].path == "layers.2.self_attn+layers.2.mlp:in"
    assert len(hooks) == 9
    # A name that a pattern matches as well is one hook.
    assert [hook.name for hook in expand_hooks(model, ["layers.1", "layers.*"])] == ["layers.1", "layers.0", "layers.2"]
    full = expand_hooks(tiny_models.model("gpt2", head=True), ["transformer.h.*.attn"])
    assert [hook.path for hook in full] == [f"transformer.h.{n}.attn" for n in range(3)]


def test_a_pattern_leaves_out_blocks_that_do_not_have_it():
    model = Blocks()
    del model.layers[1].experts
    assert [hook.name for hook in expand_hooks(model, ["layers.*.experts"])] == ["layers.0.experts", "layers.2.experts"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["layers.*.nothing"],
            r"hook 'layers.\*.nothing' matches nothing: hook 'layers.0.nothing' is no module of Llama",
        ),
        (["layers*"], r"hook 'layers\*': expected one \* in the place of a block's number"),
        (["*"], r"expected one \* in the place"),
        (["layers.*.self_attn.*"], r"expected one \* in the place"),
        (["layers.1*"], r"expected one \* in the place"),
        (["blocks.*.ln1.hook_normalized"], r"matches nothing: hook 'blocks.0.ln1.hook_normalized' has no place"),
        (
            ["layers.*", "model.layers.2"],
            "hooks layers.2 and model.layers.2: two of them are the same module, layers.2",
        ),
    ],
)
def test_patterns_that_make_no_sense(models, names, message):
    with pytest.raises(InputError, match=message):
        expand_hooks(models["llama"], names)


def test_patterns_over_given_names_keep_the_order_of_blocks():
    known = [f"blocks.{n}.{hook}" for n in (0, 10, 2) for hook in ("hook_resid_post", "attn.hook_z")]
    expected = tuple(f"blocks.{n}.attn.hook_z" for n in (0, 2, 10))
    assert expand_names(known, ["blocks.*.attn.hook_z", "blocks.2.attn.hook_z"]) == expected
    assert expand_names(known, ["hook_embed"]) == ("hook_embed",)
    with pytest.raises(InputError, match=r"hook 'blocks.\*.hook_z' matches nothing; there are blocks.0."):
        expand_names(known, ["blocks.*.hook_z"])
