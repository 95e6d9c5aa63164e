"""QLoRA for any module: linear layers in 4 bits, and small trained adapters beside them.

Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023; Hu et al., LoRA:
Low-Rank Adaptation of Large Language Models, 2022. bitsandbytes quantises and peft adapts; they
are imported when they are needed, and what uses neither can do without them.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from re import escape
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from espnet.errors import first_line
from espnet.nets.adaptation import INSTALLED, AdaptationOptions, install_command
from espnet.nets.decoders import DECODERS
from espnet.nets.encoders import TABLES
from espnet.nets.pytorch_backend.nets_utils import has_bfloat16

logger = logging.getLogger(__name__)

USUAL = AdaptationOptions()

# Their errors would go straight into the scores, and some share their weights with an embedding.
OUTPUT_LAYERS = ("lm_head", "proj_out", "ctc_lo", "output_layer")

# The linear layers of attention and feed-forward blocks, by the `model_type` of transformers.
LORA_TARGETS = {
    model_type: row.lora_targets
    for table in (*TABLES.values(), DECODERS)
    for row in table.values()
    for model_type in row.model_types
}
# Those of the project's own Conformer and Transformer blocks.
BLOCK_TARGETS = ("linear_q", "linear_k", "linear_v", "linear_pos", "linear_out", "w_1", "w_2")
BLOCK = 64  # weights that share a scale
SHOWN = 12  # names of layers that an error lists


@dataclass(frozen=True)
class ParameterReport:
    """What a module's parameters are and take.

    Attributes:
        total: Their number; one in 4 bits counts as one.
        trainable: How many of them are trained.
        bytes: Their memory, with that of the tables of 4-bit weights.
    """

    total: int
    trainable: int
    bytes: int

    def __str__(self) -> str:
        share = self.trainable / max(1, self.total)
        return (
            f"{self.total:,} parameters, {self.trainable:,} trained ({share:.2%}), "
            f"{self.bytes / 2**20:,.1f} MiB"
        )


def adapt_parts(parts: Mapping[str, nn.Module], options: AdaptationOptions) -> None:
    """Adapts parts of a recogniser in place.

    Args:
        parts: Modules by name; everything in them is frozen but for the adapters.
        options: How to adapt them. A target may be in some of the parts only.

    Raises:
        ValueError: As for `apply_qlora` and `add_lora`, or if a target is in none of the parts.
    """
    layers = {name: _adaptable_layers(part) for name, part in parts.items()}
    everywhere = sum(layers.values(), [])
    for target in options.lora_targets or ():
        if not any(_matches(layer, target) for layer in everywhere):
            raise _no_target([target], " and ".join(parts), everywhere)
    for name, part in parts.items():
        adapt = apply_qlora if options.use_qlora else add_lora
        adapt(
            part,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            dropout=options.lora_dropout,
            targets=_targets_in(layers[name], options.lora_targets),
        )
        logger.info("%s with adapters: %s", name, parameter_report(part))


def _targets_in(layers: list[str], targets: Iterable[str] | None) -> list[str] | None:
    """Those of the targets that a part has; all if it has none, which is an error then."""
    if targets is None:
        return None
    return [t for t in targets if any(_matches(name, t) for name in layers)] or list(targets)


def apply_qlora(
    module: nn.Module,
    *,
    rank: int = USUAL.lora_rank,
    alpha: float = USUAL.lora_alpha,
    dropout: float = USUAL.lora_dropout,
    targets: Iterable[str] | None = None,
    skip: Iterable[str] = (),
) -> list[str]:
    """Quantises a module in place and adds adapters.

    Args:
        module: As for `add_lora`.
        rank: As for `add_lora`.
        alpha: As for `add_lora`.
        dropout: As for `add_lora`.
        targets: As for `add_lora`.
        skip: As for `quantize_4bit`.

    Returns:
        The names of the linear layers that keep their precision.

    Raises:
        ValueError: As for `quantize_4bit` and `add_lora`; nothing is changed then.
    """
    config = _lora_config(module, rank, alpha, dropout, targets)  # Fails before the long work.
    left_alone = quantize_4bit(module, skip=skip)
    _inject(module, config)
    return left_alone


def quantize_4bit(module: nn.Module, *, skip: Iterable[str] = ()) -> list[str]:
    """Puts the weights of a module's linear layers into 4 bits, in place, and freezes them.

    They become NF4 in blocks of 64, whose scales become 8 bits. One layer is done after the
    other on the device where it is, so that there is never a second copy of the whole. Layers
    compute in bfloat16 on a GPU and in float32 on a CPU; the type of what they take and give
    stays. Tables of the quantisation take 1 kB more a layer, which is little from a width of 256
    on. They are in the state dict, which loads into a module that is quantised in the same way.

    Left alone are output layers, layers that share their weight (tied embeddings), those whose
    input is no multiple of 64, and what is not a plain `nn.Linear`.

    Args:
        module: Module with linear layers in it.
        skip: Names of further layers to leave alone; patterns as for `add_lora`.

    Returns:
        The names of the linear layers that keep their precision.

    Raises:
        ValueError: If bitsandbytes is missing or does not work.
    """
    bitsandbytes = load_package("bitsandbytes")
    names, left_alone = _choose_layers(module, skip)
    for name in names:
        module.set_submodule(name, _quantised(module.get_submodule(name), bitsandbytes))
    done = sum(_is_quantised(layer) for _, layer in _linear_layers(module))
    logger.info(
        "%d linear layers of %s are in 4 bits; left alone: %s",
        *(done, type(module).__name__, ", ".join(left_alone) or "none"),
    )
    return left_alone


def check_quantisation(device: torch.device) -> None:
    """Makes sure that weights can be quantised.

    Args:
        device: Where.

    Raises:
        ValueError: If bitsandbytes is missing or does not work there.
    """
    trial = nn.Linear(BLOCK, BLOCK, bias=False, device="meta")  # Another would draw random numbers.
    trial.weight = nn.Parameter(torch.zeros(BLOCK, BLOCK, device=device))
    _quantised(trial, load_package("bitsandbytes"))


def loading_config(module: nn.Module, *, skip: Iterable[str] = ()) -> BitsAndBytesConfig:
    """What makes transformers quantise the weights of a checkpoint one by one as it loads them.

    The model is then as `quantize_4bit` would have made it, once `finish_loading` has seen it.

    Args:
        module: The model without its weights, on the device "meta".
        skip: As for `quantize_4bit`.

    Returns:
        The `quantization_config` of `from_pretrained`.

    Raises:
        ValueError: If bitsandbytes is missing or does not work.
    """
    load_package("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        # It finds names by regular expressions; without any it would choose layers of its own.
        llm_int8_skip_modules=[escape(name) for name in _choose_layers(module, skip)[1]] or ["$"],
    )


def finish_loading(module: nn.Module, dtype: torch.dtype) -> None:
    """Makes a model that was quantised while loading equal to one that `quantize_4bit` quantised.

    Args:
        module: Model, loaded in float32 with `loading_config`: so the codes of its weights do not
            depend on the precision that is chosen here.
        dtype: Precision of what is not in 4 bits, and of the weights once they are merged.
    """
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = dtype
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for _, layer in _linear_layers(module):
        if _is_quantised(layer):
            _add_hooks(layer)


def _choose_layers(module: nn.Module, skip: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of the linear layers that are to be quantised, and of those to be left alone."""
    adaptable = set(_adaptable_layers(module))
    names, left_alone = [], []
    for name, layer in _linear_layers(module):
        if _is_quantised(layer):
            continue
        # Subclasses may read the weight themselves, as PyTorch's own attention does. bitsandbytes
        # computes wrong results on some CPUs if blocks go over the ends of rows.
        fits = type(layer) is nn.Linear and layer.in_features % BLOCK == 0
        keep = name not in adaptable or any(_matches(name, pattern) for pattern in skip)
        (names if fits and not keep else left_alone).append(name)
    return names, left_alone


def _adaptable_layers(module: nn.Module) -> list[str]:
    """Names of the linear layers but output layers, and those that share their weight.

    What is merged into an output layer would change the embeddings that it is tied to.
    """
    uses = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    return [
        name
        for name, layer in _linear_layers(module)
        if uses[id(layer.weight)] == 1 and not any(_matches(name, o) for o in OUTPUT_LAYERS)
    ]


def add_lora(
    module: nn.Module,
    *,
    rank: int = USUAL.lora_rank,
    alpha: float = USUAL.lora_alpha,
    dropout: float = USUAL.lora_dropout,
    targets: Iterable[str] | None = None,
) -> None:
    """Adds adapters to linear layers, quantised or not, and freezes all else in the module.

    At first they change no output. Give the part that is to be adapted, such as the model of
    transformers in a front-end or decoder: new layers around it are then trained as before. The
    adapters get the module's mode, training or eval: set that of the whole model again afterwards.

    Args:
        module: Module with linear layers in it.
        rank: Rank of the updates.
        alpha: Updates are scaled by alpha / rank.
        dropout: Dropout on what the adapters take.
        targets: Names of layers, whole or their last parts, in which `*` stands for anything:
            `q_proj`, `layers.0.*`. None: all of attention and feed-forward blocks, as the tables
            of encoders and decoders and `BLOCK_TARGETS` name them. Output layers get none.

    Raises:
        ValueError: If peft is missing or does not work, a number is out of range, a target matches
            no linear layer, or there are adapters already.
    """
    _inject(module, _lora_config(module, rank, alpha, dropout, targets))


def merge_lora(module: nn.Module) -> None:
    """Adds the updates of adapters to the weights, in place; only plain linear layers are left.

    Weights in 4 bits, those without adapters too, get the precision again that they had before
    they were quantised. Merged layers are frozen.

    Args:
        module: Module that `apply_qlora` or `add_lora` adapted, in any precision.

    Raises:
        ValueError: If peft, or bitsandbytes for a quantised module, is missing or does not work.
    """
    adapted = load_package("peft").tuners.lora.LoraLayer

    def merge(layer: nn.Module) -> nn.Linear:
        linear = _plain(layer.base_layer)
        for name in layer.active_adapters:
            up, down = layer.lora_B[name].weight.float(), layer.lora_A[name].weight.float()
            update = layer.scaling[name] * (up @ down).detach()
            linear.weight.data = (linear.weight.float() + update).to(linear.weight.dtype)
        return linear

    _replace(module, lambda layer: isinstance(layer, adapted), merge)
    _replace(module, _is_quantised, _plain)


def adapter_names(module: nn.Module) -> set[str]:
    """Names of the adapters' weights in a module's state dict."""
    return {name for name, _ in module.named_parameters() if ".lora_" in name}


def to_adapted_names(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives the weights of layers that have adapters by now their names beside them.

    Args:
        module: Module, adapted or not.
        state: Weights by the names that they have with or without adapters.

    Returns:
        Weights by the names in the module's state dict.
    """
    layers = [name for name, layer in module.named_modules() if hasattr(layer, "base_layer")]
    kinds = ("weight", "bias")
    names = {f"{name}.{kind}": f"{name}.base_layer.{kind}" for name in layers for kind in kinds}
    return {names.get(name, name): value for name, value in state.items()}


def plain_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Shapes that the weights in 4 bits had before, by their names in the state dict."""
    return {
        f"{name}.weight": layer.weight.quant_state.shape
        for name, layer in _linear_layers(module)
        if _is_quantised(layer)
    }


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that an optimiser is to train."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def parameter_report(module: nn.Module) -> ParameterReport:
    """Counts parameters and their memory; what is shared counts once, a 4-bit weight as it is."""
    total = size = 0
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else state.shape.numel()
        tensors = [parameter, *([] if state is None else _tables(state))]
        size += sum(tensor.nbytes for tensor in tensors)
    trainable = sum(parameter.numel() for parameter in trainable_parameters(module))
    return ParameterReport(total=total, trainable=trainable, bytes=size)


def load_package(package: str) -> ModuleType:
    """Imports a package that only adapters and the optimiser in 8 bits need.

    Args:
        package: `bitsandbytes` or `peft`.

    Raises:
        ValueError: If it cannot be imported; one line, with the command that installs it.
    """
    if package not in INSTALLED:
        raise ValueError(_remedy(package, "it is not installed"))
    # On some CPUs it recommends a kernel for weights in a form that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return import_module(package)
    except Exception as error:  # A package that does not fit its libraries raises what it likes.
        raise ValueError(_remedy(package, f"it cannot be imported ({first_line(error)})")) from None


def _remedy(package: str, problem: str) -> str:
    return f"QLoRA needs {package}, but {problem}: {install_command(package)}"


def _linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers in a module by name, without the module itself."""
    for name, layer in module.named_modules():
        if name and isinstance(layer, nn.Linear):
            yield name, layer


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern stands for a layer's whole name, or for its last parts."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _replace(
    module: nn.Module,
    chosen: Callable[[nn.Module], bool],
    make: Callable[[nn.Module], nn.Module],
) -> None:
    """Replaces layers one by one; no list holds on to those that are gone."""
    for name in [name for name, layer in module.named_modules() if name and chosen(layer)]:
        module.set_submodule(name, make(module.get_submodule(name)))


def _quantised(linear: nn.Linear, bitsandbytes: ModuleType) -> nn.Linear:
    """A layer of bitsandbytes with the weight of another, in 4 bits, and its very bias."""
    quantised = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        compute_dtype=torch.float32,
        quant_type="nf4",
        device="meta",
    )
    weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach(),
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=True,
        quant_type="nf4",
    )
    try:
        quantised.weight = weight.to(linear.weight.device)  # This is what quantises it.
    except Exception as error:  # Its library for this device may be missing, or not fit.
        problem = f"it does not work on {linear.weight.device} ({first_line(error)})"
        raise ValueError(_remedy("bitsandbytes", problem)) from None
    quantised.bias = linear.bias
    _add_hooks(quantised)
    return quantised.train(linear.training)


def _add_hooks(layer: nn.Linear) -> None:
    """Makes a layer of bitsandbytes do what this project needs of it."""
    # On some CPUs it would store weights anew in eval mode, in a form that cannot be trained with.
    layer.support_avx512bf16_for_cpu = False
    layer.register_forward_pre_hook(_choose_compute_type)
    layer.register_forward_hook(_restore_bias)
    layer.register_load_state_dict_pre_hook(_load_weight)


def _choose_compute_type(layer: nn.Linear, inputs: tuple[Tensor]) -> None:
    """A model is often quantised on the CPU and then moved."""
    half = inputs[0].is_cuda and has_bfloat16()
    layer.compute_dtype = torch.bfloat16 if half else torch.float32
    layer.own_bias = None if layer.bias is None else layer.bias.data


def _restore_bias(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG001
    """Undoes that bitsandbytes rounds the bias, which is no copy, to the type it computes in."""
    if layer.own_bias is not None:
        layer.bias.data = layer.own_bias


def _load_weight(layer: nn.Linear, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Takes tables of the quantisation from a state dict, or quantises a weight that has none.

    PyTorch then loads the weight in 4 bits itself.
    """
    name = f"{prefix}weight"
    weight = state_dict.get(name)
    if weight is not None and weight.is_floating_point():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.to(layer.weight.device, layer.weight.quant_state.dtype))
        quantised = _quantised(plain, load_package("bitsandbytes")).weight
        state_dict[name], layer.weight.quant_state = quantised.data, quantised.quant_state
        return
    tables = [entry for entry in state_dict if entry.startswith(f"{name}.")]
    if found := {entry.removeprefix(f"{name}."): state_dict.pop(entry) for entry in tables}:
        state = layer.weight.quant_state
        layer.weight.quant_state = type(state).from_dict(found, device=layer.weight.device)


def _is_quantised(layer: nn.Module) -> bool:
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def _tables(state: Any) -> list[Tensor]:
    """The tensors of bitsandbytes' state of a doubly quantised weight."""
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def _plain(layer: nn.Linear) -> nn.Linear:
    """A plain linear layer, frozen, in the precision from before a quantisation."""
    weight = layer.weight.detach()
    if _is_quantised(layer):
        dequantise = load_package("bitsandbytes").functional.dequantize_4bit
        weight = dequantise(layer.weight.data, layer.weight.quant_state)
    linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(weight.dtype), requires_grad=False)
    return linear.train(layer.training)


def _lora_config(
    module: nn.Module,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Iterable[str] | None,
) -> Any:
    """Checks the arguments of `add_lora`, and makes peft's configuration of them."""
    peft = load_package("peft")
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(
            f"LoRA rank {rank}, alpha {alpha}, dropout {dropout}: a rank of at least 1, a positive "
            "alpha and a dropout in [0, 1) are expected"
        )
    if any(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in module.modules()):
        raise ValueError(f"{type(module).__name__} has LoRA adapters already: merge them first")
    names = _target_names(module, targets)
    return peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="|".join(rf"0\.{escape(name)}" for name in names),  # 0: see `_inject`.
    )


def _target_names(module: nn.Module, targets: Iterable[str] | None) -> list[str]:
    """The names of the linear layers that targets stand for."""
    layers = _adaptable_layers(module)
    patterns = _default_targets(module) if targets is None else tuple(targets)
    matched = {pattern: [n for n in layers if _matches(n, pattern)] for pattern in patterns}
    # A checkpoint need not have all that its kind may have, but what is asked for must be there.
    vain = [pattern for pattern, names in matched.items() if not names]
    if not any(matched.values()) or (vain and targets is not None):
        raise _no_target(vain, type(module).__name__, layers)
    return [name for name in layers if any(name in names for names in matched.values())]


def _no_target(vain: list[str], what: str, layers: list[str]) -> ValueError:
    last_parts = dict.fromkeys(name.rpartition(".")[2] for name in layers)
    return ValueError(
        f"LoRA target {', '.join(vain) or 'none'} matches no linear layer of {what}: choose among "
        f"{', '.join([*last_parts][:SHOWN]) or 'none'}"
    )


def _default_targets(module: nn.Module) -> tuple[str, ...]:
    """Targets of the models of transformers in a module, else those of the project's blocks."""
    configs = [getattr(part, "config", None) for part in module.modules()]
    kinds = {getattr(config, "model_type", None) for config in configs}
    return tuple(t for kind in LORA_TARGETS if kind in kinds for t in LORA_TARGETS[kind]) or (
        BLOCK_TARGETS
    )


def _inject(module: nn.Module, config: Any) -> None:
    """Lets peft put adapters into a module.

    peft looks at the outermost module for what it is and leaves its notes there, so it gets one
    around ours. Without the mark it would take layers in 4 bits for plain ones, which it still
    tells apart with it.
    """
    outermost = nn.Sequential(module)
    outermost.is_loaded_in_4bit = True
    load_package("peft").inject_adapter_in_model(config, outermost)
    for name, parameter in module.named_parameters():
        if ".lora_" in name:  # peft gives them the type of the weights: updates would be lost.
            parameter.data = parameter.data.float()
    module.train(module.training)
