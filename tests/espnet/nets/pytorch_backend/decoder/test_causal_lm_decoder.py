"""Tests of decoder/causal_lm_decoder.py: each type of model against transformers' own code."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from datamodule.pretrained_text_transform import llama_text_transform
from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.decoders import CAUSAL_LM_TYPES, DECODERS
from espnet.nets.pytorch_backend.decoder.causal_lm_decoder import CausalLMDecoder
from espnet.nets.pytorch_backend.decoder.llama_decoder import LLaMADecoder
from espnet.nets.pytorch_backend.nets_utils import send
from espnet.nets.pytorch_backend.qlora_utils import add_lora, merge_lora, quantize_4bit
from espnet.utils.export import write_folder
from tests.causal_lm_cases import CONFIGS, LAYERS, WINDOW, WITHOUT_BOS, make_checkpoint
from tests.device_waits import Waits, to_device

MEMORY_DIM, BEAM = 6, 3
LENGTHS = torch.tensor([16, 9, 13])  # frames; the prefix has 3 of them in an embedding
CONDITIONINGS = {"cross-attention": None, "prefix": "write:"}  # and the prompt


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of the checkpoints, by model type."""
    root = tmp_path_factory.mktemp("causal_lms")
    return {kind: make_checkpoint(root / kind, kind) for kind in CAUSAL_LM_TYPES}


@pytest.fixture(params=CAUSAL_LM_TYPES)
def checkpoint(checkpoints, request):
    return checkpoints[request.param]


def transform_of(checkpoint, conditioning):
    return llama_text_transform(checkpoint, prompt=CONDITIONINGS[conditioning], text_case="lower")


def make_decoder(checkpoint, conditioning, opened=True, **options):
    """A decoder in eval mode, which the memory conditions; with closed gates: not so."""
    transform = transform_of(checkpoint, conditioning)
    torch.manual_seed(1)
    decoder = CausalLMDecoder(
        checkpoint,
        memory_dim=MEMORY_DIM,
        prompt=transform.prompt,
        eos=transform.eos,
        suppress=transform.special_tokens,
        conditioning=conditioning,
        cross_every=2,
        **options,
    ).eval()
    with torch.no_grad():
        for block in decoder.cross_attention if opened else ():
            block.gate.fill_(0.8)
            block.feed_forward_gate.fill_(-0.6)
        if decoder.memory_prefix is not None:  # A wider prefix tells utterances apart.
            decoder.memory_prefix.norm.bias.normal_()
    return decoder


def plain(checkpoint):
    """transformers' model, with attention that is written out."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()


def batch(decoder, length=9, seed=2):
    """Token ids from sos on, the second text shorter, and memory whose padding is garbage."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, decoder.odim, (3, length), generator=generator)
    tokens[:, 0] = decoder.sos
    tokens[1, 6:] = decoder.odim - 1
    memory = torch.randn(3, 16, MEMORY_DIM, generator=generator)
    memory[torch.arange(16) >= LENGTHS.unsqueeze(1)] = 9.0
    return tokens, memory, LENGTHS


def embeddings_by_hand(decoder, model, memory, text):
    """First token, memory, rest of the prompt and text of one utterance."""
    embed = model.get_input_embeddings()
    padded = F.pad(memory, (0, 0, 0, -len(memory) % 3))
    prefix = decoder.memory_prefix.projection(padded.reshape(-1, 3 * MEMORY_DIM))
    prefix = decoder.memory_prefix.norm(prefix)
    first, *instruction = decoder.prompt.tolist()
    after = torch.tensor([*instruction, *text])
    return torch.cat([embed(torch.tensor([first])), prefix, embed(after)]).unsqueeze(0)


def log_probabilities_by_hand(decoder, checkpoint, conditioning, row):
    """The plain model's on one utterance alone; cross-attention comes in by hooks."""
    model = plain(checkpoint)
    tokens, memory, lengths = batch(decoder)
    memory = memory[row, : lengths[row]]
    text = (tokens[row, 1:] - 1).tolist()
    if conditioning == "prefix":
        inputs = {"inputs_embeds": embeddings_by_hand(decoder, model, memory, text)}
    else:
        inputs = {"input_ids": torch.tensor([[*decoder.prompt.tolist(), *text]])}
    for layer, block in zip((0, 2), decoder.cross_attention, strict=False):
        model.model.layers[layer].register_forward_pre_hook(
            lambda _, inputs, block=block: (block(inputs[0], memory.unsqueeze(0), None),)
        )
    return model(**inputs).logits[0, -tokens.size(1) :].log_softmax(dim=-1)


def test_each_type_is_tested():
    assert tuple(CONFIGS) == CAUSAL_LM_TYPES == DECODERS["llama"].model_types
    assert issubclass(LLaMADecoder, CausalLMDecoder)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_log_probabilities_agree_with_transformers(checkpoint, conditioning, opened):
    """A padded batch, against each utterance alone; a closed gate lets the model be itself."""
    decoder = make_decoder(checkpoint, conditioning, opened)
    together = decoder(*batch(decoder)).log_softmax(dim=-1)
    if not opened and conditioning == "cross-attention":
        decoder.cross_attention = torch.nn.ModuleList()
    for row, length in enumerate((9, 6, 9)):
        alone = log_probabilities_by_hand(decoder, checkpoint, conditioning, row)
        torch.testing.assert_close(together[row, :length], alone[:length], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_neither_training_nor_steps_wait_for_the_device(checkpoint, conditioning):
    decoder = make_decoder(checkpoint, conditioning).train()
    tokens, memory, lengths = batch(decoder)
    with Waits() as waits:
        to_device(decoder)
        tokens, memory = to_device((tokens, memory))
        decoder(tokens, memory, lengths).square().mean().backward()
        with torch.no_grad():
            state = decoder.eval().init(memory, lengths, BEAM)
            rows = send(torch.tensor([3, 3, 5, 6, 7, 8]), memory.device)  # without the first
            for step in range(WINDOW + 3):
                scores, state = decoder.score(tokens[:, :1].expand(-1, BEAM).flatten(), state)
                if step == 2:
                    tokens, state = tokens[1:], decoder.reorder(state, rows)
    assert waits.places == {}
    assert scores.shape == (2 * BEAM, decoder.odim)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_cached_steps_agree_with_teacher_forcing(checkpoint, conditioning):
    """Beams that are reordered at every step, beyond the window; an utterance is dropped."""
    decoder = make_decoder(checkpoint, conditioning)
    _, memory, lengths = batch(decoder)
    generator = torch.Generator().manual_seed(3)
    prefixes = torch.full((3 * BEAM, 1), decoder.sos)
    utterances = torch.arange(3).repeat_interleave(BEAM)
    state = decoder.init(memory, lengths, BEAM)
    if conditioning == "prefix":  # once an utterance, not once a hypothesis
        assert all(len(layer.keys) == 3 for layer in state.prefix.cache.layers)
    for step in range(WINDOW + 3):
        scores, state = decoder.score(prefixes[:, -1], state)
        expected = decoder(prefixes, memory[utterances], lengths[utterances])[:, -1]
        expected = expected.log_softmax(-1).masked_fill(decoder.suppressed, -torch.inf)
        torch.testing.assert_close(scores[:, 1:], expected, atol=1e-5, rtol=1e-5)
        index = torch.arange(len(prefixes)).view(-1, BEAM)
        index = index.gather(1, torch.randint(BEAM, index.shape, generator=generator))
        index = (index[1:] if step == 2 else index).flatten()
        state = decoder.reorder(state, index)
        tokens = torch.randint(1, decoder.odim, (len(index), 1), generator=generator)
        prefixes, utterances = torch.cat([prefixes[index], tokens], dim=1), utterances[index]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_greedy_text_is_that_of_generate(checkpoint, conditioning):
    """Through the search, with its shared prefix, and the text transform."""
    decoder = make_decoder(checkpoint, conditioning, opened=False)
    transform, model = transform_of(checkpoint, conditioning), plain(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    search = BatchBeamSearch(
        *(1, decoder.odim, {"decoder": 1.0}, {"decoder": decoder}),
        sos=decoder.sos,
        eos=transform.eos,
    )
    _, memory, lengths = batch(decoder)
    texts = set()
    for row, hypotheses in enumerate(search(memory, lengths, maxlenratio=-15.0)):
        inputs = {"input_ids": decoder.prompt.unsqueeze(0)}
        if conditioning == "prefix":
            embeddings = embeddings_by_hand(decoder, model, memory[row, : lengths[row]], [])
            inputs = {"inputs_embeds": embeddings}
        (length,) = {value.size(1) for value in inputs.values()}
        found = model.generate(
            **inputs,
            attention_mask=torch.ones(1, length, dtype=torch.int64),
            do_sample=False,
            max_new_tokens=15,
            suppress_tokens=list(transform.special_tokens),
            pad_token_id=tokenizer.eos_token_id,
        )[0]
        found = found[len(decoder.prompt) if "input_ids" in inputs else 0 :]
        text = tokenizer.decode(found, skip_special_tokens=True).strip()
        ours = hypotheses[0].yseq[1:]
        assert transform.post_process(ours) == text
        assert ours[: len(found)].tolist() == (found + 1).tolist()
        texts.add(text)
    assert "" not in texts
    assert (len(texts) > 1) == (conditioning == "prefix")


def test_first_token_of_a_tokenizer_without_bos(checkpoints):
    """What the config names to begin stands in for it; text follows it at once."""
    for kind in WITHOUT_BOS:
        assert AutoTokenizer.from_pretrained(checkpoints[kind]).bos_token is None
    prompts = {
        kind: [transform_of(checkpoints[kind], c).prompt for c in CONDITIONINGS]
        for kind in CAUSAL_LM_TYPES
    }
    assert prompts["qwen2"] == prompts["qwen3"] == prompts["llama"]
    begin = AutoConfig.from_pretrained(checkpoints["qwen2"]).bos_token_id
    assert prompts["qwen2"][0] == (begin,)
    assert prompts["qwen2"][1][0] == begin


@pytest.mark.parametrize("kind", CAUSAL_LM_TYPES)
def test_prefix_begins_at_the_size_of_embedded_tokens(checkpoints, kind):
    """Gemma multiplies its embeddings by the root of their size."""
    decoder = make_decoder(checkpoints[kind], "prefix")
    embedded = decoder.backbone.get_input_embeddings()(torch.arange(decoder.odim - 1))
    size = decoder.memory_prefix.norm.weight
    torch.testing.assert_close(size, embedded.square().mean().sqrt().expand_as(size))


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)],
)
@torch.no_grad()
def test_low_precision(checkpoint, dtype, autocast):
    decoder = make_decoder(checkpoint, "prefix")
    tokens, memory, lengths = batch(decoder)
    close = {"atol": 0.5, "rtol": 0.0}  # as rounding in four layers of random weights adds up
    exact = decoder(tokens, memory, lengths).log_softmax(dim=-1)
    decoder.backbone.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rounded = decoder(tokens, memory, lengths).float().log_softmax(dim=-1)
        torch.testing.assert_close(rounded, exact, **close)
        state = decoder.init(memory, lengths, 1)
        for step in range(tokens.size(1)):
            scores, state = decoder.score(tokens[:, step], state)
            assert scores.dtype == torch.float32
            kept = ~decoder.suppressed
            torch.testing.assert_close(scores[:, 1:][:, kept], rounded[:, step, kept], **close)


@torch.no_grad()
def test_adapters_of_each_type(checkpoint, tmp_path):
    """All linear layers get them; merged and exported, transformers' model is the same."""
    decoder = make_decoder(checkpoint, "cross-attention", opened=False)
    add_lora(decoder.backbone, rank=2)
    adapters = {n: p for n, p in decoder.named_parameters() if ".lora_B." in n}
    assert len(adapters) == 7 * LAYERS
    for weight in adapters.values():
        weight.normal_(std=0.1)
    decoder.eval()
    tokens, memory, lengths = batch(decoder)
    expected = decoder(tokens, memory, lengths)
    merge_lora(decoder.backbone)
    close = {"atol": 1e-4, "rtol": 1e-4}  # The sums are in another order.
    torch.testing.assert_close(decoder(tokens, memory, lengths), expected, **close)
    weights = decoder.backbone.state_dict()
    write_folder(decoder.backbone.load_plain(), weights, checkpoint, tmp_path / "decoder")
    exported = plain(tmp_path / "decoder")
    before = decoder.prompt[:-1].expand(3, -1)
    logits = exported(torch.cat([before, tokens - 1], dim=1)).logits[:, before.size(1) :]
    torch.testing.assert_close(logits[0], expected[0], **close)


@torch.no_grad()
def test_each_type_is_quantised_while_it_loads(checkpoint):
    pytest.importorskip("bitsandbytes")
    decoder = make_decoder(checkpoint, "prefix", quantize=True)
    later = make_decoder(checkpoint, "prefix")
    quantize_4bit(later.backbone)
    torch.testing.assert_close(decoder(*batch(decoder)), later(*batch(later)), atol=0, rtol=0)


def test_types_that_are_refused(tmp_path):
    expected = "one of llama, mistral, .* or gemma3_text is expected: give the folder or hub id"
    for kind in ("gemma3", "gpt2"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ValueError, match=f"is a checkpoint of {kind}, {expected}"):
            llama_text_transform(str(tmp_path), prompt=None, text_case="lower")
        with pytest.raises(ValueError, match=f"is a checkpoint of {kind}, {expected}"):
            CausalLMDecoder(str(tmp_path), memory_dim=MEMORY_DIM, prompt=(1,), eos=2)


def test_a_model_that_reads_both_ways_is_refused(tmp_path):
    path = make_checkpoint(tmp_path, "gemma3_text", use_bidirectional_attention=True)
    message = "is a gemma3_text that attends in both directions, one that writes .*: give another"
    with pytest.raises(ValueError, match=message):
        make_decoder(path, "prefix")
