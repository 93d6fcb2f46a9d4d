"""The files of a checkpoint: its folder, its configuration, and the names and shapes of its weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from marginrm.errors import ModelError
from marginrm.loading.foreign import translated
from marginrm.manifest import revision_of

ADAPTER_CONFIG = "adapter_config.json"
# The order in which transformers looks for weights.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_LFS_POINTER = b"version https://git-lfs"
_VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
# What is fetched from the Hub besides weights; what lies in sub-folders are other exports of the same model.
_DESCRIPTIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a weight file.

    Attributes:
        file: The file.
        name: Its name in the file.
        shape: Its sizes.
    """

    file: Path
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint on this machine.

    Attributes:
        name: The folder or Hub name, as its user gave it.
        folder: Where its files are.
        commit: The commit on the Hub, or None for a folder.
        added: Weights from elsewhere that take the place of its own or are added to them, by name: an adapter's.
    """

    name: str
    folder: Path
    commit: str | None = None
    added: Mapping[str, StoredTensor] = field(default_factory=dict)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json, empty without one."""
        return self.json("config.json")

    @functools.cached_property
    def adapter(self) -> dict[str, Any]:
        """The content of adapter_config.json, empty without one."""
        return self.json(ADAPTER_CONFIG)

    @property
    def is_adapter(self) -> bool:
        """Whether this is an adapter alone, without the model it was trained on.

        TRL writes the value head of such an adapter to pytorch_model.bin, but no config.json.
        """
        return bool(self.adapter) and not (self.has("config.json") and self._first(_WEIGHTS))

    @property
    def class_name(self) -> str:
        """The class that config.json names, or an empty text."""
        return str((self.config.get("architectures") or [""])[0])

    @functools.cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The weights of the model, the adapter and the value head beside them, by name."""
        found: dict[str, StoredTensor] = {}
        for kinds in (_WEIGHTS, _ADAPTER_WEIGHTS, _VALUE_HEADS):
            first = self._first(kinds)
            for path in self._shards(first) if first else ():
                self._check_content(path)
                with translated(self.name, f"weights ({path.name})"):
                    found |= {name: StoredTensor(path, name, shape) for name, shape in _shapes(path).items()}
        return found | dict(self.added)

    def revision(self) -> str:
        """Returns the commit on the Hub, `hub:<commit>`, or a hash of the folder's content, which takes seconds to make."""
        return f"hub:{self.commit}" if self.commit else revision_of(self.folder)

    def read(self, name: str) -> Tensor:
        """Returns a weight in float32, on the CPU."""
        stored = self.tensors[name]
        with translated(self.name, f"weight {name}"):
            if stored.file.suffix == ".safetensors":
                with safe_open(stored.file, framework="pt") as file:
                    tensor: Tensor = file.get_tensor(stored.name)
                    return tensor.float()
            return _pickled(stored.file)[stored.name].float()

    def json(self, name: str) -> dict[str, Any]:
        """Returns the object that a JSON file holds, empty without the file."""
        value = self._parsed(name)
        if not isinstance(value, dict):
            raise ModelError(f"{self.folder / name} must hold a JSON object.")
        return value

    def json_list(self, name: str) -> list[dict[str, Any]]:
        """Returns the list of objects that a JSON file holds, empty without the file."""
        value = self._parsed(name) or []
        if not isinstance(value, list):
            raise ModelError(f"{self.folder / name} must hold a JSON list.")
        return [one for one in value if isinstance(one, dict)]

    def has(self, relative: str) -> bool:
        """Returns whether there is such a file."""
        return (self.folder / relative).is_file()

    def _parsed(self, name: str) -> Any:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} is not valid JSON: {error}.") from error

    def _check_content(self, path: Path) -> None:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ModelError(f"{path} is a Git LFS pointer, not the weights. Fetch them: git lfs pull.")

    def _first(self, names: tuple[str, ...]) -> Path | None:
        return next((self.folder / name for name in names if self.has(name)), None)

    def _shards(self, first: Path) -> list[Path]:
        if not first.name.endswith(".index.json"):
            return [first]
        names = sorted(set(self.json(first.name)["weight_map"].values()))
        missing = [name for name in names if not self.has(name)]
        if missing:
            raise ModelError(f"{self.name} lacks {missing[0]}, which {first.name} names. Fetch the checkpoint again.")
        return [self.folder / name for name in names]


def find_checkpoint(path: str | Path, revision: str | None = None, *, weights: bool = True) -> CheckpointFiles:
    """Finds a checkpoint's folder; a name on the Hub is fetched into the Hub's cache.

    Args:
        path: A folder or a name on the Hugging Face Hub.
        revision: Branch, tag or commit on the Hub.
        weights: Whether its weights are fetched from the Hub, too.

    Raises:
        ModelError: There is no such checkpoint.
    """
    folder = Path(path)
    if folder.is_dir():
        found = CheckpointFiles(str(path), folder)
        if not found.has("config.json") and not found.adapter:
            raise ModelError(
                f"{path} has neither config.json nor {ADAPTER_CONFIG}, so it is not a model folder. Give what "
                "save_pretrained wrote."
            )
        return found
    if folder.exists() or folder.is_absolute() or str(path).count("/") != 1:
        raise ModelError(
            f"{path}: no such folder, and not a name on the Hugging Face Hub (those are like owner/model)."
        )
    return _from_hub(str(path), revision, weights=weights)


def _from_hub(name: str, revision: str | None, *, weights: bool) -> CheckpointFiles:
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        with translated(name, "files"):
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=list(patterns),
                    ignore_patterns=["*/*.safetensors", "*/*.bin", "consolidated*"],
                )
            )

    if not weights:
        return CheckpointFiles(name, folder := fetch(*_DESCRIPTIONS), commit=folder.name)
    folder = fetch(*_DESCRIPTIONS, "*.safetensors")
    if not any(folder.glob("*.safetensors")):
        folder = fetch(*_DESCRIPTIONS, "*.bin")
    return CheckpointFiles(name, folder, commit=folder.name)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    content = _pickled(path)
    found = {name: tuple(value.shape) for name, value in content.items() if isinstance(value, Tensor)}
    if content and not found:
        raise ModelError(
            f"{path} holds {', '.join(map(str, list(content)[:4]))}, and no weights beside them. Save the weights alone "
            "(save_pretrained)."
        )
    return found


@functools.lru_cache(maxsize=2)
def _pickled(path: Path) -> Mapping[str, Tensor]:
    """Reads a .bin file; only tensors are unpickled, so no code in it can run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of before torch 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ModelError(
            f"{path} is not a valid file of weights, or holds other Python objects than tensors; those are not read, since "
            "they may run code. Save the checkpoint as safetensors (save_pretrained)."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a dictionary of weights.")
    return content
