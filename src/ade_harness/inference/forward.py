"""The network's forward: batches, precision, compilation, and what to do when memory is short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ade_harness.config.inference import InferenceConfig
from ade_harness.config.saved import ONE_SIZE
from ade_harness.errors import HarnessError, ShortMemoryError, text_of
from ade_harness.models.loaded import LoadedModel
from ade_harness.models.outputs import LabelMap, MaskLogits, other_scores, read_output
from ade_harness.runtime.gpu_errors import is_gpu_lost, is_out_of_memory

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""``inference.precision`` -> what the forward's autocast computes in."""


_USUAL_STRIDE = 32
"""Stride of the coarsest features of most networks."""


class BatchedForward:
    """Runs a network on images of one size, several at a time.

    Args:
        model: the network.
        cfg: ``inference`` node.
        channels: of a network that returns labels.

    Attributes:
        halved: how often a batch was halved because memory was short.
        fits: the smallest batch that it was halved to, None if it never was.
        needed: the most inputs of one size that any images have together; None if that is not known.
        passed_over: how many scores the network returned beside those that were taken, the first.
    """

    def __init__(self, model: LoadedModel, cfg: InferenceConfig, channels: int) -> None:
        self.model = model
        self.cfg = cfg
        self.channels = channels
        self.halved = 0
        self.fits: int | None = None
        self.needed: int | None = None
        self.passed_over = 0
        self._module: Any = None
        self._compiled_for: tuple[int, ...] | None = None
        """The shape of the first batch, where the network is compiled."""

    def __call__(self, images: Sequence[Tensor], what: str) -> list[Tensor | MaskLogits]:
        """Return each image's scores [1, C, h, w] float32, or mask classification with N = 1.

        Args:
            images: float32 [3, H, W], all of one size, normalised.
            what: names the image in messages.

        Raises:
            HarnessError: the network failed, or memory is too short for one image.
        """
        # the whole batch again for each image: what an earlier one has left free decides no image's bits
        limit, emptied = self.batch(images[0].device), False
        while True:
            try:
                return self._in_batches(images, limit, what)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]  # the error itself would keep the failed batch's tensors
            # outside of the except block, where it still is
            if not emptied and _empty_cache(images[0].device):
                # libraries find none where torch's own cache holds it: the same batch again keeps every bit
                emptied = True
                continue
            size = f"{images[0].shape[2]}x{images[0].shape[1]}"
            limit = min(limit, len(images)) // 2
            if limit < 1 or self._always_full:
                raise ShortMemoryError(
                    f"{what}: out of memory with one input of {size} ({reason})."
                    " Use a device with more memory, inference.precision=bf16, a smaller inference.batch, or a protocol"
                    " with smaller inputs."
                )
            self.halved += 1
            self.fits = limit if self.fits is None else min(self.fits, limit)
            _empty_cache(images[0].device)

    def _in_batches(self, images: Sequence[Tensor], limit: int, what: str) -> list[Tensor | MaskLogits]:
        outputs: list[Tensor | MaskLogits] = []
        for start in range(0, len(images), limit):
            outputs += self._split(images[start : start + limit], what)
        return outputs

    def batch(self, device: torch.device) -> int:
        """Return how many inputs share a forward on this device, if memory allows."""
        if self._compiled_for is not None:
            return self._compiled_for[0]
        # on a CPU several windows at a time only leave its caches (measured: up to 6 % slower)
        usual = self.cfg.images if device.type == "cpu" else 8
        if self.cfg.compile is not None and self.needed is not None:  # what fills up a batch is computed too
            usual = min(usual, self.needed)
        return self.model.fixed_batch or self.cfg.batch or usual

    @property
    def _always_full(self) -> bool:
        """Whether inputs fill up a batch: the model takes no other, or is compiled for it.

        What is compiled for a second shape depends on the first one, and so would an image's last bits.
        """
        return self.model.fixed_batch is not None or self.cfg.compile is not None

    def _split(self, images: Sequence[Tensor], what: str) -> list[Tensor | MaskLogits]:
        fill = self.batch(images[0].device) - len(images) if self._always_full else 0
        filled = [*images, *[images[-1]] * max(0, fill)]
        # one image is not copied; a window is, or a network would see the width of its canvas in the strides: what is
        # compiled is compiled for them, and the order of a sum may follow them
        batch = filled[0][None].contiguous() if len(filled) == 1 else torch.stack(filled)
        returned = self._run(batch, what)
        output = read_output(returned, what)
        odd = next((t for t in (output if isinstance(output, tuple) else (output,)) if not _is_plain(t)), None)
        if odd is not None and type(odd) is not type(batch):
            raise HarnessError(
                f"{what}: the model returned a {type(odd).__name__}, whose values are not in one plain tensor: expected"
                " a torch.Tensor."
            )
        elsewhere = {t.device for t in (output if isinstance(output, tuple) else (output,))} - {batch.device}
        if elsewhere:
            raise HarnessError(
                f"{what}: the model returned a tensor on {min(map(str, elsewhere))} for an input on {batch.device}:"
                " expected the same device."
            )
        self.passed_over = max(self.passed_over, other_scores(returned))
        if isinstance(output, LabelMap):
            output = output.as_scores(self.channels, what)
        tensors = (output.classes, output.masks) if isinstance(output, MaskLogits) else (output,)
        for tensor in tensors:
            if tensor.shape[0] != batch.shape[0] or tensor.numel() == 0:
                raise HarnessError(
                    f"{what}: the model returned {list(tensor.shape)} for an input of {list(batch.shape)},"
                    " expected logits [N, C, h, w] with the same N."
                )
        if isinstance(output, MaskLogits):
            parts = [(output.classes[i : i + 1], output.masks[i : i + 1]) for i in range(len(images))]
            return [MaskLogits(self._kept(c), self._kept(m)) for c, m in parts]
        if self._is_channels_last(output.shape, batch.shape):
            raise HarnessError(
                f"{what}: the model returned {list(output.shape)} for an input of {list(batch.shape)}: the"
                f" {output.shape[3]} channels seem to be last. Expected logits [N, C, h, w]: permute(0, 3, 1, 2)."
            )
        if self._is_transposed(output.shape, batch.shape):
            raise HarnessError(
                f"{what}: the model returned {list(output.shape)} for an input of {list(batch.shape)}: height and width"
                " seem to have changed places. Expected logits [N, C, h, w]: transpose(2, 3)."
            )
        # a network may have turned gradients on for itself
        return [self._kept(output[i : i + 1]) for i in range(len(images))]

    def _kept(self, scores: Tensor) -> Tensor:
        """Return scores as float32 that the next forward leaves alone: CUDA graphs write into the same memory again."""
        kept = scores.detach().as_subclass(Tensor) if _is_plain(scores) else scores.detach()
        kept = kept.float().resolve_neg()  # kernels read memory, in which a lazy negation has not been done yet
        return kept.clone() if self.cfg.compile == "cudagraphs" else kept

    def _is_channels_last(self, output: Sequence[int], images: Sequence[int]) -> bool:
        """Whether scores look like [N, h, w, C]: the last axis has all channels, the two before are the image's."""
        if output[1] == self.channels or output[3] != self.channels:
            return False
        step = max(1, round(images[2] / output[1]))
        return all(abs(side / step - found) < 1 for side, found in zip(images[2:], output[1:3], strict=True))

    def _is_transposed(self, output: Sequence[int], images: Sequence[int]) -> bool:
        """Whether scores look like [N, C, w, h]: of the input's shape on its side, and by no means of it upright."""
        step = max(1, round(max(images[2:]) / max(output[2:])))

        def fits(size: Sequence[int]) -> bool:
            return all(abs(side / step - found) < 1 for side, found in zip(images[2:], size, strict=True))

        return abs(output[2] - output[3]) > 2 and fits(output[:1:-1]) and not fits(output[2:])

    def _run(self, batch: Tensor, what: str) -> Any:
        if self.cfg.compile:
            self._compiled_for = self._compiled_for or tuple(batch.shape)
            if self._compiled_for != tuple(batch.shape):
                raise HarnessError(
                    f"{what}: inference.compile={self.cfg.compile} has compiled the network for a batch of"
                    f" {list(self._compiled_for)}, this one is {list(batch.shape)}: what is compiled for a second shape"
                    " depends on the first. Use a protocol with windows, or leave inference.compile out."
                )
        if self.cfg.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        try:
            without_gradients = torch.no_grad if self.model.of_caller else torch.inference_mode
            with arithmetic_of(self.cfg.precision, batch.device.type), without_gradients(), self._as_scripted(batch):
                return self._callable()(batch)
        except (HarnessError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the network may be anybody's code
            if is_out_of_memory(error) and not isinstance(error, RuntimeError):
                raise torch.OutOfMemoryError(text_of(error)) from error  # of a library with errors of its own
            if is_out_of_memory(error) or is_gpu_lost(error):
                raise  # the first is dealt with above; after the second this process cannot use its GPU any more
            reason = " ".join(_message_of(error).split())[:300]
            raise HarnessError(
                f"{what}: the model failed on an input of {list(batch.shape)}"
                f" ({type(error).__name__}{reason and f': {reason}'})."
                f"{self._of_type(reason) or self._of_device(reason, batch) or self._of_size(reason, batch)}"
                " ADE_HARNESS_TRACEBACK=1 shows where."
            ) from error

    def _as_scripted(self, batch: Tensor) -> AbstractContextManager[Any]:
        """Keep TorchScript from fusing operators on a GPU.

        It does so after a few inputs, for the sizes seen by then, with other roundings: an image's bits would depend on
        the images that its rank had before.
        """
        scripted = batch.device.type == "cuda" and isinstance(self.model.module, torch.jit.ScriptModule)
        unfused: Any = torch.jit.optimized_execution  # type: ignore[attr-defined]
        return unfused(False) if scripted else nullcontext()

    def _of_type(self, reason: str) -> str:
        """Return what to do where weights are of another type than the images, which are float32; else nothing."""
        weights = {p.dtype for p in self.model.module.parameters() if p.is_floating_point()} - {torch.float32}
        about_types = any(word in reason for word in ("type", "Float", "Half", "Double"))
        if not weights or not about_types or self.cfg.precision in AUTOCAST:
            return ""
        name = str(min(weights, key=str)).removeprefix("torch.")
        exported = isinstance(self.model.module, torch.jit.ScriptModule | torch.fx.GraphModule)
        permitted = self.model.of_caller or not exported  # an exported file runs as it says
        known = next((k for k, dtype in AUTOCAST.items() if dtype in weights and permitted), None)
        copied = "give a copy in float32, copy.deepcopy(network).float()"
        convert = copied if self.model.of_caller else "export it in float32"
        advice = f"inference.precision={known}, or {convert}" if known else convert
        return f" Its weights are {name}, images float32: {advice}."

    def _of_size(self, reason: str, batch: Tensor) -> str:
        """Return what to do where the size may be what the network does not take; else nothing.

        A traced or exported one has kept the size of its example; others join features of several strides, or divide
        the image into patches.
        """
        made = isinstance(self.model.module, torch.jit.ScriptModule | torch.fx.GraphModule)
        words = ("shape", "size", "Sizes", "must match", "Guard failed", "divisible", "multiple")
        if not any(word in reason for word in words):
            return ""
        settings = getattr(self.model.module, "config", None)
        side = getattr(settings, "image_size", None) if getattr(settings, "model_type", "") in ONE_SIZE else None
        if isinstance(side, int) and list(batch.shape[2:]) != [side, side]:
            return (
                f" Its config.image_size is {side}; windows of that size: inference=mmseg_slide_512"
                f" inference.window.crop={side} inference.window.stride={side * 2 // 3}."
            )
        if not made:
            odd = any(side % _USUAL_STRIDE for side in batch.shape[2:])
            return (
                f" If it takes multiples of {_USUAL_STRIDE} only: inference.resize.pad_multiple={_USUAL_STRIDE}"
                " pads images (14 or 16 for some transformers)."
                if odd and self.cfg.resize.pad_multiple == 1 else ""
            )  # fmt: skip
        return (
            " A network that was traced or exported may take the size alone that it was made with:"
            " inference=fit_input inference.resize.height=H inference.resize.width=W fits images into it. Or export it"
            " for any size."
        )

    def _of_device(self, reason: str, batch: Tensor) -> str:
        """Return what to do where an exported program names another device than the one it runs on; else nothing."""
        exported = isinstance(self.model.module, torch.jit.ScriptModule | torch.fx.GraphModule)
        if not exported or not any(words in reason for words in ("NVIDIA driver", "same device", "compiled with CUDA")):
            return ""
        return f" It names a device in its code, and runs on {batch.device.type} here: export it on that device."

    def _callable(self) -> Any:
        if self._module is None:
            module: Any = self.model.module
            if self.cfg.channels_last and not self.model.of_caller:  # the layout of its weights is the caller's
                module = module.to(memory_format=torch.channels_last)
            if self.cfg.compile:
                # inductor else times several loops for a sum and takes the fastest, each with an order of its own
                options: Any = {"deterministic": True} if self.cfg.compile == "inductor" else None
                # for one shape: all inputs have one size, which the predictor has checked, and batches are full
                module = torch.compile(module, backend=self.cfg.compile, dynamic=False, options=options)
            self._module = module
        return self._module


def _empty_cache(device: torch.device) -> bool:
    """Give back the memory that torch holds and does not use; returns whether there may be any."""
    if device.type != "cuda":
        return False
    torch.cuda.empty_cache()
    return True


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's values are in its own memory: a subclass that redefines operators may keep them elsewhere."""
    plain: Any = Tensor
    return bool(type(tensor).__torch_dispatch__ is plain.__torch_dispatch__)


def _message_of(error: BaseException) -> str:
    """Return an error's message: of TorchScript's, which begin with a traceback of its interpreter, the last line."""
    text = text_of(error)
    if "TorchScript interpreter" in text:
        text = next((line for line in reversed(text.splitlines()) if line.strip()), text)
    return text.removeprefix(f"{type(error).__name__}: ")


@contextmanager
def short_memory_named(when: str) -> Iterator[None]:
    """Say in one message what is left of a GPU's memory, where a shortage ends the work.

    Raises:
        HarnessError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, HarnessError) or not is_out_of_memory(error):
            raise
        left = ""
        if torch.cuda.is_available():
            free, total = (number / 2**30 for number in torch.cuda.mem_get_info())
            left = f" GPU {torch.cuda.current_device()} has {free:.1f} of {total:.1f} GiB free."
        raise HarnessError(
            f"out of memory while {when} ({str(error).splitlines()[0]}).{left} Another program may use it (`nvidia-smi`"
            " names it; CUDA_VISIBLE_DEVICES chooses another GPU); model.dtype=bf16 halves the weights."
        ) from error


@contextmanager
def arithmetic_of(name: str, device_type: str) -> Iterator[None]:
    """Set the forward's precision: TF32 in matrix products and convolutions, or autocast.

    Autocast keeps no casts of weights without gradients, as an evaluation's are: each forward casts them anew (of a
    ViT-L 1.2 GB). Weights that are of that type already (``model.dtype``) are left alone.
    """
    try:
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:  # a model's code has used torch's newer switches, after which the old ones can only be set
        before = False, False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        with torch.autocast(device_type, dtype=AUTOCAST.get(name), enabled=name in AUTOCAST):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
