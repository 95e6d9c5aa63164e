"""Audio front-end: WavLM on the waveform."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WavLMModel
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from espnet.nets.encoders import AUDIO_ENCODERS
from espnet.nets.pytorch_backend.frontend.packed_attention import attend
from espnet.nets.pytorch_backend.frontend.wave_encoder import SAMPLES_PER_FEATURE, WaveEncoder
from espnet.nets.pytorch_backend.nets_utils import send
from espnet.nets.pytorch_backend.pretrained import load_pretrained
from espnet.nets.pytorch_backend.real_frames import RealFrames

RECEPTIVE_FIELD = 400  # samples that a feature of the convolutions sees


class PackedAttention(WavLMAttention):
    """Attention of WavLM's layers, on packed frames too.

    All of its linear layers are called, so that other modules can take their place: that of
    transformers only reads the weights of most.

    Args:
        attention: That of transformers, whose weights it takes over.
    """

    def __init__(self, attention: WavLMAttention) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(attention))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: RealFrames,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None, Tensor]:
        """Attends within each utterance, with a bias for the distance that each query gates.

        Args:
            hidden_states: Packed, (1, N, D).
            attention_mask: Where they are, which layers pass on in place of a mask.
            position_bias: Bias of relative positions, (H, T, T); None in the first layer, which
                makes it.
            **_: What transformers passes besides.

        Returns:
            Attended values, shaped as `hidden_states`; None in place of weights; the bias.
        """
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_bias is None:
            position_bias = self.compute_bias(attention_mask.length, attention_mask.length)
        attended = attend(
            *(query, key, value, attention_mask),
            gates=self.gates(hidden_states),
            position_bias=position_bias,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out_proj(attended.flatten(2)), None, position_bias

    def gates(self, x: Tensor) -> Tensor:
        """Factors of the bias for each frame and head: (..., D) -> (..., H, 1)."""
        heads = x.unflatten(-1, (self.num_heads, -1))
        projected = self.gru_rel_pos_linear(heads).unflatten(-1, (2, -1)).sum(dim=-1)
        share, reset = projected.sigmoid().unbind(-1)
        return (share * (reset * self.gru_rel_pos_const.flatten() - 1) + 2).unsqueeze(-1)


class WavLMEncoder(WaveEncoder):
    """WavLM checkpoint on waveforms: 50 features a second from normalised 16 kHz samples.

    Source: Chen et al., WavLM: Large-Scale Self-Supervised Pre-Training for Full Stack Speech
    Processing, 2022, in transformers' implementation. Unlike there, an utterance gives in a
    padded batch what it gives alone: the group norm of base models leaves the padding out. The
    convolutions fall short of 50 features a second by one at the end, which is repeated. Neither
    time masking nor layer drop of the checkpoint's config is in use.
    """

    def load_backbone(self, name: str, *, quantize: bool) -> WavLMModel:
        """Loads the checkpoint, and puts attention for packed frames in it."""
        backbone = load_pretrained(
            WavLMModel,
            name,
            AUDIO_ENCODERS["wavlm"].model_types,
            flag="--audio-encoder-name",
            quantize=quantize,
        )
        # The vector of masked frames, which are not used, would wait for a gradient in vain.
        backbone.masked_spec_embed = None
        for layer in backbone.encoder.layers:
            layer.attention = PackedAttention(layer.attention)
        return backbone

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
        """Encodes waveforms, (B, S), longest first. See `WaveEncoder`."""
        waves = F.pad(waves, (0, max(0, RECEPTIVE_FIELD - waves.size(1))))
        x, lengths = self.convolve_waves(waves, samples.clamp(min=RECEPTIVE_FIELD))
        convolved = RealFrames(lengths, int(lengths.max()), waves.device)
        features = convolved.pad(self.choose(self.hidden_states(x, convolved))[0])
        source = torch.arange(int(frames.max())).minimum(lengths[:, None] - 1)  # (B, T)
        source = send(source, waves.device)[..., None].expand(-1, -1, features.size(2))
        features = features.gather(1, source)
        return RealFrames.of(frames, features).clear(features)

    def convolve_waves(self, waves: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Applies the convolutions, to waveforms of different length end to end.

        Args:
            waves: (B, S), zero where padded, S at least 400.
            samples: Real samples, (B,), likewise.

        Returns:
            Features of all, one after the other, (1, N, C); their lengths, (B,).
        """
        config = self.backbone.config
        lengths = [samples]
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            lengths.append((lengths[-1] - kernel) // stride + 1)
        layers = self.backbone.feature_extractor.conv_layers
        if int(samples.min()) == waves.size(1):
            x = waves[:, None]
            for layer in layers:
                x = layer(x)
            return x.transpose(1, 2).reshape(1, -1, x.size(1)), lengths[-1]
        x, slots = _end_to_end(waves, samples)
        for index, layer in enumerate(layers):
            if config.feat_extract_norm == "group" and index == 0:
                sizes = slots.lengths * (SAMPLES_PER_FEATURE // config.conv_stride[0])
                x = _norm_each(layer.layer_norm, layer.conv(x), sizes.tolist(), lengths[1].tolist())
                x = layer.activation(x)
            else:
                x = layer(x)
        return x.transpose(1, 2).index_select(1, slots.first(lengths[-1])), lengths[-1]

    def hidden_states(self, x: Tensor, real: RealFrames) -> Iterator[Tensor]:
        """The input of the first layer, and the output of each layer.

        Args:
            x: Features of the convolutions, (1, N, C).
            real: Where they are.

        Yields:
            Hidden states, (1, N, D) each.
        """
        encoder = self.backbone.encoder
        state, _ = self.backbone.feature_projection(x)
        state = state + real.pack(encoder.pos_conv_embed(real.pad(state[0])))
        if not self.backbone.config.do_stable_layer_norm:
            state = encoder.layer_norm(state)
        if self.backbone.feature_projection.training:  # else what comes before is frozen
            state = encoder.dropout(state)
        yield state
        bias = None  # of relative positions: the first layer's serves all
        for layer in self.layers:
            state, bias = layer(state, attention_mask=real, position_bias=bias)
            yield state


def _end_to_end(waves: Tensor, samples: Tensor) -> tuple[Tensor, RealFrames]:
    """Lays waveforms end to end, so that convolutions without padding compute little in vain.

    Each begins at a multiple of the convolutions' joint stride, so that its features are those
    that it has alone. The few that see two waveforms are to be left out.

    Args:
        waves: (B, S), zero where padded.
        samples: Real samples, (B,).

    Returns:
        The row, (1, 1, N·320); the strides that waveforms take, N in all.
    """
    number = -(-waves.size(1) // SAMPLES_PER_FEATURE)
    waves = F.pad(waves, (0, number * SAMPLES_PER_FEATURE - waves.size(1)))
    strides = waves.unflatten(1, (number, SAMPLES_PER_FEATURE))
    slots = RealFrames.of(-(-samples // SAMPLES_PER_FEATURE), strides)
    return slots.pack(strides).view(1, 1, -1), slots


def _norm_each(norm: nn.GroupNorm, x: Tensor, sizes: list[int], lengths: list[int]) -> Tensor:
    """Applies a group norm to each of the waveforms in a row, (1, C, T), by itself.

    Args:
        norm: A group norm of one channel a group.
        x: Features; the last waveform may lack some of its size.
        sizes: What each waveform takes of T.
        lengths: How much of it is real.

    Returns:
        Normalised features, (1, C, T); what is not real is as it was.
    """
    sizes = [*sizes[:-1], x.size(2) - sum(sizes[:-1])]
    parts = zip(x.split(sizes, dim=2), lengths, strict=True)
    return torch.cat([y for x, n in parts for y in (norm(x[..., :n]), x[..., n:])], dim=2)
