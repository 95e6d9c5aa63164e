import pytest
import torch

from espnet.nets.pytorch_backend.decoder.gated_cross_attention import GatedCrossAttention

DIM, MEMORY_DIM, HEADS = 16, 6, 4


@pytest.fixture
def gated():
    """Open gates, and no norm or bias that is trivial."""
    torch.manual_seed(0)
    module = GatedCrossAttention(DIM, MEMORY_DIM, HEADS, dropout_rate=0.1).eval()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def test_agrees_with_pytorchs_own_attention(gated):
    x, memory = torch.randn(2, 5, DIM), torch.randn(2, 7, MEMORY_DIM)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    ours = gated.attention
    theirs = torch.nn.MultiheadAttention(
        DIM, HEADS, kdim=MEMORY_DIM, vdim=MEMORY_DIM, batch_first=True
    )
    theirs.q_proj_weight, theirs.k_proj_weight = ours.linear_q.weight, ours.linear_k.weight
    theirs.v_proj_weight, theirs.out_proj = ours.linear_v.weight, ours.linear_out
    projections = (ours.linear_q, ours.linear_k, ours.linear_v)
    theirs.in_proj_bias.data = torch.cat([projection.bias for projection in projections])
    attended, _ = theirs(gated.norm(x), memory, memory, key_padding_mask=~mask)
    expected = x + torch.tanh(gated.gate) * attended
    first, activation, _, second = gated.feed_forward
    mapped = second(activation(first(gated.feed_forward_norm(expected))))
    expected = expected + torch.tanh(gated.feed_forward_gate) * mapped
    torch.testing.assert_close(gated(x, memory, mask), expected)


def test_closed_gates_change_nothing():
    module = GatedCrossAttention(DIM, MEMORY_DIM, HEADS, dropout_rate=0.1)
    x = torch.randn(2, 5, DIM)
    assert torch.equal(module(x, torch.randn(2, 7, MEMORY_DIM), None), x)


@pytest.mark.parametrize("length", [1, 4])
def test_hypotheses_share_the_memory_of_their_utterance(gated, length):
    x, memory = torch.randn(2 * 3, length, DIM), torch.randn(2, 7, MEMORY_DIM)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    rows = torch.arange(2).repeat_interleave(3)
    expected = gated(x, memory[rows], mask[rows])
    keys, values = gated.project_memory(memory)
    assert keys.shape == values.shape == (2, HEADS, 7, DIM // HEADS)
    torch.testing.assert_close(gated.attend(x, keys, values, mask, 3), expected)
    torch.testing.assert_close(gated(x, memory, mask), expected)


def test_padded_memory_changes_nothing(gated):
    x, memory = torch.randn(1, 5, DIM), torch.randn(1, 7, MEMORY_DIM)
    padded = torch.cat([memory, torch.full((1, 3, MEMORY_DIM), 9.0)], dim=1)
    mask = torch.arange(10)[None] < 7
    torch.testing.assert_close(gated(x, padded, mask), gated(x, memory, None))


def test_keeps_the_precision_of_its_input(gated):
    x, memory = torch.randn(2, 5, DIM).bfloat16(), torch.randn(2, 7, MEMORY_DIM).bfloat16()
    expected = gated(x.float(), memory.float(), None)
    result = gated(x, memory, None)
    assert result.dtype == torch.bfloat16
    # Each of the two sums is rounded to bfloat16's 8 bits.
    torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.02)


def test_gradients_reach_the_gates_first_and_then_everything():
    torch.manual_seed(0)
    module = GatedCrossAttention(DIM, MEMORY_DIM, HEADS, dropout_rate=0.1)
    x, memory = torch.randn(2, 5, DIM), torch.randn(2, 7, MEMORY_DIM)
    for gate in (0.0, 0.5):
        for parameter in (module.gate, module.feed_forward_gate):
            parameter.data.fill_(gate)
        module.zero_grad()
        module(x, memory, None).square().sum().backward()
        moved = {name for name, p in module.named_parameters() if p.grad.isfinite().all()}
        assert moved == {name for name, _ in module.named_parameters()}
        moved = {name for name, p in module.named_parameters() if p.grad.abs().max() > 1e-4}
        if gate == 0.0:
            assert moved == {"gate", "feed_forward_gate"}
    # A bias of all keys shifts all scores of a query alike: the softmax does not see it.
    assert moved == {name for name, _ in module.named_parameters()} - {"attention.linear_k.bias"}


def test_names_what_does_not_fit():
    with pytest.raises(ValueError, match="16 is no multiple of 3 heads"):
        GatedCrossAttention(DIM, MEMORY_DIM, 3, dropout_rate=0.1)
