import itertools

import pytest
import torch

from espnet.nets.pytorch_backend.ctc import CTC, ctc_frames_needed


@pytest.fixture
def ctc():
    torch.manual_seed(0)
    return CTC(odim=4, encoder_dim=5, dropout_rate=0.0)


def all_paths_loss(posteriors, target):
    """Minus the log-probability of a target: the sum over every path that collapses to it."""
    total = 0.0
    for path in itertools.product(range(posteriors.size(1)), repeat=len(posteriors)):
        collapsed = [token for token, _ in itertools.groupby(path) if token != 0]
        if collapsed == target:
            total += posteriors[range(len(path)), path].prod()
    return -torch.log(total)


def test_loss_is_the_mean_over_all_alignments(ctc):
    memory, lengths = torch.randn(3, 5, 5), torch.tensor([5, 4, 3])
    targets = torch.tensor([[1, 2], [3, 3], [2, -1]])
    posteriors = ctc.log_softmax(memory).exp()
    losses = [
        all_paths_loss(posteriors[row, :length], [token for token in target if token != -1])
        for row, (length, target) in enumerate(zip(lengths, targets.tolist(), strict=True))
    ]
    torch.testing.assert_close(ctc(memory, lengths, targets), sum(losses) / 3)


def test_an_utterance_that_is_too_short_gives_neither_loss_nor_gradient(ctc):
    memory = torch.randn(2, 5, 5, requires_grad=True)
    lengths, targets = torch.tensor([5, 2]), torch.tensor([[1, 2], [3, 3]])  # needs 3 frames
    loss = ctc(memory, lengths, targets)
    loss.backward()
    alone = ctc(memory[:1], lengths[:1], targets[:1])
    torch.testing.assert_close(loss, alone / 2)
    assert memory.grad.isfinite().all()
    assert not memory.grad[1].any()


def test_frames_needed():
    targets = torch.tensor([[1, 2, 3, -1], [2, 2, 2, -1], [5, -1, -1, -1], [1, 1, 2, 2]])
    assert ctc_frames_needed(targets).tolist() == [3, 5, 1, 6]


def test_greedy_merges_repeats_and_drops_blanks_and_padding():
    ctc = CTC(odim=4, encoder_dim=4, dropout_rate=0.0)
    ctc.ctc_lo.weight.data = torch.eye(4)
    ctc.ctc_lo.bias.data.zero_()
    path = torch.tensor([[1, 1, 0, 1, 2, 2], [0, 3, 3, 0, 2, 2]])
    memory = torch.nn.functional.one_hot(path, 4).float()
    found = ctc.greedy(memory, torch.tensor([6, 4]))
    assert [tokens.tolist() for tokens in found] == [[1, 1, 2], [3]]
