import torch

from cascade.models.dropout import Dropout


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(400_003, requires_grad=True)
    y = Dropout(0.15)(x)
    assert abs(float((y == 0).float().mean()) - 0.15) < 0.005
    assert abs(float(y.detach().mean()) - 1.0) < 0.005
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_dropout_follows_the_seed_and_rests_in_eval_mode():
    x, dropout = torch.randn(7, 5, 3), Dropout(0.5)
    torch.manual_seed(3)
    first = dropout(x)
    assert not torch.equal(dropout(x), first)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


def test_only_a_cpu_draws_bytes(monkeypatch):
    rates = []
    monkeypatch.setattr("torch.nn.functional.dropout", lambda x, rate: rates.append(rate) or x)
    for device in ("cpu", "meta"):
        assert Dropout(0.25)(torch.ones(5, 3, device=device)).shape == (5, 3)
        assert Dropout(0.25).eval()(torch.ones(5, device=device)).device.type == device
    assert rates == [0.25]
