"""The ``esper`` command. Everything heavy is imported by the subcommand that needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from esper.errors import EsperError
from esper.experiences_command import add_experiences
from esper.index_command import add_ask, add_index
from esper.learn_command import add_learn

__all__ = ["main", "print_error"]

_USER_ERROR = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        arguments: Of the command line, without the program's name.

    Returns:
        Exit status: 0, 2 for a mistake of the user, 130 after Ctrl-C, else what the subcommand says.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["train"]:
            # Hydra reads this command line by its own rules, --help included.
            from esper.train import main as train

            return train(arguments[1:])
        return _dispatch(_parser().parse_args(arguments))
    except EsperError as error:
        if os.environ.get("ESPER_DEBUG"):
            raise
        print_error(error)
        return _USER_ERROR
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output (head, less) has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def print_error(error: EsperError) -> None:
    """Say what went wrong, without the traceback."""
    print(f"esper: {error}", file=sys.stderr)
    print("(set ESPER_DEBUG=1 for the traceback)", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="esper", description="Networks that grow while they train.", allow_abbrev=False
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "train",
        help="train with growth and its controls; takes Hydra overrides, -m sweeps, `esper train --help` lists",
    )
    compare = commands.add_parser("compare", help="put several runs into one table, paired by seed")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a sweep's folder")
    report = commands.add_parser("report", help="draw a run's figure and table again")
    report.add_argument("run", metavar="RUN", help="run folder")
    report.add_argument("--out", metavar="FILE", help="where to put the figure (png, svg, pdf)")
    watch = commands.add_parser("watch", help="follow a running training from another terminal")
    watch.add_argument("target", nargs="?", help="run id or its beginning, or an ipc:// or tcp:// address")
    watch.add_argument("--once", action="store_true", help="print one complete picture and exit")
    watch.add_argument(
        "--keys", default="", metavar="FOLDER", help="CURVE keys, for an address that wants them"
    )
    serve = commands.add_parser("serve", help="decide for many training runs at once, over tcp:// or ipc://")
    serve.add_argument(
        "--config",
        default="default",
        metavar="NAME",
        help="a file of conf/service, or a .yaml file of your own",
    )
    serve.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of the service"
    )
    _add_keys(commands.add_parser("keys", help="make and show the keys that anything beyond loopback needs"))
    export = commands.add_parser("export", help="turn a checkpoint's grown network into plain PyTorch")
    export.add_argument("checkpoint", type=Path, metavar="CKPT", help="a Lightning checkpoint")
    export.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="file to write: .pt, .onnx or .safetensors; a folder with --pretrained",
    )
    export.add_argument("--model", metavar="MODULE:CLASS", help="class of your own LightningModule")
    export.add_argument(
        "--input-shape", type=_shape, metavar="N,N,...", help="shape of one float sample, without the batch"
    )
    export.add_argument(
        "--pretrained",
        action="store_true",
        help="write a model of transformers as a larger one of its own class, for from_pretrained",
    )
    add_experiences(
        commands.add_parser("experiences", help="look into a store of decisions and outcomes, or export it")
    )
    add_index(commands.add_parser("index", help="bring files into a store of passages, or keep up with them"))
    add_ask(
        commands.add_parser(
            "ask", help="show the passages of a store that a question finds, with their places"
        )
    )
    add_learn(commands.add_parser("learn", help="learn the policy that decides about growth"))
    doctor = commands.add_parser(
        "doctor",
        help="tell what can grow in a model, what cannot and why, what conflicts, and what growth could cost",
        description="Exits with 0 if something can grow and nothing conflicts, with 1 if not, with 2 after a mistake.",
    )
    doctor.add_argument(
        "model", metavar="MODULE:CLASS", help="a LightningModule, an nn.Module, or what makes one"
    )
    doctor.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of its constructor"
    )
    doctor.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="[NAME=]N,N,...[:DTYPE]",
        help="shape of an argument of forward, the batch first; by default example_input_array, or a batch of "
        "train_dataloader",
    )
    doctor.add_argument(
        "--trainer",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the trainer to look at",
    )
    doctor.add_argument("--json", action="store_true", help="print all of it as one object")
    bench = commands.add_parser("bench", help="run a benchmark; without a name, list them")
    bench.add_argument("name", nargs="?", metavar="NAME")
    bench.add_argument("--json", action="store_true", help="print one flat object, figure name -> number")
    bench.add_argument("--seeds", type=int, metavar="N", help="repeats, where the benchmark has them")
    bench.add_argument("--quick", action="store_true", help="a short form, where the benchmark has one")
    bench.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any option of the benchmark"
    )
    return parser


def _add_keys(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action, text in (
        ("create", "make a pair of keys in a new folder"),
        ("show", "print this machine's public key, and whom it trusts"),
        ("allow", "let the holder of a public key connect to this machine"),
        ("trust", "connect from this machine to the service with this public key alone"),
    ):
        parser = actions.add_parser(action, help=text)
        parser.add_argument("folder", metavar="FOLDER")
        if action in ("allow", "trust"):
            parser.add_argument("key", metavar="KEY", help="a public key, or a .key file")
        if action == "allow":
            parser.add_argument("name", metavar="NAME", help="whose it is")


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _dispatch(options: argparse.Namespace) -> int:
    if options.version:
        from importlib.metadata import version

        print(f"esper {version('esper')}")
        return 0
    if options.command is None:
        _parser().print_help()
        return 0
    if options.command == "compare":
        from esper.report import compare

        _print(compare(options.runs))
    elif options.command == "report":
        from esper.report import report

        made = report(options.run, options.out)
        for table in (made.table, made.rewards):
            if table is not None:
                _print(table)
        print(made.figure)
    elif options.command == "watch":
        from esper.watch import watch

        return watch(options.target, keys=options.keys, once=options.once)
    elif options.command == "serve":
        from esper.tamiyo.service.command import serve

        return serve(options.config, options.set)
    elif options.command == "keys":
        from esper.oona.keys_command import keys_command

        print(keys_command(options.action, options.folder, **_given(options, "key", "name")))
    elif options.command == "export":
        from esper.export_command import export_checkpoint

        print(
            export_checkpoint(
                options.checkpoint,
                options.out,
                model=options.model,
                input_shape=options.input_shape,
                pretrained=options.pretrained,
            )
        )
    elif options.command == "experiences":
        from esper.experiences_command import experiences

        return experiences(options)
    elif options.command == "index":
        from esper.index_command import index

        return index(options)
    elif options.command == "ask":
        from esper.index_command import ask

        return ask(options)
    elif options.command == "learn":
        from esper.learn_command import learn

        return learn(options)
    elif options.command == "doctor":
        from esper.doctor import doctor

        return doctor(
            options.model,
            settings=options.set,
            inputs=options.input,
            trainer=options.trainer,
            as_json=options.json,
        )
    else:
        from esper.benchmarks import bench

        return bench(
            options.name, as_json=options.json, seeds=options.seeds, quick=options.quick, settings=options.set
        )
    return 0


def _given(options: argparse.Namespace, *names: str) -> dict[str, str]:
    """Those of the options that the subcommand has."""
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def _print(table: object) -> None:
    from rich.console import Console

    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
