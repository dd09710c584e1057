"""Networks: shapes, parameter counts, bad input, and above all stacking."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state
from torch.nn.functional import cross_entropy

from flatmin.book import MLP, ResNet, SmallCNN, resnet20
from flatmin.layers import Dropout

NETWORKS = {
    "MLP": (lambda bn: MLP(12, 9, 7, 3, batch_norm=bn), (12,)),
    "MLP without bias": (lambda bn: MLP(12, 9, 3, bias=False, batch_norm=bn), (12,)),
    "MLP of images": (lambda bn: MLP(12, 9, 3, batch_norm=bn, activation=nn.Tanh), (3, 2, 2)),
    "SmallCNN": (lambda bn: SmallCNN(1, 3, widths=(4, 6, 6), batch_norm=bn), (1, 8, 8)),
    "ResNet": (lambda bn: ResNet([1, 1, 1], 3, in_channels=2, width=4, batch_norm=bn), (2, 8, 8)),
    "ResNet of four stages": (
        lambda bn: ResNet(num_classes=3, width=2, batch_norm=bn, stages=(1, 1, 1, 1)),
        (3, 16, 16),
    ),
}
networks = pytest.mark.parametrize("network", NETWORKS)
batch_norms = pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch_norm"])


def make_stack(network, batch_norm, dtype=torch.float64, runs=3, batch=5):
    """Single modules that differ in weights and running statistics, and a batch for each."""
    factory, shape = NETWORKS[network]
    torch.manual_seed(0)
    modules = []
    for _ in range(runs):
        module = factory(batch_norm).to(dtype)
        with torch.no_grad():
            for parameter in module.parameters():  # so that no branch is zero
                parameter += 0.1 * torch.randn_like(parameter)
            for name, buffer in module.named_buffers():
                if not name.endswith("num_batches_tracked"):
                    buffer += torch.rand_like(buffer)
        modules.append(module)
    x = torch.randn(runs, batch, *shape, dtype=dtype)
    y = torch.randint(3, (runs, batch))
    return modules, x, y


@batch_norms
@networks
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_stack_gives_the_outputs_gradients_and_buffers_of_each_single_network(
    network, batch_norm, training
):
    modules, x, y = make_stack(network, batch_norm)
    for module in modules:
        module.train(training)
    parameters, buffers = stack_module_state(modules)
    template = copy.deepcopy(modules[0]).to("meta")
    untouched = {name: buffer.clone() for name, buffer in buffers.items()}

    def loss(parameters, buffers, x, y):
        outputs = functional_call(template, (parameters, buffers), (x,))
        return cross_entropy(outputs, y), (outputs, buffers)

    def step(parameters, buffers, x, y):
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        return grad_and_value(loss, has_aux=True)(parameters, buffers, x, y)

    gradients, (losses, (outputs, new_buffers)) = torch.vmap(step)(parameters, buffers, x, y)

    for run, module in enumerate(modules):
        expected = module(x[run])
        cross_entropy(expected, y[run]).backward()
        torch.testing.assert_close(outputs[run], expected)
        torch.testing.assert_close(losses[run], cross_entropy(expected, y[run]))
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(gradients[name][run], parameter.grad)
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(new_buffers[name][run], buffer)
    assert bool(buffers) == batch_norm
    for name, buffer in buffers.items():
        assert torch.equal(buffer, untouched[name])
        changed = not torch.equal(new_buffers[name], buffer)
        assert changed == training, name


@batch_norms
@networks
def test_an_example_in_eval_mode_does_not_depend_on_its_batch(network, batch_norm):
    (module, *_), x, _ = make_stack(network, batch_norm)
    module.eval()
    together = module(x[0])
    alone = torch.cat([module(x[0, i : i + 1]) for i in range(len(x[0]))])
    torch.testing.assert_close(together, alone)


@batch_norms
@networks
def test_a_network_can_memorize_a_batch(network, batch_norm):
    _, x, y = make_stack(network, batch_norm, torch.float32, runs=1, batch=8)
    torch.manual_seed(1)
    model = NETWORKS[network][0](batch_norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = cross_entropy(model(x[0]), y[0])
        loss.backward()
        optimizer.step()
    assert loss < 0.2, f"{network} ends at a loss of {loss:.3f}"


@pytest.mark.parametrize("blocks", [1, 9])
def test_without_batch_norm_a_deep_residual_network_starts_well_scaled(blocks):
    """At the start each block is its shortcut, so depth changes nothing (SkipInit)."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    model = ResNet([blocks] * 3, batch_norm=False)
    features = model.blocks(model.stem(x))
    assert 0.2 < features.square().mean().sqrt() < 5
    cross_entropy(model(x), torch.arange(16) % 10).backward()
    scales = [p for p in model.parameters() if p.ndim == 0]
    assert len(scales) == len(model.blocks) == 3 * blocks
    assert all(scale == 0 for scale in scales)
    assert all(scale.grad != 0 for scale in scales), "no branch could ever switch on"


def test_mlp_is_linear_norm_activation_in_each_hidden_layer():
    kinds = [type(layer) for layer in MLP(2, 5, 4, 3, batch_norm=True)]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [nn.Flatten, *hidden, *hidden, nn.Linear]
    assert [type(layer) for layer in MLP(2, 3)] == [nn.Flatten, nn.Linear]
    assert all(layer.bias is None for layer in MLP(2, 5, 3, bias=False) if hasattr(layer, "bias"))
    assert any(isinstance(layer, nn.Tanh) for layer in MLP(2, 5, 3, activation=nn.Tanh))


@pytest.mark.parametrize(
    ("model", "count"),
    [
        # flooding demo: 4 weight matrices (2 + 3·500)·500, one 500·2, 4 norms of 2·500
        (MLP(2, 500, 500, 500, 500, 2, bias=False, batch_norm=True), 756_000),
        (MLP(784, 500, 300, 100, 10), 573_910),
        (SmallCNN(1, 10), 9 * 16 + 16 + 9 * 16 * 32 + 32 + 9 * 32 * 32 + 32 + 330),
        (SmallCNN(3, 10, batch_norm=True), 432 + 16 + 4608 + 32 + 9216 + 32 + 330 + 2 * 80),
        (resnet20(), 272_474),
        (ResNet([5, 5, 5]), 466_906),  # ResNet-32
        (ResNet([2, 2, 2, 2], width=64), 11_173_962),  # ResNet-18 with the stem for small images
    ],
    ids=lambda value: value if isinstance(value, int) else type(value).__name__,
)
def test_parameter_counts(model, count):
    assert sum(p.numel() for p in model.parameters()) == count


@batch_norms
@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize(
    "make",
    [
        lambda channels, bn: SmallCNN(channels, 7, batch_norm=bn),
        lambda channels, bn: resnet20(7, in_channels=channels, batch_norm=bn),
        lambda channels, bn: ResNet([1, 1, 1, 1], 7, channels, width=4, batch_norm=bn),
    ],
    ids=["SmallCNN", "resnet20", "ResNet of four stages"],
)
def test_image_networks_take_images_of_every_size(make, size, batch_norm):
    channels = 1 if size == 28 else 3
    outputs = make(channels, batch_norm)(torch.rand(2, channels, size, size))
    assert outputs.shape == (2, 7)
    assert torch.isfinite(outputs).all()


@pytest.mark.parametrize("network", NETWORKS)
def test_same_random_state_same_weights(network):
    factory, _ = NETWORKS[network]
    first, second = (
        (torch.manual_seed(3), factory(True).state_dict())[1],
        (torch.manual_seed(3), factory(True).state_dict())[1],
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(), r"sizes must be at least 2 positive whole numbers, got \(\)"),
        (lambda: MLP(10), r"sizes must be at least 2 .* got \(10,\)"),
        (lambda: MLP(10, 0, 2), r"sizes must be .* got \(10, 0, 2\)"),
        (lambda: MLP(10, -3), r"sizes must be .* got \(10, -3\)"),
        (lambda: MLP(10, 2.5), r"sizes must be .* got \(10, 2.5\)"),
        (lambda: MLP(10, True), r"sizes must be .* got \(10, True\)"),
        (lambda: MLP([10, 2], 3), r"sizes must be"),
        (lambda: SmallCNN(0, 10), "channels_in must be"),
        (lambda: SmallCNN(1, 0), "num_classes must be"),
        (lambda: SmallCNN(1, 10, widths=()), "widths must be"),
        (lambda: SmallCNN(1, 10, widths=(16, 0)), "widths must be"),
        (lambda: ResNet(num_classes=0), "num_classes must be"),
        (lambda: ResNet(in_channels=0), "in_channels must be"),
        (lambda: ResNet(width=0), "width must be"),
        (lambda: ResNet(stages=[]), "stages must be"),
        (lambda: ResNet(stages=[2, 0]), "stages must be"),
        (lambda: Dropout(1), r"p must be a number in \[0, 1\), got 1"),
        (lambda: Dropout(-0.1), r"p must be a number in \[0, 1\), got -0.1"),
        (lambda: Dropout(float("nan")), r"p must be a number in \[0, 1\), got nan"),
        (lambda: Dropout("0.5"), r"p must be a number in \[0, 1\), got '0.5'"),
        (lambda: MLP(2, 3, 2, dropout=1.5), r"p must be a number in \[0, 1\), got 1.5"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
