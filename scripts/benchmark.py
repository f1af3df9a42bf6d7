"""What a run costs on the machine at hand: its step, its loader, or both together."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# Before torch: CPU threads that wait by spinning lose most of their speed to any other process on their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports on itself
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import config, distributed
from utils.benchmark import configurations, end_to_end, loading, photographs, report, step, timing
from utils.device import choose_device
from utils.errors import UsageError

BENCHMARKS = {
    "step": (step.benchmark_step, "the whole training step, fed from memory"),
    "loader": (
        loading.benchmark_loader,
        "reading, decoding, cutting and coloring views, a part at a time and by workers",
    ),
    "end-to-end": (
        end_to_end.benchmark_end_to_end,
        "training from photographs to the step, beside the step fed from memory",
    ),
}
FLAGS = "After -- come flags of main_pretrain.py for all rows, as in: benchmark.py step --steps 50 -- --batch-size 64"


def main(argv: Sequence[str] | None = None) -> None:
    """The command: mistakes of the user end in one line and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own = argv[: argv.index("--")] if "--" in argv else argv
    options = parser().parse_args(own)
    try:
        benchmark(options, argv[len(own) + 1 :], shlex.join(["python", "scripts/benchmark.py", *argv]))
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error("stopped; nothing was written", status=130)


def benchmark(options: argparse.Namespace, flags: Sequence[str], command: str) -> None:
    """Measure what the options ask for, with these flags of main_pretrain.py for all rows."""
    report.check(options)
    found = configurations.configurations(options, flags)
    device = choose_device(found[0].args)
    if options.command != "loader":
        timing.resolve(options, device)
    measure, _purpose = BENCHMARKS[options.command]
    report.publish(measure(options, found), report.facts(command, device), options.out or [])


def parser() -> argparse.ArgumentParser:
    """All flags but those of main_pretrain.py."""
    whole = config.make_parser(__doc__ or "")
    commands = whole.add_subparsers(dest="command", required=True, metavar="step|loader|end-to-end")
    for name, (_measure, purpose) in BENCHMARKS.items():
        one = commands.add_parser(
            name,
            help=purpose,
            description=f"Measures {purpose}.",
            epilog=FLAGS,
            formatter_class=whole.formatter_class,
            allow_abbrev=False,
        )
        configurations.add_arguments(one.add_argument_group("rows"), methods=name != "loader")
        if name != "step":
            photographs.add_arguments(one.add_argument_group("images"))
        if name == "loader":
            loading.add_arguments(one.add_argument_group("loader"))
        else:
            timing.add_arguments(one.add_argument_group("timing"))
        if name == "step":
            step.add_arguments(one.add_argument_group("step"))
        report.add_arguments(one.add_argument_group("report"))
    return whole


if __name__ == "__main__":
    main()
