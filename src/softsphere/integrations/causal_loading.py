"""A saved model without its output layer, and the tensors of that layer."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["head_tensors", "load_below_head"]

_PREFIX = "lm_head."
_UNKNOWN = {
    "subfolder": "give the subfolder itself as folder",
    "gguf_file": "only safetensors files have the output layer",
    "key_mapping": "the tensors have the names of the model already",
}


def load_below_head(
    load: Callable[..., Any], folder: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Returns a model whose lm_head is still a plain layer, and what its loading found elsewhere.

    Args:
        load: `AutoModelForCausalLM.from_pretrained`.
        folder: where the model was saved.
        options: of load.

    Raises ValueError for options that cannot be followed, and for tensors outside the output layer
    that have another shape in the folder than in the model, unless ignore_mismatched_sizes is True.
    """
    for name, instead in _UNKNOWN.items():
        if options.get(name):
            raise ValueError(f"{name} cannot be given here, got {options[name]!r}; {instead}")
    ours = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    with _report_without_head():
        model, found = load(folder, **{**options, **ours})
    found = {
        name: type(keys)(key for key in keys if not _of_head(key)) for name, keys in found.items()
    }
    wrong = sorted(found["mismatched_keys"])
    if wrong and not options.get("ignore_mismatched_sizes"):
        listed = "; ".join(f"{key}: {saved} in {folder}, {made}" for key, saved, made in wrong)
        raise ValueError(
            f"the tensors of the saved model must have the shapes of the loaded one ({listed}); "
            "leave away the options that change the config, or give ignore_mismatched_sizes=True "
            "if these tensors are to begin with random numbers"
        )
    return model, found


def head_tensors(folder: Any, variant: str | None = None) -> dict[str, Tensor]:
    """Returns the tensors of the output layer of a saved model.

    Args:
        folder: where the model was saved.
        variant: that of `save_pretrained`.

    Raises ValueError for a folder without files of safetensors.
    """
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in _files(Path(folder), f".{variant}" if variant else ""):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is not a dict)
                if key.startswith(_PREFIX):
                    found[key.removeprefix(_PREFIX)] = tensors.get_tensor(key)
    return found


def _files(folder: Path, variant: str) -> list[Path]:
    """The files that transformers reads: a single one, or those that an index names."""
    single, index = (
        folder / f"model{variant}.safetensors",
        folder / f"model.safetensors.index{variant}.json",
    )
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(
            f"folder must have {single.name} or {index.name}, which save_pretrained writes, but "
            f"{folder} has neither"
        )
    names = json.loads(index.read_text("utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def _of_head(key: Any) -> bool:
    """Whether a name of a tensor, or a tuple that begins with it, is of the output layer."""
    name: str = key if isinstance(key, str) else key[0]
    return name.startswith(_PREFIX)


@contextmanager
def _report_without_head() -> Iterator[None]:
    """Leaves out the lines about the output layer in the report that transformers logs.

    The plain lm_head that is loaded first does not fit the tensors of the output layer.
    """
    from transformers.utils.logging import get_logger

    logger: logging.Logger = get_logger("transformers.modeling_utils")
    mine = threading.get_ident()

    def without_head(record: logging.LogRecord) -> bool:
        if record.thread != mine or record.funcName != "log_state_dict_report":
            return True
        lines = record.getMessage().split("\n")
        kept = [line for line in lines if not line.startswith(_PREFIX)]
        record.msg, record.args = "\n".join(kept), ()
        return any(" | " in line for line in kept[_first_row(kept) :])

    logger.addFilter(without_head)
    try:
        yield
    finally:
        logger.removeFilter(without_head)


def _first_row(lines: list[str]) -> int:
    """Where the rows of a report begin, after the line that separates them from the head."""
    return next((i + 1 for i, line in enumerate(lines) if "-+-" in line), 0)
