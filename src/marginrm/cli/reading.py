"""The command-line options that say how a checkpoint is read, in one place for every command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from marginrm.process_rewards import Aggregate, StepValue
from marginrm.reading import Activation, Bos, Eos, ReadingOptions

_PANEL = "How the checkpoint is read"


def _options(
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Allow code that comes with the checkpoint.", rich_help_panel=_PANEL),
    ] = False,
    bos: Annotated[
        Bos,
        typer.Option(help="BOS tokens: as apply_chat_template gives them, one, none, or two.", rich_help_panel=_PANEL),
    ] = "auto",
    eos: Annotated[
        Eos, typer.Option(help="EOS: as the template prints it, one at the end, or none added.", rich_help_panel=_PANEL)
    ] = "auto",
    label_weights: Annotated[
        str | None,
        typer.Option(
            help="Weights of the rows of a head with several: -1,1.", show_default=False, rich_help_panel=_PANEL
        ),
    ] = None,
    reward_tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a language model whose logits are the reward: yes,no or id:0.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    frame: Annotated[
        str | None,
        typer.Option(
            help="A reranker's text: the name of a known frame, such as qwen3-reranker, or a Jinja file.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    head_activation: Annotated[
        Activation | None,
        typer.Option(
            help="Activation between the layers of a head with two.", show_default=False, rich_help_panel=_PANEL
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="SEPARATOR|FORM",
            help="Text that ends each step, for a process reward model, or a form: qwen2.5-math-prm, math-shepherd, "
            "rlhflow-prm, skywork-o1-prm, trl-prm.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    step_value: Annotated[
        StepValue | None,
        typer.Option(help="A step's reward: sigmoid, or as it is.", show_default=False, rich_help_panel=_PANEL),
    ] = None,
    aggregate: Annotated[
        Aggregate | None,
        typer.Option(help="How steps make a response's reward.", show_default=False, rich_help_panel=_PANEL),
    ] = None,
) -> ReadingOptions:
    return ReadingOptions.parse(
        label_weights=label_weights,
        reward_tokens=reward_tokens,
        trust_remote_code=trust_remote_code,
        bos=bos,
        eos=eos,
        frame=frame,
        head_activation=head_activation,
        steps=steps,
        step_value=step_value,
        aggregate=aggregate,
    )


def takes_reading(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of the command line that make its parameter `reading`.

    Args:
        command: A typer command with a parameter `reading: ReadingOptions`.
    """
    given = inspect.signature(_options, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        reading = _options(**{name: arguments.pop(name) for name in given})
        command(**arguments, reading=reading)

    kept = [one for name, one in own.parameters.items() if name != "reading"]
    options = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in given.values()]
    run.__signature__ = own.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
    return run
