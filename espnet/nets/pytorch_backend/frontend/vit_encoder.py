"""Video front-end: a vision Transformer (ViT) on each frame."""

from collections.abc import Iterator

from torch import Tensor, nn
from transformers import ViTModel

from espnet.nets.encoders import VISION_ENCODERS
from espnet.nets.pytorch_backend.frontend.image_encoder import ImageEncoder
from espnet.nets.pytorch_backend.pretrained import load_pretrained


class ViTEncoder(ImageEncoder):
    """ViT checkpoint on each frame, at a size near the mouth crop's.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, in transformers'
    implementation. Its position embeddings are interpolated to the size of the frames.
    """

    def load_backbone(self, name: str, *, quantize: bool) -> ViTModel:
        """Loads the checkpoint without its head. See `PretrainedEncoder`."""
        return load_pretrained(
            ViTModel,
            name,
            VISION_ENCODERS["vit"].model_types,
            flag="--vision-encoder-name",
            quantize=quantize,
            add_pooling_layer=False,
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The Transformer layers of the backbone."""
        return self.backbone.layers

    def final_norm(self) -> nn.Module:
        """The layer norm after the last layer."""
        return self.backbone.layernorm

    def hidden_states(self, images: Tensor) -> Iterator[Tensor]:
        """Gives all hidden states of images, (N, 3, H, W). See `ImageEncoder`."""
        state = self.backbone.embeddings(images, interpolate_pos_encoding=True)
        yield state
        for layer in self.layers:
            state = layer(state, None)
            yield state
