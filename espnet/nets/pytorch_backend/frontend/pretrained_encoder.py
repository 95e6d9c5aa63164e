"""What the pretrained front-ends share: freezing, and the choice of a hidden layer."""

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from espnet.nets.pytorch_backend.frontend.interface import FrontendInterface


class PretrainedEncoder(FrontendInterface, abstract=True):
    """A transformers model with its layers cut to those that are used, frozen or trained.

    Args:
        name: Hub id of its checkpoint, or a folder as `save_pretrained` leaves it.
        quantize: Whether its linear layers go into 4 bits while they are loaded.
        freeze: Whether its weights stay as they are; it then stays in eval mode too.
        unfreeze_last_layers: Layers at its end that are trained nevertheless.
        encoder_layer: Hidden layer that gives the features, as transformers number them: 0 is
            the input of the first layer; -1 is the output of the whole model, the final norm
            included; `weighted` is a learned mean over all.
        gradient_checkpointing: Whether what is trained is computed again for its gradients.

    Raises:
        ValueError: If the checkpoint cannot be loaded, or has fewer layers than are asked for.
    """

    norm_ends_last_layer = False  # whether the last hidden layer has gone through the final norm

    def __init__(
        self,
        name: str,
        *,
        quantize: bool = False,
        freeze: bool = True,
        unfreeze_last_layers: int = 0,
        encoder_layer: int | str = -1,
        gradient_checkpointing: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone = self.load_backbone(name, quantize=quantize)
        self.gradient_checkpointing = gradient_checkpointing
        self.output_dim = backbone.config.hidden_size
        self.encoder_layer = encoder_layer
        number = len(self.layers)
        if encoder_layer == "weighted":
            self.layer_weights = nn.Parameter(torch.zeros(number + 1))
        elif not -1 <= encoder_layer <= number:
            raise ValueError(
                f"--encoder-layer {encoder_layer}, but {backbone.config.model_type} has {number} "
                f"layers: choose -1 to {number}, or weighted"
            )
        elif encoder_layer >= 0:
            del self.layers[encoder_layer:]
        used = len(self.layers)
        if unfreeze_last_layers > used:
            raise ValueError(
                f"--unfreeze-last-layers {unfreeze_last_layers}, but {used} layers of "
                f"{backbone.config.model_type} are in use: choose at most {used}"
            )
        if freeze:
            backbone.requires_grad_(False)
            self.layers[used - unfreeze_last_layers :].requires_grad_(True)
        if (norm := self.final_norm()) is not None:
            # Where it gives no feature, it takes no part in training.
            trained = not freeze or unfreeze_last_layers > 0
            in_last_layer = self.norm_ends_last_layer and used == number
            norm.requires_grad_(trained and (encoder_layer == -1 or in_last_layer))
        self.train()  # transformers loads in eval mode

    @abstractmethod
    def load_backbone(self, name: str, *, quantize: bool) -> PreTrainedModel:
        """Loads the checkpoint; arguments as for the class."""

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The Transformer layers of the backbone."""

    def final_norm(self) -> nn.Module | None:
        """The norm after the last layer; None for a backbone that has none."""
        return None

    @property
    def trains_backbone(self) -> bool:
        """Whether any weight of the backbone is trained."""
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def choose(self, states: Iterator[Tensor]) -> Tensor:
        """Makes the features of the hidden layers.

        Args:
            states: The input of the first layer and the output of each, (..., D) each.

        Returns:
            Features, (..., D).
        """
        if self.encoder_layer == "weighted":
            weights = self.layer_weights.softmax(dim=0)
            return sum(weight * state for weight, state in zip(weights, states, strict=True))
        last = deque(states, maxlen=1).pop()
        norm = None if self.norm_ends_last_layer else self.final_norm()
        return norm(last) if norm is not None and self.encoder_layer == -1 else last
