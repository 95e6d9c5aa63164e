"""Video front-end: the vision half of CLIP on each frame."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from espnet.nets.encoders import VISION_ENCODERS
from espnet.nets.pytorch_backend.frontend.image_encoder import ImageEncoder, image_statistics
from espnet.nets.pytorch_backend.pretrained import load_pretrained


class CLIPEncoder(ImageEncoder):
    """Vision model of a CLIP checkpoint on each frame, at a size near the mouth crop's.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
    ICML 2021, in transformers' implementation. Its position embeddings are interpolated to the
    size of the frames; patches, like the class token, go through its last layer norm.

    Args:
        name: Hub id, or a folder as `save_pretrained` leaves it, of a whole CLIP or its vision
            model alone.
        quantize: Whether its linear layers go into 4 bits while they are loaded.
        **options: `freeze`, `encoder_layer`, `pooling` and so on, as for `ImageEncoder` and
            `PretrainedEncoder`.

    Raises:
        ValueError: If the checkpoint cannot be loaded, or an option does not fit it.
    """

    def __init__(self, name: str, *, quantize: bool = False, **options: Any) -> None:
        super().__init__(
            load_pretrained(
                CLIPVisionModel,
                name,
                VISION_ENCODERS["clip"].model_types,
                flag="--vision-encoder-name",
                quantize=quantize,
            ),
            **image_statistics(name, (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)),
            **options,
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The Transformer layers of the backbone."""
        return self.backbone.encoder.layers

    def final_norm(self) -> nn.Module:
        """The layer norm after the last layer."""
        return self.backbone.post_layernorm

    def hidden_states(self, images: Tensor) -> Iterator[Tensor]:
        """The input of the first layer, and the output of each layer.

        Args:
            images: (N, 3, H, W).

        Yields:
            Hidden states, (N, 1 + patches, D) each, the class token first.
        """
        embedded = self.backbone.embeddings(images, interpolate_pos_encoding=True)
        state = self.backbone.pre_layrnorm(embedded)
        yield state
        for layer in self.layers:
            state = layer(state, None)
            yield state
