"""The verbs, as a table: a help page needs no import of what a verb needs, and torch is loaded only to train."""

from __future__ import annotations

from dataclasses import dataclass, field

from cyclopts import App, Group, Parameter

from kitaeru import __version__
from kitaeru.cli.help import Formatter
from kitaeru.i18n import N_, tr


@dataclass(frozen=True)
class Verb:
    """A command: its function as `module:name` (imported when called), or the verbs inside it."""

    name: str
    help: str
    example: str
    target: str = ""
    inside: tuple[Verb, ...] = field(default=())


VERBS: tuple[Verb, ...] = (
    Verb(
        "quickstart",
        N_("Fine-tune the bundled Japanese model on bundled data: a first look that needs no GPU and no network."),
        "kitaeru quickstart",
        "kitaeru.cli.quickstart:run",
    ),
    Verb(
        "train",
        N_("Plan, then train: a recipe, or a model and data."),
        "kitaeru train recipe.yaml",
        "kitaeru.cli.train:run",
    ),
    Verb(
        "launch",
        N_("Write the job file of a scheduler (Slurm, Kubernetes, SkyPilot) that trains a recipe on several hosts."),
        'kitaeru launch --on slurm recipe.yaml --nodes 2 --gpus "2x RTX A5000" -o job.sbatch',
        "kitaeru.cli.launch:run",
    ),
    Verb(
        "plan",
        N_("Show every way to train a model on a machine, ranked, with memory, speed and reasons."),
        'kitaeru plan elyza/Llama-3-ELYZA-JP-8B --gpus "2x RTX A5000"',
        "kitaeru.cli.plan:run",
    ),
    Verb(
        "models",
        N_("Show which known models a machine can train, how, and how fast."),
        'kitaeru models --gpus "2x RTX A5000"',
        "kitaeru.cli.models:run",
    ),
    Verb(
        "doctor",
        N_("Say what this machine is, what is wrong with it, and what to type to mend it."),
        "kitaeru doctor",
        "kitaeru.cli.doctor:run",
    ),
    Verb(
        "bench",
        N_("Show how fast this machine was measured to be; --calibrate measures it."),
        "kitaeru bench --calibrate",
        "kitaeru.cli.bench:run",
    ),
    Verb(
        "monitor",
        N_("Follow a run from another terminal: progress, devices, alarms."),
        "kitaeru monitor runs/my-run",
        "kitaeru.cli.monitor:run",
    ),
    Verb(
        "report",
        N_("Write the page that shows what a run did."),
        "kitaeru report runs/my-run",
        "kitaeru.cli.report:run",
    ),
    Verb(
        "advise",
        N_("Write the optimisation report: today, what is wrong, what this machine can do, what to type."),
        'kitaeru advise --gpus "2x RTX A5000" --ram 128GB',
        "kitaeru.cli.advise:run",
    ),
    Verb(
        "export",
        N_("Write a run's adapter, or its base with the adapter merged in, as a folder that other programs open."),
        "kitaeru export runs/my-run --to merged -o my-model",
        "kitaeru.cli.export:run",
    ),
    Verb(
        "quantize",
        N_("Write a copy of a model in 4 or 8 bits."),
        "kitaeru quantize elyza/Llama-3-ELYZA-JP-8B --to 4bit -o elyza-8b-4bit",
        "kitaeru.cli.quantize:run",
    ),
    Verb("chat", N_("Talk to a model or to what a run made."), "kitaeru chat runs/my-run", "kitaeru.cli.chat:run"),
    Verb(
        "data",
        N_("Look at data."),
        "kitaeru data check my.jsonl",
        inside=(
            Verb(
                "check",
                N_("Show what the trainer will see, and what is wrong with it."),
                "kitaeru data check my.jsonl",
                "kitaeru.cli.data:check",
            ),
        ),
    ),
    Verb(
        "recipe",
        N_("Show, explain and check recipes."),
        "kitaeru recipe show recipe.yaml",
        inside=(
            Verb(
                "show",
                N_("Check a recipe and show every value in force, with where it came from."),
                "kitaeru recipe show recipe.yaml --set train.epochs=2",
                "kitaeru.cli.recipe:show",
            ),
            Verb(
                "explain",
                N_("Explain a field or a section; without one, list them all."),
                "kitaeru recipe explain train.learning_rate",
                "kitaeru.cli.recipe:explain",
            ),
            Verb(
                "schema",
                N_("Print the JSON schema, for an editor."),
                "kitaeru recipe schema -o recipe.schema.json",
                "kitaeru.cli.recipe:schema",
            ),
            Verb(
                "presets",
                N_("List the presets and what they set."),
                "kitaeru recipe presets",
                "kitaeru.cli.recipe:presets",
            ),
        ),
    ),
)


def build() -> App:
    """The whole command line, in the language in force."""
    app = App(
        name="kitaeru",
        help=tr("Fine-tune large language models, Japanese ones first, on the GPUs you own."),
        help_epilogue=_epilogue("kitaeru train recipe.yaml", everywhere=True),
        help_format="plaintext",
        help_formatter=Formatter(),
        version=f"kitaeru {__version__}",
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(negative_iterable=()),
        group_commands=Group(tr("Commands"), sort_key=0),
        group_arguments=Group(tr("Arguments"), sort_key=1),
        group_parameters=Group(tr("Options"), sort_key=2),
    )
    app["--help"].help = tr("Show this page.")
    app["--version"].help = tr("Show the version.")
    for number, verb in enumerate(VERBS):
        _add(app, verb, number)
    return app


def _add(app: App, verb: Verb, number: int) -> None:
    text, epilogue = tr(verb.help), _epilogue(verb.example)
    if not verb.inside:
        app.command(verb.target, name=verb.name, help=text, sort_key=number, help_epilogue=epilogue)
        return
    group = App(name=verb.name, help=text, sort_key=number, help_epilogue=epilogue)
    app.command(group)
    for inner_number, inner in enumerate(verb.inside):
        _add(group, inner, inner_number)


def _epilogue(example: str, *, everywhere: bool = False) -> str:
    lines = [tr("Example: {example}", example=example)]
    if everywhere:
        lines.append(tr("Everywhere: --lang ja|en chooses the language, --debug shows where an error came from."))
    return "\n".join(lines)


def called(words: list[str]) -> tuple[str, tuple[str, ...]]:
    """The command that the words of a command line lead to, and the verbs that may follow it."""
    command, verbs = "kitaeru", VERBS
    for word in words:
        verb = next((verb for verb in verbs if verb.name == word), None)
        if verb is None:
            break
        command, verbs = f"{command} {word}", verb.inside
    return command, tuple(verb.name for verb in verbs)
