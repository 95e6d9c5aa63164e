"""CTC between a prefix of encoder output and a text, in the language model's own embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet.formats import IGNORE_ID
from espnet.nets.pytorch_backend.nets_utils import send

SHARPNESS = 20.0  # of the posteriors at the start: a factor of cosines


class PrefixCTC(nn.Module):
    """Aligns a prefix with its text: each embedding comes to resemble that of a token, or a blank.

    A language model that is fed unaligned embeddings first learns the language of the texts, and
    may never come to listen. Once the prefix resembles the words, it only has to read them off.
    Embeddings of tokens are the language model's own, without their mean, and only the tokens of
    the batch compete, so that the size of the vocabulary does not matter.

    Source: Graves et al., Connectionist Temporal Classification, ICML 2006.

    Args:
        embeddings: Those of the language model's tokens, (V, D).
    """

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.blank = nn.Parameter(torch.randn(embeddings.size(1)))
        self.log_sharpness = nn.Parameter(torch.tensor(SHARPNESS).log())
        self.register_buffer("centre", embeddings.float().mean(0), persistent=False)

    def forward(
        self, prefix: Tensor, lengths: Tensor, targets: Tensor, embed: nn.Module, first_token: int
    ) -> Tensor:
        """CTC loss, averaged over the utterances; one whose prefix is too short counts as zero.

        Args:
            prefix: Embeddings, (B, M, D), padded with anything.
            lengths: Real ones, (B,), on the host.
            targets: Token ids, (B, U), padded with `IGNORE_ID`, on the host.
            embed: Gives embeddings of tokens.
            first_token: Id of the first of them.

        Returns:
            Scalar loss.
        """
        real = targets != IGNORE_ID
        tokens, columns = targets[real].unique(return_inverse=True)
        labels = torch.zeros_like(targets).masked_scatter(real, columns + 1)
        rows = embed(send(tokens - first_token, prefix.device)).detach().float() - self.centre
        directions = F.normalize(torch.cat([self.blank.float()[None], rows]), dim=1)
        cosines = F.normalize(prefix.float(), dim=2) @ directions.t()  # (B, M, 1 + tokens)
        log_posteriors = (cosines * self.log_sharpness.exp()).log_softmax(dim=2)
        losses = F.ctc_loss(
            log_posteriors.transpose(0, 1),
            send(labels, prefix.device),
            lengths,
            real.sum(dim=1),
            reduction="none",
            zero_infinity=True,
        )
        return losses.mean()
