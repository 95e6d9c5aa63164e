"""`--decoder llama`: LLaMA, or another causal language model that is built like it."""

from espnet.nets.pytorch_backend.decoder.causal_lm_decoder import CausalLMDecoder


class LLaMADecoder(CausalLMDecoder):
    """A `CausalLMDecoder` by the name that runs and programs know it by."""
