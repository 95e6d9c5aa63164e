import pytest
import torch
from torch.nn import functional as F

from espnet.nets.pytorch_backend.encoder.conformer_encoder import ConformerEncoder
from espnet.nets.pytorch_backend.real_frames import RealFrames
from espnet.nets.pytorch_backend.transformer.convolution import ConvolutionModule


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    encoder = ConformerEncoder(
        attention_dim=16,
        attention_heads=2,
        linear_units=32,
        num_blocks=2,
        cnn_module_kernel=7,
        dropout_rate=0.0,
    )
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return encoder


def test_padding_changes_nothing(encoder):
    encoder.eval()
    lengths = [11, 6, 1]
    x = torch.randn(3, 11, 16)
    together = encoder(x, torch.tensor(lengths))
    assert together.shape == x.shape
    for row, length in enumerate(lengths):
        alone = encoder(x[row : row + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(together[row, :length], alone[0])
        assert not together[row, length:].any()


def test_padding_changes_neither_training_outputs_nor_statistics(encoder):
    encoder.train()
    lengths = torch.tensor([9, 4])
    x = torch.randn(2, 9, 16)
    start = {name: value.clone() for name, value in encoder.state_dict().items()}
    expected = encoder(x, lengths)
    statistics = {name: value.clone() for name, value in encoder.named_buffers()}
    encoder.load_state_dict(start)
    longer = encoder(F.pad(x, (0, 0, 0, 5), value=3.0), lengths)
    torch.testing.assert_close(longer[0, :9], expected[0])
    torch.testing.assert_close(longer[1, :4], expected[1, :4])
    for name, value in encoder.named_buffers():
        torch.testing.assert_close(value, statistics[name])


def test_gradients_are_finite_and_padding_has_none(encoder):
    x = torch.randn(2, 9, 16, requires_grad=True)
    out = encoder(x, torch.tensor([9, 4]))
    (out[0].square().sum() + out[1, :4].square().sum()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in encoder.parameters())
    assert not x.grad[1, 4:].any()


def test_convolution_module_agrees_with_plain_layers():
    torch.manual_seed(0)
    module = ConvolutionModule(channels=6, kernel_size=5).eval()
    module.norm.running_mean.normal_()
    x = torch.randn(2, 8, 6)
    y = F.glu(module.pointwise_cov1(x.transpose(1, 2)), dim=1)
    y = F.silu(module.norm(module.depthwise_conv(y)))
    real = RealFrames.of(torch.tensor([8, 8]), x)
    result = real.pad(module(real.pack(x), real))
    torch.testing.assert_close(result, module.pointwise_cov2(y).transpose(1, 2))


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="kernel of 30 frames: an odd number is needed"):
        ConvolutionModule(channels=4, kernel_size=30)
