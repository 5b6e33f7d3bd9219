"""Build command-line options from the dataclass fields that are declared with ``training.options.Option``."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from llmc_cli.training.options import Option


def with_options(*classes: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator for a command whose first parameters take one instance of each dataclass.

    On the command line each field of the dataclasses becomes an option. The command's other parameters stay.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        rest = list(inspect.signature(command).parameters.values())[len(classes) :]
        declared = [parameter(field) for cls in classes for field in dataclasses.fields(cls)]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            instances = [
                cls(**{field.name: field_value(field, values.pop(field.name)) for field in dataclasses.fields(cls)})
                for cls in classes
            ]
            command(*instances, **values)

        parameters = [*declared, *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in rest)]
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def parameter(field: "dataclasses.Field[Any]") -> inspect.Parameter:
    """Return the parameter from which typer creates the option of ``field``."""
    option: Option = field.metadata["option"]
    kind: Any = field.type
    default: Any = field.default
    minimum, maximum, metavar = option.min, option.max, "|".join(option.choices) or ("N" if kind is int else None)
    if option.zero_one:
        kind = int if isinstance(default, bool) else int | None
        default = None if default is None else int(default)
        minimum, maximum, metavar = 0, 1, "0|1"
    info = typer.Option(
        *option.names, rich_help_panel=option.panel, help=option.help, min=minimum, max=maximum, metavar=metavar,
        show_default=option.default_text or True,
    )  # fmt: skip
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def field_value(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """Convert a value from the command line to the type of ``field``."""
    return bool(value) if field.metadata["option"].zero_one and value is not None else value
