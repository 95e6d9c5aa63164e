"""What `DecoderInterface` promises, of every decoder that is registered."""

import pytest
import torch
from torch.nn import functional as F

from espnet.nets.decoders import DECODERS, Vocabulary
from espnet.nets.model_options import ModelOptions
from espnet.nets.pytorch_backend.decoder.interface import DecoderInterface
from espnet.nets.pytorch_backend.e2e_asr_conformer import build_decoder
from espnet.nets.pytorch_backend.encoded import Video
from espnet.option_tree import from_flat
from espnet.utils.building import build_text_transform

MEMORY_DIM, VIDEO_DIM, BEAM = 16, 6, 3
FRAMES, TOKENS = (9, 4, 7), (6, 4, 6)  # of three utterances
SIZES = {"aheads": 2, "dunits": 32, "dlayers": 2, "dropout_rate": 0.0}
OWN = Vocabulary(odim=11, sos=10, eos=10)  # of decoders without a checkpoint
# A case of each decoder, and of what some of them can besides.
CASES = {
    **{name: {"decoder": name} for name in DECODERS},
    "llama_twice": {"decoder": "llama", "llama_cross_every": 2},
    "llama_prefix": {"decoder": "llama", "llama_conditioning": "prefix"},
    "whisper_video": {"decoder": "whisper", "video_dim": VIDEO_DIM},
    "whisper_short_prompt": {"decoder": "whisper", "prompt_tokens": 1},
}
PRETRAINED = [name for name, case in CASES.items() if DECODERS[case["decoder"]].pretrained]
every_decoder = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def make(tiny_checkpoints):
    """Builds a small decoder and its vocabulary; gates are open."""

    def decoder(name, **options):
        options = {"modality": "audio", **SIZES, **CASES[name], **options}
        video_dim, prompt_tokens = options.pop("video_dim", 0), options.pop("prompt_tokens", 99)
        vocabulary = OWN
        if name in PRETRAINED:
            options["decoder_name"] = str(tiny_checkpoints / options["decoder"])
        options = from_flat(ModelOptions, options).resolved()
        if name in PRETRAINED:
            transform = build_text_transform(options.decoder, None)
            vocabulary = Vocabulary(
                odim=transform.odim,
                sos=transform.sos,
                eos=transform.eos,
                prompt=transform.prompt[-prompt_tokens:],
                special_tokens=transform.special_tokens,
            )
        torch.manual_seed(0)
        made = build_decoder(options, vocabulary, memory_dim=MEMORY_DIM, video_dim=video_dim)
        for key, parameter in made.named_parameters():
            if key.endswith("gate"):
                parameter.data.fill_(0.5)
        return made, vocabulary

    return decoder


def batch(name, vocabulary, seed=1):
    """Token ids from sos on, memory, lengths, and video if there is any; padding is loud."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocabulary.odim, (3, max(TOKENS)), generator=generator)
    tokens[:, 0] = vocabulary.sos
    memory = torch.randn(3, max(FRAMES) + 2, MEMORY_DIM, generator=generator)
    beside = {}
    if "video_dim" in CASES[name]:
        video = torch.randn(3, max(FRAMES), VIDEO_DIM, generator=generator)
        beside = {"video": Video(video, torch.tensor(FRAMES) - 1)}
    for row in range(3):
        tokens[row, TOKENS[row] :] = vocabulary.eos
        memory[row, FRAMES[row] :] = 9.0
        for video, lengths in beside.values():
            video[row, lengths[row] :] = 9.0
    return tokens, memory, torch.tensor(FRAMES), beside


def rows_of(beside, rows):
    """What is beside the memory of some utterances, cut to the longest."""
    return {
        name: Video(features[rows, : lengths[rows].max()], lengths[rows])
        for name, (features, lengths) in beside.items()
    }


@every_decoder
@torch.no_grad()
def test_attributes_and_shapes(make, name):
    decoder, vocabulary = make(name)
    assert isinstance(decoder, DecoderInterface)
    assert decoder.odim == vocabulary.odim
    assert hasattr(decoder, "backbone") == (name in PRETRAINED)
    assert decoder.max_tokens(max(FRAMES)) >= max(TOKENS)
    tokens, memory, lengths, beside = batch(name, vocabulary)
    features = decoder.eval().features(tokens, memory, lengths, **beside)
    assert features.shape[:2] == tokens.shape
    logits = decoder(tokens, memory, lengths, **beside)
    assert logits.shape == (*tokens.shape, decoder.odim - decoder.first_token)
    torch.testing.assert_close(decoder.logits(features[:, 2]), logits[:, 2])


@every_decoder
@torch.no_grad()
def test_neither_padding_nor_later_tokens_change_anything(make, name):
    decoder, vocabulary = make(name)
    tokens, memory, lengths, beside = batch(name, vocabulary)
    together = decoder.eval()(tokens, memory, lengths, **beside)
    for row, (frames, length) in enumerate(zip(FRAMES, TOKENS, strict=True)):
        rows = slice(row, row + 1)
        one = memory[rows, :frames], lengths[rows]
        for number in (length, 2):
            alone = decoder(tokens[rows, :number], *one, **rows_of(beside, rows))
            torch.testing.assert_close(together[rows, :number], alone, atol=1e-5, rtol=1e-4)
    other = decoder(tokens, memory.flip(2), lengths, **beside)
    assert ((other - together).abs().amax(dim=2) > 1e-4).all()  # It does attend to the memory.


@every_decoder
@torch.no_grad()
def test_steps_of_a_search_agree_with_whole_sequences(make, name):
    """Beams are reordered at every step, and utterances leave, the second first."""
    decoder, vocabulary = make(name)
    _, memory, lengths, beside = batch(name, vocabulary)
    generator = torch.Generator().manual_seed(3)
    prefixes = torch.full((3 * BEAM, 1), vocabulary.sos)
    utterances = torch.arange(3).repeat_interleave(BEAM)
    state = decoder.eval().init(memory, lengths, BEAM, **beside)
    for step in range(5):
        scores, state = decoder.score(prefixes[:, -1], state)
        assert scores.dtype == torch.float32
        assert scores.shape == (len(prefixes), decoder.odim)
        seen = memory[utterances], lengths[utterances]
        expected = decoder(prefixes, *seen, **rows_of(beside, utterances))[:, -1].log_softmax(-1)
        expected = F.pad(expected, (decoder.first_token, 0), value=-torch.inf)
        # What no text holds is out of the question, the same in each hypothesis.
        never = scores.isneginf().all(dim=0)
        assert not never[vocabulary.eos] or step == 0
        assert never.sum() < decoder.odim / 2
        expected = expected.masked_fill(never, -torch.inf)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
        index = torch.arange(len(prefixes)).view(-1, BEAM)
        index = index.gather(1, torch.randint(BEAM, index.shape, generator=generator))
        left = {1: [0, 2], 3: [0]}.get(step, slice(None))
        index = index[left].flatten()
        state = decoder.reorder(state, index)
        tokens = torch.randint(1, decoder.odim, (len(index), 1), generator=generator)
        prefixes, utterances = torch.cat([prefixes[index], tokens], dim=1), utterances[index]
    assert utterances.unique().tolist() == [0]


@every_decoder
@torch.no_grad()
def test_hypotheses_that_are_over_may_hold_blanks(make, name):
    decoder, vocabulary = make(name)
    _, memory, lengths, beside = batch(name, vocabulary)
    tokens = torch.full((3,), vocabulary.sos)
    decoder.eval()
    expected, _ = decoder.score(tokens, decoder.init(memory, lengths, 1, **beside))
    tokens[0] = 0
    scores, _ = decoder.score(tokens, decoder.init(memory, lengths, 1, **beside))
    torch.testing.assert_close(scores[1:], expected[1:])


@pytest.mark.parametrize("freeze", [True, False])
@every_decoder
def test_gradients_reach_memory_and_all_that_is_trained(make, name, freeze):
    freeze = freeze and name in PRETRAINED
    options = {"freeze_decoder": freeze} if name in PRETRAINED else {}
    decoder, vocabulary = make(name, **options)
    decoder.train()
    for key, module in decoder.named_modules():
        assert module.training != (freeze and key.startswith("backbone")), key
    tokens, memory, lengths, beside = batch(name, vocabulary)
    inputs = [(memory.requires_grad_(), lengths)]
    inputs += [(video.requires_grad_(), frames) for video, frames in beside.values()]
    decoder(tokens, memory, lengths, **beside).square().mean().backward()
    for key, parameter in decoder.named_parameters():
        assert parameter.requires_grad != (freeze and key.startswith("backbone.")), key
        assert (parameter.grad is not None) == parameter.requires_grad, key
        # A bias of keys adds the same to all scores of a query, which the softmax takes away.
        idle = not parameter.requires_grad or key.endswith("linear_k.bias")
        assert idle or (parameter.grad.isfinite().all() and parameter.grad.any()), key
    for x, frames in inputs:
        real = torch.arange(x.size(1)) < frames.unsqueeze(1)
        assert (x.grad != 0).any(dim=2).equal(real)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("name", PRETRAINED)
def test_gradient_checkpointing_gives_the_same_gradients(make, name, freeze):
    gradients, calls = [], []
    for again in (False, True):
        options = {"freeze_decoder": freeze, "dropout_rate": 0.3}
        decoder, vocabulary = make(name, gradient_checkpointing=again, **options)
        seen = []
        for module in decoder.train().backbone.modules():
            module.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        tokens, memory, lengths, beside = batch(name, vocabulary)
        torch.manual_seed(4)  # of the dropout
        decoder(tokens, memory.requires_grad_(), lengths, **beside).square().mean().backward()
        trained = {key: p.grad for key, p in decoder.named_parameters() if p.requires_grad}
        gradients.append({**trained, "memory": memory.grad})
        calls.append(len(seen))
    assert calls[1] > 1.5 * calls[0]
    torch.testing.assert_close(gradients[0], gradients[1])
