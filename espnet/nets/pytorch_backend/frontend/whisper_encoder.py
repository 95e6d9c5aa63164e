"""Audio front-end: the encoder of Whisper on utterances, each with a margin of silence."""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder as WhisperBackbone

from espnet.formats import AUDIO_RATE
from espnet.nets.encoders import AUDIO_ENCODERS
from espnet.nets.pytorch_backend.frontend.packed_attention import ATTENTION
from espnet.nets.pytorch_backend.frontend.wave_encoder import SAMPLES_PER_FEATURE, WaveEncoder
from espnet.nets.pytorch_backend.frontend.whisper_log_mel import WhisperLogMel
from espnet.nets.pytorch_backend.pretrained import load_pretrained
from espnet.nets.pytorch_backend.real_frames import RealFrames

CONVOLUTION_STRIDE = 2  # log-mel features for one of the encoder's


class WhisperEncoder(WaveEncoder):
    """Encoder of a Whisper checkpoint: 50 features a second from un-normalised 16 kHz samples.

    Source: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision, 2023, in
    transformers' implementation. Unlike there, utterances are not padded to 30 s: the table of
    positions is cut to their length and a margin of silence, and padding is masked. Its final
    layer norm is part of the last hidden layer.

    Whisper was trained on 30 s, so its decoder looks for the end of a text in the silence after
    the words, and repeats them where there is none. The margin's features are an utterance's own:
    they count in the lengths.

    Args:
        name: As for `PretrainedEncoder`, of a whole Whisper.
        margin: Seconds of silence that follow each utterance, as far as the checkpoint has
            positions; 30 fills them all.
        **options: As for `PretrainedEncoder`.
    """

    norm_ends_last_layer = True

    def __init__(self, name: str, *, margin: float = 0.0, **options: Any) -> None:
        super().__init__(name, **options)
        self.positions = self.backbone.config.max_source_positions
        self.margin = round(margin * self.frame_rate)  # features
        self.log_mel = WhisperLogMel(self.backbone.config.num_mel_bins)

    def load_backbone(self, name: str, *, quantize: bool) -> WhisperBackbone:
        """Loads the encoder of a checkpoint. See `PretrainedEncoder`."""
        backbone = load_pretrained(
            WhisperBackbone,
            name,
            AUDIO_ENCODERS["whisper"].model_types,
            flag="--audio-encoder-name",
            quantize=quantize,
            # Published checkpoints begin with `model.encoder.`, those of WhisperModel with less.
            key_mapping={r"^(model\.)?encoder\.": ""},
            attn_implementation=ATTENTION,
        )
        backbone.embed_positions.requires_grad_(False)  # Sinusoids; loading forgets it.
        return backbone

    @property
    def layers(self) -> nn.ModuleList:
        """The Transformer layers of the backbone."""
        return self.backbone.layers

    def final_norm(self) -> nn.Module:
        """The layer norm after the last layer."""
        return self.backbone.layer_norm

    def speech_lengths(self, lengths: Tensor) -> Tensor:
        """Features before the margin: one for each 20 ms that begin. `lengths` are in samples."""
        return (lengths + SAMPLES_PER_FEATURE - 1) // SAMPLES_PER_FEATURE

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Features of waveforms of given lengths in samples, the margin among them."""
        return (self.speech_lengths(lengths) + self.margin).clamp(max=self.positions)

    def encode(self, waves: Tensor, samples: Tensor, frames: Tensor) -> Tensor:  # noqa: ARG002
        """Encodes waveforms, (B, S), longest first. See `WaveEncoder`.

        Raises:
            ValueError: If they are longer than the checkpoint has positions.
        """
        length = -(-waves.size(1) // SAMPLES_PER_FEATURE)
        if length > self.positions:
            raise ValueError(
                f"an utterance lasts {waves.size(1) / AUDIO_RATE:.1f} s, but Whisper's encoder "
                f"takes at most {self.positions / self.frame_rate:g} s: leave it out, cut it, or "
                "choose another --audio-encoder"
            )
        real = RealFrames(frames, int(frames.max()), waves.device)
        mel = self.log_mel(waves, CONVOLUTION_STRIDE * real.length)
        return real.pad(self.choose(self.hidden_states(mel, real))[0])

    def hidden_states(self, mel: Tensor, real: RealFrames) -> Iterator[Tensor]:
        """The input of the first layer, and the output of each layer.

        Args:
            mel: Log-mel features, (B, 2·T, mels).
            real: Where the hidden states are.

        Yields:
            Hidden states, packed, (1, N, D) each.
        """
        backbone = self.backbone
        mel = mel.to(backbone.conv1.weight.dtype)
        mel = RealFrames.of(CONVOLUTION_STRIDE * real.lengths, mel).clear(mel)
        x = mel.transpose(1, 2)  # (B, 2·T, mels) -> (B, mels, 2·T)
        # The second convolution, with stride 2, never sees beyond 2·T.
        x = F.gelu(backbone.conv2(F.gelu(backbone.conv1(x)))).transpose(1, 2)  # -> (B, T, D)
        state = real.pack(x + backbone.embed_positions.weight[: x.size(1)])[None]
        state = F.dropout(state, backbone.dropout, backbone.conv1.training)
        for index, layer in enumerate(self.layers, start=1):
            yield state
            state = layer(state, real)
            if index == backbone.config.encoder_layers:
                state = backbone.layer_norm(state)
        yield state
