"""AdamW with layer-wise learning rate decay for a ViT in detectron2."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn


def build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW for a detector.

    The learning rate is BASE_LR in all layers above the ViT, BASE_LR x LAYER_DECAY in its last block, and smaller by
    another factor LAYER_DECAY in each block below; the embeddings are below the first block. Norms and biases have the
    weight decay of their keys in SOLVER, position embeddings have none.
    """
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=lambda name: get_vit_lr_decay_rate(name, solver.LAYER_DECAY, cfg.MODEL.VIT.DEPTH),
        overrides={"pos_embed": {"weight_decay": 0.0}},
    )
    return maybe_add_gradient_clipping(cfg, torch.optim.AdamW(groups, lr=solver.BASE_LR))
