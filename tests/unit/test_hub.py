"""Names on the hub, without a network: what is asked for, and what is said when it cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evalkit.dictionaries import hub
from evalkit.dictionaries.hub import Address, address, chosen, find, from_release
from evalkit.dictionaries.loading import load_dictionary
from evalkit.dictionaries.relu import ReLU
from evalkit.dictionaries.storage import save_dictionary
from evalkit.errors import AssetError, DictionaryError

FILES = [
    "README.md", "config.json", "layer_1/width_16k/params.npz", "layer_1/width_16k/extra/more.npz", "layer_1/cfg.json",
    "layer_2/width_16k/params.npz", "trainer_0/ae.pt", "trainer_0/config.json", "trainer_0/checkpoints/ae_10.pt",
]  # fmt: skip


def test_an_address_is_taken_apart() -> None:
    assert address("a/b") == Address("a/b", "")
    assert address("a/b@v1/c/d.pt") == Address("a/b", "c/d.pt", "v1")
    with pytest.raises(DictionaryError, match="not a name on the hub"):
        address("only-one-part")


def test_only_the_files_of_the_folder_are_fetched() -> None:
    assert chosen(FILES, "layer_1/width_16k") == [
        "layer_1/cfg.json",
        "layer_1/width_16k/extra/more.npz",
        "layer_1/width_16k/params.npz",
    ]
    assert chosen(FILES, "trainer_0/checkpoints/ae_10.pt") == ["trainer_0/checkpoints/ae_10.pt", "trainer_0/config.json"]
    assert chosen(FILES, "") == ["README.md", "config.json"]


def test_a_path_that_exists_is_a_path_and_not_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find("owner/repo").path == Path("owner/repo")
    assert find("owner/typo").path == Path("owner/typo")  # its folder exists: a mistyped path, not a hub name
    assert find("no-slash-at-all").path == Path("no-slash-at-all")


class FakeHub:
    """A repository in a folder of this machine, instead of the hub."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []

    def list_repo_files(self, repository: str, revision: str | None = None) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())

    def snapshot_download(self, repository: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        self.asked = list(allow_patterns or [])
        return str(self.root)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (4, 6), "b_enc": (6,), "W_dec": (6, 4), "b_dec": (4,)}
    dictionary = ReLU({name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()})
    save_dictionary(dictionary, tmp_path / "repo" / "saes" / "first")
    fake = FakeHub(tmp_path / "repo")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


def test_a_hub_name_is_fetched_and_read(served: FakeHub) -> None:
    assert load_dictionary("hub:owner/name/saes/first").kind == "relu"
    assert served.asked == ["saes/first/dictionary.json", "saes/first/weights.safetensors"]
    assert load_dictionary("owner/name/saes/first").kind == "relu"


def test_a_folder_that_is_not_there_names_the_near_miss(served: FakeHub) -> None:
    with pytest.raises(DictionaryError) as caught:
        load_dictionary("hub:owner/name/saes/frist")
    assert "did you mean 'saes/first'?" in str(caught.value)
    with pytest.raises(DictionaryError, match="no weights at the root"):
        load_dictionary("hub:owner/name")


def test_no_network_is_one_clear_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    transport = next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError")
    assert not issubclass(transport, OSError)  # otherwise the client's own errors are not tested here

    class Unreachable:
        def list_repo_files(self, *_: object, **__: object) -> list[str]:
            raise transport("no route to host")

    def nothing_cached(*_: object, **__: object) -> str:
        raise OSError("not cached")

    monkeypatch.setattr("huggingface_hub.HfApi", Unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing_cached)
    with pytest.raises(DictionaryError) as caught:
        load_dictionary("hub:owner/name/folder")
    assert "no route to host" in caught.value.what
    assert caught.value.where == "hub:owner/name/folder"


@pytest.mark.parametrize(
    "error", [ImportError("Using SOCKS proxy, but a package is missing"), AttributeError("SOCKS"), KeyError("SOCKS")]
)
def test_whatever_the_hubs_client_raises_is_one_clear_message(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi", fails)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(DictionaryError, match="SOCKS") as caught:
        load_dictionary("hub:owner/name/folder")
    assert "ALL_PROXY" in caught.value.fix


def test_a_socks_proxy_can_be_used() -> None:
    import httpx

    with httpx.Client(proxy="socks5://127.0.0.1:9") as client, pytest.raises(httpx.ConnectError):
        client.get("http://hub.invalid/")


def test_saelens_names_are_looked_up_in_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = tmp_path / "directory.yaml"
    listing.write_text(
        json.dumps(
            {"toy-res": {"repo_id": "lab/toy", "saes": [{"id": "blocks.1.hook", "path": "layer_1"}, {"id": "root", "path": "."}]}}
        )
    )
    monkeypatch.setattr("evalkit.assets.install.path", lambda name: {hub.DIRECTORY: listing}[name])
    assert from_release("toy-res/blocks.1.hook").address == Address("lab/toy", "layer_1")
    assert from_release("toy-res/root").address == Address("lab/toy", "")
    with pytest.raises(DictionaryError, match="no release 'toy-rse'") as caught:
        from_release("toy-rse/blocks.1.hook")
    assert "did you mean 'toy-res'?" in caught.value.fix
    with pytest.raises(DictionaryError) as caught:
        from_release("toy-res/blocks.2.hook")
    assert "did you mean 'blocks.1.hook'?" in caught.value.fix


def test_without_the_directory_the_command_that_installs_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALKIT_HOME", str(tmp_path))
    with pytest.raises(AssetError) as caught:
        find("saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert caught.value.fix == "evalkit assets install saelens-directory"


@pytest.mark.assets
def test_the_real_directory_has_the_best_known_release() -> None:
    found = from_release("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert found.address.repository.lower().endswith("gpt2-small-saes-reformatted")
    assert found.address.inside == "blocks.8.hook_resid_pre"
    assert found.listing.overrides == {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    assert found.listing.model == "gpt2-small"
    assert from_release("gpt2-small-mlp-tm/blocks.0.hook_mlp_out").listing.scale == pytest.approx(1.0493, abs=1e-4)
