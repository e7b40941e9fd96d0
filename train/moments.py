"""AdamW whose moments live in host memory: 8 bytes per parameter less on the device.

Each update streams them through the device in pieces of equal size: while one is updated, the next
is on its way in and the one before on its way out. AdamW works element by element, so where the
pieces are cut makes no difference: the result is that of `torch.optim.AdamW`, bit for bit.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.adamw import adamw

BUCKET = 1 << 26  # elements that travel together: 512 MiB of both moments, some 10 ms each way
SLOTS = 2  # buckets on the device: the one that is updated, and one that comes or goes


class _Piece(NamedTuple):
    """A part of a parameter in a bucket."""

    parameter: nn.Parameter
    elements: slice  # of the flattened parameter
    places: slice  # in the bucket
    last: bool  # of the parameter's pieces


class HostAdamW(AdamW):
    """`torch.optim.AdamW` over one group of parameters of one device, moments in host memory.

    Host memory is pinned where the parameters are on CUDA. torch may round a pinned block up to a
    power of two, so all parameters share one block for each moment.
    """

    def __init__(
        self, params: list[nn.Parameter], bucket: int | None = None, **options: Any
    ) -> None:
        """bucket: elements per transfer, by default BUCKET; options: those of AdamW."""
        super().__init__(params, **options)
        (group,) = self.param_groups
        self._parameters = [p for p in group["params"] if p.numel()]
        self._device = self._parameters[0].device
        self._bucket = bucket or BUCKET
        total = sum(p.numel() for p in self._parameters)
        pinned = self._device.type == "cuda"
        self._host = [torch.zeros(total, pin_memory=pinned) for _ in range(2)]
        sizes = [p.numel() for p in self._parameters]
        views = zip(*(flat.split(sizes) for flat in self._host), strict=True)
        for p, (average, square) in zip(self._parameters, views, strict=True):
            # AdamW keeps its counts where its kernel reads them
            count = torch.zeros((), device=self._device if group["fused"] else "cpu")
            self.state[p] = {
                "step": count,
                "exp_avg": average.view(p.shape),
                "exp_avg_sq": square.view(p.shape),
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient; moments of the others stay where they are.

        When it returns, the moments are back in host memory.
        """
        size = min(self._bucket, len(self._host[0]))
        slots = [torch.empty(2, size, device=self._device) for _ in range(SLOTS)]
        lanes = _Lanes(self._device)
        travelling = (b for b in self._buckets() if any(p.parameter.grad is not None for p in b[1]))
        for turn, (where, pieces) in enumerate(travelling):
            hosts = [flat[where] for flat in self._host]
            slot = slots[turn % SLOTS][:, : len(hosts[0])]
            with lanes.bringing(turn % SLOTS):
                for device, host in zip(slot, hosts, strict=True):
                    device.copy_(host, non_blocking=True)
            with lanes.updating(turn % SLOTS):
                self._update([p for p in pieces if p.parameter.grad is not None], slot)
            with lanes.taking(turn % SLOTS):
                for device, host in zip(slot, hosts, strict=True):
                    host.copy_(device, non_blocking=True)
        lanes.end()

    def _buckets(self) -> Iterator[tuple[slice, list[_Piece]]]:
        """Elements of the flat moments, and the pieces of parameters that they belong to."""
        start, pieces = 0, []
        for p in self._parameters:
            done = 0
            while done < p.numel():
                used = sum(piece.places.stop - piece.places.start for piece in pieces)
                count = min(p.numel() - done, self._bucket - used)
                elements, places = slice(done, done + count), slice(used, used + count)
                done += count
                pieces.append(_Piece(p, elements, places, done == p.numel()))
                if used + count == self._bucket:
                    yield slice(start, start + self._bucket), pieces
                    start, pieces = start + self._bucket, []
        if pieces:
            yield slice(start, start + pieces[-1].places.stop), pieces

    def _update(self, pieces: list[_Piece], moments: Tensor) -> None:
        (group,) = self.param_groups
        counts = [self.state[piece.parameter]["step"] for piece in pieces]
        adamw(
            [piece.parameter.detach().view(-1)[piece.elements] for piece in pieces],
            [piece.parameter.grad.reshape(-1)[piece.elements] for piece in pieces],
            *([row[piece.places] for piece in pieces] for row in moments),
            [],
            # the call counts the update: for a parameter in several pieces only the last time
            [n if piece.last else n.clone() for piece, n in zip(pieces, counts, strict=True)],
            foreach=group["foreach"],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy moments and counts in place: torch would first move all moments to the device."""
        (group,), (saved,) = self.param_groups, state_dict["param_groups"]
        group.update({name: value for name, value in saved.items() if name != "params"})
        for p, key in zip(group["params"], saved["params"], strict=True):
            if not p.numel():
                continue  # nothing is kept for it
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[p][name].copy_(value)


class _Lanes:
    """Streams for what comes, is updated and goes, and who waits for whom; without CUDA nothing."""

    def __init__(self, device: torch.device) -> None:
        self.streams: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            own = torch.cuda.current_stream(device)
            self.streams = [torch.cuda.Stream(device), own, torch.cuda.Stream(device)]
            self.through = [[torch.cuda.Event() for _ in range(SLOTS)] for _ in self.streams]
            for stream in self.streams:  # kernels queued before may still use the slots' memory
                stream.wait_stream(own)

    def bringing(self, slot: int) -> AbstractContextManager:
        """Into a slot that is empty: an event that was never recorded holds nobody up."""
        return self._lane(0, slot)

    def updating(self, slot: int) -> AbstractContextManager:
        return self._lane(1, slot)

    def taking(self, slot: int) -> AbstractContextManager:
        return self._lane(2, slot)

    @contextmanager
    def _lane(self, index: int, slot: int) -> Iterator[None]:
        """Work that begins when the lane before it is through with the slot."""
        if not self.streams:
            yield
            return
        stream = self.streams[index]
        stream.wait_event(self.through[index - 1][slot])
        with torch.cuda.stream(stream):
            yield
        self.through[index][slot].record(stream)

    def end(self) -> None:
        """Wait on the host: a reader of the moments finds what was written."""
        for stream in self.streams:
            stream.synchronize()
