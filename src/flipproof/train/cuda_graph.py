"""Micro-batches as one CUDA graph: what launches thousands of small kernels is launched once.

A step of a small model is hundreds of products of a few microseconds, each launched from Python, and the GPU waits for
most of them. So the second micro-batch of a training is recorded, forward and backward, and from then on the record is
launched. The same kernels meet the same numbers: the batch, the factor on the loss and the tick of the flips are
written where the record reads them, and gradients come out where it left them. Where samples share rows, the mask that
keeps them apart is made of their positions within the record (``transformers`` makes it without looking at them then).

Where none can be made, since something waits for the device (patterns of faults, experts that look at how many tokens
they got) or there is no memory for it, micro-batches run kernel by kernel, as they do elsewhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flipproof.data.sequences import Batch
from flipproof.log import logger
from flipproof.models.frozen import shared_bytes

MicroBatch = Callable[[Batch, "float | Tensor"], Tensor]
"""Adds the gradients of a micro-batch: (batch, what its loss is multiplied with) -> its loss."""


def peak_allocated(recorded: "Recorded | None" = None) -> int:
    """Bytes of this process's GPU that tensors have taken at most, with what a record takes when it runs and what
    shards lie in."""
    return max(torch.cuda.max_memory_allocated(), recorded.peak if recorded else 0) + shared_bytes()


class Recorded:
    """A micro-batch that is recorded when it runs the second time; the first may compile.

    Memory that a record needs is its own until it is released.
    """

    def __init__(self, run: MicroBatch, model: nn.Module, blocks: list[nn.Module], several: bool) -> None:
        """
        Args:
            run: what is recorded.
            model: whose gradients it adds to.
            blocks: of the model.
            several: whether more than one micro-batch makes a step.
        """
        self._run, self._several = run, several
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._gradients: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._masks: dict[nn.Module, Any] = {}
        self._hooks = [block.register_forward_pre_hook(self._same_mask, with_kwargs=True) for block in blocks]
        self._calls = 0
        self._within = 0
        self.peak = 0
        """Bytes that PyTorch allocated at most until now, where there is a record. It counts what a record needs within
        when that is made, and not when it runs: beside AdamW's moments, say, which come later."""

    def __call__(self, batch: Batch, factor: float) -> Tensor:
        """As what is recorded; the loss is overwritten by the next."""
        self._calls += 1
        if self._calls == 2:
            self._record(batch)
        if self._graph is None:
            return self._run(batch, factor)
        for held, given in zip(self._batch, batch, strict=True):
            if held is not None and given is not None:
                held.copy_(given)
            elif held is not given:
                raise ValueError("a batch of another kind than the one that was recorded")
        self._factor.fill_(factor)
        self._graph.replay()
        self.peak = max(self.peak, torch.cuda.memory_allocated() + self._within)
        if self._with_gradient[0].grad is not None:
            sums = [parameter.grad for parameter in self._with_gradient if parameter.grad is not None]
            torch._foreach_add_(sums, self._gradients)
            return self._loss
        if self._several:
            torch._foreach_copy_(self._sums, self._gradients)
        for parameter, gradient in zip(self._with_gradient, self._sums, strict=True):
            parameter.grad = gradient
        return self._loss

    def release(self) -> None:
        """Give the record's memory back; what follows runs kernel by kernel."""
        self._remove_hooks()
        if self._graph is not None:
            for parameter in self._trained:
                parameter.grad = None
            del self._batch, self._loss
            self._gradients, self._sums, self._graph = [], [], None
            torch.cuda.empty_cache()

    def _record(self, batch: Batch) -> None:
        """Record the micro-batch, or leave everything as it was."""
        device = batch.ids.device
        self._batch = batch.each(torch.clone)
        self._factor = torch.ones((), device=device)
        if batch.positions is not None:
            self._remove_hooks()
        sums = [parameter.grad for parameter in self._trained]
        for parameter in self._trained:
            parameter.grad = None  # so that the record makes gradients, and adds to none
        generator = torch.cuda.default_generators[device.index]
        random, graph = generator.get_state(), torch.cuda.CUDAGraph()
        self.peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            # a record that fails leaves its stream the current one
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(
                    graph,
                    capture_error_mode="thread_local",  # NCCL's watchdog asks for events meanwhile
                ),
            ):
                self._loss = self._run(self._batch, self._factor)
            made = [(p, p.grad, own) for p, own in zip(self._trained, sums, strict=True) if p.grad is not None]
            self._with_gradient = [parameter for parameter, _, _ in made]
            self._gradients = [gradient for _, gradient, _ in made]
            self._sums = self._gradients
            if self._several:  # and this is the second of its step: what the first made goes on being used
                self._sums = [torch.empty_like(gradient) if own is None else own for _, gradient, own in made]
            self._graph = graph
            self._within = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        except RuntimeError as error:
            why = str(error.__context__ or error).splitlines()[0]
            logger.info("steps are launched kernel by kernel, since they make no CUDA graph: %s", why)
            fresh = torch.Generator(device)  # the old one counts as one that is recorded
            fresh.set_state(random)
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
        for parameter, gradient in zip(self._trained, sums, strict=True):
            parameter.grad = gradient
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._masks.clear()

    def _same_mask(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Keep a block's mask, and give it the same while it is recorded. ``transformers`` then makes one that masks
        nothing, where it would leave attention to its fast kernel; what a mask is depends on shapes alone here."""
        if "attention_mask" not in kwargs:
            return None
        if torch.cuda.is_current_stream_capturing():
            return args, kwargs | {"attention_mask": self._masks[block]}
        if block.training:  # a validation in between may have other rows
            self._masks[block] = kwargs["attention_mask"]
        return None
