"""Options of an engine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from services.engine.core.faults import ScriptedFaults
from services.engine.model.linear.form import WeightForm
from services.rpc.bind import split_address
from services.rpc.server import ServerConfig
from services.rpc.tls import ClientTls

# Set by test runners, and by nobody else.
TESTING_VARIABLE = "MICROSERVE_TESTING"
MAX_NAME_CHARACTERS = 128
_QUANTISED = {
    "int8": WeightForm.BYTES,
    "fp8": WeightForm.FLOATS8,
    "packed": WeightForm.PACKED,
    "packed16": WeightForm.PACKED_16,
}
_WILDCARDS = ("0.0.0.0", "::", "*")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(ServerConfig):
    """An engine: serves one model replica through sub-request calls."""

    model: str = field(metadata={"help": "catalogue name, model folder, GGUF file or hub id"})
    name: str = field(default="engine", metadata={"help": "name of this engine, stable across restarts"})
    kvtransfer: str | None = field(
        default=None, metadata={"help": "host:port of this node's KV transfer service; none: a private pool"}
    )
    kvtransfer_ca: Path | None = field(
        default=None, metadata={"help": "PEM roots of the KV transfer service; with it the link uses TLS"}
    )
    threads: int | None = field(default=None, metadata={"help": "threads that compute; none: one a core"})
    tp: int = field(
        default=1, metadata={"help": "tensor parallel: processes (on GPUs: GPUs) that share the model, on this node"}
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda or cuda:N"})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "number format; int8: weights in bytes, all else float32, on a GPU bfloat16; fp8: on a GPU, "
            "weights in 8-bit floats, all else bfloat16; packed: on cpu, weights in the 4 or 8 bits that a GGUF file "
            "has, int8 where it has none; packed16: the same with activations rounded to 16 bits, not 8; auto: packed "
            "on cpu, bfloat16 elsewhere",
            "choices": ("auto", "packed", "packed16", "int8", "fp8", "float32", "bfloat16", "float16"),
        },
    )
    kv_dtype: str = field(
        default="auto",
        metadata={
            "help": "number format of KV; fp8: 8-bit floats (e4m3), half of bfloat16's memory, on a GPU of compute "
            "capability 8.9 or on cpu, slower there; auto: as activations",
            "choices": ("auto", "fp8"),
        },
    )
    attention: str | None = field(
        default=None, metadata={"help": "attention backend; none: what fits, on a GPU the fastest"}
    )
    pages: int | None = field(default=None, metadata={"help": "pages of KV; none: as --kv-memory-mib allows"})
    kv_memory_mib: int | None = field(
        default=None,
        metadata={"help": "MiB of KV where --pages is none; none: 1024 or an eighth of memory on cpu, half on a GPU"},
    )
    page_size: int = field(default=16, metadata={"help": "tokens in a page"})
    max_context: int | None = field(
        default=None,
        metadata={
            "help": "most tokens of a prompt and its output; none: as the model, and half of a pool that peers write to"
        },
    )
    max_batch_size: int = field(default=64, metadata={"help": "sequences computed in one step"})
    max_step_tokens: int = field(default=512, metadata={"help": "tokens computed in one step"})
    max_waiting: int = field(default=256, metadata={"help": "requests that wait; more are refused"})
    lease_default: float = field(default=30.0, metadata={"help": "seconds a reservation lives by default"})
    lease_max: float = field(default=600.0, metadata={"help": "longest lease in seconds"})
    labels: tuple[str, ...] = field(default=(), metadata={"help": "key=value for GetInfo; repeatable"})
    register: tuple[str, ...] = field(default=(), metadata={"help": "host:port of a router to join; may be repeated"})
    register_token: str | None = field(default=None, metadata={"help": "token of these routers", "secret": True})
    register_ca: Path | None = field(
        default=None, metadata={"help": "PEM roots of these routers; with it they are called by TLS"}
    )
    poison_pages: bool = field(default=False, metadata={"help": "fill freed pages with NaN, to find reads of them"})
    fault_points: tuple[str, ...] = field(
        default=(), metadata={"help": "where tests hold or break the engine", "hidden": True}
    )

    def __post_init__(self) -> None:
        ServerConfig.__post_init__(self)
        self.check_message_bytes()
        if not 1 <= len(self.name) <= MAX_NAME_CHARACTERS:
            raise ValueError(f"--name must have 1 to {MAX_NAME_CHARACTERS} characters")
        if self.kvtransfer is not None:
            try:
                split_address(self.kvtransfer)
            except ValueError as error:
                raise ValueError(f"--kvtransfer: {error}") from None
        self._check_counts()
        if self.max_context is not None and self.max_context < 2:
            raise ValueError("--max-context must be at least 2")
        if not 0 < self.lease_default <= self.lease_max:
            raise ValueError("--lease-default must be above 0 and at most --lease-max")
        self._check_register()
        if self.dtype in ("packed", "packed16") and self.device != "cpu":
            raise ValueError(f"--dtype {self.dtype} needs --device cpu")
        if self.dtype == "fp8" and self.device == "cpu":
            raise ValueError("--dtype fp8 needs a GPU")
        if any("=" not in label for label in self.labels):
            raise ValueError("--labels must be key=value")
        if self.fault_points and os.environ.get(TESTING_VARIABLE) != "1":
            raise ValueError("--fault-points is for tests only")
        try:
            _ = self.faults
        except ValueError as error:
            raise ValueError(f"--fault-points: {error}") from None

    @property
    def faults(self) -> ScriptedFaults:
        """What --fault-points says is to happen; nothing unless this is a test."""
        return ScriptedFaults.parse(",".join(self.fault_points))

    @property
    def label_map(self) -> dict[str, str]:
        """The labels by key."""
        return dict(label.split("=", 1) for label in self.labels)

    @property
    def kv_dtype_name(self) -> str:
        """The number format of KV."""
        return "float8_e4m3" if self.kv_dtype == "fp8" else self.dtype_name

    @property
    def dtype_name(self) -> str:
        """The number format of activations, and of weights too unless they have a form of their own."""
        if self.dtype == "auto" or self.dtype in _QUANTISED:
            return "float32" if self.device == "cpu" else "bfloat16"
        return self.dtype

    @property
    def weight_form(self) -> WeightForm:
        """How linear layers keep their weights."""
        if self.dtype == "auto" and self.device == "cpu":
            return WeightForm.PACKED
        return _QUANTISED.get(self.dtype, WeightForm.EXACT)

    @property
    def num_threads(self) -> int:
        """The threads in force."""
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def kvtransfer_tls(self) -> ClientTls | None:
        """How to reach the KV transfer service; the engine shows its own certificate. None: in clear text."""
        return ClientTls(self.kvtransfer_ca, self.tls_cert, self.tls_key) if self.kvtransfer_ca is not None else None

    @property
    def register_tls(self) -> ClientTls | None:
        """How to reach routers; the engine shows its own certificate. None: in clear text."""
        return ClientTls(self.register_ca, self.tls_cert, self.tls_key) if self.register_ca is not None else None

    def _check_register(self) -> None:
        for router in self.register:
            try:
                split_address(router)
            except ValueError as error:
                raise ValueError(f"--register: {error}") from None
        # What is bound to every address has none to tell.
        if self.register and self.advertise is None and split_address(self.listen)[0] in _WILDCARDS:
            raise ValueError("--register needs --advertise where --listen is every address")

    def _check_counts(self) -> None:
        for flag, value in (
            ("--threads", self.threads),
            ("--tp", self.tp),
            ("--pages", self.pages),
            ("--kv-memory-mib", self.kv_memory_mib),
            ("--page-size", self.page_size),
            ("--max-batch-size", self.max_batch_size),
            ("--max-step-tokens", self.max_step_tokens),
            ("--max-waiting", self.max_waiting),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be at least 1")
