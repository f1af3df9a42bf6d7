"""Pre-training methods by name."""

import argparse

from models.gtsa import GTSA
from models.method import Method
from models.slotcon import SlotCon
from models.slotfa import SlotFA

METHODS: dict[str, type[Method]] = {"slotcon": SlotCon, "slotfa": SlotFA, "gtsa": GTSA}

__all__ = ["METHODS", "Method", "build_method"]


def build_method(args: argparse.Namespace) -> Method:
    """Build the method that `args.method` names, initialized from the current random state of torch."""
    return METHODS[args.method](args)
