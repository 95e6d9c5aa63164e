import shutil

import torch

from benchmarks import whisper_margin
from espnet.formats import CLEAN_SNR


def test_prints_a_row_for_each_margin(corpus, tiny_checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(whisper_margin, "MARGINS", (0.0, 30.0))
    monkeypatch.setattr(whisper_margin, "BEAMS", (1,))
    monkeypatch.setattr(whisper_margin, "SNRS", (CLEAN_SNR, 5.0))
    lines = (corpus / "labels/val.txt").read_text().splitlines()[:2]
    rows = ["file,transcript"]
    for number, (name, text) in enumerate(line.split(maxsplit=1) for line in lines):
        shutil.copy(corpus / f"demo/{name}.wav", tmp_path / f"{number}.wav")
        rows.append(f"{number}.wav,{text}")
    (tmp_path / "transcripts.csv").write_text("\n".join(rows) + "\n")
    threads = torch.get_num_threads()
    whisper_margin.main([str(tiny_checkpoints / "whisper"), str(tmp_path)])
    torch.set_num_threads(threads)
    header, rule, *table = capsys.readouterr().out.splitlines()
    assert header == (
        "| WER [%] of 12 words | clean, beam 1 | 5 dB, beam 1 | texts of `generate` | time |"
    )
    assert rule == "| --- | ---: | ---: | ---: | ---: |"
    labels = ["`generate`, 30 s", "30 s", "0 s of silence", "30 s, --length-normalization"]
    cells = [row.strip("| ").split(" | ") for row in table]
    assert [row[0] for row in cells] == labels
    assert all(float(rate) >= 0 for row in cells for rate in row[1:3])
    assert cells[1][-1] == "1.00"
    assert cells[0][3].strip(" |") == "4 of 4"


def test_noise_has_the_ratio_that_is_asked_for(corpus, tmp_path):
    lines = (corpus / "labels/val.txt").read_text().splitlines()[:3]
    clips = {}
    for number, line in enumerate(lines):
        shutil.copy(corpus / f"demo/{line.split()[0]}.wav", tmp_path / f"{number}.wav")
        clips[f"{number}.wav"] = whisper_margin.read_audio(tmp_path / f"{number}.wav")
    for snr in (0.0, 5.0):
        for name, mixed in whisper_margin.noisy(clips, tmp_path, snr).items():
            noise = mixed - clips[name]
            ratio = clips[name].square().sum() / noise.square().sum()
            torch.testing.assert_close(10 * ratio.log10(), torch.tensor(snr), atol=0.01, rtol=0)
    assert whisper_margin.noisy(clips, tmp_path, CLEAN_SNR)["0.wav"].equal(clips["0.wav"])
