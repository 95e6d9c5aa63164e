from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import checkpoints, common, memory, qlora_memory
from benchmarks.checkpoints import Checkpoint
from benchmarks.common import CPU
from benchmarks.qlora_memory import Case, StepMemory, StepRow, WeightRow
from espnet.nets.adaptation import INSTALLED
from espnet.nets.pytorch_backend.qlora_utils import parameter_report

FRAMES = (20, 13)
MEMORY = StepMemory(
    trained=5, total=1234, weights=2_000_000_000, before=1, loading=3 * 10**9, steps=4 * 10**9
)
needs_both = pytest.mark.skipif(len(INSTALLED) < 2, reason="bitsandbytes or peft is not installed")


def tiny_llama():
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=298,
        eos_token_id=299,
    )
    return Checkpoint("tiny LLaMA", config, (298, 3, 4), 299)


def tiny_case(**changes):
    sizes = {"adim": 64, "aheads": 4, "elayers": 0}
    ways = {
        "full": qlora_memory.full("vision_encoder", "audio_encoder", "decoder"),
        "LoRA": qlora_memory.LORA,
        "QLoRA": qlora_memory.QLORA,
    }
    ways = {way: options | sizes for way, options in ways.items()}
    case = Case("tiny", ("clip", "whisper"), tiny_llama(), ways, target=10**12)
    return replace(case, **changes)


@pytest.fixture
def tiny(tiny_checkpoints, monkeypatch):
    """Encoders of the tiny checkpoints in place of those of published sizes."""
    monkeypatch.setattr(
        checkpoints, "encoder_checkpoint", lambda name: nullcontext(str(tiny_checkpoints / name))
    )


@needs_both
def test_bytes_are_those_of_codes_tables_and_biases():
    """NF4 with double quantisation by hand: QLoRA's section 3 and bitsandbytes' tables."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 512), nn.LayerNorm(512), nn.Linear(512, 40, bias=False))
    row = qlora_memory.measure_weights("two layers", module.bfloat16())
    blocks = [256 * 512 // 64, 512 * 40 // 64]
    expected = sum(
        64 * number // 2  # codes of 4 bits
        + number  # their scales in 8 bits
        + 4 * -(-number // 256)  # the scales of these, and what precedes the quantisation:
        + 4 * (16 + 256 + 1)  # values of both codes, and the mean of the scales
        for number in blocks
    )
    expected += 2 * 512  # bias
    assert row.linear == expected
    assert row.linear_bfloat16 == 2 * (256 * 512 + 512 + 512 * 40)
    assert row.left_alone == {"norms": 2 * 2 * 512}
    assert row.whole == expected + 2 * 2 * 512
    assert row.whole_bfloat16 == row.linear_bfloat16 + 2 * 2 * 512


@needs_both
def test_a_linear_layer_that_stays_counts_against_the_ratio():
    module = nn.ModuleDict({"w_1": nn.Linear(256, 256), "w_2": nn.Linear(65, 256, bias=False)})
    row = qlora_memory.measure_weights("blocks", module.bfloat16())
    assert row.left_alone == {"linear layers": 2 * 65 * 256}
    assert row.linear_bfloat16 == 2 * (256 * 256 + 256 + 65 * 256)
    assert row.linear == parameter_report(module["w_1"]).bytes + 2 * 65 * 256
    assert row.ratio > 0.3


@needs_both
@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_is_left_alone_and_named(tied):
    config = tiny_llama().config
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    row = qlora_memory.measure_weights("LLaMA", model)
    table = 2 * 300 * 64
    norms = 2 * 64 * (2 * 2 + 1)
    output = {} if tied else {"output layer": table}
    assert row.left_alone == {"embeddings": table, **output, "norms": norms}
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # q, o; k, v; the feed-forward's
    assert row.linear_bfloat16 == 2 * linear
    assert row.whole - row.linear == sum(row.left_alone.values())
    assert row.whole_bfloat16 - row.linear_bfloat16 == sum(row.left_alone.values())


@needs_both
@pytest.mark.parametrize("name", ["vit", "clip", "whisper", "wavlm"])
@pytest.mark.usefixtures("tiny")
def test_all_of_an_encoder_is_counted_once(name):
    title = checkpoints.TITLES[name] + (", encoder" if name == "whisper" else "")
    module = qlora_memory.published_parts()[title]().bfloat16()
    sizes = {id(p): 2 * p.numel() for p in module.parameters()}
    row = qlora_memory.measure_weights(name, module)
    assert row.whole_bfloat16 == sum(sizes.values())
    # Those of a tiny WavLM that are narrower than a block count among the linear layers.
    beside = {kind: size for kind, size in row.left_alone.items() if kind != "linear layers"}
    assert row.whole == row.linear + sum(beside.values())
    assert row.left_alone["convolutions"] >= sum(
        2 * p.numel()
        for layer in module.modules()
        if isinstance(layer, (nn.Conv1d, nn.Conv2d))
        for p in layer.parameters()
    )


def test_decoders_are_those_of_published_models():
    parts = qlora_memory.published_parts()
    whisper, llama = (parts[name].args[0] for name in ("Whisper small, decoder", "Llama-3.2-1B"))
    assert whisper.to_dict() == checkpoints.whisper().config.to_dict()
    assert llama.num_hidden_layers == checkpoints.LLAMA_LAYERS


@pytest.mark.parametrize("tied", [True, False])
def test_a_random_llama_is_what_its_checkpoint_loads(tied, tmp_path):
    config = tiny_llama().config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = qlora_memory.random_llama(config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.testing.assert_close(weight, torch.ones_like(weight))
        else:
            assert 0.015 < weight.float().std() < 0.025  # config.initializer_range is 0.02
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(dict(loaded.named_parameters()), dict(model.named_parameters()))
    assert loaded(torch.tensor([[298, 3]])).logits.isfinite().all()


@pytest.mark.parametrize(("linear", "verdict"), [(300, "yes"), (301, "no")])
def test_weights_are_held_against_their_target(linear, verdict):
    row = WeightRow("part", linear, 1000, 1_500_000, 3_000_000, {"norms": 100_000})
    assert row.ratio == linear / 1000
    assert str(row) == (
        f"| part | 0.0 | 0.0 | {linear / 1000:.3f} | at most 0.30: {verdict} | 1.5 of 3.0 | 0.500 "
        "| norms 0.1 |"
    )


@pytest.mark.parametrize(
    ("loading", "steps", "verdict"), [(3, 4, "yes"), (3, 5, "no"), (5, 3, "no")]
)
def test_both_peaks_are_held_against_the_target(loading, steps, verdict):
    memory = replace(MEMORY, loading=loading * 10**9, steps=steps * 10**9)
    assert str(StepRow("case", "QLoRA", memory, target=5e9)) == (
        f"| case | QLoRA | 5 of 1,234 | 2.00 | 0.00 | {loading}.00 | {steps}.00 | under 5 GB: "
        f"{verdict} |"
    )


def test_rows_without_target_or_memory():
    assert str(StepRow("case", "full", MEMORY)).endswith("| 4.00 |  |")
    assert str(StepRow("case", "full", "not run")) == "| case | full |  |  |  |  |  | not run |"


def test_a_batch_has_the_streams_and_tokens_of_its_model():
    options = {"modality": "audiovisual", "eos": 300}
    x, lengths, targets = qlora_memory.batch_of(options, (100, 60), CPU)
    assert list(x) == list(lengths) == ["video", "audio"]
    assert lengths["video"].tolist() == [100, 60]
    assert (targets != -1).sum(dim=1).tolist() == [16, 9]
    assert targets.max() < 299
    audio, _, _ = qlora_memory.batch_of({"modality": "audio", "eos": 300}, (100,), CPU)
    assert list(audio) == ["audio"]


@needs_both
@pytest.mark.parametrize("way", ["full", "LoRA", "QLoRA"])
@pytest.mark.usefixtures("tiny")
def test_steps_train_what_the_way_says(way, monkeypatch):
    case = tiny_case()
    with qlora_memory.saved_case(case) as options:
        options |= case.ways[way]
        torch.manual_seed(0)
        model = qlora_memory.E2E.from_keywords(**options)
    assert model.training
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    losses, optimisers = [], []
    forward, make_optimiser = model.forward, torch.optim.AdamW

    def adamw(*args, **options):
        optimisers.append(make_optimiser(*args, **options))
        return optimisers[-1]

    monkeypatch.setattr(model, "forward", lambda *args: losses.append(1) or forward(*args))
    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    qlora_memory.train(model, qlora_memory.batch_of(options, FRAMES, CPU), CPU)
    assert len(losses) == qlora_memory.STEPS
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained
    assert all(("lora_" in name) == (way != "full") for name in trained if ".backbone." in name)
    moments = optimisers[0].state
    assert {id(p) for p in moments} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(moments[p]["exp_avg"].shape == p.shape for p in moments)
    assert all(moments[p]["step"] == 2 for p in moments)


def test_a_loss_that_is_not_finite_is_refused():
    class Broken(nn.Linear):
        def forward(self, x):
            return (super().forward(x).sum() * float("nan"),)

    with pytest.raises(RuntimeError, match="the loss is nan"):
        qlora_memory.train(Broken(2, 1), (torch.ones(1, 2),), CPU)


@needs_both
@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_each_way_has_a_process_of_its_own():
    rows = list(qlora_memory.measure_case(tiny_case(), FRAMES, CPU))
    assert [row.way for row in rows] == ["full", "LoRA", "QLoRA"]
    assert [row.target for row in rows] == [None, None, 10**12]
    full, lora, qlora = (row.memory for row in rows)
    assert full.trained > lora.trained == qlora.trained > 0
    assert full.total < lora.total == qlora.total
    assert full.weights == 4 * full.total
    assert lora.weights == 4 * lora.total
    assert all(min(asdict(memory).values()) > 0 for memory in (full, lora, qlora))


def test_running_out_of_memory_ends_a_row_only(monkeypatch):
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 1 GiB\nand more")

    monkeypatch.setattr(qlora_memory.E2E, "from_keywords", nn.Identity)
    monkeypatch.setattr(qlora_memory, "batch_of", lambda *_: None)
    monkeypatch.setattr(qlora_memory, "train", fail)
    assert qlora_memory.measure_training({}, FRAMES, CPU) == (
        "out of memory: CUDA out of memory. Tried 1 GiB"
    )


def test_a_process_that_is_killed_ends_its_row_only(monkeypatch):
    def be_killed(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(qlora_memory, "saved_case", lambda _: nullcontext({}))
    monkeypatch.setattr(common, "run_apart", be_killed)
    rows = list(qlora_memory.measure_case(tiny_case(), FRAMES, CPU))
    assert len(rows) == 3
    assert all("ended without a result" in row.memory for row in rows)


def test_llama_of_8b_is_not_trained_in_full(monkeypatch):
    monkeypatch.setattr(qlora_memory, "saved_case", lambda _: nullcontext({}))
    monkeypatch.setattr(common, "run_apart", lambda *_: MEMORY)
    smaller, larger = (
        list(qlora_memory.measure_case(case, FRAMES, CPU))
        for case in qlora_memory.cases("cuda").values()
    )
    assert [row.memory for row in smaller] == [MEMORY] * 3
    assert [row.memory for row in larger] == [qlora_memory.FULL_8B] + [MEMORY] * 3
    assert [row.target for row in smaller + larger] == [None] * 5 + [12e9] * 2


@pytest.fixture
def quick(monkeypatch):
    """One small part and two recognisers that nothing trains."""
    parts = {"a part": lambda: nn.Sequential(nn.Linear(256, 256))}
    both = {"1b": tiny_case(), "8b": tiny_case(title="large")}
    monkeypatch.setattr(qlora_memory, "published_parts", lambda: parts)
    monkeypatch.setattr(qlora_memory, "cases", lambda _: both)
    monkeypatch.setattr(qlora_memory, "saved_case", lambda _: nullcontext({}))
    monkeypatch.setattr(common, "run_apart", lambda *_: MEMORY)


@needs_both
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("more", "counts"),
    [
        ([], [1, 6]),
        (["--table", "weights"], [1]),
        (["--table", "steps"], [6]),
        (["--table", "steps", "--llama", "1b"], [3]),
    ],
)
def test_prints_the_tables_that_are_asked_for(more, counts, tables):
    qlora_memory.main(["--device", "cpu", *more])
    printed = tables()
    assert [len(table.rows) for table in printed] == counts
    for table in printed:
        ways = [row[1] for row in table.rows if table.head[1] == "trained"]
        assert ways == ["full", "LoRA", "QLoRA"] * (len(ways) // 3)
        assert {len(row) for row in (table.head, *table.rows)} == {8}


def test_llama_of_8b_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        qlora_memory.main(["--device", "cpu", "--llama", "8b"])
    assert "--llama 8b needs --device cuda" in capsys.readouterr().err


def test_a_peak_that_cannot_be_told_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "PROCESS", tmp_path)
    with pytest.raises(SystemExit):
        qlora_memory.main(["--device", "cpu", "--table", "steps"])
    assert "status is missing, where Linux tells the peak" in capsys.readouterr().err
