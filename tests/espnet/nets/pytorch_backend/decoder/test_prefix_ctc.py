import itertools

import pytest
import torch

from espnet.nets.pytorch_backend.decoder.prefix_ctc import PrefixCTC

TOKENS, DIM, FIRST = 12, 6, 1


@pytest.fixture
def embed():
    torch.manual_seed(0)
    return torch.nn.Embedding(TOKENS, DIM)


def make(embed):
    torch.manual_seed(1)
    return PrefixCTC(embed.weight.detach())


def collapsed(path):
    return [token for token, _ in itertools.groupby(path) if token]


def slow_loss(ctc, prefix, target, competing, embed):
    """Minus the log of the sum over all paths that collapse to the target."""
    rows = [ctc.blank, *(embed.weight[token - FIRST] - embed.weight.mean(0) for token in competing)]
    cosines = torch.stack(
        [torch.stack([torch.cosine_similarity(x, row, dim=0) for row in rows]) for x in prefix]
    )
    log_posteriors = (cosines * 20.0).log_softmax(dim=1)
    wanted = [competing.index(token) + 1 for token in target]
    paths = itertools.product(range(len(rows)), repeat=len(prefix))
    scores = [
        sum(log_posteriors[frame, label] for frame, label in enumerate(path))
        for path in paths
        if collapsed(path) == wanted
    ]
    return -torch.stack(scores).logsumexp(0)


def test_the_loss_is_that_of_all_alignments(embed):
    """Only the tokens of the batch compete, and padding is not seen."""
    ctc, prefix = make(embed), torch.randn(2, 4, DIM)
    prefix[1, 3:] = 99.0
    targets = torch.tensor([[3, 3, 7], [5, -1, -1]])
    found = ctc(prefix, torch.tensor([4, 3]), targets, embed, FIRST)
    competing = [3, 5, 7]
    expected = [
        slow_loss(ctc, prefix[0], [3, 3, 7], competing, embed),
        slow_loss(ctc, prefix[1, :3], [5], competing, embed),
    ]
    torch.testing.assert_close(found, sum(expected) / 2)


def test_a_prefix_that_is_too_short_counts_as_zero(embed):
    ctc, prefix = make(embed), torch.randn(2, 4, DIM, requires_grad=True)
    targets = torch.tensor([[3, 3, 7], [5, -1, -1]])
    loss = ctc(prefix, torch.tensor([3, 4]), targets, embed, FIRST)
    alone = make(embed)(prefix[1:], torch.tensor([4]), torch.tensor([[5, 3, 7]])[:, :1], embed, 1)
    assert loss.isfinite()
    assert loss > alone / 2  # More tokens compete.
    loss.backward()
    assert not prefix.grad[0].any()
    assert prefix.grad[1].any()


def test_the_language_models_embeddings_are_not_trained(embed):
    ctc, prefix = make(embed), torch.randn(1, 4, DIM, requires_grad=True)
    ctc(prefix, torch.tensor([4]), torch.tensor([[2, 9]]), embed, FIRST).backward()
    assert embed.weight.grad is None
    assert all(p.grad.any() for p in (prefix, *ctc.parameters()))
