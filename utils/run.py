"""The objects that make up a run."""

import argparse
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from utils import distributed
from utils.config import TrainingPlan
from utils.device import loader_workers

MethodT = TypeVar("MethodT", bound=nn.Module)


@dataclass
class Run(Generic[MethodT]):
    """Arguments, plan, device, method, optimizer and gradient scaler of a run."""

    args: argparse.Namespace
    plan: TrainingPlan
    device: torch.device
    method: MethodT
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    notes: list[str]
    """Messages for the user about how the run is executed."""

    @property
    def metadata(self) -> dict[str, Any]:
        """All arguments, and the numbers of images and processes; saved in every checkpoint."""
        return {**vars(self.args), "images": self.plan.num_images, "processes": distributed.world_size()}

    def describe(self) -> str:
        """Summarize the run in a few lines."""
        args, plan, method = self.args, self.plan, self.method
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        moments = 2 if args.optimizer == "adamw" else 1
        weights = sum(tensor.numel() * tensor.element_size() for tensor in method.state_dict().values())
        has_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in method.modules())
        local_norm = has_norm and args.device == "cpu" and distributed.world_size() > 1
        lines = {
            "method": f"{args.method}, {args.arch}, stride {method.encoder_q.stride}",
            "images": f"{plan.num_images} of {args.dataset} in {args.data_dir}",
            "device": f"{distributed.world_size()} x {args.device}, mixed precision {args.amp}"
            + (", batch norm not synchronized (that needs GPUs)" if local_norm else ""),
            "compiled": "no" if not args.compile else "with CUDA graphs" if args.cuda_graphs else "yes",
            "workers": f"{loader_workers(args.num_workers)} per process",
            "effective batch": f"{plan.effective_batch} = {plan.batch_size} over all processes x {plan.accum_steps}",
            "learning rate": f"{plan.peak_lr:g} = {args.base_lr:g} x {plan.effective_batch} / 256, {args.optimizer}",
            "steps": f"{plan.total_steps} = {args.epochs} epochs x {plan.steps_per_epoch}",
            "parameters": f"{trained / 1e6:.1f} M trained",
            "checkpoint size": f"{(weights + 4 * moments * trained) / 2**20:.0f} MiB",
        }
        return "\n".join(f"{name:<16}  {value}" for name, value in lines.items())
