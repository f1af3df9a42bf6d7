"""The pieces of a run, put together."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from utils import distributed
from utils.device import loader_workers
from models.method import Method
from utils.config import Plan


@dataclass
class Run:
    """What a run is made of: what was asked, what follows from it, and what learns."""

    args: argparse.Namespace
    plan: Plan
    device: torch.device
    method: Method
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    notes: list[str]
    """What a user should know of how it runs."""

    @property
    def facts(self) -> dict[str, Any]:
        """All arguments, and what they met; stands in every checkpoint."""
        return {**vars(self.args), "images": self.plan.images, "processes": distributed.world_size()}

    def describe(self) -> str:
        """What the run is, in a few lines."""
        args, plan, method = self.args, self.plan, self.method
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        moments = 2 if args.optimizer == "adamw" else 1
        weights = sum(tensor.numel() * tensor.element_size() for tensor in method.state_dict().values())
        alone = args.device == "cpu" and distributed.world_size() > 1
        facts = {
            "method": f"{args.method}, {args.arch}, output stride {args.output_stride}",
            "images": f"{plan.images} of {args.dataset} in {args.data_dir}",
            "device": f"{distributed.world_size()} x {args.device}, mixed precision {args.amp}"
            + (", batch norm of each process on its own (synchronizing it needs GPUs)" if alone else ""),
            "compiled": "no" if not args.compile else "with CUDA graphs" if args.cuda_graphs else "yes",
            "workers": f"{loader_workers(args.num_workers)} for each process",
            "effective batch": f"{plan.effective_batch} = {plan.batch_size} over all processes x {plan.accum_steps}",
            "learning rate": f"{plan.peak_lr:g} = {args.base_lr:g} x {plan.effective_batch} / 256, {args.optimizer}",
            "steps": f"{plan.total_steps} = {args.epochs} epochs x {plan.steps_per_epoch}",
            "parameters": f"{trained / 1e6:.1f} M trained",
            "checkpoint size": f"{(weights + 4 * moments * trained) / 2**20:.0f} MiB",
        }
        if "num_prototypes" in args:
            facts["prototypes"] = f"{args.num_prototypes}"
        return "\n".join(f"{name:<16}  {fact}" for name, fact in facts.items())
