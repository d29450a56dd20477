"""for_saebench: the interface that SAEBench and sae-probes ask for, held to the SAE itself and to their own code."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saefast
from saefast.errors import InputError
from saefast.integrations.saebench import SAEBenchConfig, SAEBenchSAE, for_saebench

D, L, K = 16, 64, 6
ABOUT = {"model_name": "gpt2", "hook_name": "layers.3", "context_size": 32}
KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "free decoder": {"unit_norm_decoder": False},
    "ranked by norm": {"unit_norm_decoder": False, "rescale_acts_by_decoder_norm": True},
    "raw input": {"apply_b_dec_to_input": False},
    "jumprelu": {"activation": "jumprelu", "unit_norm_decoder": False},
    "batchtopk": {"activation": "batchtopk"},
    "groupmax": {"activation": "groupmax", "k": 8},
}


def trained(name: str, dtype: torch.dtype = torch.float32) -> saefast.SAE:
    """An SAE of a kind with weights that a fold could get wrong: other norms, biases, a row of zeros."""
    settings = dict(d_in=D, n_latents=L, k=K, metadata=ABOUT) | KINDS[name]
    sae = saefast.SAE(saefast.SAEConfig(**settings), seed=0)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.3)
        sae.b_dec.normal_(std=0.3)
        if not sae.config.unit_norm_decoder:
            sae.W_dec *= torch.rand(L, 1) * 3 + 0.2
            sae.W_dec[5] = 0
        for buffer in sae.buffers():  # a threshold: until there is one, a token's code depends on those beside it
            buffer.fill_(0.4)
    return sae.to(dtype)


@pytest.mark.parametrize("name", KINDS)
def test_codes_and_reconstructions_are_the_saes(name: str) -> None:
    sae = trained(name)
    bench, x = for_saebench(sae), torch.randn(3, 7, D)
    f = bench.encode(x)
    assert (f.shape, f.dtype) == ((3, 7, L), torch.float32)
    expected = sae(x).x_hat
    torch.testing.assert_close(bench.decode(f), expected)
    torch.testing.assert_close(bench(x), expected)
    torch.testing.assert_close(f @ bench.W_dec + bench.b_dec, expected)
    assert torch.equal((f > 0) | (sae.W_dec.norm(dim=1) == 0), (sae.encode(x) > 0) | (sae.W_dec.norm(dim=1) == 0))


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_theirs_to_read(name: str) -> None:
    bench, x = for_saebench(trained(name)), torch.randn(9, D)
    assert (bench.W_enc.shape, bench.W_dec.shape) == ((D, L), (L, D))
    assert all(isinstance(p, torch.nn.Parameter) for p in (bench.W_enc, bench.W_dec, bench.b_enc, bench.b_dec))
    torch.testing.assert_close(bench.W_dec.norm(dim=1), torch.ones(L), rtol=0, atol=1e-5)
    centred = x - bench.b_dec if bench.cfg.apply_b_dec_to_input else x
    pre, f = centred @ bench.W_enc + bench.b_enc, bench.encode(x)
    torch.testing.assert_close(f[f > 0], pre[f > 0])


def test_weights_of_unit_norm_are_not_copied() -> None:
    sae = trained("topk")
    bench = for_saebench(sae)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert getattr(bench, name).data_ptr() == getattr(sae, name).data_ptr(), name


@pytest.mark.parametrize("name", ["topk", "free decoder", "ranked by norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_to_moves_all_of_it(name: str, dtype: torch.dtype) -> None:
    bench = for_saebench(trained(name))
    assert bench.to(device="cpu", dtype=dtype) is bench
    assert (bench.dtype, bench.W_enc.dtype, bench.W_dec.dtype, bench.b_dec.dtype) == (dtype,) * 4
    assert (bench.cfg.dtype, bench.cfg.device, bench.device) == (str(dtype)[6:], "cpu", torch.device("cpu"))
    f = bench.encode(torch.randn(2, 3, D))
    assert f.dtype == bench.decode(f).dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert ((bench.W_dec.norm(dim=1) - 1).abs() <= tolerance).all()


def test_the_config_says_what_they_read() -> None:
    cfg = for_saebench(trained("topk")).cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("gpt2", "blocks.3.hook_resid_post", 3)
    assert (cfg.d_in, cfg.d_sae, cfg.context_size, cfg.dtype) == (D, L, 32, "float32")
    cfg.metadata = object()  # type: ignore[attr-defined]  # as their code adds to it
    assert json.loads(json.dumps(cfg.to_dict()))["hook_name"] == "blocks.3.hook_resid_post"
    given = for_saebench(trained("topk"), "pythia-70m", "blocks.1.attn.hook_z", context_size=8).cfg
    assert (given.model_name, given.hook_name, given.hook_layer) == ("pythia-70m", "blocks.1.attn.hook_z", 1)
    assert given.context_size == 8
    assert for_saebench(trained("topk"), hook_name="hook_embed", hook_layer=2).cfg.hook_layer == 2


@pytest.mark.parametrize(
    ("hook", "found"),
    [("model.layers.12", 12), ("h.4", 4), ("transformer.h.0", 0), ("blocks.7.hook_resid_post", 7), ("layers.-1", None)],
)
def test_names_of_blocks(hook: str, found: int | None) -> None:
    if found is None:
        with pytest.raises(InputError, match="takes TransformerLens' name"):
            for_saebench(trained("topk"), hook_name=hook)
        return
    assert for_saebench(trained("topk"), hook_name=hook).cfg.hook_name == f"blocks.{found}.hook_resid_post"


def kind(**changes: Any) -> saefast.SAE:
    return saefast.SAE(saefast.SAEConfig(**dict(d_in=D, n_latents=L, k=K, metadata=ABOUT) | changes), seed=0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: for_saebench(3), "sae is 3 (int): expected SAE"),
        (lambda: for_saebench(kind(d_out=D, apply_b_dec_to_input=False)), "sae is a transcoder"),
        (lambda: for_saebench(kind(input_norm="layer_norm")), "sae decodes with its input"),
        (lambda: for_saebench(kind(metadata={})), "model_name is None"),
        (lambda: for_saebench(kind(metadata={}), "gpt2"), "hook_name is None"),
        (lambda: for_saebench(kind(), hook_name="layers.3.mlp"), "takes TransformerLens' name"),
        (lambda: for_saebench(kind(), hook_name="hook_embed"), "give hook_layer"),
    ],
)
def test_what_saebench_could_not_evaluate_is_refused(call: Any, said: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert said in str(error.value)


# --- SAEBench's own code


@pytest.fixture
def model() -> Any:
    lens = pytest.importorskip("transformer_lens")
    pytest.importorskip("sae_bench")
    config = lens.HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=32, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu", seed=0, device="cpu"
    )
    return lens.HookedTransformer(config)


class Store:
    """What core's functions ask of SAELens' store, which draws its texts from the hub."""

    context_size, store_batch_size_prompts = 16, 4

    def __init__(self) -> None:
        self.drawn: Iterator[Tensor] = iter(())
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.drawn = iter([torch.randint(50, (4, 16), generator=generator) for _ in range(9)])

    def get_batch_tokens(self, batch_size: int) -> Tensor:
        return next(self.drawn)[:batch_size]


@pytest.mark.peers
@pytest.mark.parametrize("name", ["topk", "free decoder", "ranked by norm", "jumprelu", "batchtopk"])
def test_saebenchs_core_evaluation_measures_what_it_should(name: str, model: Any, tmp_path: Path) -> None:
    from sae_bench.evals.core import main as core
    from sae_bench.sae_bench_utils import general_utils

    sae = trained(name)
    about = dict(model_name="tiny", hook_name="blocks.1.hook_resid_post")
    sae.config = dataclasses.replace(sae.config, metadata=about)
    _, bench, _ = general_utils.load_and_format_sae("ours", for_saebench(sae), "cpu")  # type: ignore[misc]
    assert general_utils.check_decoder_norms(bench.W_dec.data)
    bench = bench.to(device="cpu", dtype=torch.float32)
    settings = core.CoreEvalConfig(
        model_name="tiny", batch_size_prompts=4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2,
        compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True, context_size=16, dataset="none", llm_dtype="float32",
    )  # fmt: skip
    metrics, features = core.run_evals(bench, Store(), model, settings)  # type: ignore[arg-type]
    tokens = torch.cat([batch for batch, _ in zip(Store().drawn, range(2), strict=False)])
    _, cache = model.run_with_cache(tokens, names_filter=["blocks.1.hook_resid_post"])
    x = cache["blocks.1.hook_resid_post"].flatten(0, 1)
    x_hat, acts, idx = sae(x)
    counted = (acts > 0) & (sae.W_dec.norm(dim=1)[idx.long()] > 0)
    assert metrics["sparsity"]["l0"] == pytest.approx(counted.sum(1).float().mean().item())
    squares = (x - x_hat).square().sum(1)
    assert metrics["reconstruction_quality"]["mse"] == pytest.approx((squares / (len(x) / 2)).mean().item(), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(x, x_hat).mean().item()
    assert metrics["reconstruction_quality"]["cossim"] == pytest.approx(cosine, rel=1e-4)
    replaced = model.run_with_hooks(
        tokens, return_type="loss", fwd_hooks=[("blocks.1.hook_resid_post", lambda h, hook: sae(h).x_hat)]
    )
    measured = metrics["model_performance_preservation"]
    assert measured["ce_loss_with_sae"] == pytest.approx(replaced.item(), rel=1e-4)
    density = torch.zeros(L).index_add(0, idx[counted].long(), torch.ones(int(counted.sum()))) / len(x)
    torch.testing.assert_close(torch.tensor(features["feature_density"]), density, rtol=1e-4, atol=1e-6)
    cosines = torch.tensor(features["encoder_decoder_cosine_sim"])
    expected = torch.nn.functional.cosine_similarity(bench.W_dec, bench.W_enc.T)
    torch.testing.assert_close(cosines, expected, rtol=1e-4, atol=1e-5)
    saved = _saved(core, metrics, features, settings, bench, tmp_path)
    assert saved["sae_cfg_dict"]["hook_name"] == "blocks.1.hook_resid_post"
    assert len(saved["eval_result_details"]) == L


def _saved(core: Any, metrics: Any, features: Any, settings: Any, bench: SAEBenchSAE, folder: Path) -> Any:
    """SAEBench's file of results, read back."""
    metrics["misc_metrics"] = core.calculate_misc_metrics(features)
    result = {"eval_cfg": settings, "metrics": metrics, "feature_metrics": features, "sae_id": "x", "sae_set": "ours"}
    core.save_single_eval_result(result, "id", "version", "commit", str(folder / "out.json"), bench)
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def test_the_pages_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "saebench.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    trained("topk").save("run")
    found: dict[str, Any] = {}
    exec(page.split("```python")[1].split("```")[0], found)
    ((name, bench),) = found["selected_saes"]
    assert (name, bench.cfg.hook_layer) == ("mine", 3)


@pytest.mark.peers
def test_their_config_has_no_field_that_ours_lacks() -> None:
    theirs = pytest.importorskip("sae_bench.custom_saes.custom_sae_config").CustomSAEConfig
    named = {f.name for f in dataclasses.fields(theirs)} | {"activation_fn_kwargs", "model_from_pretrained_kwargs"}
    assert named <= {f.name for f in dataclasses.fields(SAEBenchConfig)}


@pytest.mark.peers
def test_sae_probes_activations_are_the_saes(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = pytest.importorskip("sae_probes.generate_sae_activations")
    x = torch.randn(40, D)
    sets = (x[:30], torch.zeros(30), x[30:], torch.zeros(10))
    monkeypatch.setattr(probes, "DATASET_SIZES", {"a": 140})
    monkeypatch.setattr(probes, "get_xy_traintest", lambda *args, **kwargs: sets)
    bench = for_saebench(trained("free decoder"))
    with torch.inference_mode():
        found = probes.generate_sae_activations_normal(bench, "a", "h", "tiny", "cpu", ".", batch_size=7)
    torch.testing.assert_close(found.X_train, bench.encode(x[:30]))
    torch.testing.assert_close(found.X_test, bench.encode(x[30:]))
