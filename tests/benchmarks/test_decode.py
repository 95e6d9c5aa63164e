import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig

from benchmarks import checkpoints, decode
from benchmarks.checkpoints import Checkpoint
from benchmarks.common import CPU, Timing
from benchmarks.decode import Work
from espnet.nets.pytorch_backend.decoder.gated_cross_attention import GatedCrossAttention

pytestmark = pytest.mark.usefixtures("no_gradients")
WORK = Work(steps=5, llama_layers=4, repeats=2)
TOKENS, WIDTH = 1000, 32  # so many that the end symbol, which is forbidden, is not among the best
BEGIN, END = 998, 999
IDS = {"bos_token_id": BEGIN, "eos_token_id": END}
KINDS = ["whisper", "prefix", "cross-attention"]
OPTIONS = {kind: {"conditioning": kind} for kind in KINDS[1:]} | {"whisper": {}}


def tiny(kind):
    if kind == "whisper":
        config = WhisperConfig(
            d_model=WIDTH,
            encoder_layers=1,
            encoder_attention_heads=4,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=48,
            vocab_size=TOKENS,
            pad_token_id=END,
            decoder_start_token_id=57,
            begin_suppress_tokens=None,
            init_std=0.3,
            **IDS,
        )
        return Checkpoint("tiny Whisper", config, (57, 56, 55), END, memory_dim=WIDTH)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
        **IDS,
    )
    prompt = (BEGIN, 3, 4) if kind == "prefix" else (BEGIN,)
    return Checkpoint("tiny LLaMA", config, prompt, END, memory_dim=WIDTH)


def load(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return decode.load(tiny(kind), CPU, dtype, **OPTIONS[kind])


def random_memory():
    return torch.randn(1, 20, WIDTH, generator=torch.Generator().manual_seed(1))


def both_searches(kind, decoder, model):
    checkpoint, memory = tiny(kind), random_memory()
    make_inputs = partial(decode.generate_inputs, decoder, model, checkpoint.prompt, memory)
    return (
        partial(decode.search, decoder, checkpoint, memory),
        partial(decode.generate, model, make_inputs),
    )


def open_gates(decoder):
    for block in decoder.cross_attention:
        block.gate.fill_(1.0)
        block.feed_forward_gate.fill_(1.0)


def test_gated_blocks_have_the_share_of_the_weights_that_is_told():
    shares = []
    for layers in (4, 16):
        checkpoint = checkpoints.llama("cross-attention", layers)
        with torch.device("meta"):
            model = LlamaForCausalLM(checkpoint.config)
            block = GatedCrossAttention(2048, 768, 32, 0.0)
        # Keys and values of the memory are no part of a step.
        keys_values = [block.attention.linear_k, block.attention.linear_v]
        unused = sum(value.numel() for part in keys_values for value in part.parameters())
        used = sum(value.numel() for value in block.parameters()) - unused
        all_weights = sum(value.numel() for value in model.parameters())
        shares.append(layers / 4 * used / all_weights)
    assert [round(1 / share) for share in shares] == [12, 7]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_both_find_the_same(kind, beam_size):
    search, generate = both_searches(kind, *load(kind))
    found = search(beam_size, 8)
    assert found.shape == (8,)
    assert len(found.unique()) > 2
    torch.testing.assert_close(found, generate(beam_size, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_both_take_the_same_number_of_steps(kind, monkeypatch):
    decoder, model = load(kind)
    steps = []
    score = decoder.score
    monkeypatch.setattr(decoder, "score", lambda *args: steps.append("search") or score(*args))
    model.register_forward_pre_hook(lambda *_: steps.append("generate"))
    for search in both_searches(kind, decoder, model):
        search(3, 6)
    assert steps == ["search"] * 6 + ["generate"] * 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_does_not_end_before(kind):
    decoder, model = load(kind)
    search, _ = both_searches(kind, decoder, model)
    likely = int(search(3, 1)[0])
    found = decode.search(decoder, replace(tiny(kind), eos=likely), random_memory(), 3, 6)
    assert len(found) == 6
    assert likely not in found


def test_the_memory_of_a_prefix_stands_after_bos():
    decoder, model = load("prefix")
    memory = random_memory()
    inputs = decode.generate_inputs(decoder, model, (BEGIN, 3, 4), memory)
    embeddings = inputs["inputs_embeds"][0]
    prefix = decoder.memory_prefix(memory, torch.tensor([20]))[0][0]
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(embeddings, torch.cat([table[[BEGIN]], prefix, table[[3, 4]]]))
    assert inputs["attention_mask"].tolist() == [[1] * 10]


def test_gated_blocks_before_the_layers_do_what_the_decoder_does():
    decoder, model = load("cross-attention")
    assert len(decoder.cross_attention) == 2  # before layers 0 and 4
    open_gates(decoder)
    search, generate = both_searches("cross-attention", decoder, model)
    plain = generate(3, 8)
    assert not torch.equal(search(3, 8), plain)
    with decode.blocks_between_layers(model, decoder, random_memory()):
        torch.testing.assert_close(search(3, 8), generate(3, 8))
    torch.testing.assert_close(generate(3, 8), plain)


def test_a_step_is_what_further_steps_take(monkeypatch):
    calls = []

    def time_in_turns(functions, device, repeats):
        assert (device, repeats) == (CPU, WORK.repeats)
        results = [function() for function in functions]
        return [Timing(time, result) for time, result in zip([7, 9, 57, 109], results, strict=True)]

    def one(name, beam_size, steps):
        calls.append((name, beam_size, steps))
        return torch.arange(steps)

    monkeypatch.setattr(decode, "time_in_turns", time_in_turns)
    searches = (partial(one, "search"), partial(one, "generate"))
    row = decode.compare("a search", "another", searches, 3, WORK, CPU)
    names = ("search", "generate")
    assert calls == [
        (name, beam, steps) for beam, steps in [(3, 1), (3, 6), (1, 6)] for name in names
    ]
    assert str(row) == (
        "| a search, beam 3 (reference: another) | 10.0 | 20.0 | 0.50 times "
        "| at most 1.1 times: yes |"
    )
    assert row.notes == [
        "another: all 6 tokens (6 different ones) are the same with beam 1, all 6 tokens "
        "(6 different ones) are the same with beam 3",
        "another: what precedes the text and the first step take 7 ms, there 9 ms",
    ]


def test_tokens_that_differ_are_told():
    found, expected = torch.tensor([4, 5, 6, 7]), torch.tensor([4, 5, 5, 7])
    assert decode.agreement(found, expected) == (
        "only the first 2 of 4 tokens (3 different ones) are the same"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_have_the_precision_that_is_asked_for(kind):
    decoder, model = load(kind, torch.bfloat16)
    pretrained = decoder.backbone
    assert {pretrained.dtype, model.dtype} == {torch.bfloat16}
    assert not decoder.training
    assert not model.training
    assert [len(search(2, 3)) for search in both_searches(kind, decoder, model)] == [3, 3]


def test_generate_reads_the_memory_once_a_hypothesis(monkeypatch):
    """It expands the memory in place: given it again, it would do so again."""
    decoder, model = load("whisper")
    rows = []
    model.model.decoder.layers[0].encoder_attn.k_proj.register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0]))
    )
    monkeypatch.setattr(decode, "load", lambda *_: (decoder, model))
    list(decode.measure(tiny("whisper"), WORK, CPU, beam_size=3, dtype=torch.float32))
    assert rows == [3] * 2 * WORK.repeats + [1]


@pytest.mark.parametrize("kind", KINDS)
def test_command_prints_a_table_and_notes(kind, monkeypatch, tables):
    layers = []

    def llama_checkpoint(conditioning, count):
        layers.append(count)
        return tiny(conditioning)

    monkeypatch.setattr(checkpoints, "whisper", lambda: tiny("whisper"))
    monkeypatch.setattr(checkpoints, "llama", llama_checkpoint)
    monkeypatch.setitem(decode.WORK, "cpu", WORK)
    command = ["--decoder", "whisper"]
    if kind != "whisper":
        command = ["--decoder", "llama", "--llama-conditioning", kind, "--llama-layers", "3"]
    decode.main([*command, "--device", "cpu", "--beam-size", "2"])
    (table,) = tables()
    assert table.head == ["what", "step (ms)", "reference (ms)", "ratio", "target"]
    references = [re.search(r"beam 2 \(reference: (.*)\)", row[0])[1] for row in table.rows]
    plain = "`generate`"
    both = [f"{plain} without gated blocks", f"{plain} with gated blocks"]
    assert references == (both if kind == "cross-attention" else [plain])
    assert len(table.notes) == 2 * len(references)
    assert sum(note.count("all 6 tokens") for note in table.notes) == 2 * len(references)
    assert layers == ([] if kind == "whisper" else [3])
