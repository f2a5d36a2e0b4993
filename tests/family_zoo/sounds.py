"""Families that take sound, their default configs made small by `shrunk`."""

from __future__ import annotations

import torch

from .common import AUDIO, HIDDEN, Family, batches, build, pixels, tokens
from .newer_images import MAMBA
from .shrunk import shrunk


def _sound(model, count: int, name: str, *shape: int, mask: str | None = None, frames: int | None = None) -> Family:
    """Return a family that takes a sound, which becomes `count` tokens."""

    def make(seed):
        inputs = {**tokens((AUDIO, count), seed=seed), name: pixels(*shape, seed=seed)}
        return inputs | ({mask: torch.ones(shape[0], frames or shape[-1], dtype=torch.long)} if mask else {})

    return Family(model, batches(make))


def fun_asr_nano() -> Family:
    return _sound(
        build(
            "FunAsrNanoForConditionalGeneration",
            shrunk("FunAsrNanoConfig", adaptor_config={"intermediate_size": HIDDEN // 4}),
        ),
        4,
        "input_features",
        1,
        4,
        112,
        mask="input_features_mask",
        frames=4,
    )


def glmasr() -> Family:
    return _sound(
        build("GlmAsrForConditionalGeneration", shrunk("GlmAsrConfig")),
        2,
        "input_features",
        1,
        16,
        16,
        mask="input_features_mask",
    )


def _granite_speech(model_class: str, config_class: str) -> Family:
    config = shrunk(
        config_class,
        has_lora_adapter=False,
        downsample_rate=2,
        window_size=4,
        encoder_config={"input_dim": 16, "context_size": 8, "max_pos_emb": 16},
        projector_config={"encoder_hidden_size": HIDDEN},
    )
    return _sound(build(model_class, config), 8, "input_features", 1, 16, 16)


def granite_speech() -> Family:
    return _granite_speech("GraniteSpeechForConditionalGeneration", "GraniteSpeechConfig")


def granite_speech_plus() -> Family:
    return _granite_speech("GraniteSpeechPlusForConditionalGeneration", "GraniteSpeechPlusConfig")


def moss_transcribe_diarize() -> Family:
    model = build(
        "MossTranscribeDiarizeForConditionalGeneration", shrunk("MossTranscribeDiarizeConfig", audio_merge_size=2)
    )
    return _sound(model, 4, "input_features", 1, 16, 16, mask="input_features_mask")


def omniasr() -> Family:
    config = shrunk(
        "OmniASRConfig",
        audio_config={
            "conv_dim": [8, 8],
            "conv_kernel": [4, 4],
            "conv_stride": [4, 4],
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
    )
    return _sound(build("OmniASRForConditionalGeneration", config), 4, "input_values", 1, 1, 64)


def qwen3_asr() -> Family:
    config = shrunk("Qwen3ASRConfig", audio_config={"max_position_embeddings": 13})
    return _sound(
        build("Qwen3ASRForConditionalGeneration", config), 13, "input_features", 1, 16, 100, mask="input_features_mask"
    )


def vibevoice_asr() -> Family:
    part = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1], "hidden_size": 16}
    config = shrunk(
        "VibeVoiceAsrConfig",
        acoustic_tokenizer_encoder_config=part,
        semantic_tokenizer_encoder_config=part,
        acoustic_tokenizer_chunk_size=64,
    )
    return _sound(build("VibeVoiceAsrForConditionalGeneration", config), 4, "input_values", 1, 1, 16)


def voxtral_realtime() -> Family:
    model = build("VoxtralRealtimeForConditionalGeneration", shrunk("VoxtralRealtimeConfig"))
    # four frames of the encoder for each token, of two of the spectrogram: features are added to all tokens' embeddings
    return Family(
        model,
        batches(lambda seed: {**tokens(seed=seed, words=20), "input_features": pixels(1, 16, 160, seed=seed)}),
        generates=False,
        settings={"allow_text_only": True},
    )


MIMI = {
    "num_filters": 4,
    "upsampling_ratios": [2, 2],
    "num_quantizers": 2,
    "codebook_size": 16,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "upsample_groups": 32,
}


def kyutai_speech_to_text() -> Family:
    config = shrunk(
        "KyutaiSpeechToTextConfig",
        codebook_vocab_size=20,
        num_codebooks=2,
        audio_pad_token_id=19,
        audio_bos_token_id=18,
        codec_config=MIMI,
    )
    model = build("KyutaiSpeechToTextForConditionalGeneration", config)
    columns = [tokens(seed=10 + c, words=20)["input_ids"] % 18 for c in range(2)]

    def make(seed):
        inputs = tokens(seed=seed, words=20)
        return {**inputs, "input_ids": torch.stack([inputs["input_ids"], *columns], -1)}

    return Family(model, batches(make), generates=False)


def nemo_speechlm() -> Family:
    config = shrunk("Nemotron3_5TranscribeConfig", word_timestamp_config={"blank_token_id": 5}, text_config=MAMBA)
    return _sound(
        build("Nemotron3_5TranscribeForConditionalGeneration", config),
        2,
        "input_features",
        1,
        16,
        16,
        mask="input_features_mask",
    )


FAMILIES = {
    name: f
    for name, f in list(globals().items())
    if callable(f) and getattr(f, "__module__", "") == __name__ and not name.startswith("_")
}
