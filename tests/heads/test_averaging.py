"""The exponential moving average of weights."""

import torch

from heads.averaging import WeightAverage


def test_the_average_is_the_weighted_sum_of_all_weights() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(3, 2)
    head.bias.requires_grad_(False)
    average = WeightAverage(head, 0.8)
    assert average.values.keys() == {"weight"}
    trace, decays = [head.weight.detach().clone().double()], []
    for step in range(1, 60):
        with torch.no_grad():
            head.weight += torch.randn(2, 3)
        average.update(step)
        trace.append(head.weight.detach().clone().double())
        decays.append(min(0.8, (1 + step) / (10 + step)))
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for number, weight in enumerate(trace):
        share = 1.0 if number == 0 else 1 - decays[number - 1]
        for later in decays[number:]:
            share *= later
        expected += share * weight
    torch.testing.assert_close(average.values["weight"].double(), expected, atol=1e-5, rtol=1e-5)
    assert 0.8 in decays
    assert decays[0] < 0.2


def test_the_head_computes_with_the_average_inside_and_trains_on_with_its_own() -> None:
    head = torch.nn.Linear(2, 1)
    average = WeightAverage(head, 0.5)
    own = head.weight.detach().clone()
    average.values["weight"].fill_(7.0)
    with average.applied():
        assert (head.weight == 7).all()
    assert torch.equal(head.weight, own)
    assert (average.values["weight"] == 7).all()
