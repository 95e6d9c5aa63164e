import re
from contextlib import nullcontext

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks import encoders
from benchmarks.common import CPU
from benchmarks.encoders import RAGGED_FRAMES, Work
from espnet.nets.pytorch_backend.frontend.vit_encoder import ViTEncoder

pytestmark = pytest.mark.usefixtures("no_gradients")
NAMES = ["vit", "clip", "whisper", "wavlm"]
WORK = Work(utterances=2, images=3, frame_step=20, repeats=1)
SAME = 1e-4  # what features of about 1 may differ by when they are computed in another order


def number(note):
    return float(re.search(r"at most (\S+) from", note)[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_of_a_ragged_batch_has_its_content_without_padding(
    name, tiny_checkpoints, monkeypatch
):
    inputs = []

    def encode(x, lengths):
        inputs.append((x, lengths))
        return x.flatten(2), lengths

    monkeypatch.setattr(encoders, "load_encoder", lambda *_: encode)
    row = encoders.time_ragged_batch(name, str(tiny_checkpoints / name), WORK, CPU)
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
    assert number(row.notes[0]) == 0


def test_a_ragged_batch_that_padding_changes_is_noticed(tiny_checkpoints, monkeypatch):
    def encode(x, lengths):
        return x.mean(dim=1, keepdim=True).expand(x.shape), lengths

    monkeypatch.setattr(encoders, "load_encoder", lambda *_: encode)
    row = encoders.time_ragged_batch("wavlm", str(tiny_checkpoints / "wavlm"), WORK, CPU)
    assert number(row.notes[0]) > SAME


def test_whisper_padded_to_30_s_gives_what_transformers_does(tiny_checkpoints):
    row = encoders.time_short_utterances(str(tiny_checkpoints / "whisper"), WORK, CPU)
    assert row.faster
    assert row.target == 5
    assert number(row.notes[0]) < SAME
    assert float(re.search(r"change by (\S+) %", row.notes[1])[1]) > 100 * SAME


def test_images_are_encoded_at_both_sizes(tiny_checkpoints, monkeypatch):
    sizes = []
    hidden_states = ViTEncoder.hidden_states

    def noted(self, images):
        sizes.append(tuple(images.shape))
        return hidden_states(self, images)

    monkeypatch.setattr(ViTEncoder, "hidden_states", noted)
    row = encoders.time_small_images(str(tiny_checkpoints / "vit"), WORK, CPU)
    assert sizes == [(3, 3, 96, 96), (3, 3, 224, 224)]
    assert "3 frames of 88x88 at 96x96 (reference: at 224x224)" in row.what
    assert row.faster
    assert row.target == 7


def test_prints_a_table(tiny_checkpoints, monkeypatch, tables):
    monkeypatch.setattr(
        encoders, "encoder_checkpoint", lambda name: nullcontext(str(tiny_checkpoints / name))
    )
    monkeypatch.setitem(encoders.WORK, "cpu", WORK)
    encoders.main(["--device", "cpu"])
    (table,) = tables()
    assert table.head == ["what", "time (ms)", "reference (ms)", "ratio", "target"]
    assert [(row[0].split(",")[0], row[-1].split(":")[0]) for row in table.rows] == [
        ("ViT-B/16", "at least 7 times faster"),
        ("ViT-B/16", "at most 1.15 times"),
        ("CLIP ViT-B/16", "at most 1.15 times"),
        ("Whisper small", "at least 5 times faster"),
        ("Whisper small", "at most 1.15 times"),
        ("WavLM base plus", "at most 1.15 times"),
    ]
    differences = [number(note) for note in table.notes if "at most" in note]
    assert len(differences) == 5
    assert max(differences) < SAME
