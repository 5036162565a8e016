"""What users name by import path: `module:name`, of an installed package or of a file in the working directory."""

import importlib
import os
import sys
from typing import Any


def import_object(path: str) -> Any:
    """
    The object that `module:name` names.

    Raises:
        `ValueError`: where there is no such module or name.
    """
    module_name, separator, name = path.partition(":")
    if not (module_name and separator and name):
        raise ValueError(f"{path!r} is no import path, expected module:name such as my_rewards:redness")
    if os.getcwd() not in sys.path and "" not in sys.path:  # as `python -m` has it
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):  # an import inside of it
            raise
        raise ValueError(f"{path}: there is no module {error.name!r}, in {os.getcwd()} or installed") from error
    if not hasattr(module, name):
        names = [found for found in vars(module) if not found.startswith("_")]
        raise ValueError(f"{path}: {module_name} has no {name!r}, but {names}")
    return getattr(module, name)
