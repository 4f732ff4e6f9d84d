"""The models that ship inside the package, and the names they go by on the command line."""

from __future__ import annotations

from pathlib import Path

from collegium.errors import ModelError

__all__ = ["SHIPPED", "model_folder"]

_HERE = Path(__file__).parent
SHIPPED = {"demo": _HERE / "demo", "demo-dense": _HERE / "demo-dense"}
"""Name -> folder: the demo MoE language model, and the dense model of the same active size it is compared with."""


def model_folder(name: str | Path) -> Path:
    """The folder of a model: one of `SHIPPED` by its name, or a path as it is, which wins where it holds a model.

    Raises:
        ModelError: there is no such folder; the message lists the shipped names.
    """
    # `collegium demo` leaves a folder of that name, which is no model
    if str(name) in SHIPPED and not (Path(name) / "config.json").is_file():
        return SHIPPED[str(name)]
    folder = Path(name)
    if not folder.is_dir():
        raise ModelError(
            f"no model folder {str(name)!r}; give a folder with a config.json, or one of {', '.join(SHIPPED)}"
        )
    return folder
