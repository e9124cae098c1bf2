"""Inference in bfloat16 beside float32, and devices without units for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from config_keys import SWIN, H, M, build, losses, picture, train_sample, with_values
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from tiny_nuclei_model import write_tiny_model
from torch import Tensor

from mask2former import SemanticSegmentorWithTTA
from mask2former.errors import UserError
from mask2former.modeling import InferenceSettings, precision
from mask2former.predictor import Predictor

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

KEY = f"{M}TEST.BFLOAT16"
MODELS: dict[str, dict[str, Any]] = {
    "R50": {},
    "Swin": SWIN,
    "MaskFormer": {
        f"{H}PIXEL_DECODER_NAME": "TransformerEncoderPixelDecoder",
        f"{M}TRANSFORMER_DECODER_NAME": "StandardTransformerDecoder",
        f"{M}TRANSFORMER_IN_FEATURE": "transformer_encoder",
    },
}


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has units for bfloat16; if not, it is merely slow here."""
    monkeypatch.setattr(precision, "_cpu_has_units", lambda: True)


def tensors_of(result: Any) -> Iterator[Tensor]:
    """All numbers of results, in order."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict | list | tuple):
        for part in result.values() if isinstance(result, dict) else result:
            yield from tensors_of(part)
    elif hasattr(result, "get_fields"):
        yield from tensors_of(result.get_fields())
    elif hasattr(result, "tensor"):
        yield result.tensor


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("tile_size", [0, 64])
@pytest.mark.parametrize("name", MODELS)
def test_results_are_close_to_those_of_float32(name: str, tile_size: int) -> None:
    values = {**MODELS[name], f"{M}TEST.TILE_SIZE": tile_size, f"{M}TEST.TILE_OVERLAP": 16}
    batch = [{**picture(), "height": 80, "width": 120}, picture(50, 70)]
    results = []
    for bfloat16 in (False, True):
        with torch.inference_mode():
            results.append(build({**values, KEY: bfloat16}).eval()(batch))
    assert all(x.dtype != torch.bfloat16 for x in tensors_of(results[1]))
    for plain, rounded in zip(*results, strict=True):
        assert plain.keys() == rounded.keys() == {"sem_seg", "panoptic_seg", "instances"}
        assert plain["instances"].get_fields().keys() == rounded["instances"].get_fields().keys()
        assert rounded["sem_seg"].dtype == rounded["instances"].scores.dtype == torch.float32
        differences = (plain["sem_seg"] - rounded["sem_seg"]).abs()
        assert 0 < differences.mean() < 0.03 * plain["sem_seg"].mean()
        best = min(len(plain["instances"]), 5)
        torch.testing.assert_close(
            rounded["instances"].scores[:best], plain["instances"].scores[:best], atol=0.01, rtol=0
        )


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("name", MODELS)
def test_what_is_in_bfloat16_and_what_is_not(name: str) -> None:
    model = build({**MODELS[name], KEY: True}).eval()
    seen: dict[str, Any] = {}
    for part in ("backbone", "sem_seg_head", "sem_seg_head.predictor.mask_embed"):
        model.get_submodule(part).register_forward_hook(lambda m, i, output, part=part: seen.__setitem__(part, output))
    with torch.inference_mode():
        model([picture()])
    if name != "Swin":  # its last operation is a norm, in float32
        assert {x.dtype for x in seen["backbone"].values()} == {torch.bfloat16}
    assert seen["sem_seg_head.predictor.mask_embed"].dtype == torch.bfloat16
    predictions = seen["sem_seg_head"]
    assert predictions.mask_features.dtype == torch.bfloat16
    masks = predictions.mask_logits(-1, 0)
    exact = torch.einsum(
        "qc,chw->qhw", predictions.mask_embeddings[-1, 0].double(), predictions.mask_features[0].double()
    )
    assert masks.dtype == torch.float32  # and not merely at the end
    torch.testing.assert_close(masks.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("units")
def test_training_stays_as_it_is() -> None:
    plain, with_key = build(), build({KEY: True})
    dtypes = set()
    for model in (plain, with_key):
        for part in (model.backbone, model.sem_seg_head.pixel_decoder.mask_features):
            part.register_forward_hook(lambda m, i, output: dtypes.update(x.dtype for x in tensors_of(output)))
    assert losses(plain) == losses(with_key)
    assert dtypes == {torch.float32}
    torch.manual_seed(0)
    sum(with_key([train_sample()]).values()).backward()
    assert {x.grad.dtype for x in with_key.parameters() if x.grad is not None} == {torch.float32}


def test_pixel_decoder_follows_autocast_to_bfloat16_in_inference_alone() -> None:
    """Under autocast of AMP training it is in float32, as published."""
    decoder = build().sem_seg_head.pixel_decoder
    features = {
        name: torch.randn(1, 16 << i, 32 >> i, 32 >> i) for i, name in enumerate(["res2", "res3", "res4", "res5"])
    }
    found = {}
    for training in (True, False):
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype), torch.no_grad():
                found[training, dtype] = decoder.train(training).forward_features(features)[0].dtype
    assert found.pop((False, torch.bfloat16)) == torch.bfloat16
    assert set(found.values()) == {torch.float32}


@pytest.mark.usefixtures("units")
def test_test_time_augmentation() -> None:
    values = {"TEST.AUG.MIN_SIZES": (48, 64), "TEST.AUG.MAX_SIZE": 96}
    means = []
    for bfloat16 in (False, True):
        model = build({**values, KEY: bfloat16}).eval()
        means.append(SemanticSegmentorWithTTA(with_values(values), model)([picture()])[0]["sem_seg"])
    assert means[1].dtype == torch.float32
    assert 0 < (means[0] - means[1]).abs().mean() < 0.01 * means[0].mean()


@pytest.mark.usefixtures("units")
def test_predictor(tmp_path: Path) -> None:
    files = write_tiny_model(tmp_path)
    image = picture()["image"]
    plain, rounded = (Predictor(*files, options=[KEY, value])(image)["sem_seg"] for value in ("False", "True"))
    assert rounded.dtype == torch.float32
    assert 0 < (plain - rounded).abs().mean() < 0.01 * plain.mean()


def test_lazy_config() -> None:
    assert instantiate(L(InferenceSettings)(bfloat16=True)).bfloat16
    assert not InferenceSettings().bfloat16


# ------------------------------------------------------------------------------------------------ devices


def cpu(monkeypatch: pytest.MonkeyPatch, torchs: list[str] | None, linuxs: list[str]) -> None:
    """A CPU that can do what torch (None: a version that can't be asked) and Linux list."""
    precision._cpu_has_units.cache_clear()
    if torchs is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(torchs, True), raising=False)
    monkeypatch.setattr(precision, "_linux_cpu_flags", lambda: linuxs)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test says of the CPU is not remembered."""
    yield
    precision._cpu_has_units.cache_clear()


@pytest.mark.parametrize("train", [False, True])
def test_refused_on_a_cpu_without_units(monkeypatch: pytest.MonkeyPatch, train: bool) -> None:
    cpu(monkeypatch, ["avx2", "avx512_f"], ["avx512_bf16"])
    model = build({KEY: True}).train(train)  # where it is to run isn't known before it runs
    with pytest.raises(UserError, match=r"TEST\.BFLOAT16 .* this CPU has none .*: set it to False$"):
        model([train_sample()])
    with torch.no_grad():
        assert build().eval()([picture()])


@pytest.mark.parametrize("unit", ["avx512_bf16", "amx_bf16", "bf16"])
@pytest.mark.parametrize("asked", ["torch", "Linux"])
def test_units_of_cpus(monkeypatch: pytest.MonkeyPatch, unit: str, asked: str) -> None:
    cpu(monkeypatch, ["fma3", unit] if asked == "torch" else None, ["fma", unit] if asked == "Linux" else [])
    precision.require_bfloat16(torch.device("cpu"))
    cpu(monkeypatch, ["fma3"] if asked == "torch" else None, ["fma", "bf16_like"])
    with pytest.raises(UserError):
        precision.require_bfloat16(torch.device("cpu"))


def test_list_of_linux_is_that_of_torch() -> None:
    if not hasattr(torch.cpu, "get_capabilities") or not Path("/proc/cpuinfo").is_file():
        pytest.skip("needs Linux and a torch with get_capabilities")
    capabilities = torch.cpu.get_capabilities()
    flags = precision._linux_cpu_flags()
    assert [unit in flags for unit in precision.CPU_UNITS] == [
        bool(capabilities.get(unit)) for unit in precision.CPU_UNITS
    ]


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, has_units in [((7, 5), False), ((8, 0), True), ((9, 0), True)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        if has_units:
            precision.require_bfloat16(device)
        else:
            with pytest.raises(UserError, match="Tesla T4 has none"):
                precision.require_bfloat16(device)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    precision.require_bfloat16(device)


@pytest.mark.parametrize(("macos", "has_units"), [(13, False), (14, True)])
def test_apple_gpus(monkeypatch: pytest.MonkeyPatch, macos: int, has_units: bool) -> None:
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device_type: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major, raising=False)
    assert precision._has_units(torch.device("mps")) == has_units


def test_other_devices_are_refused() -> None:
    with pytest.raises(UserError, match="this META has none"):
        precision.require_bfloat16(torch.device("meta"))
