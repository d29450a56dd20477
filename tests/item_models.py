"""Models that read images and sound, made on the spot: transformers' classes, random weights; and files for them."""

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saefast.data.shards import ShardFolder

SIDE, PATCH, MELS, FRAMES, RATE = 32, 8, 16, 100, 16_000
_SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
_IMAGE: dict[str, Any] = {"image_size": SIDE, "patch_size": PATCH}


def model(kind: str) -> Any:
    """ "vit", "dinov2", "registers" (DINOv2 with 4), "clip" (both towers), "clip_vision", "siglip_vision", "swin",
    "resnet", "whisper", "wav2vec2" or "wav2vec2_mask": 3 blocks of width 16, float32, in eval mode."""
    import transformers as tf

    torch.manual_seed(0)
    return _made(tf, kind).eval()


def _made(tf: Any, kind: str) -> Any:
    vision = _SMALL | _IMAGE
    if kind == "vit":
        return tf.ViTModel(tf.ViTConfig(**vision))
    if kind == "dinov2":
        return tf.Dinov2Model(tf.Dinov2Config(**vision))
    if kind == "registers":
        return tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**vision, num_register_tokens=4))
    if kind == "clip":
        text = _SMALL | {"vocab_size": 66, "max_position_embeddings": 64, "eos_token_id": 3, "bos_token_id": 2}
        return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    if kind == "clip_vision":
        return tf.CLIPVisionModel(tf.CLIPVisionConfig(**vision))
    if kind == "siglip_vision":
        return tf.SiglipVisionModel(tf.SiglipVisionConfig(**vision))
    if kind == "swin":
        return tf.SwinModel(
            tf.SwinConfig(image_size=SIDE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
        )
    if kind == "resnet":
        return tf.ResNetModel(
            tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        )
    if kind == "whisper":
        return tf.WhisperModel(tf.WhisperConfig(
            vocab_size=66, d_model=16, encoder_layers=3, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
            encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=FRAMES // 2, num_mel_bins=MELS,
            pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
        ))  # fmt: skip
    norm = {"wav2vec2": "group", "wav2vec2_mask": "layer"}[kind]
    return tf.Wav2Vec2Model(tf.Wav2Vec2Config(
        **_SMALL, vocab_size=8, conv_dim=[8, 8], conv_stride=[5, 4], conv_kernel=[10, 8], feat_extract_norm=norm,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, do_stable_layer_norm=norm == "layer",
    ))  # fmt: skip


def processor(kind: str) -> Any:
    """The image processor or feature extractor of a model of that kind."""
    import transformers as tf

    size = {"height": SIDE, "width": SIDE}
    if kind in ("whisper",):
        return tf.WhisperFeatureExtractor(feature_size=MELS, chunk_length=1, hop_length=160, sampling_rate=RATE)
    if kind.startswith("wav2vec2"):
        return tf.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=kind == "wav2vec2_mask")
    if kind.startswith("clip"):
        return tf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    return tf.ViTImageProcessorPil(size=size)


def save(folder: Path, kind: str) -> Path:
    """A folder with the model and its processor, as transformers keeps them."""
    model(kind).save_pretrained(folder)
    processor(kind).save_pretrained(folder)
    return folder


def pictures(folder: Path, n: int, seed: int = 0) -> Path:
    """n pictures in two folders, png, jpg and webp, colours and sizes of many kinds."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    for i in range(n):
        high, wide = generator.integers(20, 60, 2)
        pixels = generator.integers(0, 256, (high, wide, 3), dtype=np.uint8)
        place = folder / ("a" if i % 3 else "b c") / f"{i:02d}.{('png', 'jpg', 'webp')[i % 3]}"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert("L" if i % 5 == 0 else "RGB").save(place)
    return folder


def sound(file: Path, seconds: float, rate: int = RATE, width: int = 2, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Writes a wav file. -> Its samples (n, channels), from -1 to 1, as they are in it."""
    n = round(seconds * rate)
    exact = 0.5 * np.random.default_rng(seed).standard_normal((n, channels)).clip(-1.9, 1.9)
    half = 2 ** (8 * width - 1)
    whole = np.round(exact * (half - 1)).astype(np.int64)
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as out:
        out.setparams((channels, width, rate, n, "NONE", ""))
        coded = whole + (128 if width == 1 else 0)
        out.writeframes(coded.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width].tobytes())
    return whole / half


def rows_of(folder: Path, hook: str) -> dict[tuple[int, int], Tensor]:
    """Each row by its item and position, of both shares."""
    opened, found = ShardFolder(folder), {}
    assert not opened.verify()
    for split in ("train", "heldout"):
        for info in opened.shards(split, hook):
            shard = opened.open(info, hook)
            for row, seq, pos in zip(shard.acts, shard.seq.tolist(), shard.pos.tolist(), strict=True):
                assert (seq, pos) not in found
                found[seq, pos] = row.float()
    return found


def blocks(found: Any, module: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What a module of the model gives in a plain forward pass, by a hook of the test's own."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    try:
        with torch.no_grad():
            found(**inputs)
    finally:
        handle.remove()
    return seen[0]
