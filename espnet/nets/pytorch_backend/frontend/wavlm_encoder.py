"""Audio front-end: WavLM on the waveform."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WavLMModel

from espnet.nets.encoders import AUDIO_ENCODERS
from espnet.nets.pytorch_backend.frontend.wave_encoder import SAMPLES_PER_FEATURE, WaveEncoder
from espnet.nets.pytorch_backend.nets_utils import padding_mask, zero_padding
from espnet.nets.pytorch_backend.pretrained import load_pretrained

RECEPTIVE_FIELD = 400  # samples that a feature of the convolutions sees


class WavLMEncoder(WaveEncoder):
    """WavLM checkpoint on waveforms: 50 features a second from normalised 16 kHz samples.

    Source: Chen et al., WavLM: Large-Scale Self-Supervised Pre-Training for Full Stack Speech
    Processing, 2022, in transformers' implementation. Unlike there, an utterance gives in a
    padded batch what it gives alone: the group norm of base models leaves the padding out. The
    convolutions fall short of 50 features a second by one at the end, which is repeated. Neither
    time masking nor layer drop of the checkpoint's config is in use.

    Args:
        name: Hub id, or a folder as `save_pretrained` leaves it.
        freeze: Whether its weights stay as they are.
        unfreeze_last_layers: Layers at its end that are trained nevertheless.
        encoder_layer: Hidden layer that gives the features; -1: the output, `weighted`: all.
        gradient_checkpointing: Whether trained layers are computed again for their gradients.

    Raises:
        ValueError: If the checkpoint cannot be loaded, or an option does not fit it.
    """

    def __init__(
        self,
        name: str,
        *,
        freeze: bool = True,
        unfreeze_last_layers: int = 0,
        encoder_layer: int | str = -1,
        gradient_checkpointing: bool = True,
    ) -> None:
        backbone = load_pretrained(
            WavLMModel, name, AUDIO_ENCODERS["wavlm"].model_types, flag="--audio-encoder-name"
        )
        # The vector of masked frames, which are not used, would wait for a gradient in vain.
        backbone.masked_spec_embed = None
        super().__init__(
            backbone,
            freeze=freeze,
            unfreeze_last_layers=unfreeze_last_layers,
            encoder_layer=encoder_layer,
            gradient_checkpointing=gradient_checkpointing,
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The Transformer layers of the backbone."""
        return self.backbone.encoder.layers

    def final_norm(self) -> nn.Module | None:
        """The layer norm after the last layer, which large models have."""
        stable = self.backbone.config.do_stable_layer_norm
        return self.backbone.encoder.layer_norm if stable else None

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Features of waveforms of given lengths in samples: one for each full 20 ms."""
        return lengths // SAMPLES_PER_FEATURE

    def encode(self, waves: Tensor, samples: Tensor, frames: Tensor) -> Tensor:
        """Encodes waveforms of similar length.

        Args:
            waves: (B, S).
            samples: Real samples, (B,), at most S.
            frames: Features of each, (B,).

        Returns:
            Features, (B, T, D), zero where padded, T that of the longest.
        """
        waves = zero_padding(waves[..., None], padding_mask(samples, waves.size(1))).squeeze(-1)
        waves = F.pad(waves, (0, max(0, RECEPTIVE_FIELD - waves.size(1))))
        samples = samples.clamp(min=RECEPTIVE_FIELD)
        x, lengths = self.convolve_wave(waves, samples)
        mask = padding_mask(lengths, x.size(1))
        features = self.choose(self.hidden_states(x, mask))
        length = int(frames.max())
        source = torch.arange(length, device=waves.device).minimum(lengths[:, None] - 1)  # (B, T)
        features = features.gather(1, source[..., None].expand(-1, -1, features.size(2)))
        return zero_padding(features, padding_mask(frames, length))

    def convolve_wave(self, waves: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Applies the convolutions.

        Args:
            waves: (B, S), S at least 400.
            samples: Real samples, (B,), likewise.

        Returns:
            Features, (B, T, C), and their lengths, (B,); what is beyond them means nothing.
        """
        config, lengths = self.backbone.config, samples
        x = waves[:, None]
        for index, layer in enumerate(self.backbone.feature_extractor.conv_layers):
            lengths = (lengths - config.conv_kernel[index]) // config.conv_stride[index] + 1
            if config.feat_extract_norm == "group" and index == 0:
                x = layer.conv(x)
                mask = padding_mask(lengths, x.size(2))
                x = layer.activation(_norm_over_time(layer.layer_norm, x, mask))
            else:
                x = layer(x)
        return x.transpose(1, 2), lengths

    def hidden_states(self, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """The input of the first layer, and the output of each layer.

        Args:
            x: Features of the convolutions, (B, T, C).
            mask: Real frames, (B, T), or None if all are real.

        Yields:
            Hidden states, (B, T, D) each.
        """
        encoder = self.backbone.encoder
        projected, _ = self.backbone.feature_projection(x)
        state = zero_padding(projected, mask)
        state = state + encoder.pos_conv_embed(state)
        if not self.backbone.config.do_stable_layer_norm:
            state = encoder.layer_norm(state)
        if self.backbone.feature_projection.training:  # else what comes before is frozen
            state = encoder.dropout(state)
        yield state
        bias = None  # of relative positions: the first layer's serves all
        for index, layer in enumerate(self.layers):
            options = {} if self.backbone.config.do_stable_layer_norm else {"index": index}
            state, bias = layer(state, attention_mask=mask, position_bias=bias, **options)
            yield state


def _norm_over_time(norm: nn.GroupNorm, x: Tensor, mask: Tensor | None) -> Tensor:
    """Applies a group norm of one channel a group, (B, C, T), to real frames, (B, T), only."""
    if mask is None:
        return norm(x)
    real = mask[:, None]  # (B, T) -> (B, 1, T)
    number = real.sum(dim=2, keepdim=True)
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        mean = (x * real).sum(dim=2, keepdim=True) / number
        variance = ((x - mean).square() * real).sum(dim=2, keepdim=True) / number
        x = (x - mean) * (variance + norm.eps).rsqrt()
        return x * norm.weight[:, None] + norm.bias[:, None]
