"""What is learned: methods by name."""

import argparse

from models.slotcon import SlotCon
from models.slotfa import SlotFA
from models.method import Method

METHODS: dict[str, type[Method]] = {"slotcon": SlotCon, "slotfa": SlotFA}


def build_method(args: argparse.Namespace) -> Method:
    """The method that `args.method` names, freshly initialized from torch's current random state."""
    return METHODS[args.method](args)
