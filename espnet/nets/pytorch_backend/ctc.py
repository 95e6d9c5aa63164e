"""CTC head and loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet.nets.pytorch_backend.nets_utils import send
from espnet.nets.pytorch_backend.real_frames import RealFrames


def ctc_frames_needed(targets: Tensor, ignore_id: int = -1) -> Tensor:
    """Fewest frames to which CTC can align a target: one a token, one more between equal ones.

    Args:
        targets: Token ids, (B, U), padded with `ignore_id`.
        ignore_id: Id of padding.

    Returns:
        Number of frames, (B,) int64.
    """
    repeats = (targets[:, 1:] == targets[:, :-1]) & (targets[:, 1:] != ignore_id)
    return (targets != ignore_id).sum(dim=1) + repeats.sum(dim=1)


class CTC(nn.Module):
    """Connectionist temporal classification over the encoder's output; blank is id 0.

    Source: Graves et al., Connectionist Temporal Classification, ICML 2006.

    Args:
        odim: Vocabulary size V, blank and eos included.
        encoder_dim: Feature size D of the encoder.
        dropout_rate: Dropout on the encoder's output.
        ignore_id: Id of target padding.
    """

    def __init__(
        self, *, odim: int, encoder_dim: int, dropout_rate: float = 0.1, ignore_id: int = -1
    ) -> None:
        super().__init__()
        self.ctc_lo = nn.Linear(encoder_dim, odim)
        self.dropout = nn.Dropout(dropout_rate)
        self.ignore_id = ignore_id

    def forward(self, memory: Tensor, memory_lengths: Tensor, targets: Tensor) -> Tensor:
        """CTC loss, averaged over the utterances of the batch.

        An utterance with fewer frames than its target needs has no alignment; it counts as zero
        and gives no gradient. One with an empty target, silence, is blank in all frames.

        Args:
            memory: Encoder output, (B, T, D).
            memory_lengths: Frames, (B,), on the host.
            targets: Token ids, (B, U), padded with `ignore_id`, on the host.

        Returns:
            Scalar loss.
        """
        real = RealFrames.of(memory_lengths, memory)
        log_posteriors = self.log_softmax(self.dropout(real.pack(memory)))  # (N, V)
        target_lengths = (targets != self.ignore_id).sum(dim=1)
        if targets.size(1) == 0:  # Not all devices take a tensor without columns.
            targets = F.pad(targets, (0, 1), value=self.ignore_id)
        losses = F.ctc_loss(
            real.pad(log_posteriors).transpose(0, 1),  # (T, B, V)
            send(targets.clamp(min=0), memory.device),
            memory_lengths,
            target_lengths,
            reduction="none",
            zero_infinity=True,
        )
        return losses.sum() / len(targets)

    def log_softmax(self, memory: Tensor) -> Tensor:
        """Log-posteriors of every token at every frame.

        Args:
            memory: Encoder output, (..., D).

        Returns:
            Log-probabilities in float32, (..., V).
        """
        return self.ctc_lo(memory).float().log_softmax(dim=-1)

    def greedy(self, memory: Tensor, memory_lengths: Tensor) -> list[Tensor]:
        """Best path decoding: the best token of each frame, repeats merged, blanks removed.

        Args:
            memory: Encoder output, (B, T, D).
            memory_lengths: Frames, (B,).

        Returns:
            Token ids of each utterance, B tensors of one dimension.
        """
        best = self.ctc_lo(memory).argmax(dim=-1).cpu()  # (B, T)
        hypotheses = []
        for path, length in zip(best, memory_lengths.tolist(), strict=True):
            tokens = torch.unique_consecutive(path[:length])
            hypotheses.append(tokens[tokens != 0])
        return hypotheses
