"""Logits of a model on windows of tokens: from memory where the model fits, else block by block.

Both ways make the same calls on the same weights in the same batches, and on a CPU give the same bits
(tests/unit/test_reading.py), so that nothing that is measured depends on how much memory was free. Streaming reads the
weights once for as many windows as their states fit in memory; only what `model/skeleton.py` understands can be
streamed, anything that transformers loads can be held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from rich.filesize import decimal
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmmpq.errors import CalibrationError, CheckpointError, UnsupportedModelError
from llmmpq.evaluate.perplexity import refuse_idle_windows, whole_logits
from llmmpq.hf import LlmmpqForCausalLM
from llmmpq.inspection import is_quantized
from llmmpq.model.checkpoint import TORCH_DTYPES, Checkpoint
from llmmpq.model.skeleton import build_skeleton
from llmmpq.model.source import resolve_model
from llmmpq.model.stream import BlockStream
from llmmpq.session import pick_device

MOST_WINDOWS_PER_FORWARD = 4  # enough to fill two cores
MOST_LOGITS_PER_FORWARD = 2**28  # 1 GB in float32: four windows of 2,048 with 32 thousand words, one with 128 thousand
WEIGHTS_SHARE = 0.9  # of the free memory; the rest is for activations and logits
STATES_SHARE = 0.25  # of the free memory: the states of as many windows ride through the blocks together


class Reader:
    """A model on a device, in memory or streamed, for as long as this object lives.

    Weights are read with the first logits: who finds these in a cache needs no more than the config.
    """

    def __init__(self, model: str, *, device: str = "auto", dtype: str = "auto") -> None:
        self.name, self.folder = model, resolve_model(model)
        self.device = pick_device(device)
        # Damage, missing shards and pickled weights are named here, before anything is loaded.
        self.checkpoint = Checkpoint.open(self.folder)
        self._wanted = wanted_dtype(dtype, self.device)
        self._loaded: PreTrainedModel | None = None
        needed, free = self.needed_nbytes(), free_nbytes(self.device)
        self.is_held = needed <= WEIGHTS_SHARE * free or is_quantized(self.folder)
        if self.is_held:
            self.config: PreTrainedConfig = read_config(self.folder)
        else:
            reason = f"its weights take {decimal(needed)}, {decimal(free)} of memory are free"
            try:
                self._skeleton = build_skeleton(self.folder, self.checkpoint)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{model} cannot be held ({reason}) nor streamed: {error}") from None
            self.config = self._skeleton.model.config

    def load(self) -> PreTrainedModel | None:
        """The model in memory, None where it is streamed; logits call this themselves.

        For those who would take the time or the errors of loading for something else.
        """
        if self.is_held and self._loaded is None:
            self._loaded = _load(self.folder, self.device, self._wanted)
        return self._loaded

    @property
    def dtype(self) -> torch.dtype:
        if (model := self.load()) is not None:
            return model.dtype
        return self._wanted if isinstance(self._wanted, torch.dtype) else self._stored_dtype()

    def batch(self, window: int) -> int:
        """Windows per forward; it decides the last bits of what comes out."""
        per_window = window * int(self.config.get_text_config().vocab_size)
        return max(1, min(MOST_WINDOWS_PER_FORWARD, MOST_LOGITS_PER_FORWARD // per_window))

    def logits(self, windows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """The index of a batch's first window, and the batch's logits [B, T, V] on the device."""
        refuse_idle_windows(windows)
        window, batch = windows.shape[1], self.batch(windows.shape[1])
        nbytes = batch * window * int(self.config.get_text_config().vocab_size) * self.dtype.itemsize
        if nbytes > (free := free_nbytes(self.device)):
            raise CalibrationError(
                f"the logits of one window of {window} tokens take {decimal(nbytes)}, {decimal(free)} of memory are "
                "free: give a smaller --window"
            )
        if (model := self.load()) is not None:
            yield from whole_logits(model, windows, batch=batch)
            return
        text_config = self.config.get_text_config()
        per_batch = batch * window * int(text_config.hidden_size) * self.dtype.itemsize
        step = batch * max(1, int(STATES_SHARE * psutil.virtual_memory().available / per_batch))
        for start in range(0, len(windows), step):
            for first, logits in self._streamed(windows[start : start + step], batch):
                yield start + first, logits

    @torch.no_grad()
    def _streamed(self, windows: torch.Tensor, batch: int) -> Iterator[tuple[int, torch.Tensor]]:
        stream = BlockStream(
            self._skeleton,
            self.checkpoint,
            windows,
            device=self.device,
            dtype=self.dtype,
            batch=batch,
            states_on_host=True,
        )
        states: list[torch.Tensor] = []
        for block in stream:
            if block.index + 1 == len(self._skeleton.block_names):
                states = [state.cpu() for state in block.run()]
        with stream.around() as around:
            around.embed(windows[:1].to(self.device))
            for index, state in enumerate(states):
                yield index * batch, around.logits(state.to(self.device))

    def needed_nbytes(self) -> int:
        entries = self.checkpoint.entries.values()
        if isinstance(self._wanted, torch.dtype):
            return sum(math.prod(entry.shape) for entry in entries) * self._wanted.itemsize
        return sum(entry.nbytes for entry in entries)

    def _stored_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[max(self.checkpoint.entries.values(), key=lambda entry: entry.nbytes).dtype]


def load_model(model: str, *, device: str = "auto", dtype: str = "auto") -> tuple[Path, PreTrainedModel]:
    """A quantized or plain model, ready to run."""
    folder = resolve_model(model)
    target = pick_device(device)
    Checkpoint.open(folder)
    return folder, _load(folder, target, wanted_dtype(dtype, target))


def read_config(folder: Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers answers a damaged config with any kind of exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{folder / 'config.json'} describes no model that transformers knows: {reason}"
        ) from None
    return config


def wanted_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """What transformers is asked for: on a CPU auto is float32, on a GPU what the checkpoint says."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def free_nbytes(device: torch.device) -> int:
    """Of the device, and of the host through whose memory weights come."""
    host = int(psutil.virtual_memory().available)
    return host if device.type == "cpu" else min(host, int(torch.cuda.mem_get_info(device)[0]))


def _load(folder: Path, device: torch.device, dtype: torch.dtype | str) -> PreTrainedModel:
    loader = LlmmpqForCausalLM if is_quantized(folder) else AutoModelForCausalLM
    loaded: PreTrainedModel = loader.from_pretrained(
        str(folder), dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    torch.nn.Module.to(loaded, device)
    return loaded.eval()
