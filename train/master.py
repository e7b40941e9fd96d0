"""Float32 masters of narrow compute weights, for a run in one process. Nothing here is sharded.

    compute weight, bfloat16   what forward, backward and sampling read
    master, float32            what AdamW updates, the EMA teacher follows and checkpoints hold

An update of relative size below 2^-9 would be lost on a bfloat16 weight; the master keeps it. A
teacher has no use for both: it keeps its float32 average and rounds one layer at a time, for as
long as the layer runs.

Bytes per trained parameter with an EMA teacher: compute weight 2, master 4, gradient 4, EMA 4,
moments of AdamW 8 or, with --adam_moments host, none on the device.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn


class MasterWeights(nn.Module):
    """A model whose parameters are float32 masters and whose forward runs on rounded twins.

    Its parameters, their gradients and its state dict are those of the masters, so that optimizer,
    clipping, averaging and checkpoints need not know. The twins are in `compute`: they share
    nothing with the masters, have no gradient outside of a backward pass, are changed in place
    only, and only by `publish` and by loading a state dict.

    The master of a parameter that is not trained serves checkpoints alone: it lies in host memory.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Take over `module`, which becomes the masters.

        Args:
            module: float32, on the device of the run, with `requires_grad` where it is trained.
            dtype: of the compute weights.

        Raises:
            TypeError: a parameter is narrower than float32, so its master could not be exact.
        """
        super().__init__()
        narrow = [name for name, p in module.named_parameters() if p.dtype != torch.float32]
        if narrow:
            raise TypeError(f"{narrow[0]} is not float32: load the weights in float32 for a master")
        self.module = module
        # in a tuple, or the twins would be parameters of this module as well
        self._hidden = (_twin(module, dtype),)
        pairs = list(zip(module.parameters(), self.compute.parameters(), strict=True))
        self._trained = [pair for pair in pairs if pair[0].requires_grad]
        self._frozen = [pair for pair in pairs if not pair[0].requires_grad]
        for master, weight in self._trained:
            weight.register_post_accumulate_grad_hook(partial(_hand_over, master))
        for master, _ in self._frozen:
            master.data = master.data.cpu()
        self.register_load_state_dict_post_hook(lambda *_: self._publish_all())

    @property
    def compute(self) -> nn.Module:
        """The model that runs; sampling may use these very weights."""
        return self._hidden[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MasterWeights":
        raise TypeError("a copy would lose what hands gradients over: wrap a copy of the module")

    @torch.no_grad()
    def publish(self) -> None:
        """Round what was updated into the compute weights, in place. Nothing is read back."""
        for master, weight in self._trained:
            weight.copy_(master)

    @torch.no_grad()
    def _publish_all(self) -> None:
        self.publish()
        for master, weight in self._frozen:
            weight.copy_(master)


def _twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with parameters in `dtype`; there is never a float32 copy on the way."""
    rounded: dict[int, Any] = {
        # copied also where the dtype is that of the master
        id(p): nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, rounded)  # what it finds in there it takes for copied


def _hand_over(master: nn.Parameter, weight: nn.Parameter) -> None:
    """Add the gradient that has just arrived to the master's and free it.

    The sum over micro batches is float32; within a backward pass autograd has summed already.
    """
    assert weight.grad is not None  # this is what the hook is called after
    if master.grad is None:
        master.grad = weight.grad.to(master.dtype)
    else:
        master.grad.add_(weight.grad)
    weight.grad = None


class RoundedForward:
    """Lets a float32 model run in a narrower dtype, one unit of it at a time.

    Each unit (a module of one of the given classes) has rounded parameters from the start of its
    forward to its end, without those of the units inside. The float32 parameters are the same
    objects before and after, so whoever averages or saves them is not concerned. For inference.
    """

    def __init__(
        self, model: nn.Module, units: tuple[type[nn.Module], ...], dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        owner = {}
        for unit in model.modules():  # outer ones first
            if isinstance(unit, units):
                owner |= dict.fromkeys(unit.modules(), unit)
        self.places: dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter]]] = {}
        for module in model.modules():
            own = list(module.named_parameters(recurse=False))
            if own and module not in owner:
                raise ValueError(f"{own[0][0]} of {type(module).__name__} is in none of the units")
            for name, parameter in own:
                self.places.setdefault(owner[module], []).append((module, name, parameter))
        for unit in self.places:
            unit.register_forward_pre_hook(self._narrow)
            unit.register_forward_hook(self._restore, always_call=True)

    def _narrow(self, unit: nn.Module, inputs: tuple) -> None:
        for module, name, parameter in self.places[unit]:
            rounded = parameter.detach().to(self.dtype)
            setattr(module, name, nn.Parameter(rounded, requires_grad=False))

    def _restore(self, unit: nn.Module, inputs: tuple, output: Any) -> None:
        for module, name, parameter in self.places[unit]:
            setattr(module, name, parameter)
