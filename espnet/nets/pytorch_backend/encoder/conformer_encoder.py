"""Conformer encoder."""

from torch import Tensor, nn

from espnet.nets.pytorch_backend.real_frames import RealFrames
from espnet.nets.pytorch_backend.transformer.attention import RelPositionMultiHeadedAttention
from espnet.nets.pytorch_backend.transformer.convolution import ConvolutionModule
from espnet.nets.pytorch_backend.transformer.embedding import RelPositionalEncoding
from espnet.nets.pytorch_backend.transformer.positionwise_feed_forward import (
    PositionwiseFeedForward,
)

LAYER_NORM_EPS = 1e-12  # that of published checkpoints


class ConformerLayer(nn.Module):
    """One Conformer block: half a feed-forward, self-attention, convolution, the other half.

    Args:
        dim: Feature size D.
        heads: Attention heads.
        hidden_units: Units of the feed-forward blocks.
        kernel_size: Frames that the convolution sees.
        dropout_rate: Dropout on each residual branch.
    """

    def __init__(
        self, *, dim: int, heads: int, hidden_units: int, kernel_size: int, dropout_rate: float
    ) -> None:
        super().__init__()
        self.self_attn = RelPositionMultiHeadedAttention(heads=heads, dim=dim)
        self.feed_forward = PositionwiseFeedForward(
            dim=dim, hidden_units=hidden_units, dropout_rate=dropout_rate
        )
        self.conv_module = ConvolutionModule(channels=dim, kernel_size=kernel_size)
        self.feed_forward_macaron = PositionwiseFeedForward(
            dim=dim, hidden_units=hidden_units, dropout_rate=dropout_rate
        )
        self.norm_ff = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm_mha = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm_ff_macaron = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm_conv = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm_final = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor, encoding: Tensor, real: RealFrames) -> Tensor:
        """Applies the block.

        Args:
            x: Features of real frames, (N, D).
            encoding: Encodings of distances, (2T - 1, D).
            real: Where these frames are.

        Returns:
            Features, (N, D).
        """
        x = x + 0.5 * self.dropout(self.feed_forward_macaron(self.norm_ff_macaron(x)))
        x = x + self.dropout(self.self_attn(self.norm_mha(x), encoding, real))
        x = x + self.dropout(self.conv_module(self.norm_conv(x), real))
        x = x + 0.5 * self.dropout(self.feed_forward(self.norm_ff(x)))
        return self.norm_final(x)


class ConformerEncoder(nn.Module):
    """Conformer blocks with relative positions, on real frames only.

    Source: Gulati et al., Conformer, Interspeech 2020.

    Args:
        attention_dim: Feature size D.
        attention_heads: Attention heads.
        linear_units: Units of the feed-forward blocks.
        num_blocks: Number of blocks.
        cnn_module_kernel: Frames that the convolutions see, odd.
        dropout_rate: Dropout on positions and residual branches.
    """

    def __init__(
        self,
        *,
        attention_dim: int = 768,
        attention_heads: int = 12,
        linear_units: int = 3072,
        num_blocks: int = 12,
        cnn_module_kernel: int = 31,
        dropout_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed = RelPositionalEncoding(dim=attention_dim, dropout_rate=dropout_rate)
        self.encoders = nn.ModuleList(
            ConformerLayer(
                dim=attention_dim,
                heads=attention_heads,
                hidden_units=linear_units,
                kernel_size=cnn_module_kernel,
                dropout_rate=dropout_rate,
            )
            for _ in range(num_blocks)
        )
        self.after_norm = nn.LayerNorm(attention_dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Encodes a batch.

        Args:
            x: Features, (B, T, D).
            lengths: Real frames, (B,).

        Returns:
            Encoded features, (B, T, D), zero where padded.
        """
        real = RealFrames.of(lengths, x)
        encoding = self.embed.distances(x)
        x = self.embed(real.pack(x))
        for layer in self.encoders:
            x = layer(x, encoding, real)
        return real.pad(self.after_norm(x))
