import math

import pytest
import torch

from espnet.nets.model_options import ModelOptions
from espnet.nets.pytorch_backend.e2e_asr_conformer import (
    E2E,
    build_audio_frontend,
    build_video_frontend,
)
from espnet.nets.pytorch_backend.encoded import Encoded
from espnet.option_tree import from_flat

ODIM = 13
SIZES = {
    "adim": 16,
    "aheads": 2,
    "eunits": 32,
    "elayers": 2,
    "dunits": 32,
    "dlayers": 1,
    "cnn_module_kernel": 7,
    "video_width": 2,
    "audio_width": 2,
}


def make(modality="audiovisual", *, seed=0, **options):
    torch.manual_seed(seed)
    return E2E.from_keywords(ODIM, modality, **{**SIZES, **options})


def batch(frames, streams=("video", "audio"), seed=1):
    generator = torch.Generator().manual_seed(seed)
    longest = max(frames)
    every = {
        "video": torch.randn(len(frames), longest, 1, 24, 24, generator=generator),
        "audio": torch.randn(len(frames), longest * 640, 1, generator=generator),
    }
    lengths = {"video": torch.tensor(frames), "audio": torch.tensor(frames) * 640}
    targets = torch.randint(1, ODIM - 1, (len(frames), 4), generator=generator)
    targets[-1, 2:] = -1
    x = {stream: every[stream] for stream in streams}
    return x, {stream: lengths[stream] for stream in streams}, targets


@pytest.mark.parametrize("modality", ["audio", "video", "audiovisual"])
def test_padding_changes_neither_memory_nor_loss(modality):
    model = make(modality).eval()
    frames = [9, 7, 5]
    x, lengths, targets = batch(frames, model.streams)
    memory, memory_lengths, _ = model.encode(x, lengths)
    assert memory_lengths.tolist() == frames
    losses = []
    for row, length in enumerate(frames):
        one = {
            stream: x[stream][row : row + 1, : length * (1 if stream == "video" else 640)]
            for stream in model.streams
        }
        one_lengths = {stream: lengths[stream][row : row + 1] for stream in model.streams}
        alone, _, _ = model.encode(one, one_lengths)
        torch.testing.assert_close(memory[row, :length], alone[0], atol=2e-5, rtol=1e-4)
        target = targets[row : row + 1]
        losses.append(torch.stack(model(one, one_lengths, target[:, target[0] != -1])[:3]))
    together = torch.stack(model(x, lengths, targets)[:3])
    torch.testing.assert_close(together, torch.stack(losses).mean(dim=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [[0, 1], [0]])
def test_silence_is_learned_as_blanks_and_an_end(rows):
    """An utterance without tokens, in a batch and alone."""
    model = make().eval()
    x, lengths, targets = batch([9, 7])
    x, lengths = ({name: v[rows] for name, v in each.items()} for each in (x, lengths))
    targets[0] = -1
    targets = targets[rows] if len(rows) > 1 else targets[:1, :0]
    encoded = model.encode(x, lengths)
    losses = torch.stack(model.losses(encoded, targets)[:3])
    blanks = -model.ctc.log_softmax(encoded.memory[0])[:, 0].sum()
    start = torch.full((1, 1), model.sos)
    logits = model.decoder(start, encoded.memory[:1], encoded.lengths[:1])[0, 0].float()
    logits = torch.nn.functional.pad(logits, (ODIM - len(logits), 0), value=-torch.inf)
    if len(rows) > 1:
        alone = {name: v[1:, : v.shape[1] * 7 // 9] for name, v in x.items()}
        other = model(alone, {name: v[1:] for name, v in lengths.items()}, targets[1:, :2])[1]
        torch.testing.assert_close(losses[1], (blanks + other) / 2)
    else:
        torch.testing.assert_close(losses[1], blanks)
        end = logits.argmax() == model.eos
        assert model.losses(encoded, targets)[3] == float(end)
    model.train()
    model(x, lengths, targets)[0].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_one_stream_may_be_given_without_a_dict(modality):
    model = make(modality).eval()
    x, lengths, targets = batch([6, 4], model.streams)
    expected = model(x, lengths, targets)
    torch.testing.assert_close(model(x[modality], lengths[modality], targets), expected)


def test_decoder_loss_is_the_divergence_from_the_smoothed_target():
    model = make("audio").eval()
    x, lengths, targets = batch([6, 4], ("audio",))
    memory, memory_lengths, _ = model.encode(x, lengths)
    total = correct = tokens = 0
    for row, target in enumerate(targets):
        words = [token for token in target.tolist() if token != -1]
        inputs = torch.tensor([[ODIM - 1, *words]])
        logits = model.decoder(inputs, memory[row : row + 1], memory_lengths[row : row + 1])[0]
        for scores, token in zip(logits, [*words, ODIM - 1], strict=True):
            wanted = torch.full((ODIM,), 0.1 / (ODIM - 1))
            wanted[token] = 0.9
            total += (wanted * (wanted.log() - scores.log_softmax(-1))).sum()
            correct += int(scores.argmax() == token)
            tokens += 1
    loss, loss_ctc, loss_att, accuracy = model(x, lengths, targets)
    torch.testing.assert_close(loss_att, total / 2)
    assert accuracy.item() == pytest.approx(correct / tokens)
    torch.testing.assert_close(loss, 0.1 * loss_ctc + 0.9 * loss_att)


@pytest.mark.parametrize("smoothing", [0.0, 1e-3])
def test_little_or_no_smoothing(smoothing):
    model = make("audio", label_smoothing=smoothing).eval()
    loss = model(*batch([6, 4], ("audio",)))[2]
    assert loss.isfinite()
    assert loss > 0


def test_modality_dropout_replaces_a_stream_by_its_vector():
    model = make(modality_dropout=(1.0, 0.0), dropout_rate=0.0).train()
    torch.nn.init.normal_(model.missing_audio)
    x, lengths, targets = batch([6, 4])
    loss = model(x, lengths, targets)[0]
    other = {"video": x["video"], "audio": torch.randn_like(x["audio"])}
    torch.testing.assert_close(model(other, lengths, targets)[0], loss)
    without = {"video": x["video"]}
    torch.testing.assert_close(model(without, {"video": lengths["video"]}, targets)[0], loss)
    model.modality_dropout = (0.0, 1.0)
    assert not torch.isclose(model(x, lengths, targets)[0], loss)


@pytest.mark.parametrize("lost", ["audio", "video"])
def test_a_lost_stream_gives_the_same_whatever_the_other_utterances(lost, monkeypatch):
    """Also where those that keep it are shorter, and in evaluation, where all lack it."""
    model = make(modality_dropout=(0.5, 0.5))
    for vector in (model.missing_audio, model.missing_video):
        torch.nn.init.normal_(vector)
    taken = []
    model.proj_encoder.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    x, lengths, _ = batch([10, 4])
    rows = {"audio": torch.zeros(2, dtype=bool), "video": torch.zeros(2, dtype=bool)}
    rows[lost][0] = True
    monkeypatch.setattr(model, "_draw_lost_streams", lambda batch_size: rows)  # noqa: ARG005
    model.encode(x, lengths)
    model.eval()
    (kept,) = {"audio", "video"} - {lost}
    model.encode({kept: x[kept]}, {kept: lengths[kept]})
    vector = getattr(model, f"missing_{lost}")
    assert len(taken) == 2
    for features in taken:
        torch.testing.assert_close(features[lost][0], vector.expand(10, -1))


def test_modality_dropout_never_takes_both_streams():
    model = make(modality_dropout=(0.3, 0.5))
    torch.manual_seed(0)
    lost = model._draw_lost_streams(20000)
    assert not (lost["audio"] & lost["video"]).any()
    assert lost["audio"].float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert lost["video"].float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_streams_are_kept_in_evaluation():
    model = make(modality_dropout=(0.5, 0.5)).eval()
    x, lengths, targets = batch([6, 4])
    first = model(x, lengths, targets)[0]
    assert all(torch.equal(model(x, lengths, targets)[0], first) for _ in range(5))


def test_streams_may_differ_by_two_frames_and_the_video_gives_the_length():
    model = make().eval()
    x, lengths, _ = batch([8, 8])
    shorter = {"video": x["video"], "audio": x["audio"][:, : 6 * 640]}
    memory, frames, _ = model.encode(shorter, {**lengths, "audio": torch.tensor([6, 6]) * 640})
    assert frames.tolist() == [8, 8]
    assert memory.shape == (2, 8, 16)
    wrong = {**lengths, "audio": torch.tensor([8, 5]) * 640}
    with pytest.raises(
        ValueError, match="utterance 1 of the batch has 8 frames of video and 5 of audio"
    ):
        model.encode(x, wrong)


def test_gradients_reach_every_parameter():
    model = make(modality_dropout=(0.4, 0.4))
    torch.manual_seed(3)
    frames = [9, 8, 7, 6, 5, 5, 4, 4]
    model(*batch(frames))[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("modality", "options", "message"),
    [
        ("sound", {}, "--modality sound is unknown: choose one of audio, video, audiovisual"),
        ("audio", {"ctc_weight": 1.5}, "--ctc-weight 1.5 is out of range"),
        (
            "audio",
            {"modality_dropout": (0.1, 0.1)},
            "needs a model of video and audio, not",
        ),
        ("audiovisual", {"modality_dropout": (0.6, 0.6)}, "the sum must be at most 1"),
        (
            "audiovisual",
            {"modality_dropout": (-0.1, 0.6)},
            "--modality-dropout -0.1 is out of",
        ),
    ],
)
def test_bad_arguments(modality, options, message):
    with pytest.raises(ValueError, match=message):
        make(modality, **options)


def test_a_missing_stream_needs_modality_dropout():
    x, lengths, targets = batch([6], ("video",))
    with pytest.raises(
        ValueError, match="a single stream if it is trained with --modality-dropout"
    ):
        make()(x, lengths, targets)


def test_unknown_frontends():
    options = from_flat(ModelOptions, {"vision_encoder": "vgg", "audio_encoder": "mfcc"})
    with pytest.raises(ValueError, match="'vgg' is unknown: choose resnet, vit, clip"):
        build_video_frontend(options)
    with pytest.raises(
        ValueError, match="'mfcc' is unknown: choose resnet1d, fbank, whisper, wavlm"
    ):
        build_audio_frontend(options)
    with pytest.raises(ValueError, match="--vision-encoder vgg is unknown.*--audio-encoder mfcc"):
        make(vision_encoder="vgg", audio_encoder="mfcc")


def test_smoothing_constant_is_the_targets_entropy():
    """A decoder that knows the target exactly has no loss left."""
    model = make("audio")
    wanted = torch.full((ODIM,), math.log(0.1 / (ODIM - 1)))
    wanted[5] = math.log(0.9)
    model.decoder.features = lambda *_: torch.zeros(1, 2, 16)
    model.decoder.logits = lambda features: wanted.expand(len(features), -1)
    encoded = Encoded(torch.zeros(1, 3, 16), torch.tensor([3]))
    loss, _ = model._decoder_loss(encoded, torch.tensor([[5]]))
    # The second target is eos: only its entropy term and its cost remain.
    cost = math.log(0.9 / (0.1 / (ODIM - 1))) * (0.9 - 0.1 / (ODIM - 1))
    assert loss.item() == pytest.approx(cost, rel=1e-4)
