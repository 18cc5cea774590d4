"""Ranks, device, precision and every collective: the only file that imports accelerate."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from trainer.device import Device
from trainer.errors import RunEnd, UserError
from trainer.peers import PeerFailed, Peers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer.config import Precision


T = TypeVar("T")


class Runtime(Device):
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
        super().__init__(self._accelerator.device)
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.local_world_size: int = int(os.environ.get("LOCAL_WORLD_SIZE") or self.world_size)
        self.precision: Precision = precision
        self.scaler: torch.amp.GradScaler | None = self._accelerator.scaler
        self._check(deterministic)
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

    @property
    def gradients_are_buckets(self) -> bool:
        """Whether gradients are views of the memory that DDP averages over the ranks, and have to stay there."""
        return self.world_size > 1

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
