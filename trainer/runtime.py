"""Ranks, device, precision and every collective: the only file that imports accelerate."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from trainer.errors import RunEnd, UserError
from trainer.peers import PeerFailed, Peers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer.config import Precision


T = TypeVar("T")


class Runtime:
    """This process among its peers; raises UserError for what this machine cannot do."""

    def __init__(self, precision: Precision, deterministic: bool, collective_timeout_seconds: float = 600):
        if deterministic:
            # cuBLAS reads this when CUDA starts, so it has to be set before anything asks for a device.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)
        # Deterministic mode would fill every new tensor first, in case something reads what nobody wrote.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        torch.backends.cudnn.benchmark = False
        # fp32 means fp32, on GPUs too: not TF32. By torch's older settings alone: those of its newer API do not mix
        # with them, and torch.compile reads these.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

        has_accelerator = torch.accelerator.is_available()
        timeout = timedelta(seconds=collective_timeout_seconds)
        # On a GPU the host's collectives, one a step, are to notice a lost rank before NCCL ends the process for it.
        device_timeout = timeout + timedelta(minutes=1) if has_accelerator else timeout
        if not has_accelerator and precision == "fp16":
            raise UserError(
                "fp16 needs a GPU: without one the Accelerator would silently compute in fp32",
                "train.precision",
                "use fp32 or bf16 here",
            )
        # Without cpu=True, two processes on a machine without a GPU become two independent rank-0 mains.
        try:
            self._accelerator = Accelerator(
                mixed_precision={"fp32": "no"}.get(precision, precision),
                cpu=not has_accelerator,
                kwargs_handlers=[
                    # Buckets of 25 MB would make 140 collectives of SD 1.5's gradients.
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True, bucket_cap_mb=100),
                    InitProcessGroupKwargs(timeout=device_timeout),
                ],
            )
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise PeerFailed(
                f"the ranks did not find each other within {device_timeout.total_seconds():g} s; "
                f"train.collective_timeout_seconds makes them wait longer ({str(error).splitlines()[0]})"
            ) from None
        self._timeout_seconds = collective_timeout_seconds
        self.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.local_world_size: int = int(os.environ.get("LOCAL_WORLD_SIZE") or self.world_size)
        self.precision: Precision = precision
        self.scaler: torch.amp.GradScaler | None = self._accelerator.scaler
        self._check(deterministic)
        self._beside: torch.cuda.Stream | None = None  # for copies of the state
        self._copied: torch.cuda.Event | None = None  # of the newest copy, if steps have not waited for it yet
        # Flags and gathered objects live on the host: waiting for them never waits for the GPU's queue.
        self._host_group, self._peers = None, None
        if self.world_size > 1:
            self._host_group = _host_group(timeout)
            self._peers = Peers(self.rank, self.world_size, collective_timeout_seconds)

    def _check(self, deterministic: bool) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.world_size:
            raise UserError(
                f"the launcher started {launched} processes, but this one sees {self.world_size}",
                "the launch command",
                "without a GPU use accelerate_configs/cpu.yaml; `MULTI_CPU` and `--cpu` start one process",
            )
        on_gpu = self.device.type == "cuda"
        if on_gpu and self.precision == "bf16" and not self.has_bf16:
            raise UserError(
                f"{torch.cuda.get_device_name()} has no bf16 arithmetic", "train.precision", "use fp16 or fp32 here"
            )
        if on_gpu and deterministic and os.environ["CUBLAS_WORKSPACE_CONFIG"] not in (":4096:8", ":16:8"):
            raise UserError(
                f"CUBLAS_WORKSPACE_CONFIG={os.environ['CUBLAS_WORKSPACE_CONFIG']} is not deterministic",
                "the environment",
                "export CUBLAS_WORKSPACE_CONFIG=:4096:8",
            )

    @property
    def has_bf16(self) -> bool:
        """Whether the device is a GPU that computes in bf16, and not by way of fp32."""
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line for people, from rank 0 alone."""
        if self.is_main:
            print(line, flush=True)

    def idle_gpus(self) -> int:
        """GPUs of this machine that no rank of this run uses."""
        return max(0, torch.cuda.device_count() - self.local_world_size) if self.device.type == "cuda" else 0

    def device_facts(self) -> dict[str, Any]:
        """What only a running torch knows of the device, for env.json."""
        on_gpu = self.device.type == "cuda"
        return {
            "device": str(self.device),
            "torch_threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if on_gpu else None,
            "fp32_products": torch.get_float32_matmul_precision(),
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "gpu_names": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_gpu else [],
        }

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on this device, wrapped for autocast and for the averaging of gradients over ranks."""
        model = self._accelerator.prepare_model(model)
        wrapped = isinstance(model, torch.nn.parallel.DistributedDataParallel)
        assert wrapped == (self.world_size > 1), f"{self.world_size} ranks got a {type(model).__name__}"
        if wrapped:
            # Buffers are constants here. Not as an argument: from torch 2.13 on that has another name.
            model.broadcast_buffers = False
        return model

    def sync_gradients_if(self, last: bool, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Within it, backward averages gradients over ranks only if this is the `last` micro batch of the step."""
        return contextlib.nullcontext() if last else self._accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, scaled by the fp16 scaler if there is one."""
        self._accelerator.backward(loss)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The run's compute precision, for forwards outside the prepared model."""
        return self._accelerator.autocast()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the fp16 scale; nothing in other precisions."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks, in place; queued on the device, without waiting for it."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank, the same answer on all."""
        return bool(self.max(flag))

    def max(self, value: int) -> int:
        """The largest `value` of any rank, the same answer on all."""
        if self.world_size == 1:
            return value
        values = torch.tensor([value], dtype=torch.int32)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._host_group)
        return int(values.item())

    def sum_modulo(self, values: list[int]) -> list[int]:
        """Each of `values` summed over the ranks, modulo 2**64, the same answer on all."""
        sums = torch.tensor([_signed(value) for value in values], dtype=torch.int64)
        if self.world_size > 1:
            dist.all_reduce(sums, group=self._host_group)  # overflows as two's complement does
        return [value % 2**64 for value in sums.tolist()]

    def gather(self, item: Any) -> list[Any]:
        """The `item` of every rank, in rank order, on all ranks."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self._host_group)
        return items

    def from_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, on all ranks; the RunEnd it raises there is raised on all.

        The others wait as long as it takes, and no longer than the time-out for a rank 0 that gives no sign of life.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            with self._peers.working() if self._peers else contextlib.nullcontext():
                try:
                    outcome[0] = action()
                except RunEnd as error:
                    outcome[1] = error
        elif self._peers:
            self._peers.wait_for_main(self._timeout_seconds)
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0, group=self._host_group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def blame(self, error: BaseException, step: int) -> BaseException:
        """The error itself if this rank is where it began; else the end that names the rank and its reason.

        `step` is the number of steps done. Every rank that fails comes here, alone and at once.
        """
        return error if self._peers is None else self._peers.explain(error, step)

    def watching(
        self, step: Callable[[], int], lost: Callable[[PeerFailed], None]
    ) -> contextlib.AbstractContextManager[None]:
        """Within it, a thread ends this process by `lost` if a rank is silent and the main thread is stuck."""
        return self._peers.watching(step, lost) if self._peers else contextlib.nullcontext()

    def seed_dropout(self, seed: int) -> None:
        """Make layers that draw from the device's own generator (nn.Dropout) depend on `seed` alone."""
        if self.device.type == "cuda":
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
        elif self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds every backend there might be: 0.3 ms
        else:
            torch.manual_seed(seed)

    @property
    def gradients_are_buckets(self) -> bool:
        """Whether gradients are views of the memory that DDP averages over the ranks, and have to stay there."""
        return self.world_size > 1

    @property
    def queues_steps(self) -> bool:
        """Whether the host runs ahead of its device, which has to have work queued to stay busy."""
        return self.device.type == "cuda"

    def on_its_way(self, values: Tensor) -> Callable[[], Tensor]:
        """Gives `values` on the host, once they are there: waits for what was queued up to now, for nothing later."""
        if self.device.type != "cuda":
            return lambda: values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)  # from torch's own store of such memory
        host.copy_(values, non_blocking=True)
        there = torch.cuda.Event()
        there.record()

        def arrived() -> Tensor:
            there.synchronize()
            return host

        return arrived

    @contextlib.contextmanager
    def copying(self) -> Iterator[Callable[[], None]]:
        """Within it copies to the host are queued beside the steps; what it gives waits for them, in any thread.

        Whoever changes what is copied calls `finish_copies` before.
        """
        if self.device.type != "cuda":
            yield lambda: None
            return
        self._beside = self._beside or torch.cuda.Stream()
        self._beside.wait_stream(torch.cuda.current_stream())
        self._copied = torch.cuda.Event()
        with torch.cuda.stream(self._beside):
            yield self._copied.synchronize
            self._copied.record()

    def finish_copies(self) -> None:
        """Let the device change nothing before the copies are done; the host goes on."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def forget_peak_memory(self) -> None:
        """From now on `memory` has the peak of what follows."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):  # Linux alone has it
            Path("/proc/self/clear_refs").write_text("5")

    def memory(self) -> dict[str, int]:
        """Bytes that this rank has held at most: of the GPU, with what was reserved, or of the process without one."""
        if self.device.type == "cuda":
            return {
                "peak_memory_bytes": torch.cuda.max_memory_allocated(),
                "reserved_memory_bytes": torch.cuda.max_memory_reserved(),
            }
        with contextlib.suppress(OSError, IndexError, ValueError):  # some sandboxes leave the line out
            text = Path("/proc/self/status").read_text()
            return {"peak_memory_bytes": 1024 * int(text.partition("VmHWM:")[2].split(maxsplit=1)[0])}
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_memory_bytes": peak if sys.platform == "darwin" else 1024 * peak}

    @property
    def may_hang_at_its_end(self) -> bool:
        """Whether leaving the process group would wait for a rank that no longer answers: NCCL does."""
        return self.world_size > 1 and self.device.type == "cuda"

    def close(self) -> None:
        """Leave the process group, so that another run can start in this process."""
        from accelerate.state import AcceleratorState

        self._peers = None
        gc.collect()  # a wrapped model that outlived its process group would end the process with an abort
        self._host_group = None
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]


def _signed(value: int) -> int:
    """The number of 64 bits with a sign that has the low bits of `value`."""
    return (value + 2**63) % 2**64 - 2**63


def _host_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "this rank is not in the group of all ranks"
    return group
