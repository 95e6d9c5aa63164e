"""Video front-end: the vision half of CLIP on each frame."""

from collections.abc import Iterator

from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from espnet.nets.encoders import VISION_ENCODERS
from espnet.nets.pytorch_backend.frontend.image_encoder import ImageEncoder
from espnet.nets.pytorch_backend.pretrained import load_pretrained


class CLIPEncoder(ImageEncoder):
    """Vision model of a CLIP checkpoint on each frame, at a size near the mouth crop's.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
    ICML 2021, in transformers' implementation. Its position embeddings are interpolated to the
    size of the frames; patches, like the class token, go through its last layer norm.
    """

    mean_and_std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    def load_backbone(self, name: str, *, quantize: bool) -> CLIPVisionModel:
        """Loads the checkpoint of a CLIP, or its vision model's. See `PretrainedEncoder`."""
        return load_pretrained(
            CLIPVisionModel,
            name,
            VISION_ENCODERS["clip"].model_types,
            flag="--vision-encoder-name",
            quantize=quantize,
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The Transformer layers of the backbone."""
        return self.backbone.encoder.layers

    def final_norm(self) -> nn.Module:
        """The layer norm after the last layer."""
        return self.backbone.post_layernorm

    def hidden_states(self, images: Tensor) -> Iterator[Tensor]:
        """Gives all hidden states of images, (N, 3, H, W). See `ImageEncoder`."""
        embedded = self.backbone.embeddings(images, interpolate_pos_encoding=True)
        state = self.backbone.pre_layrnorm(embedded)
        yield state
        for layer in self.layers:
            state = layer(state, None)
            yield state
