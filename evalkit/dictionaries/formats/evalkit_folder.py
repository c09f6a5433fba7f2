"""evalkit's own folders: weights.safetensors and dictionary.json; see ``storage`` for the layout."""

from __future__ import annotations

from pathlib import Path

from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats.base import FORMATS, Format, Place
from evalkit.dictionaries.registry import DICTIONARIES
from evalkit.dictionaries.storage import CARD, load_dictionary, save_dictionary


class EvalkitFolder(Format):
    """Every kind of dictionary, exact in every bit, hash-checked."""

    name = "evalkit"
    title = "evalkit: weights.safetensors + dictionary.json"

    def recognise(self, place: Place) -> bool:
        """Whether ``dictionary.json`` is there."""
        return (place.folder / CARD).is_file()

    def read(self, place: Place) -> Dictionary:
        """The saved dictionary; see ``storage.load_dictionary``."""
        return load_dictionary(place.folder)

    @property
    def writes(self) -> tuple[str, ...]:  # type: ignore[override]  # every kind there is, known once all are imported
        """Every kind."""
        return tuple(DICTIONARIES.names())

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        """See ``storage.save_dictionary``."""
        save_dictionary(dictionary, folder)


FORMATS.register("evalkit")(EvalkitFolder())
