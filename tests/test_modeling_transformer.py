"""The transformer against torch's own layers and Hugging Face's DETR."""

from types import ModuleType

import pytest
import torch
from huggingface_detr import in_detr_names
from torch import Tensor, nn

from mask2former.modeling.attention import MultiheadAttention
from mask2former.modeling.position_encoding import PositionEmbeddingSine
from mask2former.modeling.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    TransformerEncoderOnly,
)

C, HEADS, HIDDEN = 32, 4, 48


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randomize(module: nn.Module) -> nn.Module:
    """Biases and norms away from 0 and 1, so that each of them shows."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    return module


def padding_bias(padding: Tensor) -> Tensor:
    return torch.zeros(padding.shape).masked_fill(padding, float("-inf"))[:, None, None]


PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])


@pytest.mark.parametrize("padding", [PADDING, PADDING[1:]])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_encoder_layer_equals_torchs(pre_norm: bool, padding: Tensor) -> None:
    pictures = len(padding)
    dropout = 0.3 if pictures == 1 else 0.0  # torch orders batches otherwise in memory, and so drops other units
    ours = randomize(TransformerEncoderLayer(C, HEADS, HIDDEN, dropout, pre_norm)).train()
    theirs = nn.TransformerEncoderLayer(C, HEADS, HIDDEN, dropout, norm_first=pre_norm, batch_first=True).train()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(pictures, 7, C)
    torch.manual_seed(1)  # the same weights and units are dropped
    expected = theirs(x, src_key_padding_mask=padding)
    torch.manual_seed(1)
    torch.testing.assert_close(ours(x, torch.zeros(1, 7, C), padding_bias(padding)), expected)


@pytest.mark.parametrize("padding", [PADDING, PADDING[1:]])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_decoder_layer_equals_torchs(pre_norm: bool, padding: Tensor) -> None:
    pictures = len(padding)
    dropout = 0.3 if pictures == 1 else 0.0  # as above
    ours = randomize(TransformerDecoderLayer(C, HEADS, HIDDEN, dropout, pre_norm)).train()
    theirs = nn.TransformerDecoderLayer(C, HEADS, HIDDEN, dropout, norm_first=pre_norm, batch_first=True).train()
    theirs.load_state_dict(ours.state_dict())
    x, memory = torch.randn(pictures, 5, C), torch.randn(pictures, 7, C)
    torch.manual_seed(1)
    expected = theirs(x, memory, memory_key_padding_mask=padding)
    torch.manual_seed(1)
    actual = ours(x, torch.zeros(pictures, 5, C), memory, torch.zeros(1, 7, C), padding_bias(padding))
    torch.testing.assert_close(actual, expected)


def test_dropout_of_attention_is_off_in_inference() -> None:
    attention = MultiheadAttention(C, HEADS, dropout=0.5)
    x = torch.randn(1, 6, C)
    assert not torch.equal(attention(x, x, x), attention(x, x, x))
    attention.eval()
    assert torch.equal(attention(x, x, x), attention(x, x, x))


def test_width_that_heads_do_not_share_is_named() -> None:
    with pytest.raises(ValueError, match="width 32 .* 5 heads"):
        MultiheadAttention(32, 5)


def detr_config() -> object:
    from transformers import DetrConfig

    widths = {"d_model": C, "encoder_ffn_dim": HIDDEN, "decoder_ffn_dim": HIDDEN}
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    return DetrConfig(**widths, **heads, encoder_layers=2, decoder_layers=2)


def test_encoder_with_positions_equals_hugging_faces(hugging_face: ModuleType) -> None:
    from transformers.models.detr.modeling_detr import DetrEncoder

    theirs = DetrEncoder(detr_config()).eval()
    ours = randomize(TransformerEncoder(2, C, HEADS, HIDDEN, dropout=0.1, pre_norm=False)).eval()
    theirs.load_state_dict(in_detr_names(ours.state_dict()))
    x, position = torch.randn(2, 7, C), torch.randn(1, 7, C)
    expected = theirs(x, attention_mask=~PADDING, spatial_position_embeddings=position)[0]
    actual = ours(x, position, padding_bias(PADDING))
    torch.testing.assert_close(actual[~PADDING], expected[~PADDING], atol=1e-5, rtol=1e-4)


def test_decoder_with_positions_equals_hugging_faces(hugging_face: ModuleType) -> None:
    from transformers.models.detr.modeling_detr import DetrDecoder

    theirs = DetrDecoder(detr_config()).eval()
    ours = randomize(TransformerDecoder(2, C, HEADS, HIDDEN, dropout=0.1, pre_norm=False)).eval()
    theirs.load_state_dict(in_detr_names(ours.state_dict()))
    memory, position, queries = torch.randn(2, 7, C), torch.randn(1, 7, C), torch.randn(2, 5, C)
    expected = theirs(
        torch.zeros(2, 5, C),
        encoder_hidden_states=memory,
        encoder_attention_mask=~PADDING,
        spatial_position_embeddings=position,
        object_queries_position_embeddings=queries,
    )[0]
    actual = ours(torch.zeros(2, 5, C), queries, memory, position, padding_bias(PADDING))
    torch.testing.assert_close(actual[-1], expected, atol=1e-5, rtol=1e-4)


def test_pre_norm_adds_positions_behind_the_norm() -> None:
    """With torch's attention, step by step."""
    layer = randomize(TransformerDecoderLayer(C, HEADS, HIDDEN, 0.0, pre_norm=True))
    attentions = []
    for ours in (layer.self_attn, layer.multihead_attn):
        attentions.append(nn.MultiheadAttention(C, HEADS, batch_first=True))
        attentions[-1].load_state_dict(ours.state_dict())
    x, queries = torch.randn(2, 5, C), torch.randn(2, 5, C)
    memory, position = torch.randn(2, 7, C), torch.randn(1, 7, C)
    normed = layer.norm1(x)
    expected = x + attentions[0](normed + queries, normed + queries, normed)[0]
    expected = expected + attentions[1](layer.norm2(expected) + queries, memory + position, memory)[0]
    expected = expected + layer.linear2(layer.linear1(layer.norm3(expected)).relu())
    torch.testing.assert_close(layer(x, queries, memory, position), expected)
    encoder_layer = randomize(TransformerEncoderLayer(C, HEADS, HIDDEN, 0.0, pre_norm=True))
    attentions[0].load_state_dict(encoder_layer.self_attn.state_dict())
    normed = encoder_layer.norm1(memory)
    expected = memory + attentions[0](normed + position, normed + position, normed)[0]
    expected = expected + encoder_layer.linear2(encoder_layer.linear1(encoder_layer.norm2(expected)).relu())
    torch.testing.assert_close(encoder_layer(memory, position), expected)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_encoder_has_a_last_norm_where_it_is_pre_norm(pre_norm: bool) -> None:
    encoder = randomize(TransformerEncoder(0, C, HEADS, HIDDEN, 0.0, pre_norm))
    x = torch.randn(2, 7, C)
    assert set(encoder.state_dict()) == ({"norm.weight", "norm.bias"} if pre_norm else set())
    assert torch.equal(encoder(x, torch.zeros(1, 7, C)), x) == (not pre_norm)


def test_encoded_maps_keep_their_rows_and_columns() -> None:
    transformer = TransformerEncoderOnly(C, HEADS, num_encoder_layers=1, dim_feedforward=HIDDEN).eval()
    x, position = torch.randn(2, C, 3, 5), torch.randn(1, C, 3, 5)
    encoded = transformer(x, position)
    flat = transformer.encoder(x.flatten(2).mT, position.flatten(2).mT)
    for row in range(3):
        torch.testing.assert_close(encoded[:, :, row], flat[:, 5 * row : 5 * row + 5].mT)


def test_every_decoder_layer_gives_queries_normed_alike() -> None:
    transformer = randomize(Transformer(C, HEADS, 1, 3, HIDDEN)).eval()
    x, position, queries = torch.randn(2, C, 3, 5), torch.randn(1, C, 3, 5), torch.randn(4, C)
    outputs = transformer(x, position, queries)
    assert outputs.shape == (3, 2, 4, C)
    for layers in (1, 2):
        transformer.decoder.layers = transformer.decoder.layers[: 3 - layers]
        torch.testing.assert_close(transformer(x, position, queries), outputs[: 3 - layers])


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("encoder_layers", [0, 1])
def test_padding_does_not_change_what_queries_see(pre_norm: bool, encoder_layers: int) -> None:
    transformer = Transformer(C, HEADS, encoder_layers, 2, HIDDEN, pre_norm=pre_norm).eval()
    embedding = PositionEmbeddingSine(C // 2, normalize=True)
    x, queries = torch.randn(2, C, 4, 6), torch.randn(5, C)
    padding = torch.zeros(2, 4, 6, dtype=torch.bool)
    padding[1, 3:] = padding[1, :, 4:] = True
    outputs = transformer(x, embedding.of_padded(padding), queries, padding)
    whole = transformer(x[:1], embedding(4, 6, x.device), queries)
    cropped = transformer(x[1:, :, :3, :4], embedding(3, 4, x.device), queries)
    torch.testing.assert_close(outputs, torch.cat([whole, cropped], dim=1))


def test_every_weight_has_a_finite_gradient() -> None:
    transformer = randomize(Transformer(C, HEADS, 1, 2, HIDDEN, pre_norm=True)).train()
    queries = torch.randn(4, C, requires_grad=True)
    transformer(torch.randn(2, C, 3, 5), torch.randn(1, C, 3, 5), queries).square().sum().backward()
    for name, parameter in [*transformer.named_parameters(), ("queries", queries)]:
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if name != "decoder.layers.0.norm1.weight":  # it scales queries that are 0 still
            assert parameter.grad.any(), name
