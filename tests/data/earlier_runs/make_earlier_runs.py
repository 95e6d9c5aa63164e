"""Makes what lies beside this file: small runs that later versions must be able to score.

    PYTHONPATH=. python tests/data/earlier_runs/make_earlier_runs.py FOLDER

was run at cc4bf28 (python 3.11, torch 2.11, transformers 5.24). Of its output, this folder keeps
the test clips, their vocabulary, and of each run the averaged weights, config.yaml without the
folders of the machine, and the hypotheses.
"""

import shutil
import sys
from pathlib import Path

import torch
import yaml

import train
from datamodule.demo_corpus import make_demo_corpus
from espnet.utils.tiny_checkpoints import make_tiny_checkpoints

SMALL_MODEL = [
    *["--adim", "16", "--aheads", "2", "--eunits", "32", "--dunits", "32"],
    *["--elayers", "1", "--dlayers", "1", "--cnn-module-kernel", "7"],
    *["--video-width", "2", "--audio-width", "2", "--crop-size", "32"],
]


def main(out: Path) -> None:
    """Trains the runs, and copies from them what is kept into `out/kept`."""
    torch.set_num_threads(1)
    corpus, tiny, kept = out / "corpus", out / "tiny", out / "kept"
    make_demo_corpus(str(corpus), num_train=40, num_val=4, num_test=2, seed=5, progress=False)
    make_tiny_checkpoints(tiny)
    common = [
        *["--exp-dir", str(out / "exp"), "--root-dir", str(corpus), "--train-file", "train.csv"],
        *["--val-file", "val.csv", "--test-file", "test.csv", "--warmup-epochs", "1"],
        *["--max-frames", "300", "--num-workers", "0", "--accelerator", "cpu"],
        *["--logger", "none", "--average-epochs", "1", "--beam-size", "4", "--lr", "5e-3"],
    ]
    runs = {
        "audiovisual": [
            *["--audio-encoder", "fbank", "--modality-dropout", "0.3", "0.3", *SMALL_MODEL],
            *["--modality", "audiovisual", "--max-epochs", "60"],
            *["--ctc-weight", "0.3", "--ctc-decode-weight", "0.3"],
        ],
        "adapters": [
            *["--audio-encoder", "whisper", "--audio-encoder-name", str(tiny / "whisper")],
            *["--decoder", "llama", "--decoder-name", str(tiny / "llama"), "--elayers", "0"],
            *["--llama-conditioning", "prefix", "--use-lora", "--lora-rank", "2"],
            *["--max-epochs", "6"],
        ],
    }
    for name, options in runs.items():
        train.main([*common, "--exp-name", name, *options])
        run = out / "exp" / name
        (kept / name).mkdir(parents=True)
        content = torch.load(run / "model_avg_1.pth", weights_only=True)
        for base in content.get("bases", {}).values():
            base["name"] = f"../{Path(base['name']).name}"
        torch.save(content, kept / name / "model_avg_1.pth")
        shutil.copy(next((run / "test").glob("*.jsonl")), kept / name / "hypotheses.jsonl")
        config = yaml.safe_load((run / "config.yaml").read_text())
        for option, value in config.items():
            if isinstance(value, str) and value.startswith(str(out)):
                config[option] = f"../{Path(value).name}"
        (kept / name / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for file in (*(corpus / "spm").iterdir(), *(corpus / "demo" / "test").glob("*/*")):
        folder = kept if file.parent.name == "spm" else kept / file.relative_to(corpus).parent
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)
    (kept / "labels").mkdir()
    shutil.copy(corpus / "labels" / "test.csv", kept / "labels")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
