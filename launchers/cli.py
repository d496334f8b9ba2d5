"""The `attractor` command: its subcommands, and the one place where what went wrong becomes an exit code.

0 success; 2 refused (bad input: one paragraph on standard error, nothing was touched); 3, 4, 5 a run that had to stop
(see `attractor train --help`); 130 interrupted. A traceback is a bug. Subcommands import torch when they run, not before.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from launchers.commands import (
    bench,
    checkpoint,
    compare,
    data,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    import_,
    launch,
    plan,
    study,
    sweep,
    train,
)
from launchers.output import print_error, print_note
from pretrain.errors import Refusal, RunStopped

REFUSED = 2
INTERRUPTED = 130
ORDER = (
    "data",
    "plan",
    "train",
    "sweep",
    "study",
    "launch",
    "checkpoint",
    "evaluate",
    "generate",
    "export",
    "import",
    "compare",
    "bench",
    "doctor",
    "demo",
)


class Face(TyperGroup):
    """The group of all subcommands: turns refusals, stopped runs and Ctrl-C into messages and exit codes."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of a user's work."""
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Refusal as refusal:
            print_error(str(refusal))
            raise typer.Exit(REFUSED) from refusal
        except RunStopped as stopped:
            print_note(str(stopped))
            raise typer.Exit(stopped.code) from stopped
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(INTERRUPTED) from interrupt


app = typer.Typer(
    name="attractor",
    cls=Face,
    help="Pretrain Attractor Models, and the Transformers they must be compared with.\n\n"
    "From text to a trained model: [bold]attractor data prepare[/], then [bold]attractor plan[/], [bold]train[/] and "
    "[bold]evaluate[/]. New here? [bold]attractor demo[/] does all of it in minutes; [bold]attractor doctor[/] checks this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
app.command("plan", epilog=plan.EPILOG)(plan.command)
app.command("train", epilog=train.EPILOG)(train.command)
app.command("sweep", epilog=sweep.EPILOG)(sweep.command)
app.command("study", epilog=study.EPILOG)(study.command)
app.add_typer(launch.app, name="launch")
app.add_typer(checkpoint.app, name="checkpoint")
app.command("evaluate", epilog=evaluate.EPILOG)(evaluate.command)
app.command("generate", epilog=generate.EPILOG)(generate.command)
app.command("export", epilog=export.EPILOG)(export.command)
app.command("import", epilog=import_.EPILOG)(import_.command)
app.command("compare", epilog=compare.EPILOG)(compare.command)
app.add_typer(bench.app, name="bench")
app.command("doctor", epilog=doctor.EPILOG)(doctor.command)
app.command("demo", epilog=demo.EPILOG)(demo.command)


def main() -> None:
    """The console command."""
    app(prog_name="attractor")


if __name__ == "__main__":
    main()
