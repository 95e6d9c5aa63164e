import pytest
import torch

from espnet.nets.pytorch_backend.decoder.transformer_decoder import TransformerDecoder

ODIM, DIM, BEAM = 11, 16, 3


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return TransformerDecoder(
        odim=ODIM,
        attention_dim=DIM,
        attention_heads=2,
        linear_units=32,
        num_blocks=2,
        dropout_rate=0.0,
    )


def test_agrees_with_pytorchs_own_decoder_layers(decoder):
    """The same weights in `torch.nn.TransformerDecoderLayer`."""
    tokens, memory = torch.randint(ODIM, (2, 5)), torch.randn(2, 7, DIM)
    lengths = torch.tensor([7, 4])
    x = decoder.embed(tokens)
    padding = torch.arange(7) >= lengths.unsqueeze(1)
    for layer in decoder.decoders:
        theirs = torch.nn.TransformerDecoderLayer(
            DIM, 2, 32, 0.0, layer_norm_eps=1e-12, batch_first=True, norm_first=True
        )
        for name, ours in (("self_attn", layer.self_attn), ("multihead_attn", layer.src_attn)):
            attention = getattr(theirs, name)
            parts = (ours.linear_q, ours.linear_k, ours.linear_v)
            attention.in_proj_weight.data = torch.cat([part.weight for part in parts])
            attention.in_proj_bias.data = torch.cat([part.bias for part in parts])
            attention.out_proj = ours.linear_out
        theirs.linear1, theirs.linear2 = layer.feed_forward.w_1, layer.feed_forward.w_2
        theirs.norm1, theirs.norm2, theirs.norm3 = layer.norm1, layer.norm2, layer.norm3
        causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
        x = theirs(x, memory, tgt_mask=causal, memory_key_padding_mask=padding)
    expected = decoder.output_layer(decoder.after_norm(x))
    torch.testing.assert_close(decoder(tokens, memory, lengths), expected)


def test_cached_steps_in_bfloat16(decoder):
    """As under autocast, where the cache takes the precision of the projections."""
    decoder.eval()
    memory, lengths = torch.randn(1, 6, DIM), torch.tensor([6])
    tokens = torch.randint(ODIM, (BEAM, 4))
    with torch.autocast("cpu", torch.bfloat16):
        state = decoder.init(memory, lengths, BEAM)
        for step in range(4):
            scores, state = decoder.score(tokens[:, step], state)
        expected = decoder(tokens, memory.expand(BEAM, -1, -1), lengths.expand(BEAM))[:, -1]
    assert scores.dtype == torch.float32
    # bfloat16 has 8 bits: batches of other shapes differ in the last ones.
    torch.testing.assert_close(scores, expected.float().log_softmax(-1), rtol=0.02, atol=0.05)


def test_memory_is_kept_once_an_utterance(decoder):
    state = decoder.init(torch.randn(2, 7, DIM), torch.tensor([7, 4]), BEAM)
    assert all(part.shape == (2, 2, 7, DIM // 2) for pair in state.memory for part in pair)
