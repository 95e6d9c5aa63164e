import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.pytorch_backend.decoder.llama_decoder import LLaMADecoder

TOKENS, DIM, MEMORY_DIM, LAYERS, BEAM = 60, 32, 6, 4, 3
BOS, EOS = 58, 59  # of the tokenizer; 1 more in the project
PROMPTS = {"cross-attention": (BOS, 16, 17), "prefix": (BOS, 16, 17)}
CONDITIONINGS = list(PROMPTS)
LENGTHS = torch.tensor([7, 4, 6])  # frames; 3 of them make an embedding of the prefix


def make_checkpoint(folder, tied=False, positions=64):
    """A checkpoint whose heads share keys, with LLaMA 3's scaling of positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=DIM,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        tie_word_embeddings=tied,
        initializer_range=0.25,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"))


def make_decoder(checkpoint, conditioning, **options):
    torch.manual_seed(1)
    defaults = {
        "memory_dim": MEMORY_DIM,
        "prompt": PROMPTS.get(conditioning, (BOS,)),
        "eos": EOS + 1,
        "conditioning": conditioning,
        "cross_every": 2,
        "dropout_rate": 0.0,
    }
    return LLaMADecoder(checkpoint, **{**defaults, **options})


def open_gates(decoder):
    """Lets the memory through; a wider prefix tells utterances apart."""
    with torch.no_grad():
        for block in decoder.cross_attention:
            block.gate.fill_(0.8)
            block.feed_forward_gate.fill_(-0.6)
        if decoder.memory_prefix is not None:
            decoder.memory_prefix.norm.bias.normal_()
    return decoder


def batch(seed=2, length=5):
    """Token ids from sos on, and memory whose padding is garbage."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, TOKENS + 1, (3, length), generator=generator)
    tokens[:, 0] = PROMPTS["prefix"][-1] + 1
    memory = torch.randn(3, 7, MEMORY_DIM, generator=generator)
    memory[torch.arange(7) >= LENGTHS.unsqueeze(1)] = 9.0
    return tokens, memory, LENGTHS


def plain_llama(checkpoint):
    return LlamaForCausalLM.from_pretrained(checkpoint).eval()


def embeddings_by_hand(decoder, model, memory, text):
    """BOS, memory, prompt and text of one utterance: frames are stacked in threes."""
    embed = model.model.embed_tokens
    padded = torch.zeros(-(-len(memory) // 3) * 3, MEMORY_DIM)
    padded[: len(memory)] = memory
    first, gelu, second = decoder.memory_prefix.projection
    hidden = second(gelu(first(padded.reshape(-1, 3 * MEMORY_DIM))))
    prefix = F.layer_norm(
        hidden, (DIM,), decoder.memory_prefix.norm.weight, decoder.memory_prefix.norm.bias
    )
    bos, *instruction = PROMPTS["prefix"]
    after = torch.tensor([*instruction, *text])
    return torch.cat([embed(torch.tensor([bos])), prefix, embed(after)]).unsqueeze(0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("prompt", [(BOS,), (BOS, 16, 17)])
def test_cross_attention_starts_as_the_language_model(tmp_path, tied, prompt):
    path = make_checkpoint(tmp_path, tied)
    decoder = make_decoder(path, "cross-attention", prompt=prompt)
    assert decoder.odim == TOKENS + 1
    assert decoder.sos == prompt[-1] + 1
    tokens, memory, lengths = batch()
    tokens[:, 0] = decoder.sos
    before = torch.tensor(prompt[:-1], dtype=torch.int64).expand(3, -1)
    expected = plain_llama(path)(torch.cat([before, tokens - 1], dim=1)).logits
    torch.testing.assert_close(decoder(tokens, memory, lengths), expected[:, len(prompt) - 1 :])


@pytest.mark.parametrize(("every", "layers"), [(1, [0, 1, 2, 3]), (3, [0, 3]), (8, [0])])
def test_cross_attention_stands_before_every_nth_layer(checkpoint, every, layers):
    """The blocks as hooks of the plain model."""
    decoder = open_gates(make_decoder(checkpoint, "cross-attention", cross_every=every))
    model = plain_llama(checkpoint)
    tokens, memory, lengths = batch()
    mask = torch.arange(7) < lengths.unsqueeze(1)
    for layer, block in zip(layers, decoder.cross_attention, strict=True):
        model.model.layers[layer].register_forward_pre_hook(
            lambda _, inputs, block=block: (block(inputs[0], memory, mask),)
        )
    before = torch.tensor(PROMPTS["cross-attention"][:-1]).expand(3, -1)
    expected = model(torch.cat([before, tokens - 1], dim=1)).logits[:, before.size(1) :]
    torch.testing.assert_close(decoder(tokens, memory, lengths), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_prefix_agrees_with_embeddings_by_hand(tmp_path, tied):
    """Each utterance alone in the plain model, against all in one padded batch."""
    path = make_checkpoint(tmp_path, tied)
    decoder, model = open_gates(make_decoder(path, "prefix")), plain_llama(path)
    tokens, memory, lengths = batch()
    logits = decoder(tokens, memory, lengths)
    for row, length in enumerate(lengths):
        text = (tokens[row, 1:] - 1).tolist()
        embeddings = embeddings_by_hand(decoder, model, memory[row, :length], text)
        expected = model(inputs_embeds=embeddings).logits[0, -tokens.size(1) :]
        torch.testing.assert_close(logits[row], expected)


def test_prefix_begins_at_the_size_of_token_embeddings(checkpoint):
    decoder = make_decoder(checkpoint, "prefix")
    embeddings, _ = decoder.memory_prefix(torch.randn(1, 30, MEMORY_DIM), torch.tensor([30]))
    expected = decoder.backbone.model.embed_tokens.weight.square().mean().sqrt()
    # The norm's epsilon takes a little away.
    torch.testing.assert_close(embeddings.square().mean().sqrt(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_search_keeps_memory_and_prompt_once_an_utterance(checkpoint, conditioning):
    decoder = make_decoder(checkpoint, conditioning)
    _, memory, lengths = batch()
    state = decoder.init(memory, lengths, BEAM)
    _, state = decoder.score(torch.full((3 * BEAM,), decoder.sos), state)
    places = {"cross-attention": 2, "prefix": 2 + 3}[conditioning]
    for layer in range(LAYERS):
        shared, own = state.prefix.cache.layers[layer], state.cache.layers[layer]
        assert shared.keys.shape == shared.values.shape == (3, 2, places, DIM // 4)
        assert own.keys.shape == own.values.shape == (3 * BEAM, 2, 1, DIM // 4)
    assert all(part.shape == (3, 4, 7, DIM // 4) for pair in state.memory for part in pair)


def search(decoder, beam_size, most_tokens, fewest_tokens=0, **options):
    find = BatchBeamSearch(
        beam_size,
        decoder.odim,
        {"decoder": 1.0},
        {"decoder": decoder},
        sos=decoder.sos,
        eos=EOS + 1,
        **options,
    )
    _, memory, lengths = batch()
    return find(memory, lengths, maxlenratio=-most_tokens, minlenratio=-fewest_tokens)


def generate(decoder, checkpoint, conditioning, row, **options):
    """What transformers' own search finds for an utterance, as ids of the project."""
    model = plain_llama(checkpoint)
    _, memory, lengths = batch()
    prompt = torch.tensor([PROMPTS[conditioning]])
    inputs, mask = {"input_ids": prompt}, torch.ones_like(prompt)
    if conditioning == "prefix":
        embeddings = embeddings_by_hand(decoder, model, memory[row, : lengths[row]], [])
        inputs, mask = {"inputs_embeds": embeddings}, torch.ones(embeddings.shape[:2]).long()
    output = model.generate(
        **inputs, attention_mask=mask, do_sample=False, pad_token_id=EOS, **options
    )[0]
    output = output[prompt.size(1) :] if "input_ids" in inputs else output
    return [token + 1 for token in output.tolist()]


def ended(tokens, most_tokens):
    """Tokens as the search gives them: one that is cut off ends too."""
    return [*tokens, EOS + 1] if len(tokens) == most_tokens and tokens[-1] != EOS + 1 else tokens


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_greedy_search_agrees_with_generate(checkpoint, conditioning):
    decoder = make_decoder(checkpoint, conditioning).eval()
    if conditioning == "prefix":
        open_gates(decoder)
    for row, hypotheses in enumerate(search(decoder, 1, 12)):
        with torch.no_grad():
            theirs = generate(decoder, checkpoint, conditioning, row, max_new_tokens=12)
        found = hypotheses[0].yseq.tolist()
        assert found == [decoder.sos, *ended(theirs, 12)]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_beam_search_finds_no_worse_than_generate(checkpoint, conditioning):
    decoder = make_decoder(checkpoint, conditioning).eval()
    if conditioning == "prefix":
        open_gates(decoder)
    _, memory, lengths = batch()

    def score(row, tokens):
        rows = slice(row, row + 1)
        tokens = torch.tensor([tokens])
        logits = decoder(tokens[:, :-1], memory[rows], lengths[rows])
        return logits.log_softmax(-1).gather(2, tokens[:, 1:, None] - 1).sum()

    for row, hypotheses in enumerate(search(decoder, BEAM, 8, 4)):
        with torch.no_grad():
            theirs = generate(
                decoder,
                checkpoint,
                conditioning,
                row,
                max_new_tokens=8,
                min_new_tokens=4,
                num_beams=BEAM,
                length_penalty=0.0,
            )
            ours = hypotheses[0].yseq.tolist()
            if len(ours) == 8 + 2:  # Cut off: its end has not been scored.
                ours.pop()
            torch.testing.assert_close(score(row, ours), torch.tensor(hypotheses[0].score))
            assert hypotheses[0].score >= score(row, [decoder.sos, *theirs]) - 1e-4


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_beam_search_equals_generate(checkpoint, conditioning, normalize):
    """Also where tokens are suppressed."""
    suppressed = (1, 5, 6, 7)
    decoder = make_decoder(checkpoint, conditioning, suppress=suppressed).eval()
    if conditioning == "prefix":
        open_gates(decoder)
    options = {"end_when_beaten": True, "length_normalization": normalize}
    for row, hypotheses in enumerate(search(decoder, BEAM, 8, **options)):
        with torch.no_grad():
            theirs = generate(
                *(decoder, checkpoint, conditioning, row),
                max_new_tokens=8,
                num_beams=BEAM,
                length_penalty=float(normalize),
                suppress_tokens=list(suppressed),
            )
        assert hypotheses[0].yseq.tolist() == [decoder.sos, *ended(theirs, 8)]


def test_a_search_never_chooses_what_is_suppressed(checkpoint):
    decoder = make_decoder(checkpoint, "cross-attention", suppress=(BOS, 5, EOS)).eval()
    _, memory, lengths = batch()
    scores, _ = decoder.score(torch.full((3,), decoder.sos), decoder.init(memory, lengths, 1))
    never = scores.isneginf().all(0).nonzero().flatten().tolist()
    assert never == sorted({0, BOS + 1, 5 + 1})  # The end symbol is no text, but must be chosen.


def test_gates_get_the_first_gradients(checkpoint):
    decoder = make_decoder(checkpoint, "cross-attention").train()
    decoder(*batch()).square().mean().backward()
    trained = {name: p.grad for name, p in decoder.named_parameters() if p.requires_grad}
    nonzero = {name for name, gradient in trained.items() if gradient.any()}
    gates = {name for name in trained if name.endswith("gate")}
    assert len(gates) == 2 * len(decoder.cross_attention) == 4
    assert nonzero == gates


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_low_precision(checkpoint, conditioning, dtype, autocast):
    """A checkpoint in bfloat16, autocast, or both: against float32, and step by step."""
    decoder = open_gates(make_decoder(checkpoint, conditioning)).eval()
    tokens, memory, lengths = batch()
    close = {"atol": 0.3, "rtol": 0.0}  # bfloat16 has steps of 2^-5 at the logits' size of 4 to 8
    with torch.no_grad():
        exact = decoder(tokens, memory, lengths).log_softmax(dim=-1)
        decoder.backbone.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rounded = decoder(tokens, memory, lengths).float().log_softmax(dim=-1)
            torch.testing.assert_close(rounded, exact, **close)
            state = decoder.init(memory, lengths, 1)
            for step in range(tokens.size(1)):
                scores, state = decoder.score(tokens[:, step], state)
                assert scores.dtype == torch.float32
                torch.testing.assert_close(scores[:, 1:], rounded[:, step], **close)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "adapter"}, "--llama-conditioning adapter is unknown: .*cross-attention"),
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (BOS,), "conditioning": "prefix"}, "give an instruction of at least one token"),
        ({"cross_every": 0}, "--llama-cross-every 0 .* must be at least 1"),
        ({"downsample": 0}, "--llama-downsample 0: both must be at least 1"),
        ({"prompt": (BOS, TOKENS)}, "knows 60 tokens, but the prompt has 58, 60"),
        ({"eos": 0}, "the end symbol is -1: take the tokenizer of this checkpoint"),
    ],
)
def test_options_that_do_not_fit(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        make_decoder(checkpoint, **{"conditioning": "cross-attention", **options})


def test_checkpoint_of_another_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="--decoder-name .* is a checkpoint of gpt2, one of llama"):
        make_decoder(str(tmp_path), "cross-attention")


def test_more_positions_than_the_checkpoint_has(tmp_path):
    """Memory of 3 embeddings, a prompt of 3 and 4 more tokens are 10 positions."""
    path = make_checkpoint(tmp_path, positions=10)
    tokens, memory, lengths = batch(length=5)
    decoder = make_decoder(path, "prefix")
    assert decoder(tokens, memory, lengths).shape == (3, 5, TOKENS)
    message = r"11 positions .* 3 of the encoder's output .* has 10: raise --llama-downsample, 3"
    with pytest.raises(ValueError, match=message):
        decoder(batch(length=6)[0], memory, lengths)
    states = [decoder.init(memory[:1], lengths[:1], 1), decoder.init(memory, lengths, 1)]
    for step in range(5):
        for rows, state in zip((1, 3), states, strict=True):
            decoder.score(tokens[:rows, step], state)
    with pytest.raises(ValueError, match=message):
        decoder.score(tokens[:1, 0], states[0])
    # The longest has no position left: it is over, while the others have room for one more.
    together, _ = decoder.score(tokens[:, 0], states[1])
    state = decoder.init(memory[1:], lengths[1:], 1)
    for step in (0, 1, 2, 3, 4, 0):
        scores, state = decoder.score(tokens[1:, step], state)
    torch.testing.assert_close(together[1:], scores)
    with pytest.raises(ValueError, match="leave the utterance out"):
        decoder.init(memory.repeat(1, 4, 1), 4 * lengths, 1)


def test_length_of_a_text(tmp_path):
    decoder = make_decoder(make_checkpoint(tmp_path, positions=10), "cross-attention")
    assert decoder.max_tokens(30) == 7
    _, memory, lengths = batch()
    assert decoder(batch(length=8)[0], memory, lengths).shape == (3, 8, TOKENS)
    with pytest.raises(ValueError, match="11 positions are needed, 3 of the prompt"):
        decoder(batch(length=9)[0], memory, lengths)
