"""Small models of many kinds, and what is expected of instruments and ``fit``.

``loop``: works only one by one (``chunk_size=1``, ``batch_size=1``), which the error says.
``refused``: an error.  ``lacking``: PyTorch itself cannot do it, and the error says so.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Linear, Sequential, Tanh
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from flatmin.layers import Dropout

SECOND = "hessian eigenvalues trace density fit_penalty"
FIT = "fit fit_sam fit_penalty"
MAPPED = f"sharpness_of_shards stiffness slice {FIT}"  # what vmap is used for
MEASURES = "gradient_norm sharpness attack sharpness_of_shards stiffness slice"
MEASURES += " hessian eigenvalues trace density"
ALL = f"{MEASURES} {FIT}"

random = torch.Generator().manual_seed(0)
VECTORS = torch.randn(6, 4, generator=random, dtype=torch.float64)
SEQUENCES = torch.randn(6, 3, 2, generator=random, dtype=torch.float64)
IMAGES = torch.randn(6, 2, 4, 4, generator=random, dtype=torch.float64)
TOKENS = torch.randint(5, (6, 3), generator=random)
CLASSES = torch.tensor([0, 1, 2, 1, 0, 2])


def cross_entropy(output, y):
    return F.cross_entropy(output, y, reduction="none")


@dataclass
class Kind:
    make: object
    x: torch.Tensor = VECTORS
    y: torch.Tensor = CLASSES
    twin: object = None  # the same function, written plainly
    criterion: object = cross_entropy
    dtype: object = torch.float64  # of the weights
    loop: str = ""
    refused: str = ""
    lacking: str = ""
    message: str = ""

    def expected(self, operation):
        for outcome in ("loop", "refused", "lacking"):
            if operation in getattr(self, outcome).split():
                return outcome
        return "right"


KINDS: dict[str, Kind] = {}


def kind(**expectations):
    def add(make):
        KINDS[make.__name__] = Kind(make, **expectations)
        return make

    return add


def on_tokens(**expectations):
    """Whole numbers have no gradient for an attack."""
    lacking = "attack " + expectations.pop("lacking", "")
    return kind(x=TOKENS, lacking=lacking, **expectations)


class Net(nn.Module):
    """A module from a function of itself and x; tensors become buffers."""

    def __init__(self, function, **parts):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self._function = function

    def forward(self, x):
        return self._function(self, x)


def weight(*shape):
    return nn.Parameter(torch.randn(*shape))


@kind()
def perceptron():
    return Sequential(Linear(4, 5), Tanh(), Linear(5, 3))


# ------------------------------------------------------------------------------------- in place


@kind(refused=ALL, message="model must not change its input in place")
def input_in_place():
    def forward(self, x):
        x -= 0.5
        return self.a(x)

    return Net(forward, a=Linear(4, 3))


@kind(refused=ALL, message="model must not change its input in place")
def part_of_the_input_in_place():
    def forward(self, x):
        x[:, 0].clamp_(min=0)
        return self.a(x)

    return Net(forward, a=Linear(4, 3))


@kind()
def activations_in_place():
    def forward(self, x):
        h = self.a(x)
        h += 1
        h[:, 0] = 0
        return self.b(h.tanh_())

    return Net(forward, a=Linear(4, 5), b=Linear(5, 3))


@kind()
def relu_in_place():
    return Sequential(Linear(4, 5), nn.ReLU(inplace=True), Linear(5, 3))


def spoiled(output, y):
    losses = cross_entropy(output, y)
    y.clamp_(max=1)
    return losses


@kind(criterion=spoiled, refused=ALL, message="criterion must not change its targets in place")
def targets_in_place():
    return perceptron()


# -------------------------------------------------------------------------------- shared weights


@kind()
def tied():
    model = Sequential(Linear(4, 4), Tanh(), Linear(4, 4), Tanh(), Linear(4, 3))
    model[2].weight = model[0].weight
    return model


@on_tokens()
def tied_by_a_product():
    forward = lambda self, x: torch.tanh(self.e(x).mean(1)) @ self.e.weight.T[:, :3]
    return Net(forward, e=nn.Embedding(5, 3))


@kind()
def used_twice():
    forward = lambda self, x: self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))
    return Net(forward, a=Linear(4, 4), b=Linear(4, 3))


@kind()
def low_rank():  # LoRA with 3 rows
    forward = lambda self, x: F.linear(x, self.l.weight + self.b @ self.a, self.l.bias)
    return Net(forward, l=Linear(4, 3), a=weight(2, 4), b=weight(3, 2))


@kind()
def low_rank_beside_frozen():
    model = low_rank()
    model.l.requires_grad_(False)
    return model


@kind()
def scalar_unused_and_empty():
    forward = lambda self, x: self.a(x) * self.scale
    scale = nn.Parameter(torch.tensor(2.0))
    return Net(forward, a=Linear(4, 3), scale=scale, unused=weight(2), empty=weight(0))


# ------------------------------------------------------------------ the examples inside of a model


@kind()
def reordered():
    def forward(self, x):
        order = x[:, 0].argsort()
        return self.b(torch.tanh(self.a(x[order])))[order.argsort()]

    return Net(forward, a=Linear(4, 5), b=Linear(5, 3))


@kind(x=SEQUENCES)
def time_first():
    forward = lambda self, x: self.b(self.a(x.transpose(0, 1)).tanh().mean(0))
    return Net(forward, a=Linear(2, 4), b=Linear(4, 3))


@kind(loop=f"sharpness_of_shards stiffness {FIT}", message="under torch.func.vmap")
def branch_on_data():
    forward = lambda self, x: self.a(x) if x.sum() > 0 else self.a(x) * 1.0
    return Net(forward, a=Linear(4, 3))


@kind(loop=f"sharpness_of_shards slice {FIT}", message="under torch.func.vmap")
def branch_on_weights():
    forward = lambda self, x: self.a(x) * (2.0 if self.a.weight.sum().item() > 0 else 1.0)
    return Net(forward, a=Linear(4, 3))


@kind()
def soft_experts():
    def forward(self, x):
        shares = self.g(x).softmax(-1)[..., None]
        return (shares * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)

    return Net(forward, g=Linear(4, 2), experts=nn.ModuleList([Linear(4, 3), Linear(4, 3)]))


@kind(loop=MAPPED, message="under torch.func.vmap")
def hard_experts():
    def forward(self, x):
        share, choice = self.g(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            rows = (choice == i).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]) * share[rows, None])
        return out

    return Net(forward, g=Linear(4, 2), experts=nn.ModuleList([Linear(4, 3), Linear(4, 3)]))


# ----------------------------------------------------------------------------------- sequences


def recurrent(layer):
    forward = lambda self, x: self.o(self.r(x)[0][:, -1])
    return Net(forward, r=layer(2, 3, batch_first=True), o=Linear(3, 3))


@kind(x=SEQUENCES, loop=MAPPED, message="layer of the type RNN")
def rnn():
    return recurrent(nn.RNN)


@kind(x=SEQUENCES, loop=MAPPED, message="layer of the type LSTM")
def lstm():
    return recurrent(nn.LSTM)


@kind(x=SEQUENCES, loop=MAPPED, message="layer of the type GRU")
def gru():
    return recurrent(nn.GRU)


@kind(x=SEQUENCES)
def gru_cell():
    def forward(self, x):
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = self.r(x[:, t], h)
        return self.o(h)

    return Net(forward, r=nn.GRUCell(2, 3), o=Linear(3, 3))


@kind(x=SEQUENCES, refused=ALL.replace("slice", ""), loop="slice", message="type LSTM")
def packed_lstm():
    def forward(self, x):
        lengths = [2] * len(x)
        pack = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        return self.o(self.r(pack)[1][0][-1])

    return Net(forward, r=nn.LSTM(2, 3, batch_first=True), o=Linear(3, 3))


def attends(**options):
    forward = lambda self, x: self.o(self.a(self.i(x), self.i(x), self.i(x))[0].mean(1))
    layer = nn.MultiheadAttention(4, 2, batch_first=True, **options)
    return Net(forward, i=Linear(2, 4), a=layer, o=Linear(4, 3))


@kind(x=SEQUENCES)
def attention():
    return attends()


@kind(x=SEQUENCES)
def attention_kernel():
    def forward(self, x):
        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0].mean(1))

    return Net(forward, q=Linear(2, 4), k=Linear(2, 4), v=Linear(2, 4), o=Linear(4, 3))


@kind(x=SEQUENCES)
def transformer():
    forward = lambda self, x: self.o(self.a(self.i(x)).mean(1))
    layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)
    return Net(forward, i=Linear(2, 4), a=layer, o=Linear(4, 3))


def embeds(**options):
    forward = lambda self, x: self.o(self.e(x).tanh().mean(1))
    return Net(forward, e=nn.Embedding(5, 3, **options), o=Linear(3, 3))


@on_tokens()
def embedding_with_padding():
    return embeds(padding_idx=0)


@on_tokens()
def embedding_with_sparse_gradients():
    return embeds(sparse=True)


@on_tokens(refused=ALL, message="without max_norm")
def embedding_of_bounded_norm():
    return embeds(max_norm=0.5)


@on_tokens(refused=ALL, message="scale_grad_by_freq")
def embedding_scaled_by_frequency():
    return embeds(scale_grad_by_freq=True)


@on_tokens(lacking=SECOND, message="twice for a Hessian.*embedding_bag")
def embedding_bag():
    return Net(lambda self, x: self.o(self.e(x).tanh()), e=nn.EmbeddingBag(5, 3), o=Linear(3, 3))


@on_tokens(y=TOKENS)
def language_model():
    forward = lambda self, x: self.o(torch.tanh(self.e(x))).transpose(1, 2)
    return Net(forward, e=nn.Embedding(5, 3), o=Linear(3, 5))


# -------------------------------------------------------------------------------- random numbers

NO_RANDOM = "random numbers must come from flatmin.layers.Dropout"


@kind()
def our_dropout():
    return Sequential(Linear(4, 5), Dropout(0.5), Linear(5, 3))


@kind(refused=FIT, message=NO_RANDOM)
def dropout():
    return Sequential(Linear(4, 5), nn.Dropout(0.5), Linear(5, 3))


@kind(x=SEQUENCES, refused=FIT, message=NO_RANDOM)
def dropout_in_attention():
    return attends(dropout=0.1)


@kind(refused=FIT, message=NO_RANDOM)
def dropout_as_a_function():
    forward = lambda self, x: self.b(F.dropout(self.a(x), 0.5, self.training))
    return Net(forward, a=Linear(4, 5), b=Linear(5, 3))


@kind(refused=ALL, message=NO_RANDOM)
def dropout_in_evaluation_too():
    return Net(lambda self, x: self.b(F.dropout(self.a(x))), a=Linear(4, 5), b=Linear(5, 3))


@kind(refused=FIT, message=NO_RANDOM)
def noise():
    forward = lambda self, x: self.a(x + torch.randn(4) if self.training else x)
    return Net(forward, a=Linear(4, 3))


# -------------------------------------------------------------------------------- normalization


class WeightNorm(nn.Module):
    """What ``weight_norm`` computes, by its formula."""

    def __init__(self):
        super().__init__()
        norm = parametrizations.weight_norm(Linear(4, 5))
        self.bias = norm.bias
        self.g, self.v = norm.parametrizations.weight.parameters()
        self.o = Linear(5, 3)

    def forward(self, x):
        w = self.g * self.v / self.v.norm(dim=1, keepdim=True)
        return self.o(torch.tanh(F.linear(x, w, self.bias)))


@kind(twin=WeightNorm)
def weight_norm():
    return Sequential(parametrizations.weight_norm(Linear(4, 5)), Tanh(), Linear(5, 3))


@kind(twin=WeightNorm, refused=FIT, message="see torch.nn.utils.parametrizations")
def weight_norm_by_a_hook():
    with warnings.catch_warnings(action="ignore"):
        return Sequential(nn.utils.weight_norm(Linear(4, 5)), Tanh(), Linear(5, 3))


@kind(loop=FIT, message="under torch.func.vmap")
def spectral_norm():
    return Sequential(parametrizations.spectral_norm(Linear(4, 5)), Tanh(), Linear(5, 3))


@kind()
def orthogonal():
    return Sequential(parametrizations.orthogonal(Linear(4, 4)), Tanh(), Linear(4, 3))


@kind()
def batch_norm():
    return Sequential(Linear(4, 5), nn.BatchNorm1d(5), Tanh(), Linear(5, 3))


@kind(refused=MEASURES, message="must give an example a loss")
def batch_norm_without_statistics():
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    return Sequential(Linear(4, 5), norm, Tanh(), Linear(5, 3))


@kind(loop=FIT, message="layer of the type BatchNorm1d")
def batch_norm_by_a_plain_average():
    return Sequential(Linear(4, 5), nn.BatchNorm1d(5, momentum=None), Tanh(), Linear(5, 3))


class Frozen(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


@kind()
def batch_norm_frozen():
    return Sequential(Linear(4, 5), Frozen(5).eval(), Tanh(), Linear(5, 3))


@kind()
def other_norms():
    return Sequential(Linear(4, 5), nn.LayerNorm(5), Tanh(), nn.RMSNorm(5), Linear(5, 3))


@kind(x=IMAGES)
def convolution():
    grouped = nn.Conv2d(2, 4, 3, groups=2)
    return Sequential(
        grouped, nn.GroupNorm(2, 4), Tanh(), nn.MaxPool2d(2), nn.Flatten(), Linear(4, 3)
    )


@kind(x=IMAGES)
def transposed_convolution_in_channels_last():
    up, norm = nn.ConvTranspose2d(2, 2, 2), nn.InstanceNorm2d(2, affine=True)
    model = Sequential(up, norm, Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(2, 3))
    return model.to(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------ types, compilers


@kind(dtype=None, refused=ALL, message="must have real parameters")
def complex_weights():
    forward = lambda self, x: torch.view_as_real(x.to(self.w.dtype) @ self.w).flatten(1)[:, :3]
    return Net(forward, w=nn.Parameter(torch.randn(4, 2, dtype=torch.complex128)))


@kind(dtype=torch.float16)
def half():
    return perceptron()


@kind(dtype=torch.bfloat16)
def brain_float():
    return perceptron()


@kind(dtype=None, refused=ALL, message="dtype must be given|examples of the type torch.float64")
def weights_of_two_types():
    forward = lambda self, x: self.b(self.a(x.float()).tanh().double())
    return Net(forward, a=Linear(4, 5), b=Linear(5, 3).double())


@kind(twin=perceptron)
def compiled():
    return torch.compile(perceptron(), backend="aot_eager")


@kind(twin=perceptron)
def compiled_in_place():
    model = perceptron()
    model.compile(backend="eager")
    return model


@kind(twin=perceptron)
def compiled_in_part():
    model = perceptron()
    return Sequential(torch.compile(model[0], backend="aot_eager"), *model[1:])


@kind(refused=ALL, message="the module that the RecursiveScriptModule was made from")
def scripted():
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(perceptron())


@kind(refused=ALL, message="the module that the DataParallel was made from")
def data_parallel():
    return nn.DataParallel(perceptron())


# ---------------------------------------------------------------------- frozen, hooks, derivatives


@kind()
def partly_frozen():
    model = perceptron()
    model[0].requires_grad_(False)
    return model


@kind(lacking=ALL, message="parameter that requires a gradient, got none")
def frozen():
    return perceptron().requires_grad_(False)


@kind(lacking=ALL, message="weights with values")
def lazy():
    return Sequential(nn.LazyLinear(5), Tanh(), Linear(5, 3))


@kind()
def without_gradient_in_part():
    def forward(self, x):
        with torch.no_grad():
            h = self.a(x).tanh()
        return self.b(h + x @ self.c)

    return Net(forward, a=Linear(4, 5), b=Linear(5, 3), c=weight(4, 5))


@kind()
def forward_hook():
    model = perceptron()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


@kind(refused=ALL.replace("slice", ""), message="torch.func")
def backward_hook():
    model = perceptron()
    model[0].register_full_backward_hook(lambda module, inputs, outputs: None)
    return model


@kind(refused=ALL.replace("slice", ""), message="torch.func")
def checkpointed():
    forward = lambda self, x: self.b(checkpoint(self.a, x, use_reentrant=False).tanh())
    return Net(forward, a=Linear(4, 5), b=Linear(5, 3))


class StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@kind()
def straight_through():
    forward = lambda self, x: self.b(self.a(x) + StraightThrough.apply(self.a(x)))
    return Net(forward, a=Linear(4, 5), b=Linear(5, 3))


@kind(refused=ALL.replace("slice", ""), loop="slice", message="torch.func")
def straight_through_in_the_old_style():
    forward = lambda self, x: self.b(self.a(x) + OldStyle.apply(self.a(x)))
    return Net(forward, a=Linear(4, 5), b=Linear(5, 3))


@kind(lacking=SECOND, message="twice for a Hessian.*cdist")
def distances():
    return Net(lambda self, x: -torch.cdist(x, self.c).square(), c=weight(3, 4))


def penalized(output, y):
    return cross_entropy(output["logits"], y) + 0.1 * output["penalty"]


@kind(criterion=penalized, lacking="attack", message="network must return K > 1 logits.*got dict")
def output_in_a_dictionary():
    forward = lambda self, x: {"logits": self.a(x), "penalty": self.a(x).square().mean(1)}
    return Net(forward, a=Linear(4, 3))


@kind()
def one_bias_for_all_units():
    return Net(lambda self, x: F.linear(x, self.w, self.b), w=weight(3, 4), b=weight(1))


@kind()
def energy_whose_gradient_is_the_output():
    forward = lambda self, x: torch.func.grad(lambda z: self.b(self.a(z).tanh()).sum())(x)[:, :3]
    return Net(forward, a=Linear(4, 5), b=Linear(5, 1))


@kind()
def layer_mapped_over_examples():
    return Net(lambda self, x: torch.func.vmap(self.a)(x), a=Linear(4, 3))


# ------------------------------------------------------------------------- what a model remembers


@kind()
def buffer_that_counts():
    def forward(self, x):
        self.n += 1
        return self.a(x) / self.n

    return Net(forward, a=Linear(4, 3), n=torch.zeros(()))


@kind()
def buffer_that_is_replaced():
    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.a(x - self.mean)

    return Net(forward, a=Linear(4, 3), mean=torch.zeros(4))


@kind()
def attribute_of_one_value():
    model = Net(lambda self, x: self.a(x * self.scale), a=Linear(4, 3))
    model.scale = torch.linspace(1, 2, 4, dtype=torch.float64)
    return model


@kind(refused=FIT, message="keep what differs between seeds in parameters and buffers")
def attribute_that_is_random():
    model = attribute_of_one_value()
    model.scale = torch.randn(4, dtype=torch.float64)
    return model


@kind(refused=FIT, message="keep what differs between seeds")
def random_layers():
    return Sequential(Linear(4, 5), [Tanh, nn.ReLU][int(torch.randint(2, ()))](), Linear(5, 3))


@kind(refused=FIT, message="keep what its forward pass changes in buffers.*'last'")
def attribute_that_is_kept():
    def forward(self, x):
        self.last = self.a(x)
        return self.b(self.last.tanh())

    return Net(forward, a=Linear(4, 5), b=Linear(5, 3))


@kind(refused=FIT, message="keep what its forward pass changes in buffers.*'h'")
def attribute_that_is_carried():
    def forward(self, x):
        h = self.a(x) if self.h is None else self.a(x) + self.h
        self.h = h.detach().mean(0)
        return self.b(h.tanh())

    model = Net(forward, a=Linear(4, 5), b=Linear(5, 3))
    model.h = None
    return model


@kind(refused=FIT, message="keep what its forward pass changes in buffers.*'calls'")
def attribute_that_counts():
    def forward(self, x):
        self.calls += 1
        return self.a(x) / self.calls

    model = Net(forward, a=Linear(4, 3))
    model.calls = 0
    return model
