"""The decoders' parts against other people's code, and the published contract for a user's own parts."""

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_model
from detectron2.structures import Instances
from test_modeling_criterion import sample
from tiny_nuclei_model import tiny_config
from torch import Tensor, nn

from mask2former.errors import UserError
from mask2former.modeling import TRANSFORMER_DECODER_REGISTRY, MultiScaleMaskedTransformerDecoder
from mask2former.modeling.pixel_decoder import msdeformattn
from mask2former.modeling.pixel_decoder.msdeformattn import cell_centres
from mask2former.modeling.position_encoding import PositionEmbeddingSine
from mask2former.modeling.transformer_decoder.layers import MultiheadAttention
from mask2former.modeling.transformer_decoder.masked import masked_attention_bias, resize_mask_features


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_attention_equals_torchs() -> None:
    ours = MultiheadAttention(32, 4)
    nn.init.normal_(ours.in_proj_bias)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    blocked = torch.rand(2, 5, 7) < 0.4
    blocked[..., 0] = False
    bias = torch.zeros(2, 1, 5, 7).masked_fill(blocked[:, None], float("-inf"))
    expected, _ = theirs(query, key, value, attn_mask=blocked.repeat_interleave(4, dim=0))
    torch.testing.assert_close(ours(query, key, value, bias), expected)
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0])


def test_attention_is_masked_where_the_resized_mask_is_background() -> None:
    embeddings, features = torch.randn(2, 6, 8), torch.randn(2, 8, 24, 32)
    embeddings[0, 0] = 0
    features[:, 0] = -features[:, 0].abs() - 1
    embeddings[0, 1] = torch.tensor([100.0, 0, 0, 0, 0, 0, 0, 0])  # background everywhere: attends everywhere
    bias = masked_attention_bias(embeddings, resize_mask_features(features, (6, 8)))
    masks = torch.einsum("bqc,bchw->bqhw", embeddings, features)
    probabilities = F.interpolate(masks, size=(6, 8), mode="bilinear", align_corners=False).sigmoid().flatten(2)
    blocked = probabilities < 0.5
    blocked[blocked.all(-1)] = False
    assert torch.equal(bias[:, 0] == float("-inf"), blocked)
    assert torch.equal(bias[0, 0, 1], torch.zeros(48))


def test_position_embedding_equals_hugging_faces(hugging_face: ModuleType) -> None:
    theirs = hugging_face.Mask2FormerSinePositionEmbedding(num_position_features=16, normalize=True)
    ours = PositionEmbeddingSine(16, normalize=True)(5, 7, torch.device("cpu"))
    expected = theirs(torch.Size([1, 3, 5, 7]), torch.device("cpu"), torch.float32)
    torch.testing.assert_close(ours, expected.reshape(ours.shape))


def test_cell_centres_are_x_then_y() -> None:
    centres = cell_centres([(2, 4), (1, 2)], torch.device("cpu"))
    assert centres.shape == (1, 10, 2, 2)
    assert centres[0, 1, 0].tolist() == pytest.approx([1.5 / 4, 0.5 / 2])
    assert centres[0, 9, 1].tolist() == pytest.approx([0.75, 0.5])


@pytest.mark.parametrize("rows", [7, 1024])
def test_encoder_layer_in_chunks_equals_the_formula(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msdeformattn, "CHUNK_ROWS", rows)
    layer = msdeformattn.MSDeformAttnTransformerEncoderLayer(32, 48, 0.0, n_levels=2, n_heads=4, n_points=3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    shapes = [(2, 3), (4, 6)]
    x, position = torch.randn(2, 30, 32, requires_grad=True), torch.randn(1, 30, 32, requires_grad=True)
    points = cell_centres(shapes, x.device)

    y = layer.norm1(x + layer.self_attn(x + position, points, x, shapes))
    expected = layer.norm2(y + layer.linear2(F.relu(layer.linear1(y))))
    inputs = (x, position, *layer.parameters())
    ours = layer(x, position, points, shapes)
    torch.testing.assert_close(ours, expected)
    for gradient, its_expected in zip(
        *(torch.autograd.grad(result.square().sum(), inputs) for result in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(gradient, its_expected, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x, position, points, shapes), expected)
        seen: list[Tensor] = []
        layer.self_attn.register_forward_hook(lambda module, inputs, output: seen.append(output))
        torch.testing.assert_close(layer(x, position, points, shapes), expected)
        assert [output.shape for output in seen] == [x.shape]


def test_wrong_numbers_of_maps_and_layers_are_named() -> None:
    with pytest.raises(UserError, match="DEC_LAYERS"):
        MultiScaleMaskedTransformerDecoder(in_channels=8, num_classes=2, hidden_dim=8, nheads=2, dec_layers=0)
    decoder = MultiScaleMaskedTransformerDecoder(8, num_classes=2, hidden_dim=8, nheads=2, dec_layers=1, mask_dim=8)
    for maps, count in (([torch.zeros(1, 8, 2, 2)] * 2, 2), (torch.zeros(3, 8, 2, 2), 1)):
        with pytest.raises(UserError, match=f"3 feature maps, but got {count}: .*TRANSFORMER_IN_FEATURE"):
            decoder(maps, torch.zeros(1, 8, 8, 8))


@pytest.mark.parametrize(("key", "name"), [("PRE_NORM", None), ("ENFORCE_INPUT_PROJ", "input_proj.0.weight")])
def test_switches_of_the_decoder(key: str, name: str | None) -> None:
    image = [{"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}]
    outputs = []
    for value in (False, True):
        torch.manual_seed(0)
        cfg = tiny_config()
        cfg.MODEL.MASK_FORMER[key] = value
        model = build_model(cfg).eval()
        with torch.inference_mode():
            outputs.append(model(image)[0]["sem_seg"])
        assert (f"sem_seg_head.predictor.{name}" in model.state_dict()) == (value and name is not None)
    assert not torch.allclose(outputs[0], outputs[1])


class UsersPixelDecoder(nn.Module):
    """As a user of the published code writes one: any class with ``forward_features``."""

    def __init__(self, cfg: CfgNode, input_shape: dict[str, Any]) -> None:
        super().__init__()
        width = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM
        self.convs = nn.ModuleDict({name: nn.Conv2d(shape.channels, width, 1) for name, shape in input_shape.items()})

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, None, list[Tensor]]:
        maps = {name: F.group_norm(conv(features[name]), 8) for name, conv in self.convs.items()}
        return maps["res2"], None, [maps[name] for name in ("res5", "res4", "res3")]


class UsersTransformerDecoder(nn.Module):
    """Returns the published dict with whole masks."""

    def __init__(self, cfg: CfgNode, in_channels: int, mask_classification: bool) -> None:
        super().__init__()
        queries, classes = cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        self.queries = nn.Embedding(queries, in_channels)
        self.classify = nn.Linear(in_channels, classes + 1)

    def forward(self, x: list[Tensor], mask_features: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        layers = []
        queries = self.queries.weight[None].expand(len(mask_features), -1, -1)
        for level in x:
            queries = queries + level.mean((2, 3))[:, None]
            masks = torch.einsum("bqc,bchw->bqhw", queries, mask_features)
            layers.append({"pred_logits": self.classify(queries), "pred_masks": masks})
        return {**layers[-1], "aux_outputs": layers[:-1]}


@pytest.fixture
def users_parts() -> Any:
    SEM_SEG_HEADS_REGISTRY.register(UsersPixelDecoder)
    TRANSFORMER_DECODER_REGISTRY.register(UsersTransformerDecoder)
    yield
    del SEM_SEG_HEADS_REGISTRY._obj_map["UsersPixelDecoder"]
    del TRANSFORMER_DECODER_REGISTRY._obj_map["UsersTransformerDecoder"]


@pytest.mark.parametrize("pixel_decoder", ["UsersPixelDecoder", "MSDeformAttnPixelDecoder"])
@pytest.mark.parametrize("decoder", ["UsersTransformerDecoder", "MultiScaleMaskedTransformerDecoder"])
def test_parts_registered_by_a_user_train_and_infer(users_parts: None, pixel_decoder: str, decoder: str) -> None:
    cfg = tiny_config()
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = pixel_decoder
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = decoder
    model = build_model(cfg).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = [sample((4, 4, 40, 40)), sample()]
    before = {name: parameter.detach().clone() for name, parameter in model.sem_seg_head.named_parameters()}
    for _ in range(2):
        loss = sum(model(batch).values())
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = dict(model.sem_seg_head.named_parameters())
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"pixel_decoder", "predictor"}
    with torch.inference_mode():
        [result] = model.eval()([{"image": batch[0]["image"], "height": 50, "width": 70}])
    assert result["sem_seg"].shape == (2, 50, 70)
    assert result["panoptic_seg"][0].shape == (50, 70)
    assert isinstance(result["instances"], Instances)


def test_pixel_decoder_without_its_method_is_refused() -> None:
    cfg = tiny_config()
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "SemSegFPNHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3"]
    with pytest.raises(TypeError, match="forward_features"):
        build_model(cfg)


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), pytest.param("cuda", torch.float16, marks=NEEDS_CUDA)]
)
def test_losses_stay_float32_under_autocast(device: str, dtype: torch.dtype) -> None:
    cfg = tiny_config()
    cfg.MODEL.DEVICE = device
    model = build_model(cfg).train()
    captured = []
    model.sem_seg_head.register_forward_hook(lambda module, inputs, output: captured.append(output))
    with torch.autocast(device, dtype=dtype):
        losses = model([sample((4, 4, 40, 40))])
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
    assert captured[0].class_logits.dtype == dtype  # autocast was at work
    assert captured[0].mask_features.dtype == torch.float32
    assert captured[0].mask_logits(-1, 0).dtype == torch.float32
