"""Forward engines: token ids to pooled vectors, behind one small interface.

PaddleEngine runs any PaddleNLP model in dynamic graph mode, on a GPU or a CPU; onednn.OneDNNEngine is
several times as fast on CPUs, for encoders.
"""

import importlib.metadata
import logging
from functools import cache
from typing import Protocol

import numpy as np

from ..kernels import onednn as matmul
from ..models import loading as weights
from ..models.checkpoint import Checkpoint
from ..models.paddlenlp import default_dtype, first_output
from ..process import runtime
from . import cpu_engine

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """A model in memory.

    Attributes:
        threads: calls of ``forward`` that may run, and are worth running, side by side.
    """

    threads: int

    def forward(self, ids: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Pooled vectors, float32 [b, hidden].

        Args:
            ids: int64 [b, t], padded to the right.
            lengths: int64 [b], the tokens that are no padding.
            weights: float32 [b, t], the pooling as a weighted sum over tokens.
        """


@cache
def device() -> str:
    """``"gpu"`` where Paddle was built for CUDA and sees a GPU, else ``"cpu"``."""
    try:
        importlib.metadata.version("paddlepaddle-gpu")
    except importlib.metadata.PackageNotFoundError:
        return "cpu"  # decided without the seconds that importing Paddle takes
    paddle = runtime.import_paddle()
    return "gpu" if paddle.device.cuda.device_count() else "cpu"


def batch_tokens() -> int:
    """Tokens in a batch, padding included, unless the user says otherwise."""
    return 65536 if device() == "gpu" else 2048


def padded_length(length: int) -> int:
    """The width of a batch whose longest text has ``length`` tokens.

    Few widths mean few shapes to prepare, and eight is what matrix kernels like.
    """
    return -(-length // 8) * 8


class LazyEngine:
    """Knows which engine a checkpoint gets before anything heavy is imported, and loads it when needed."""

    def __init__(self, model: Checkpoint, dtype: str):
        self.model = model
        self.device, self.batch_tokens = device(), batch_tokens()
        self.name = "onednn" if self.device == "cpu" and cpu_engine.supports(model) and matmul.is_usable() else "paddle"
        self.dtype = dtype
        self._engine: Engine | None = None
        if dtype == "auto":
            self.dtype = "bfloat16" if self.device == "gpu" else "float32"
            if self.name == "onednn":
                self.dtype = cpu_engine.best_dtype()
        elif self.device == "cpu" and dtype != "float32" and (self.name, dtype) != ("onednn", cpu_engine.best_dtype()):
            logger.warning("warning: %s is not used for this model on this processor; computing in float32", dtype)
            self.dtype = "float32"

    def description(self) -> dict:
        """What of the engine the vectors depend on."""
        about = {"engine": self.name, "device": self.device, "dtype": self.dtype}
        # Our own products and oneDNN's add up in different orders.
        return about | ({"amx": runtime.cpu_has("amx_bf16")} if self.name == "onednn" else {})

    def loaded(self) -> Engine:
        """The engine, its weights in memory."""
        if self._engine is None:
            try:
                if self.name == "onednn":
                    self._engine = cpu_engine.OneDNNEngine(self.model, self.dtype)
                else:
                    self._engine = PaddleEngine(self.model, self.dtype, self.device)
            except (ValueError, OSError, MemoryError):
                raise
            except Exception as error:  # whatever Paddle or safetensors raise for a damaged checkpoint
                reason = (str(error).strip().splitlines() or [""])[-1][:200]
                raise ValueError(f"{self.model.folder}: cannot be loaded ({type(error).__name__}: {reason})") from error
        return self._engine


class PaddleEngine:
    """PaddleNLP's AutoModel in dynamic graph mode, which takes all cores or the GPU for each call."""

    threads = 1

    def __init__(self, model: Checkpoint, dtype: str, device_name: str):
        paddle = runtime.import_paddle()
        paddle.set_device(device_name)
        self._model, self._dtype = weights.load_model(model, dtype), dtype
        self._model.eval()

    def forward(self, ids: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """See Engine."""
        import paddle

        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        # PaddleNLP's BERT adds a mask of the default type to its scores.
        with paddle.no_grad(), default_dtype(self._dtype):
            output = self._model(paddle.to_tensor(ids), attention_mask=paddle.to_tensor(mask))
            hidden = first_output(output).astype("float32")
            pooled = paddle.bmm(paddle.to_tensor(weights).unsqueeze(1), hidden).squeeze(1)
        return pooled.numpy()
