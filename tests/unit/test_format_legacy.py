"""Pickles of two writers: read as data, exactly; and whatever tries to run, or to reach outside its file, is refused unrun."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats import legacy_pickle
from evalkit.dictionaries.formats.base import FORMATS, Place
from evalkit.errors import DictionaryError

HOAGYC, SAFETY = FORMATS.get("hoagyc"), FORMATS.get("ai_safety")
D, F = 8, 20


class Stored:
    """An object that pickles as one of the writers' classes."""

    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


@pytest.fixture
def writers() -> Iterator[dict[str, type]]:
    """The writers' classes, importable while a file is written and gone when it is read."""
    made: dict[str, type] = {}
    modules = {".".join(name.split(".")[:depth]) for name in legacy_pickle.CLASSES for depth in range(1, name.count(".") + 1)}
    for module in modules:
        sys.modules[module] = types.ModuleType(module)
    for name in legacy_pickle.CLASSES:
        module, cls = name.rsplit(".", 1)
        made[cls] = type(cls, (Stored,), {"__module__": module})
        setattr(sys.modules[module], cls, made[cls])
    yield made
    for module in modules:
        sys.modules.pop(module, None)


def saved(thing: Any, path: Path) -> Place:
    torch.save(thing, path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("autoencoders", "sparse_autoencoder")]:
        del sys.modules[name]
    return Place(path)


def tied_state(features: int = F, **changes: Any) -> dict[str, Any]:
    state = {
        "encoder": torch.randn(features, D) * 3,
        "encoder_bias": torch.randn(features) * 0.5,
        "norm_encoder": True,
        "n_feats": features,
        "activation_size": D,
        "center_trans": torch.zeros(D),
        "center_rot": torch.eye(D),
        "center_scale": torch.ones(D),
    }
    return {name: value for name, value in {**state, **changes}.items() if value is not ...}


def tied_reference(state: dict[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The writer's ``predict`` in float64: centre, encode, decode, uncentre."""
    trans, rot, scale = (state[name].double() for name in ("center_trans", "center_rot", "center_scale"))
    raw = state["encoder"].double()
    unit = raw / raw.pow(2).sum(1, keepdim=True).sqrt()
    encoder = unit if state["norm_encoder"] else raw
    codes, out = [], []
    for token in x.double():
        centred = (rot @ (token - trans)) * scale
        code = (encoder @ centred + state["encoder_bias"].double()).clamp(min=0)
        codes.append(code)
        out.append(rot.T @ ((unit.T @ code) / scale) + trans)
    return torch.stack(codes), torch.stack(out)


def same(dictionary: Dictionary, expected: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> None:
    codes, x_hat = expected
    assert 0.05 < (codes > 0).double().mean() < 0.95
    assert type(dictionary.encode(x)) is torch.Tensor
    torch.testing.assert_close(dictionary.encode(x).double(), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dictionary.reconstruct(x).double(), x_hat, rtol=1e-4, atol=1e-4)


# --- HoagyC ---


@pytest.mark.parametrize("features", [F, D])
def test_a_tied_sae_is_normalised_at_use(tmp_path: Path, writers: dict[str, type], features: int) -> None:
    state = tied_state(features)
    place = saved([(writers["TiedSAE"](**state), {"l1_alpha": 1e-3, "dict_size": features})], tmp_path / "learned_dicts.pt")
    assert HOAGYC.recognise(place) and not SAFETY.recognise(place)
    dictionary = HOAGYC.read(place)
    x = torch.randn(30, D) * 2
    assert dictionary.kind == "tied"
    same(dictionary, tied_reference(state, x), x)
    assert dictionary.details["writer"]["hyperparameters"] == {"l1_alpha": 1e-3, "dict_size": features}


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_later_pickle_protocols_are_read_too(tmp_path: Path, writers: dict[str, type], protocol: int) -> None:
    state, path = tied_state(), tmp_path / "sweep.pt"
    torch.save([(writers["TiedSAE"](**state), {})], path, pickle_protocol=protocol)
    assert HOAGYC.recognise(Place(path))
    x = torch.randn(30, D)
    same(HOAGYC.read(Place(path)), tied_reference(state, x), x)


def test_a_tied_sae_without_centring_attributes_is_an_older_one(tmp_path: Path, writers: dict[str, type]) -> None:
    state = tied_state()
    old = {name: value for name, value in state.items() if not name.startswith("center")}
    dictionary = HOAGYC.read(saved([(writers["TiedSAE"](**old), {})], tmp_path / "learned_dicts.pt"))
    x = torch.randn(30, D)
    same(dictionary, tied_reference(state, x), x)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"center_trans": torch.randn(D)}, "tied"),
        ({"norm_encoder": False}, "relu"),
        ({"center_scale": torch.rand(D) + 0.5, "center_trans": torch.randn(D)}, "relu"),
        ({"center_rot": torch.linalg.qr(torch.randn(D, D)).Q, "center_scale": torch.rand(D) + 0.5}, "relu"),
        ({"center_rot": torch.linalg.qr(torch.randn(D, D)).Q, "center_trans": torch.randn(D), "norm_encoder": False}, "relu"),
    ],
)
def test_centring_is_kept_or_folded_exactly(tmp_path: Path, writers: dict[str, type], changes: dict[str, Any], kind: str) -> None:
    state = tied_state(**changes)
    dictionary = HOAGYC.read(saved([(writers["TiedSAE"](**state), {})], tmp_path / "learned_dicts.pt"))
    x = torch.randn(30, D) * 2
    assert dictionary.kind == kind
    same(dictionary, tied_reference(state, x), x)


@pytest.mark.parametrize("features", [F, D])
def test_an_untied_sae_has_unit_decoder_rows_and_no_decoder_bias(tmp_path: Path, writers: dict[str, type], features: int) -> None:
    state = {
        "encoder": torch.randn(features, D),
        "decoder": torch.randn(features, D) * 4,
        "encoder_bias": torch.randn(features) * 0.5,
    }
    dictionary = HOAGYC.read(saved([(writers["UntiedSAE"](**state), {})], tmp_path / "learned_dicts.pt"))
    x = torch.randn(30, D)
    codes = (x.double() @ state["encoder"].double().T + state["encoder_bias"].double()).clamp(min=0)
    rows = state["decoder"].double()
    assert dictionary.kind == "relu" and dictionary.settings() == {"subtract_b_dec": False}
    same(dictionary, (codes, codes @ (rows / rows.norm(dim=1, keepdim=True))), x)


def test_a_topk_learned_dict(tmp_path: Path, writers: dict[str, type]) -> None:
    rows = torch.randn(F, D)
    state = {"dict": rows, "sparsity": 15, "n_feats": F, "activation_size": D}
    dictionary = HOAGYC.read(saved([(writers["TopKLearnedDict"](**state), {})], tmp_path / "learned_dicts.pt"))
    x = torch.randn(30, D)
    pre = x.double() @ rows.double().T
    keep = pre.topk(15).indices
    codes = torch.zeros_like(pre).scatter(-1, keep, pre.gather(-1, keep)).clamp(min=0)
    same(dictionary, (codes, codes @ rows.double()), x)


def test_a_sweep_is_listed_and_a_choice_beside_it_is_followed(tmp_path: Path, writers: dict[str, type]) -> None:
    states = [tied_state() for _ in range(3)]
    sweep = [(writers["TiedSAE"](**state), {"l1_alpha": 0.001 * i}) for i, state in enumerate(states)]
    place = saved(sweep, tmp_path / "learned_dicts.pt")
    with pytest.raises(DictionaryError, match=r"3 dictionaries: 0: TiedSAE l1_alpha = 0\.0; 1: .*0\.002") as caught:
        HOAGYC.read(place)
    assert "evalkit.json" in caught.value.fix
    x = torch.randn(30, D)
    for index in (0, 2):
        (tmp_path / "evalkit.json").write_text(json.dumps({"index": index}))
        dictionary = HOAGYC.read(Place(tmp_path))
        same(dictionary, tied_reference(states[index], x), x)
        assert dictionary.details["writer"]["index"] == index
    for wrong in (3, -1, "0", None):
        (tmp_path / "evalkit.json").write_text(json.dumps({"index": wrong}))
        with pytest.raises(DictionaryError, match="index"):
            HOAGYC.read(Place(tmp_path))


def test_a_row_of_zeros_is_a_dead_feature(tmp_path: Path, writers: dict[str, type]) -> None:
    state = tied_state()
    state["encoder"][3], state["encoder_bias"][3] = 0, -1
    dictionary = HOAGYC.read(saved([(writers["TiedSAE"](**state), {})], tmp_path / "learned_dicts.pt"))
    assert dictionary.encode(torch.randn(30, D))[:, 3].abs().max() == 0


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        ("TiedSAE", {"norm_encoder": ...}, "norm_encoder"),
        ("TiedSAE", {"encoder_bias": torch.zeros(F - 1)}, "encoder_bias"),
        ("TiedSAE", {"encoder": ...}, "encoder"),
        ("TiedSAE", {"center_rot": torch.eye(D + 1)}, "center_rot"),
        ("TiedSAE", {"center_scale": torch.zeros(D)}, "NaN or an infinity"),
        ("TiedSAE", {"encoder": torch.full((F, D), float("nan"))}, "NaN"),
        ("UntiedSAE", {"decoder": torch.randn(D, F)}, "decoder"),
        ("ReverseSAE", {}, "ReverseSAE"),
    ],
)
def test_objects_that_are_wrong_are_refused(
    tmp_path: Path, writers: dict[str, type], cls: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DictionaryError, match=message) as caught:
        HOAGYC.read(saved([(writers[cls](**tied_state(**changes)), {})], tmp_path / "learned_dicts.pt"))
    assert caught.value.where and caught.value.fix


# --- AI Safety Foundation ---


def safety_weights(features: int = F, components: int | None = None) -> OrderedDict[str, torch.Tensor]:
    lead = () if components is None else (components,)
    bias = torch.randn(*lead, D)
    return OrderedDict(
        {
            "tied_bias": bias,
            "pre_encoder_bias._bias_reference": bias,
            "encoder.weight": torch.randn(*lead, features, D),
            "encoder.bias": torch.randn(*lead, features) * 0.5,
            "decoder.weight": torch.randn(*lead, D, features) * 2,
            "post_decoder_bias._bias_reference": bias,
        }
    )


def safety_reference(weights: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    at = {name: (tensor[0] if weights["encoder.weight"].ndim == 3 else tensor).double() for name, tensor in weights.items()}
    codes = ((x.double() - at["tied_bias"]) @ at["encoder.weight"].T + at["encoder.bias"]).clamp(min=0)
    return codes, codes @ at["decoder.weight"].T + at["tied_bias"]


def pydantic_state(weights: Any, **config: Any) -> Any:
    """The writer's own pydantic classes, of which ``torch.save`` pickles instances."""
    from pydantic import BaseModel

    module = types.ModuleType("sparse_autoencoder.autoencoder.model")

    class SparseAutoencoderConfig(BaseModel, frozen=True):
        n_input_features: int
        n_learned_features: int
        n_components: int | None = None

    class SparseAutoencoderState(BaseModel, arbitrary_types_allowed=True):
        config: Any
        state_dict: Any

    for cls in (SparseAutoencoderConfig, SparseAutoencoderState):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    for name in ("sparse_autoencoder", "sparse_autoencoder.autoencoder"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[module.__name__] = module
    made = {"n_input_features": D, "n_learned_features": F, **config}
    return SparseAutoencoderState(config=SparseAutoencoderConfig(**made), state_dict=weights)


@pytest.mark.parametrize(("features", "components"), [(F, None), (D, None), (F, 1)])
def test_a_model_state_is_a_relu_autoencoder_with_a_tied_bias(tmp_path: Path, features: int, components: int | None) -> None:
    weights = safety_weights(features, components)
    place = saved(pydantic_state(weights, n_learned_features=features, n_components=components), tmp_path / "sae-model-state.pt")
    assert SAFETY.recognise(place) and not HOAGYC.recognise(place)
    dictionary = SAFETY.read(place)
    x = torch.randn(30, D) * 2
    assert dictionary.kind == "relu"
    same(dictionary, safety_reference(weights, x), x)
    assert dictionary.details["writer"]["n_learned_features"] == features


def test_a_state_dict_with_module_metadata_and_parameters(tmp_path: Path) -> None:
    weights = safety_weights()
    weights["tied_bias"] = torch.nn.Parameter(weights["tied_bias"])
    weights._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    x = torch.randn(30, D)
    with torch.no_grad():
        same(SAFETY.read(saved(pydantic_state(weights), tmp_path / "a.pt")), safety_reference(weights, x), x)


def test_a_bare_state_dict_of_one_component(tmp_path: Path) -> None:
    weights, x = safety_weights(), torch.randn(30, D)
    place = saved(dict(weights), tmp_path / "component.pt")
    assert SAFETY.recognise(place)
    same(SAFETY.read(place), safety_reference(weights, x), x)


def test_states_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    def refused(weights: Any, message: str, **config: Any) -> None:
        with pytest.raises(DictionaryError, match=message) as caught:
            SAFETY.read(saved(pydantic_state(weights, **config), tmp_path / "sae-model-state.pt"))
        assert caught.value.where and caught.value.fix

    refused(safety_weights(components=3), "3 components", n_components=3)
    refused(safety_weights(components=3), "n_components = None")
    refused(safety_weights(), "n_components = 2", n_components=2)
    refused(safety_weights(), "n_learned_features = 21", n_learned_features=21)
    refused({**safety_weights(), "post_decoder_bias._bias_reference": torch.zeros(D)}, "post_decoder_bias")
    refused({**safety_weights(), "decoder.weight": torch.randn(F, D)}, "decoder.weight")
    refused({}, "encoder.weight")


# --- what must not run ---


def archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A file as torch.save lays it out, with any pickle and any storages."""
    with zipfile.ZipFile(path, "w", options.get("compression", zipfile.ZIP_STORED)) as out:
        for name in options.get("pickles", ("archive/data.pkl",)):
            out.writestr(name, pickled)
        for key, data in (storages or {}).items():
            out.writestr(f"archive/data/{key}", data)
        if "byteorder" in options:
            out.writestr("archive/byteorder", options["byteorder"])
    return path


def valid(**parts: bytes) -> bytes:
    """A pickle that looks like a sweep: [(TiedSAE, {...})], with ``inside`` pickled among its state."""
    return (
        b"\x80\x02]cautoencoders.learned_dict\nTiedSAE\n)\x81}(X\x04\x00\x00\x00sizeK\x08"
        b"X\x06\x00\x00\x00extras" + parts.get("inside", b"N") + b"ub}X\x02\x00\x00\x00l1G?\x00\x00\x00\x00\x00\x00\x00s\x86a."
    )


def executing(marker: Path) -> dict[str, bytes]:
    """Pickle fragments, each of which would create ``marker`` under an unpickler that follows it."""
    touch = f"touch {marker}".encode()
    code = f"open({str(marker)!r}, 'w').close()".encode()
    system = os.system.__module__.encode()
    return {
        "reduce os.system": b"c" + system + b"\nsystem\n(S'" + touch + b"'\ntR",
        "builtins.eval": b"cbuiltins\neval\nX" + struct.pack("<I", len(code)) + code + b"\x85R",
        "__builtin__.exec": b"c__builtin__\nexec\nX" + struct.pack("<I", len(code)) + code + b"\x85R",
        "instance opcode": b"(S'" + touch + b"'\ni" + system + b"\nsystem\n",
        "object opcode": b"(c" + system + b"\nsystem\nS'" + touch + b"'\no",
        "stack global": b"X\x05\x00\x00\x00posixX\x06\x00\x00\x00system\x93X" + struct.pack("<I", len(touch)) + touch + b"\x85R",
        "new object": b"csubprocess\nPopen\n]X\x05\x00\x00\x00touchaX"
        + struct.pack("<I", len(str(marker)))
        + str(marker).encode()
        + b"a\x85\x81",
        "attribute chain": b"\x8c\x08builtins\x8c\x0cgetattr.open\x93N\x85R",
        "torch.load": b"ctorch\nload\nX" + struct.pack("<I", len(str(marker))) + str(marker).encode() + b"\x85R",
        "extension registry": b"\x82\x01",
    }


@pytest.mark.parametrize("name", sorted(executing(Path("x"))))
@pytest.mark.parametrize("nested", [True, False])
def test_nothing_in_a_pickle_runs(tmp_path: Path, name: str, nested: bool) -> None:
    marker = tmp_path / "ran"
    fragment = executing(marker)[name]
    data = valid(inside=fragment) if nested else b"\x80\x02" + fragment + b"."
    path = archive(tmp_path / "learned_dicts.pt", data)
    with pytest.raises(DictionaryError) as caught:
        HOAGYC.read(Place(path))
    assert not marker.exists()
    assert caught.value.where == str(path) and "nothing in it was run" in str(caught.value)
    assert HOAGYC.recognise(Place(path))  # by its name, so that the reason is what the user is told
    HOAGYC.recognise(Place(path)), SAFETY.recognise(Place(path)), legacy_pickle.globals_of(path)
    assert not marker.exists()


def test_the_fragments_would_run_under_an_ordinary_unpickler(tmp_path: Path) -> None:
    """Otherwise the test above proves nothing."""
    for name in ("reduce os.system", "builtins.eval", "__builtin__.exec", "instance opcode", "object opcode", "stack global"):
        marker = tmp_path / name.replace(" ", "_")
        pickle.loads(b"\x80\x02" + executing(marker)[name] + b".")
        assert marker.exists(), name


def test_objects_whose_own_hooks_would_run_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Poisoned:
        def __reduce_ex__(self, protocol: Any) -> Any:
            return os.system, (f"touch {marker}",)

    buffer = io.BytesIO()
    torch.save([(Poisoned(), {"l1_alpha": 1e-3})], buffer)
    path = tmp_path / "learned_dicts.pt"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(DictionaryError, match=r"asks for 'posix\.system'"):
        HOAGYC.read(Place(path))
    assert not marker.exists()


def test_state_with_the_names_of_hooks_is_only_kept(tmp_path: Path) -> None:
    poisoned = b"\x80\x02cautoencoders.learned_dict\nTiedSAE\n)\x81}(U\x0c__setstate__U\x02hiU\t__class__K\x01ub}(U\x01aK\x02ub."
    found = legacy_pickle.load(archive(tmp_path / "a.pt", poisoned))
    assert type(found) is legacy_pickle.Record
    assert found.state == {"__setstate__": "hi", "__class__": 1, "a": 2}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ctorch._utils\n_rebuild_tensor_v2\n}(U\x0c__defaults__Nub.", "sets attributes of 'torch._utils._rebuild_tensor_v2'"),
        (b"ctorch._utils\n_rebuild_tensor_v2\nN}(U\x08__code__Nu\x86b.", "sets attributes of 'torch._utils._rebuild_tensor_v2'"),
        (b"cautoencoders.learned_dict\nTiedSAE\n}(U\x01aK\x01ub.", "sets attributes of 'autoencoders.learned_dict.TiedSAE'"),
        (b"]}(U\x01aK\x01ub.", "cannot be followed: AttributeError: 'list'"),
        (b"cautoencoders.learned_dict\nTiedSAE\n)R.", "calls 'autoencoders.learned_dict.TiedSAE'"),
        (b"cautoencoders.learned_dict\nTiedSAE\nK\x01\x85\x81.", "none of the writer's classes"),
        (b"cautoencoders.learned_dict\nTiedSAE\n)\x81K\x01K\x02\x86b.", "sets attributes of 'autoencoders.learned_dict.TiedSAE'"),
        (b"cautoencoders.learned_dict\nTiedSAE\n)\x81(K\x01K\x02\x86b.", "cannot be followed: UnpicklingError"),
        (b"cautoencoders.learned_dict\nTiedSAE.__init__\n.", "asks for 'autoencoders.learned_dict.TiedSAE.__init__'"),
        (b"ctorch\nFloatStorage\nK\x04\x85R.", "calls 'torch.FloatStorage'"),
        (b"ccollections\nOrderedDict\n)\x81.", "none of the writer's classes"),
        (b"U\x02hiK\x01a.", "cannot be followed: AttributeError: 'str'"),
        (b"}(]K\x01u.", "cannot be followed: TypeError: unhashable type: 'list'"),
        (b"Pstorage\n.", "opcode PERSID"),
        (b"a.", "cannot be followed"),
        (b"j\xff\xff\xff\xff.", "cannot be followed"),
        (b"]r\xff\xff\xff\x7f.", "numbers an object 2147483647"),
        (b"]", "cannot be followed"),
        (b"", "cannot be followed"),
        (b"K\x01\x85(t.", None),
    ],
)
def test_opcodes_on_what_they_do_not_fit(tmp_path: Path, data: bytes, message: str | None) -> None:
    path = archive(tmp_path / "a.pt", b"\x80\x02" + data)
    if message is None:
        assert legacy_pickle.load(path) == ()
        return
    with pytest.raises(DictionaryError, match=message) as caught:
        legacy_pickle.load(path)
    assert caught.value.where and caught.value.fix


# --- tensors inside their storages ---


def tensor(offset: int, size: tuple[int, ...], stride: tuple[int, ...], count: int, kind: str = "FloatStorage") -> bytes:
    """A pickle of one tensor on storage 0, as torch.save writes it, with any numbers in it."""

    def integer(value: int) -> bytes:
        return b"I%d\n" % value

    def several(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(integer(value) for value in values) + b"t"

    pid = b"(U\x07storagectorch\n" + kind.encode() + b"\nU\x010U\x03cpu" + integer(count) + b"tQ"
    view = pid + integer(offset) + several(size) + several(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"tR."


NUMBERS = struct.pack("<12f", *range(12))


def test_views_are_read_with_their_offset_and_steps(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", tensor(2, (2, 3), (1, 3), 12), {"0": NUMBERS}, byteorder="little")
    assert torch.equal(legacy_pickle.load(path), torch.tensor([[2.0, 5, 8], [3, 6, 9]]))
    path = archive(tmp_path / "b.pt", tensor(0, (0, 3), (3, 1), 0), {"0": b""})
    assert legacy_pickle.load(path).shape == (0, 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (b"}(U\x01aK\x01ub.", "sets attributes of a tensor"),
        (b"(K\x00K\x01K\x02K\x03tb.", "sets attributes of a tensor"),
        (b"K\x00K\x01s.", "sets numbers of a tensor"),
        (b"K\x00a.", "cannot be followed: AttributeError"),
        (b")R.", "cannot be followed: TypeError"),
    ],
)
def test_a_tensor_is_not_changed_by_its_pickle(tmp_path: Path, more: bytes, message: str) -> None:
    path = archive(tmp_path / "a.pt", tensor(0, (2,), (1,), 12)[:-1] + more, {"0": NUMBERS})
    with pytest.raises(DictionaryError, match=message):
        legacy_pickle.load(path)


def test_storage_types_and_shared_storages(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    things = {
        "double": whole.double(),
        "half": whole.half(),
        "bfloat16": whole.bfloat16(),
        "long": whole.long(),
        "bool": whole > 2,
        "part": whole[2:].reshape(2, 2).T,
        "again": whole,
        "size": whole.shape,
        "device": torch.device("cuda:1"),
        "set": {1, 2},
    }
    path = tmp_path / "a.pt"
    torch.save(things, path)
    found = legacy_pickle.load(path)
    for name in ("double", "half", "bfloat16", "long", "bool", "part", "again"):
        assert torch.equal(found[name], things[name]) and found[name].dtype == things[name].dtype, name
    assert (found["size"], found["device"], found["set"]) == ((6,), "cuda:1", {1, 2})


@pytest.mark.parametrize(
    ("pickled", "storage", "message"),
    [
        (tensor(0, (12, 12), (0, 1), 12), NUMBERS, "reaches beyond its storage"),
        (tensor(0, (1 << 60, 1 << 60), (0, 0), 12), NUMBERS, "reaches beyond its storage"),
        (tensor(1, (12,), (1,), 12), NUMBERS, "reaches beyond its storage"),
        (tensor(0, (4,), (4,), 12), NUMBERS, "reaches beyond its storage"),
        (tensor(-1, (2,), (1,), 12), NUMBERS, "negative"),
        (tensor(3, (2,), (-1,), 12), NUMBERS, "negative"),
        (tensor(0, (-2,), (1,), 12), NUMBERS, "negative"),
        (tensor(0, (2, 2), (1,), 12), NUMBERS, "not declared as a view"),
        (tensor(0, (2,), (1,), 13), NUMBERS, "declares 13 numbers but holds 48 bytes"),
        (tensor(0, (2,), (1,), 11), NUMBERS, "more than it may have"),
        (tensor(0, (2,), (1,), -1), NUMBERS, "declared with -1 numbers"),
        (tensor(0, (2,), (1,), 1 << 70), NUMBERS, "declares 1180591620717411303424 numbers but holds 48"),
        (tensor(0, (2,), (1,), 12, "UntypedStorage"), NUMBERS, "UntypedStorage"),
        (tensor(0, (2,), (1,), 12), None, "'data/0' cannot be read"),
        (tensor(0, (2,), (1,), 12).replace(b"U\x010", b"U\x0a../../evil"), NUMBERS, "not by a number"),
    ],
)
def test_tensors_that_reach_outside_their_storage_are_refused(
    tmp_path: Path, pickled: bytes, storage: bytes | None, message: str
) -> None:
    path = archive(tmp_path / "a.pt", pickled, {} if storage is None else {"0": storage})
    with pytest.raises(DictionaryError, match=message) as caught:
        legacy_pickle.load(path)
    assert caught.value.where == str(path) and caught.value.fix


def test_archives_that_are_not_as_torch_writes_them_are_refused(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(DictionaryError, match=message):
            legacy_pickle.load(path)
        assert legacy_pickle.globals_of(path) == frozenset()

    refused(archive(tmp_path / "a.pt", valid(), compression=zipfile.ZIP_DEFLATED), "compressed")
    refused(archive(tmp_path / "b.pt", valid(), pickles=("a/data.pkl", "b/data.pkl")), "holds 2")
    refused(archive(tmp_path / "c.pt", valid(), pickles=()), "holds 0")
    (tmp_path / "d.pt").write_bytes(valid())
    refused(tmp_path / "d.pt", "not the zip form")
    torch.save({"a": torch.ones(2)}, tmp_path / "e.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "e.pt", "not the zip form")
    whole = archive(tmp_path / "f.pt", valid()).read_bytes()
    (tmp_path / "f.pt").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "f.pt", "not the zip form")
    big = archive(tmp_path / "g.pt", tensor(0, (2,), (1,), 12), {"0": NUMBERS}, byteorder="big")
    with pytest.raises(DictionaryError, match="big-endian"):
        legacy_pickle.load(big)


@pytest.mark.parametrize("made", [b"h\x01h\x02\x85R", b"h\x03h\x02\x85R"], ids=["OrderedDict", "set"])
def test_copies_of_copies_are_bounded(tmp_path: Path, made: bytes) -> None:
    """20 kB that would come to 50 million items."""
    pairs = b"".join(b"M" + struct.pack("<H", n) + (b"N\x86" if made[1] == 1 else b"") for n in range(10_000))
    functions = b"ccollections\nOrderedDict\nq\x010cbuiltins\nset\nq\x030"
    data = b"\x80\x02" + functions + b"](" + pairs + b"eq\x02" + made * 5000 + b"."
    with pytest.raises(DictionaryError, match="copies more than"):
        legacy_pickle.load(archive(tmp_path / "a.pt", data))


def test_members_that_lie_over_one_another_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", b"\x80\x02].", {"0": b"12345678" * 500, "1": b"x"})
    assert legacy_pickle.load(path) == []
    data = path.read_bytes()
    name = b"archive/data/1"
    entry = data.rindex(name) - 46  # its line of the central directory
    path.write_bytes(data[: entry + 20] + struct.pack("<II", 1 << 16, 1 << 16) + data[entry + 28 :])
    with pytest.raises(DictionaryError, match="lie over one another"):
        legacy_pickle.load(path)


def test_any_cut_or_flipped_byte_gives_a_clear_error_or_the_same_data(tmp_path: Path) -> None:
    data = valid()
    [(record, settings)] = legacy_pickle.load(archive(tmp_path / "a.pt", data))
    assert (record.state, settings) == ({"size": 8, "extras": None}, {"l1": 2.0**-15})
    for position in range(2, len(data)):
        for byte in (0, data[position] ^ 1, 0x52):
            path = archive(tmp_path / "a.pt", data[:position] + bytes([byte]) + data[position + 1 :])
            try:
                legacy_pickle.load(path)
            except DictionaryError as error:
                assert error.where and error.fix
