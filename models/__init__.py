"""What is learned: methods by name."""

import argparse

from torch import nn

from models.slotcon import SlotCon

METHODS: dict[str, type[nn.Module]] = {"slotcon": SlotCon}


def build_method(args: argparse.Namespace) -> nn.Module:
    """The method that `args.method` names, freshly initialised from torch's current random state."""
    return METHODS[args.method](args)
