"""A pretended device, to find on the CPU where the host would wait for a real one.

Its tensors are wrappers of tensors on the CPU, so every value is real. As on CUDA, a tensor of the
device and one of the host do not mix, unless that has no axes. What would make the host wait is
noted with the line of the repository that causes it: reading a value, a result whose shape depends
on values, a copy to or from the device that is not non_blocking.

It cannot see what a single operator does on CUDA inside: that CTC's copies its lengths again.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("meta")  # Autograd runs what is on it in the thread that calls `backward`.
ROOT = Path(__file__).resolve().parents[1]
READS = {  # operators that read values, or whose result has a shape that depends on values
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
CTC = {"_ctc_loss": 2, "_ctc_loss_backward": 3}  # places of two lengths, to be on the host
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}


class OnDevice(torch.Tensor):
    """A tensor of the pretended device, with its values in `on_host`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
        )

    def __init__(self, real):
        self.on_host = real

    def __repr__(self):
        return f"OnDevice({self.on_host})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of `Waits`")


class Waits(TorchDispatchMode):
    """Runs what is on the pretended device, and counts where the host would wait for it.

    Attributes:
        places: How often the host has waited, by line of the repository.
    """

    def __init__(self):
        super().__init__()
        self.places = Counter()
        self.factories = _Factories(self)

    @property
    def count(self):
        return self.places.total()

    def __enter__(self):
        self.autocast = torch.autocast.__init__
        self.factories.__enter__()
        init = self.autocast

        def with_known_device(this, device_type, *args, **kwargs):
            init(this, "cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

        torch.autocast.__init__ = with_known_device
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        torch.autocast.__init__ = self.autocast
        self.factories.__exit__(*exception)

    def note(self, times=1):
        """Counts waits of the line of the repository that is being run."""
        frame = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and path != Path(__file__):
                break
            frame = frame.f_back
        where = "?" if frame is None else f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        if times:
            self.places[where] += times

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        wrapped = [x for x in tensors if isinstance(x, OnDevice)]
        plain = [x for x in tensors if not isinstance(x, OnDevice)]
        device = kwargs.get("device")
        to_device = bool(wrapped)
        if device is not None:
            to_device = torch.device(device) == DEVICE
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if not wrapped and not to_device:
            return function(*args, **kwargs)
        if name == "_to_copy" or name == "copy_":
            self._note_copy(name, args, kwargs, to_device)
        elif wrapped and plain:
            self._check_mixture(name, args, plain)
        self._note_reads(name, args)
        own = {id(x.on_host): x for x in wrapped}  # What is changed in place is what it was.

        def wrap(x):
            if not isinstance(x, torch.Tensor):
                return x
            return own[id(x)] if id(x) in own else OnDevice(x)

        def real(x):
            return x.on_host if isinstance(x, OnDevice) else x

        result = function(*tree_map(real, args), **tree_map(real, kwargs))
        if name == "copy_":
            return args[0]
        return tree_map(wrap, result) if to_device else result

    def _note_copy(self, name, args, kwargs, to_device):
        if name == "copy_":
            both = {isinstance(x, OnDevice) for x in args[:2]}
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            both = {isinstance(args[0], OnDevice), to_device}
            waits = not kwargs.get("non_blocking", False)
        if len(both) > 1 and waits and args[0].numel():
            self.note()

    def _note_reads(self, name, args):
        if name in READS or (name == "repeat_interleave" and len(args) == 1):
            self.note()
        elif name in CTC:
            self.note(sum(isinstance(x, OnDevice) for x in _ctc_lengths(name, args)))
        elif name in BY_INDEX:
            places = [x for x in args[1] if x is not None]
            # Setting one value by a mask is done without looking for its places.
            fills = name != "index" and args[2].numel() == 1
            self.note(sum(x.dtype == torch.bool and not fills for x in places))

    def _check_mixture(self, name, args, plain):
        allowed = _ctc_lengths(name, args)
        if name in BY_INDEX and isinstance(args[0], OnDevice):
            allowed = [x for x in args[1] if x is not None and not isinstance(x, OnDevice)]
            self.note(len(allowed))  # CUDA copies them first.
        if any(x.dim() for x in plain if all(x is not y for y in allowed)):
            raise RuntimeError(
                f"{name} got tensors on {DEVICE} and on the CPU: expected all tensors to be on the "
                "same device"
            )


def _ctc_lengths(name, args):
    return args[CTC[name] : CTC[name] + 2] if name in CTC else []


class _Factories(TorchFunctionMode):
    """Makes tensors of given values on the pretended device, which dispatch would not see."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.new_tensor and isinstance(args[0], OnDevice):
            kwargs = {"device": args[0].device, "dtype": args[0].dtype, **kwargs}
            function, args = torch.tensor, args[1:]
        device = kwargs.get("device")
        if function not in (torch.tensor, torch.as_tensor) or device is None:
            return function(*args, **kwargs)
        return function(*args, **{**kwargs, "device": None}).to(device)


def to_device(x):
    """Copies tensors in a nest to the pretended device, and a module in place."""
    if isinstance(x, nn.Module):
        for module in x.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    wrapped = OnDevice(parameter.detach())
                    module._parameters[name] = nn.Parameter(wrapped, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = OnDevice(buffer)
        return x
    return tree_map(lambda y: OnDevice(y) if isinstance(y, torch.Tensor) else y, x)
