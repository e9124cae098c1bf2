"""The encoder's layers in chunks and by kernels against their modules and torch's own gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.pixel_decoder import msdeformattn, position_wise
from mask2former.modeling.pixel_decoder.msdeformattn import MSDeformAttnTransformerEncoderLayer, cell_centres
from mask2former.ops import extension

SHAPES = [(2, 3), (4, 6)]
POSITIONS, CHANNELS, HIDDEN = 30, 16, 40


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_layer(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> MSDeformAttnTransformerEncoderLayer:
    layer = MSDeformAttnTransformerEncoderLayer(CHANNELS, HIDDEN, dropout, n_levels=2, n_heads=4, n_points=3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.to(dtype)


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x of two pictures, and positions for all."""
    x, position = (torch.randn(batch, POSITIONS, CHANNELS, dtype=dtype, requires_grad=True) for batch in (2, 1))
    return x, position


def formula(layer: MSDeformAttnTransformerEncoderLayer, x: Tensor, position: Tensor) -> Tensor:
    y = layer.norm1(x + layer.self_attn(x + position, centres(x), x, SHAPES))
    return layer.norm2(y + layer.linear2(F.relu(layer.linear1(y))))


def in_chunks(layer: MSDeformAttnTransformerEncoderLayer, x: Tensor, position: Tensor) -> Tensor:
    return layer(x, position, centres(x), SHAPES)


def centres(x: Tensor) -> Tensor:
    return cell_centres(SHAPES, x.device).to(x.dtype)


def gradients(function: Callable[..., Tensor], layer: nn.Module, x: Tensor, position: Tensor) -> list[Tensor]:
    """The result, and gradients of both inputs and all parameters that have one."""
    output = function(layer, x, position)
    wanted = [tensor for tensor in (x, position, *layer.parameters()) if tensor.requires_grad]
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weights).square().sum(), wanted)]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions in ``position_wise`` that are called."""
    names: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        function = getattr(position_wise, name)

        def call(*args: Any) -> Any:
            names.append(name)
            return function(*args)

        return call

    for name in ("project", "add_and_feed_forward"):
        monkeypatch.setattr(msdeformattn, name, noted(name))
    return names


BOTH = ["project", "add_and_feed_forward"]


@pytest.mark.parametrize("rows", [7, 30, 2048])
def test_result_and_gradients_are_the_formulas(rows: int, used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position_wise, "CHUNK_ROWS", rows)
    layer, inputs = make_layer(), make_inputs()
    expected, found = (gradients(function, layer, *inputs) for function in (formula, in_chunks))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert used == BOTH


def test_frozen_parts_have_no_gradient(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position_wise, "CHUNK_ROWS", 7)
    layer, (x, position) = make_layer(), make_inputs()
    for parameter in (layer.linear1.weight, layer.norm2.bias, layer.norm1.weight, *layer.self_attn.parameters()):
        parameter.requires_grad_(False)
    inputs = x, position.detach()
    expected, found = (gradients(function, layer, *inputs) for function in (formula, in_chunks))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert used == BOTH
    in_chunks(layer, *inputs).sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in layer.parameters())


def test_no_pictures() -> None:
    layer, (x, position) = make_layer(), make_inputs()
    output, grad_x, grad_position, *others = gradients(in_chunks, layer, x[:0], position)
    assert output.shape == grad_x.shape == (0, POSITIONS, CHANNELS)
    assert not any(grad.any() for grad in (grad_position, *others))


def test_hidden_features_and_sums_with_positions_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msdeformattn, "ms_deform_attn_fused", lambda value, *_: value.flatten(2))  # which keeps nothing
    layer, inputs = make_layer(), make_inputs()
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        in_chunks(layer, *inputs)
    known = {x.untyped_storage().data_ptr() for x in (*inputs, *layer.parameters())}
    widths = [x[0, 0].numel() for address, x in kept.items() if address not in known and x.shape[:2] == (2, POSITIONS)]
    # Of a norm mean and deviation; what was attended to, and the sums before both norms.
    assert sorted(widths) == [1, 1, CHANNELS, CHANNELS, CHANNELS]


def test_gradients_of_gradients() -> None:
    layer, inputs = make_layer(), make_inputs()

    def penalty(function: Callable[..., Tensor]) -> list[Tensor]:
        output = function(layer, *inputs)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
        return [*first, *torch.autograd.grad(total, [*inputs, *layer.parameters()], allow_unused=True)]

    torch.testing.assert_close(penalty(in_chunks), penalty(formula), rtol=1e-8, atol=1e-8)


def test_transforms_take_the_modules(used: list[str]) -> None:
    layer, (x, position) = make_layer(), make_inputs()
    x, position = x.detach(), position.detach()
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x, position, centres(x), SHAPES)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
    assert not used
    for index in range(2):
        output = in_chunks(layer, x[index : index + 1], position).square().sum()
        expected = torch.autograd.grad(output, list(parameters.values()))
        torch.testing.assert_close([gradient[index] for gradient in found.values()], list(expected))


def with_hook(layer: MSDeformAttnTransformerEncoderLayer) -> None:
    layer.linear1.register_forward_hook(lambda module, inputs, output: output * 2)


def with_backward_hook(layer: MSDeformAttnTransformerEncoderLayer) -> None:
    layer.norm1.register_full_backward_hook(lambda module, grads, outputs: (grads[0] * 2,))


def with_another_layer(layer: MSDeformAttnTransformerEncoderLayer) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer.self_attn.value_proj.__class__ = Doubled


@pytest.mark.parametrize("change", [with_hook, with_backward_hook, with_another_layer])
def test_changed_parts_do_what_they_do(
    change: Callable[[MSDeformAttnTransformerEncoderLayer], None], used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(msdeformattn, "CHUNK_ROWS", 7)
    layer, inputs = make_layer(), make_inputs()
    plain = gradients(in_chunks, layer, *inputs)
    change(layer)
    used.clear()
    expected, found = (gradients(function, layer, *inputs) for function in (formula, in_chunks))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found[1], plain[1])
    assert not used


def test_dropout_and_autocast_take_the_modules(used: list[str]) -> None:
    x, position = make_inputs(torch.float32)
    layer = make_layer(dropout=0.5, dtype=torch.float32)
    first, second = in_chunks(layer, x, position), in_chunks(layer, x, position)
    assert not torch.allclose(first, second)
    assert not used
    layer.eval()
    torch.testing.assert_close(in_chunks(layer, x, position), formula(layer, x, position))
    assert used == BOTH
    with torch.autocast("cpu", torch.bfloat16):
        in_chunks(layer, x, position).sum().backward()
    assert used == BOTH


# ------------------------------------------------------------------------------------------- without gradients

needs_kernels = pytest.mark.skipif("cpu" not in extension.KERNELS, reason=f"no CPU kernels: {extension.reason('cpu')}")


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("channels", "hidden"), [(16, 40), (12, 7), (256, 1024)], ids=["vectors", "odd numbers", "the usual size"]
)
def test_kernels_equal_the_formula(channels: int, hidden: int, threads: int, used: list[str]) -> None:
    """For two pictures that share positions, and more positions than a block has."""
    shapes, before = [(5, 7), (15, 33)], torch.get_num_threads()
    layer = MSDeformAttnTransformerEncoderLayer(channels, hidden, 0.0, n_levels=2, n_heads=4, n_points=3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=channels**-0.5)
    x, position = torch.randn(2, 530, channels), torch.randn(1, 530, channels)
    points = cell_centres(shapes, x.device)
    with torch.inference_mode():
        y = layer.norm1(x + layer.self_attn(x + position, points, x, shapes))
        expected = layer.norm2(y + layer.linear2(F.relu(layer.linear1(y))))
        torch.set_num_threads(threads)
        try:
            found = layer(x, position, points, shapes)
        finally:
            torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert used == BOTH


@needs_kernels
@pytest.mark.parametrize("change", [with_hook, with_another_layer])
def test_changed_parts_take_no_kernels(
    change: Callable[[MSDeformAttnTransformerEncoderLayer], None], used: list[str]
) -> None:
    layer, (x, position) = make_layer(dtype=torch.float32), make_inputs(torch.float32)
    change(layer)
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(layer, x, position), formula(layer, x, position))
    assert not used


def test_no_kernels_take_modules_in_chunks(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position_wise, "KERNELS", frozenset())
    monkeypatch.setattr(msdeformattn, "CHUNK_ROWS", 7)
    layer, inputs = make_layer(), make_inputs()
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(layer, *inputs), formula(layer, *inputs), rtol=1e-10, atol=1e-10)
    assert not used


@needs_kernels
def test_kernels_keep_what_is_no_number() -> None:
    layer, (x, position) = make_layer(dtype=torch.float32), make_inputs(torch.float32)
    with torch.no_grad():
        layer.linear1.bias[3] = torch.nan
        assert in_chunks(layer, x, position).isnan().all()


def operator_arguments() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Of both operators."""
    layer, (x, position) = make_layer(dtype=torch.float32), make_inputs(torch.float32)
    parts = (layer.self_attn.output_proj, layer.norm1, layer.linear1, layer.linear2, layer.norm2)
    x, position, *parameters = (t.detach() for t in (x, position, *position_wise._parameters(*parts)))
    weights, biases = [torch.randn(m, CHANNELS) for m in (3, 20)], [torch.randn(m) for m in (3, 20)]
    return (x, position, weights, biases), (x, x.neg(), parameters, 1e-5, 1e-5)


@needs_kernels
def test_operators_keep_to_their_schemas() -> None:
    operators = torch.ops.mask2former
    first, second = operator_arguments()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.project_positions, first, test_utils=tests)
    torch.library.opcheck(operators.add_and_feed_forward, second, test_utils=tests)


@needs_kernels
def test_arguments_that_do_not_fit() -> None:
    """The operators say so, and reach nowhere."""
    operators = torch.ops.mask2former
    (x, position, weights, biases), (_, attended, parameters, *eps) = operator_arguments()
    for message, call in (
        ("x must be Float", lambda: operators.project_positions(x.double(), position, weights, biases)),
        (r"position must be \(B or 1", lambda: operators.project_positions(x, x[:0], weights, biases)),
        ("position must be Float", lambda: operators.project_positions(x, position[:, :5], weights, biases)),
        ("one layer or more", lambda: operators.project_positions(x, position, weights, biases[:1])),
        ("biases must be Float", lambda: operators.project_positions(x, position, weights, biases[::-1])),
        ("weights must be Float", lambda: operators.project_positions(x, position, [w.T for w in weights], biases)),
        ("attended must be Float", lambda: operators.add_and_feed_forward(x, attended[:1], parameters, *eps)),
        ("five parts", lambda: operators.add_and_feed_forward(x, attended, parameters[:9], *eps)),
        ("third a matrix", lambda: operators.add_and_feed_forward(x, attended, parameters[::-1], *eps)),
        ("parameters must be Float", lambda: operators.add_and_feed_forward(x[..., 1:], x[..., 1:], parameters, *eps)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
