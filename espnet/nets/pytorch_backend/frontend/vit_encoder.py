"""Video front-end: a vision Transformer (ViT) on each frame."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import ViTModel

from espnet.nets.encoders import VISION_ENCODERS
from espnet.nets.pytorch_backend.frontend.image_encoder import ImageEncoder, image_statistics
from espnet.nets.pytorch_backend.pretrained import load_pretrained

PUBLISHED_MEAN, PUBLISHED_STD = [0.5] * 3, [0.5] * 3


class ViTEncoder(ImageEncoder):
    """ViT checkpoint on each frame, at a size near the mouth crop's.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, in transformers'
    implementation. Its position embeddings are interpolated to the size of the frames.

    Args:
        name: Hub id, or a folder as `save_pretrained` leaves it.
        quantize: Whether its linear layers go into 4 bits while they are loaded.
        **options: `freeze`, `encoder_layer`, `pooling` and so on, as for `ImageEncoder` and
            `PretrainedEncoder`.

    Raises:
        ValueError: If the checkpoint cannot be loaded, or an option does not fit it.
    """

    def __init__(self, name: str, *, quantize: bool = False, **options: Any) -> None:
        super().__init__(
            load_pretrained(
                ViTModel,
                name,
                VISION_ENCODERS["vit"].model_types,
                flag="--vision-encoder-name",
                quantize=quantize,
                add_pooling_layer=False,
            ),
            **image_statistics(name, (PUBLISHED_MEAN, PUBLISHED_STD)),
            **options,
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The Transformer layers of the backbone."""
        return self.backbone.layers

    def final_norm(self) -> nn.Module:
        """The layer norm after the last layer."""
        return self.backbone.layernorm

    def hidden_states(self, images: Tensor) -> Iterator[Tensor]:
        """The input of the first layer, and the output of each layer.

        Args:
            images: (N, 3, H, W).

        Yields:
            Hidden states, (N, 1 + patches, D) each, the class token first.
        """
        state = self.backbone.embeddings(images, interpolate_pos_encoding=True)
        yield state
        for layer in self.layers:
            state = layer(state, None)
            yield state
