import re
from contextlib import nullcontext

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks import encoders
from benchmarks.encoders import RAGGED_FRAMES, Row, Work
from benchmarks.timing import time_in_turns
from espnet.utils.tiny_checkpoints import make_tiny_checkpoints

CPU = torch.device("cpu")
WORK = Work(utterances=2, images=3, frame_step=20, repeats=1)
SAME = 1e-4  # what features of about 1 may differ by when they are computed in another order


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    make_tiny_checkpoints(folder)
    return folder


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def number(note):
    return float(re.search(r"at most (\S+) from", note)[1])


def test_functions_take_turns_and_their_best_times_count(monkeypatch):
    seconds = iter([0, 3, 10, 11, 20, 22, 30, 34])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    calls = []

    def call(name):
        calls.append(name)
        return name, len(calls)

    timings = time_in_turns([lambda: call("a"), lambda: call("b")], CPU, repeats=2)
    assert calls == ["a", "b", "a", "b"]
    assert [timing.milliseconds for timing in timings] == [2000, 1000]
    assert [timing.result for timing in timings] == [("a", 3), ("b", 4)]


def test_ratios_are_printed_in_the_sense_of_their_target():
    row = Row("short", 20.0, 130.0, target=5, faster=True)
    assert str(row) == "| short | 20.0 | 130.0 | 6.5 times faster | at least 5 times faster |"
    row = Row("ragged", 23.0, 20.0, target=1.15, faster=False)
    assert str(row) == "| ragged | 23.0 | 20.0 | 1.15 times | at most 1.15 times |"


@pytest.mark.parametrize(
    ("name", "millions", "left_out"),
    [("vit", 86.4, ()), ("clip", 85.8, ()), ("whisper", 88.2, ("decoder",)), ("wavlm", 94.4, ())],
)
def test_models_have_the_size_of_the_published_ones(name, millions, left_out):
    with torch.device("meta"):
        model = encoders.published_model(name)
    used = [value for key, value in model.named_parameters() if not key.startswith(left_out)]
    assert round(sum(value.numel() for value in used) / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["vit", "clip", "whisper", "wavlm"])
def test_a_checkpoint_loads_and_is_removed(name, checkpoints, monkeypatch, caplog):
    tiny = encoders.load_encoder(name, str(checkpoints / name), CPU)
    config = type(tiny.backbone.config).from_pretrained(checkpoints / name)
    model_class = {
        "vit": encoders.ViTModel,
        "clip": encoders.CLIPVisionModel,
        "whisper": encoders.WhisperModel,
        "wavlm": encoders.WavLMModel,
    }[name]
    monkeypatch.setattr(encoders, "published_model", lambda _: model_class(config))
    with encoders.checkpoint(name) as folder:
        encoder = encoders.load_encoder(name, folder, CPU)
    assert encoder.output_dim == 64
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not caplog.records  # such as that the normalisation of images is not known
    with pytest.raises(ValueError, match="is no folder"):
        encoders.load_encoder(name, folder, CPU)


@pytest.mark.parametrize("name", ["vit", "clip", "whisper", "wavlm"])
def test_the_reference_of_a_ragged_batch_has_its_content_without_padding(
    name, checkpoints, monkeypatch
):
    inputs = []

    def encode(x, lengths):
        inputs.append((x, lengths))
        return x.flatten(2), lengths

    monkeypatch.setattr(encoders, "load_encoder", lambda *_: encode)
    row = encoders.time_ragged_batch(name, str(checkpoints / name), WORK, CPU)
    (ragged, lengths), (unpadded, unpadded_lengths), *alone = inputs
    utterances = encoders.ragged_utterances(name, WORK, CPU)
    expected = {
        "vit": [frames // 20 for frames in RAGGED_FRAMES],
        "clip": [frames // 20 for frames in RAGGED_FRAMES],
        "whisper": [frames * 640 for frames in RAGGED_FRAMES],
        "wavlm": [frames * 640 for frames in RAGGED_FRAMES],
    }[name]
    assert lengths.tolist() == expected
    torch.testing.assert_close(ragged, pad_sequence(utterances, batch_first=True))
    assert len(unpadded) == (1 if name in ("vit", "clip") else 8)
    assert set(unpadded_lengths.tolist()) == {unpadded.size(1)}
    torch.testing.assert_close(unpadded.flatten(0, 1), torch.cat(utterances))
    assert [one.size(1) for one, _ in alone] == expected
    assert not row.faster
    assert number(row.notes[0]) == 0


def test_a_ragged_batch_that_padding_changes_is_noticed(checkpoints, monkeypatch):
    def encode(x, lengths):
        return x.mean(dim=1, keepdim=True).expand(x.shape), lengths

    monkeypatch.setattr(encoders, "load_encoder", lambda *_: encode)
    row = encoders.time_ragged_batch("wavlm", str(checkpoints / "wavlm"), WORK, CPU)
    assert number(row.notes[0]) > SAME


def test_whisper_padded_to_30_s_gives_what_transformers_does(checkpoints):
    row = encoders.time_short_utterances(str(checkpoints / "whisper"), WORK, CPU)
    assert row.faster
    assert row.target == 5
    assert number(row.notes[0]) < SAME
    assert float(re.search(r"change by (\S+) %", row.notes[1])[1]) > 100 * SAME


def test_images_are_encoded_at_both_sizes(checkpoints, monkeypatch):
    sizes = []
    hidden_states = encoders.ViTEncoder.hidden_states

    def noted(self, images):
        sizes.append(tuple(images.shape))
        return hidden_states(self, images)

    monkeypatch.setattr(encoders.ViTEncoder, "hidden_states", noted)
    row = encoders.time_small_images(str(checkpoints / "vit"), WORK, CPU)
    assert sizes == [(3, 3, 96, 96), (3, 3, 224, 224)]
    assert "3 frames of 88x88 at 96x96 (reference: at 224x224)" in row.what
    assert row.faster
    assert row.target == 7


def test_prints_a_table(checkpoints, monkeypatch, capsys):
    monkeypatch.setattr(encoders, "checkpoint", lambda name: nullcontext(str(checkpoints / name)))
    monkeypatch.setitem(encoders.WORK, "cpu", WORK)
    encoders.main(["--device", "cpu"])
    facts, empty, *table = capsys.readouterr().out.splitlines()
    assert facts.startswith(f"torch {torch.__version__}, transformers ")
    assert facts.endswith(", cpu, 1 CPU threads, float32")
    assert not empty
    end = table.index("")
    head, line, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table[:end])
    assert head == ["what", "time (ms)", "reference (ms)", "ratio", "target"]
    assert line == ["---"] * 5
    titles = ["ViT-B/16"] * 2 + ["CLIP ViT-B/16"] + ["Whisper small"] * 2 + ["WavLM base plus"]
    assert [what.split(",")[0] for what, *_ in rows] == titles
    assert [target for *_, target in rows] == [
        "at least 7 times faster",
        "at most 1.15 times",
        "at most 1.15 times",
        "at least 5 times faster",
        "at most 1.15 times",
        "at most 1.15 times",
    ]
    notes = table[end + 1 :]
    differences = [number(note) for note in notes if "at most" in note]
    assert len(differences) == 5
    assert max(differences) < SAME
