"""Language models of many architectures with two tiny blocks, random norms and biases, made without any network."""

from collections.abc import Callable
from typing import Any

import torch

_SIZES: dict[str, Any] = {
    "vocab_size": 66, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 1}
_HEADS = {**_GROUPED, "head_dim": 8}
_GPT2: dict[str, Any] = {"vocab_size": 66, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_FALCON = {"vocab_size": 66, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_OPT = {**_FALCON, "ffn_dim": 32, "max_position_embeddings": 64, "word_embed_proj_dim": 16}
_BART = {
    "vocab_size": 66, "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_QWEN_VISION = {"depth": 4, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_QWEN_IDS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
_GEMMA = {**_HEADS, "sliding_window": 32, "query_pre_attn_scalar": 8}
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}

# Name -> class of transformers, without "Config" its config's unless given, and the config's settings.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2", _GPT2),
    "llama": ("LlamaForCausalLM", "Llama", _GROUPED),
    "mistral": ("MistralForCausalLM", "Mistral", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3", _HEADS),
    "gemma": ("GemmaForCausalLM", "Gemma", _HEADS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2", _GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3Text", _GEMMA),
    "phi": ("PhiForCausalLM", "Phi", _SIZES),
    "phi3": ("Phi3ForCausalLM", "Phi3", {**_GROUPED, "pad_token_id": 0}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoX", _SIZES),
    "neox one after the other": ("GPTNeoXForCausalLM", "GPTNeoX", {**_SIZES, "use_parallel_residual": False}),
    "opt": ("OPTForCausalLM", "OPT", _OPT),
    "opt with late norms": ("OPTForCausalLM", "OPT", {**_OPT, "do_layer_norm_before": False}),
    "bloom": ("BloomForCausalLM", "Bloom", {"vocab_size": 66, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "gptj": ("GPTJForCausalLM", "GPTJ", {**_GPT2, "rotary_dim": 4}),
    "neo": (
        "GPTNeoForCausalLM", "GPTNeo",
        {"vocab_size": 66, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64,
         "attention_types": [[["global", "local"], 1]]},
    ),
    "mixtral": ("MixtralForCausalLM", "Mixtral", {**_GROUPED, "num_local_experts": 4}),
    "olmo": ("OlmoForCausalLM", "Olmo", _GROUPED),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2", _GROUPED),
    "olmoe": ("OlmoeForCausalLM", "Olmoe", _EXPERTS),
    "stablelm": ("StableLmForCausalLM", "StableLm", _GROUPED),
    "falcon": ("FalconForCausalLM", "Falcon", _FALCON),
    "falcon with two norms": (
        "FalconForCausalLM", "Falcon", {**_FALCON, "num_kv_heads": 1, "new_decoder_architecture": True},
    ),
    "mpt": ("MptForCausalLM", "Mpt", {"vocab_size": 66, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}),
    "cohere": ("CohereForCausalLM", "Cohere", _GROUPED),
    "granite": ("GraniteForCausalLM", "Granite", {**_GROUPED, "residual_multiplier": 0.5}),
    "glm4": ("Glm4ForCausalLM", "Glm4", {**_HEADS, "pad_token_id": 0}),
    "exaone4": (
        "Exaone4ForCausalLM", "Exaone4", {**_HEADS, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "codegen": ("CodeGenForCausalLM", "CodeGen", {**_GPT2, "n_head": 4, "rotary_dim": 4}),
    "bigcode": ("GPTBigCodeForCausalLM", "GPTBigCode", _GPT2),
    "qwen2moe": (
        "Qwen2MoeForCausalLM", "Qwen2Moe",
        {**_EXPERTS, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    ),
    "mamba": ("MambaForCausalLM", "Mamba",
              {"vocab_size": 66, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "bert": ("BertForMaskedLM", "Bert", _SIZES),
    "distilbert": (
        "DistilBertForMaskedLM", "DistilBert",
        {"vocab_size": 66, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64},
    ),
    "esm": ("EsmForMaskedLM", "Esm", {**_SIZES, "mask_token_id": 4, "pad_token_id": 0}),
    "modernbert": (
        "ModernBertForMaskedLM", "ModernBert",
        {**_SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "roberta": ("RobertaForMaskedLM", "Roberta", {**_SIZES, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}),
    "albert": ("AlbertForMaskedLM", "Albert", {**_SIZES, "embedding_size": 8}),
    "deberta": (
        "DebertaV2ForMaskedLM", "DebertaV2",
        {**_SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "bart with a head": (
        "BartForConditionalGeneration", "Bart",
        {**_BART, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 1, "decoder_start_token_id": 2},
    ),
    "t5 with a head": (
        "T5ForConditionalGeneration", "T5",
        {"vocab_size": 66, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
         "decoder_start_token_id": 0},
    ),
    "bart": ("BartModel", "Bart", {**_BART, "encoder_layers": 2, "decoder_layers": 4}),
    "t5": ("T5Model", "T5", {"vocab_size": 66, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}),
    "whisper": (
        "WhisperModel", "Whisper",
        {**_BART, "encoder_layers": 2, "decoder_layers": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 1, "num_mel_bins": 8, "max_source_positions": 16},
    ),
    "xlnet": ("XLNetModel", "XLNet", {"vocab_size": 66, "d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 32}),
    "qwen2vl": (
        "Qwen2VLForConditionalGeneration", "Qwen2VL",
        {"text_config": {**_GROUPED, **_MROPE}, "vision_config": _QWEN_VISION, **_QWEN_IDS},
    ),
    "gemma3 with vision": (
        "Gemma3ForConditionalGeneration", "Gemma3",
        {"text_config": {**_HEADS, "sliding_window": 32}, "vision_config": _VISION, "mm_tokens_per_image": 4,
         "boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7},
    ),
    "llava": (
        "LlavaForConditionalGeneration", "Llava",
        {"text_config": {"model_type": "llama", **_GROUPED},
         "vision_config": {"model_type": "clip_vision_model", **_VISION}, "image_token_index": 7},
    ),
    "wav2vec2": (
        "Wav2Vec2Model", "Wav2Vec2",
        {**_SIZES, "conv_dim": (8, 8, 8), "conv_stride": (2, 2, 2), "conv_kernel": (2, 2, 2),
         "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    ),
    "vit": ("ViTModel", "ViT", _VISION),
    "clip": ("CLIPModel", "CLIP", {"text_config": _SIZES, "vision_config": _VISION}),
}  # fmt: skip


def build(name: str) -> Any:
    """The model, float32, in eval mode; no norm is the identity and no bias 0, so that every module can be told by
    what it puts out."""
    import transformers

    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    made: Callable[..., Any] = getattr(transformers, kind)
    model = made(getattr(transformers, f"{config}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model
