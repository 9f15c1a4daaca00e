"""The decoder layer and its dropout, against torch's own layers and plain loops."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.dropout import dropout, kept, relu_dropout
from heads.query_decoder import QueryDecoder

WIDTH, HEADS, HIDDEN, DIM = 16, 4, 24, 10
SHAPES = list(itertools.product((1, 3, 5, 40), (1, 2, 7, 50)))  # every pair of forms occurs


class Reference(nn.Module):
    """The same layer of torch's own parts, as its documentation composes them."""

    def __init__(self, layer: QueryDecoder) -> None:
        super().__init__()
        self.layer = layer
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        with torch.no_grad():
            parts = (layer.query, layer.key, layer.value)
            self.attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            # Any offset of the keys: the softmax over tokens has to cancel it.
            biases = [layer.query.bias, torch.randn(WIDTH), layer.value.bias]
            self.attention.in_proj_bias.copy_(torch.cat(biases))
        self.attention.out_proj.load_state_dict(layer.out.state_dict())

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        layer = self.layer
        memory = torch.relu(layer.embed(tokens))
        asked = layer.norms[0](2 * queries).expand(len(tokens), -1, -1)
        padding = None if mask is None else ~mask
        attended = self.attention(asked, memory, memory, key_padding_mask=padding)[0]
        found = layer.norms[1](asked + attended)
        return layer.norms[2](found + layer.contract(torch.relu(layer.expand(found))))


def layer_of(seed: int = 0) -> QueryDecoder:
    torch.manual_seed(seed)
    layer = QueryDecoder(DIM, WIDTH, HEADS, HIDDEN, dropout=0.3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer.double()


@pytest.mark.parametrize(("num_queries", "num_tokens"), SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_layer_equals_torchs_own(num_queries: int, num_tokens: int, masked: bool) -> None:
    layer = layer_of().eval()
    reference = Reference(layer).double().eval()
    queries = torch.randn(num_queries, WIDTH, dtype=torch.float64)
    tokens = torch.randn(6, num_tokens, DIM, dtype=torch.float64)
    mask = None
    if masked:
        mask = torch.arange(num_tokens) < torch.randint(1, num_tokens + 1, (6, 1))
    found = layer(queries, tokens, mask)
    expected = reference(queries, tokens, mask)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    away = torch.randn_like(found)
    inputs = list(layer.parameters())
    ours = torch.autograd.grad((found * away).sum(), inputs)
    inputs = [p for name, p in layer.named_parameters()]
    theirs = dict(
        zip(
            [name for name, _ in reference.named_parameters()],
            torch.autograd.grad(
                (expected * away).sum(), list(reference.parameters()), allow_unused=True
            ),
            strict=True,
        )
    )
    moved = theirs["attention.in_proj_weight"]
    assert moved is not None
    theirs |= {f"layer.{n}.weight": moved[i * WIDTH :][:WIDTH] for i, n in enumerate(
        ("query", "key", "value"))}  # fmt: skip
    offsets = theirs["attention.in_proj_bias"]
    assert offsets is not None
    theirs |= {"layer.query.bias": offsets[:WIDTH], "layer.value.bias": offsets[2 * WIDTH :]}
    theirs |= {f"layer.out.{n}": theirs[f"attention.out_proj.{n}"] for n in ("weight", "bias")}
    for (name, _), own in zip(layer.named_parameters(), ours, strict=True):
        wanted = theirs[f"layer.{name}"]
        assert wanted is not None, name
        torch.testing.assert_close(own, wanted, rtol=1e-7, atol=1e-9, msg=name)


def test_a_row_without_tokens_has_a_finite_result_and_gradient() -> None:
    layer = layer_of().train()
    mask = torch.tensor([[True, False], [False, False]])
    found = layer(torch.randn(3, WIDTH).double(), torch.zeros(2, 2, DIM).double(), mask)
    found.square().sum().backward()
    assert torch.isfinite(found).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_a_width_that_heads_do_not_share_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match="width 10 is no multiple of num_heads 4"):
        QueryDecoder(DIM, 10, 4)


def test_dropout_in_training_differs_by_row_and_not_in_evaluation() -> None:
    layer = layer_of()
    tokens = torch.randn(1, 5, DIM).double().expand(2, -1, -1)
    queries = torch.randn(3, WIDTH).double()
    trained = layer.train()(queries, tokens)
    assert not torch.equal(trained[0], trained[1])
    tested = layer.eval()(queries, tokens)
    torch.testing.assert_close(tested[0], tested[1])


class TestDropout:
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
    def test_the_share_and_the_mean_are_kept(self, share: float) -> None:
        torch.manual_seed(0)
        result = dropout(torch.ones(400, 1001), share)
        dropped = (result == 0).float().mean().item()
        deviation = (share * (1 - share) / result.numel()) ** 0.5
        assert abs(dropped - share) < 5 * deviation + 2**-16
        assert result.max().item() == pytest.approx(1 / (1 - share), rel=1e-3)
        assert result.mean().item() == pytest.approx(1, abs=6 * deviation / (1 - share))

    def test_elements_that_share_a_random_number_are_independent(self) -> None:
        torch.manual_seed(1)
        mask = kept(torch.Size([200_000, 4]), 0.5).float()
        together = torch.corrcoef(mask.t()) - torch.eye(4)
        assert together.abs().max() < 0.012

    def test_gradients_pass_where_values_do(self) -> None:
        torch.manual_seed(2)
        values = torch.randn(50, 33, requires_grad=True)
        result = dropout(values, 0.25)
        result.sum().backward()
        assert values.grad is not None
        torch.testing.assert_close(values.grad * values.detach(), result.detach())

    def test_relu_dropout_is_relu_then_dropout(self) -> None:
        source = torch.randn(40, 17, requires_grad=True)
        torch.manual_seed(3)
        joined = relu_dropout(source * 1.0, 0.25)
        away = torch.randn(40, 17)
        (gradient,) = torch.autograd.grad((joined * away).sum(), source)
        torch.manual_seed(3)
        apart = dropout(F.relu(source), 0.25)
        torch.testing.assert_close(joined, apart)
        torch.testing.assert_close(gradient, *torch.autograd.grad((apart * away).sum(), source))

    def test_a_share_of_nothing_changes_nothing(self) -> None:
        values = torch.randn(3, 2)
        assert dropout(values, 0.0) is values
        torch.testing.assert_close(relu_dropout(values.clone(), 0.0), F.relu(values))
