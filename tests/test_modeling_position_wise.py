"""The encoder's layers in chunks and by kernels against their modules and torch's own gradients."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from mask2former.modeling.checkpointing import LayerCheckpointing
from mask2former.modeling.pixel_decoder import msdeformattn, position_wise
from mask2former.modeling.pixel_decoder.msdeformattn import MSDeformAttnTransformerEncoderLayer, cell_centres
from mask2former.ops import extension

SHAPES = [(2, 3), (4, 6)]
POSITIONS, CHANNELS, HIDDEN = 30, 16, 40

needs_kernels = pytest.mark.skipif("cpu" not in extension.KERNELS, reason=f"no CPU kernels: {extension.reason('cpu')}")
# Kernels are for float32 alone.
both_forms = pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float64, id="in chunks"), pytest.param(torch.float32, marks=needs_kernels, id="kernels")],
)


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


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """To what float64 gives, each tensor but for the rounding of its largest numbers in its own type."""
    for ours, theirs in zip(found, expected, strict=True):
        tolerance = 1e-10 if ours.dtype == torch.float64 else 2e-5
        largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * max(largest, 1))


def in_double(layer: nn.Module, *inputs: Tensor) -> tuple[Any, ...]:
    """The same in float64."""
    doubled = (x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    return copy.deepcopy(layer).double(), *doubled


def centres(x: Tensor) -> Tensor:
    return cell_centres(SHAPES, x.device).to(x.dtype)


def gradients(function: Callable[..., Tensor], layer: nn.Module, x: Tensor, position: Tensor) -> list[Tensor]:
    """The result, and gradients of both inputs and all parameters that have one."""
    output = function(layer, x, position)
    wanted = [tensor for tensor in (x, position, *layer.parameters()) if tensor.requires_grad]
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output.dtype).view_as(output)
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


@both_forms
def test_frozen_parts_have_no_gradient(dtype: torch.dtype, used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position_wise, "CHUNK_ROWS", 7)
    layer, (x, position) = make_layer(dtype=dtype), make_inputs(dtype)
    for parameter in (layer.linear1.weight, layer.norm2.bias, layer.norm1.weight, *layer.self_attn.parameters()):
        parameter.requires_grad_(False)
    inputs = x, position.detach()
    assert_close(gradients(in_chunks, layer, *inputs), gradients(formula, *in_double(layer, *inputs)))
    assert used == BOTH
    in_chunks(layer, *inputs).sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in layer.parameters())


@both_forms
def test_no_pictures(dtype: torch.dtype) -> None:
    layer, (x, position) = make_layer(dtype=dtype), make_inputs(dtype)
    output, grad_x, grad_position, *others = gradients(in_chunks, layer, x[:0], position)
    assert output.shape == grad_x.shape == (0, POSITIONS, CHANNELS)
    assert not any(grad.any() for grad in (grad_position, *others))


@both_forms
def test_hidden_features_and_sums_with_positions_are_not_kept(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(msdeformattn, "ms_deform_attn_fused", lambda value, *_: value.flatten(2))  # which keeps nothing
    layer, inputs = make_layer(dtype=dtype), make_inputs(dtype)
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        in_chunks(layer, *inputs)
    known = {x.untyped_storage().data_ptr() for x in (*inputs, *layer.parameters())}
    widths = [x[0, 0].numel() for address, x in kept.items() if address not in known and x.shape[:2] == (2, POSITIONS)]
    assert widths == [CHANNELS] * 3  # what was attended to, and the sums before both norms


@both_forms
def test_gradients_of_gradients(dtype: torch.dtype) -> None:
    layer, inputs = make_layer(dtype=dtype), make_inputs(dtype)

    def penalty(function: Callable[..., Tensor], layer: nn.Module, *inputs: Tensor) -> list[Tensor]:
        output = function(layer, *inputs)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
        return [*first, *torch.autograd.grad(total, [*inputs, *layer.parameters()], allow_unused=True)]

    assert_close(penalty(in_chunks, layer, *inputs), penalty(formula, *in_double(layer, *inputs)))


def two_layers(dtype: torch.dtype) -> nn.ModuleList:
    return nn.ModuleList(make_layer(dtype=dtype) for _ in range(2))


def one_after_the_other(
    function: Callable[..., Tensor], layers: nn.ModuleList, x: Tensor, position: Tensor, run: Callable[..., Tensor]
) -> Tensor:
    for layer in layers:
        x = run(function, layer, x, position)
    return x


def call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def checkpointed(*args: Any) -> Tensor:
    stack = LayerCheckpointing()
    stack.checkpointing = True
    return stack.run_layer(*args)


@both_forms
@pytest.mark.parametrize("run", [call, checkpointed])
def test_gradients_of_layers_one_after_the_other(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    layers, inputs = two_layers(dtype), make_inputs(dtype)

    def all_of(function: Callable[..., Tensor], run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return functools.partial(one_after_the_other, function, run=run)

    assert_close(
        gradients(all_of(in_chunks, run), layers, *inputs),
        gradients(all_of(formula, call), *in_double(layers, *inputs)),
    )


@both_forms
def test_what_is_between_layers_is_made_again(dtype: torch.dtype) -> None:
    """It is not kept, nor what it can be made of where it is kept in any case."""
    layers, (x, position) = two_layers(dtype), make_inputs(dtype)
    between = in_chunks(layers[0], x, position)
    storage, expected = StorageWeakRef(between.untyped_storage()), between.detach().clone()
    output = in_chunks(layers[1], between, position)
    del between
    assert storage.expired() and output.requires_grad
    torch.testing.assert_close(in_chunks(layers[0], x, position)._made_by[1](), expected)
    assert not hasattr(checkpointed(in_chunks, layers[0], x, position), "_made_by")


@both_forms
def test_gradients_of_gradients_of_layers(dtype: torch.dtype) -> None:
    layers, inputs = two_layers(dtype), make_inputs(dtype)

    def penalty(function: Callable[..., Tensor], layers: nn.ModuleList, *inputs: Tensor) -> list[Tensor]:
        output = one_after_the_other(function, layers, *inputs, run=call)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
        return [*first, *torch.autograd.grad(total, [*inputs, *layers.parameters()], allow_unused=True)]

    found, expected = penalty(in_chunks, layers, *inputs), penalty(formula, *in_double(layers, *inputs))
    for ours, theirs in zip(found, expected, strict=True):  # of numbers that four products have made large
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


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


# ------------------------------------------------------------------------------------------- kernels

# Channels and hidden features.
WIDTHS = pytest.mark.parametrize(
    ("channels", "hidden"), [(16, 40), (12, 7), (256, 1024)], ids=["vectors", "odd numbers", "the usual size"]
)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many torch has meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_kernels
@WIDTHS
def test_kernels_equal_the_formula(channels: int, hidden: int, threads: int, used: list[str]) -> None:
    """With and without gradients, for two pictures that share positions, and more positions than a block has."""
    shapes = [(5, 7), (15, 33)]
    layer = MSDeformAttnTransformerEncoderLayer(channels, hidden, 0.0, n_levels=2, n_heads=4, n_points=3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=channels**-0.5)
    x, position = (torch.randn(batch, 530, channels, requires_grad=True) for batch in (2, 1))
    points = cell_centres(shapes, x.device)

    def compiled(layer: Any, x: Tensor, position: Tensor) -> Tensor:
        return layer(x, position, points, shapes)

    def plain(layer: Any, x: Tensor, position: Tensor) -> Tensor:
        y = layer.norm1(x + layer.self_attn(x + position, points.double(), x, shapes))
        return layer.norm2(y + layer.linear2(F.relu(layer.linear1(y))))

    expected = gradients(plain, *in_double(layer, x, position))
    assert_close(gradients(compiled, layer, x, position), expected)
    with torch.inference_mode():
        assert_close([compiled(layer, x, position)], expected[:1])
    assert used == 2 * BOTH


def beside(*sizes: int) -> Tensor:
    """Random numbers that others are between in memory."""
    return torch.randn(*sizes[:-1], 2 * sizes[-1])[..., ::2]


def operator_calls(positions: int = POSITIONS, channels: int = CHANNELS, hidden: int = HIDDEN) -> dict[str, Any]:
    """Arguments of all operators, by name; of gradients some are needed, of each kind."""
    x, position = beside(2, positions, channels), beside(1, positions, channels)
    widths = (3, channels, 20)
    weights, biases = [beside(m, channels) for m in widths], [beside(m) for m in widths]
    square, row = (channels, channels), (channels,)
    shapes = (square, row, row, row, (hidden, channels), (hidden,), (channels, hidden), row, row, row)
    parameters = [0.3 * beside(*shape) for shape in shapes]
    grad, sum1, sum2, attended = (beside(2, positions, channels) for _ in range(4))
    grads = [beside(2, positions, m) for m in widths]
    return {
        "project_positions": (x, position, weights, biases),
        "project_positions_backward": (grads, x, position, weights, [True] * 3 + [False, True, False] + [True] * 2),
        "add_and_feed_forward": (x, attended, parameters, 1e-5, 1e-2, True),
        "add_and_feed_forward_backward": (
            *(grad, sum1, sum2, attended, parameters, 1e-5, 1e-2),
            [True] * 4 + [False] * 2 + [True] * 6,
        ),
    }


OPERATORS = pytest.mark.parametrize("name", list(operator_calls()))


@needs_kernels
@OPERATORS
@WIDTHS
def test_operators_equal_their_plain_forms(name: str, channels: int, hidden: int, threads: int) -> None:
    arguments = operator_calls(530, channels, hidden)[name]
    doubled = torch.utils._pytree.tree_map_only(Tensor, Tensor.double, arguments)
    found = getattr(torch.ops.mask2former, name)(*arguments)
    assert_close(found, getattr(position_wise._InChunks, name)(*doubled))
    assert all(map(torch.equal, found, getattr(torch.ops.mask2former, name)(*arguments)))


@needs_kernels
def test_positions_of_each_picture() -> None:
    grads, x, _, weights, needed = operator_calls()["project_positions_backward"]
    position = torch.randn(x.shape)
    found = torch.ops.mask2former.project_positions_backward(grads, x, position, weights, needed)
    assert_close(found[1:2], [(grads[1] @ weights[1] + grads[2] @ weights[2]).double()])


@needs_kernels
@OPERATORS
def test_work_of_operators_is_that_of_their_plain_forms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for hidden features that are made again, which the counter isn't to see."""
    monkeypatch.setattr(position_wise, "make_hidden_again", lambda x, parts, buffer: buffer[: len(x)].zero_())
    counts = []
    for form in (torch.ops.mask2former, position_wise._InChunks):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
            getattr(form, name)(*operator_calls()[name])
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def addmm_flops(_: Any, a: Sequence[int], b: Sequence[int], **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


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


@needs_kernels
@OPERATORS
def test_operators_keep_to_their_schemas(name: str) -> None:
    operator = getattr(torch.ops.mask2former, name)
    torch.library.opcheck(operator, operator_calls()[name], test_utils=("test_schema", "test_faketensor"))


@needs_kernels
def test_arguments_that_do_not_fit() -> None:
    """The operators say so, and reach nowhere."""
    operators, calls = torch.ops.mask2former, operator_calls()

    def change(name: str, index: int, argument: Any) -> None:
        getattr(operators, name)(*calls[name][:index], argument, *calls[name][index + 1 :])

    x, position, weights, biases = calls["project_positions"]
    _, attended, parameters, *_ = calls["add_and_feed_forward"]
    grads, grad = calls["project_positions_backward"][0], calls["add_and_feed_forward_backward"][0]
    for message, name, index, argument in (
        ("x must be Float", "project_positions", 0, x.double()),
        (r"position must be \(B or 1", "project_positions", 1, x[:0]),
        ("position must be Float", "project_positions", 1, position[:, :5]),
        ("one layer or more", "project_positions", 2, []),
        ("as many biases", "project_positions", 3, biases[:1]),
        ("biases must be Float", "project_positions", 3, biases[::-1]),
        ("weights must be Float", "project_positions", 2, [weight.T for weight in weights]),
        ("grads must be Float", "project_positions_backward", 0, grads[::-1]),
        ("3 grads", "project_positions_backward", 0, grads[:2]),
        ("8 needed", "project_positions_backward", 4, [True] * 7),
        ("attended must be Float", "add_and_feed_forward", 1, attended[:1]),
        ("five parts", "add_and_feed_forward", 2, parameters[:9]),
        ("third a matrix", "add_and_feed_forward", 2, parameters[::-1]),
        ("parameters must be Float", "add_and_feed_forward", 2, [parameters[0].double(), *parameters[1:]]),
        (r"grad must be \(B, S, C\)", "add_and_feed_forward_backward", 0, grad[0]),
        ("sum1 must be Float", "add_and_feed_forward_backward", 1, grad[:, 1:]),
        ("sum2 must be Float", "add_and_feed_forward_backward", 2, grad.double()),
        ("attended must be Float", "add_and_feed_forward_backward", 3, grad[:1]),
        ("12 gradients", "add_and_feed_forward_backward", 7, [True] * 10),
    ):
        with pytest.raises(RuntimeError, match=message):
            change(name, index, argument)
