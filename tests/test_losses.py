"""Eqs. (1)-(3) of tinyclip_swap.py: against numpy, in closed form, at their edges.

Everything is written out once more in numpy float64, so that a wrong reduction, a transposed matrix
or swapped roles cannot pass.
"""
import numpy as np
import pytest
import torch

from tinyclip_swap import affinity_loss, class_scores, kl_pair

B, D = 6, 5
LABELS = np.array([0, 1, 0, 2, 1, 0])  # repeats: classes of three, two and one


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def tensors(*arrays, grad=False):
    return [torch.tensor(a, dtype=torch.float64, requires_grad=grad) for a in arrays]


VIDEO, TEXT = draw(B, D), draw(B, D, seed=1)
LARGE = draw(B, D + 3, seed=2), draw(B, D + 3, seed=3)  # another width


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def soft_labels(labels):
    return softmax(10. * np.equal.outer(labels, labels))


def np_kl_pair(v, t, labels, scale):
    G, logits = soft_labels(labels), scale * unit(v) @ unit(t).T
    return sum((G * np.log(G / softmax(z))).sum() for z in (logits, logits.T)) / (2 * len(v))


def np_affinity(v_s, t_s, v_t, t_t, scale_s, scale_t):
    z_s, z_t = scale_s * unit(v_s) @ unit(t_s).T, scale_t * unit(v_t) @ unit(t_t).T
    pairs = (z_s, z_t), (z_s.T, z_t.T)
    return sum(-(softmax(b) * np.log(softmax(a))).sum() for a, b in pairs) / (2 * len(v_s))


def through_unit(x, gradient):
    """Gradient with respect to x of what has `gradient` with respect to x / |x|."""
    n, length = unit(x), np.sqrt((x * x).sum(-1, keepdims=True))
    return (gradient - n * (n * gradient).sum(-1, keepdims=True)) / length


def assert_gradients(loss, v, t, scale, targets):
    """autograd against dL/dz = (P - target)/2B + (Q - target)'/2B, P the softmax of the rows of z
    and Q that of its columns, carried on to v, t and scale."""
    x, y, s = unit(v.detach().numpy()), unit(t.detach().numpy()), scale.item()
    z = s * x @ y.T
    dz = ((softmax(z) - targets[0]) + (softmax(z.T) - targets[1]).T) / (2 * len(z))
    loss.backward()
    for tensor, expected in ((v, through_unit(v.detach().numpy(), s * dz @ y)),
                             (t, through_unit(t.detach().numpy(), s * dz.T @ x)),
                             (scale, (dz * (x @ y.T)).sum())):
        np.testing.assert_allclose(tensor.grad, expected, atol=1e-10, rtol=0)


# ---- eq. (1)


@pytest.mark.parametrize("labels", [LABELS, np.arange(B), np.zeros(B, int)],
                         ids=["repeats", "all differ", "all equal"])
def test_kl_pair_equals_numpy(labels):
    for scale in (1., 100.):
        loss = kl_pair(*tensors(VIDEO, TEXT), torch.tensor(labels), scale)
        assert loss.item() == pytest.approx(np_kl_pair(VIDEO, TEXT, labels, scale), rel=1e-10)


def test_kl_pair_gradient_in_closed_form():
    v, t, scale = tensors(VIDEO, TEXT, 14.3, grad=True)
    G = soft_labels(LABELS)
    assert_gradients(kl_pair(v, t, torch.tensor(LABELS), scale), v, t, scale, (G, G))


# ---- eq. (2)


def test_class_scores_equal_numpy():
    v, t = draw(3, D), draw(16, 4, D, seed=1)
    z = 100 * np.stack([unit(v) @ unit(template).T for template in t])          # (16, 3, 4)
    np.testing.assert_allclose(class_scores(*tensors(v, t)), softmax(z).mean(0), atol=1e-12)
    np.testing.assert_allclose(class_scores(*tensors(7 * v, .1 * t)), softmax(z).mean(0))


def test_class_scores_are_a_mean_of_softmaxes_not_a_softmax_of_means():
    v = torch.tensor([[1., 0.]])  # template 1 is sure of class 0, template 2 cannot tell
    t = torch.tensor([[[1., 0.], [0., 1.]], [[1., 0.], [1., 0.]]])
    torch.testing.assert_close(class_scores(v, t), torch.tensor([[.75, .25]]))


# ---- eq. (3)


def test_affinity_loss_equals_numpy_and_its_gradient_the_closed_form():
    v, t, scale = tensors(VIDEO, TEXT, 14.3, grad=True)
    loss = affinity_loss(v, t, *tensors(*LARGE), scale, 50.)
    assert loss.item() == pytest.approx(np_affinity(VIDEO, TEXT, *LARGE, 14.3, 50.), rel=1e-10)
    z = 50 * unit(LARGE[0]) @ unit(LARGE[1]).T
    assert_gradients(loss, v, t, scale, (softmax(z), softmax(z.T)))


# ---- both losses


@pytest.mark.parametrize("text", [torch.eye(B), -torch.eye(B), torch.zeros(B, B)],
                         ids=["right", "opposite", "zero"])
def test_losses_stay_finite_at_a_scale_of_ten_thousand(text):
    for loss in (lambda v, t, scale: kl_pair(v, t, torch.tensor(LABELS), scale),
                 lambda v, t, scale: affinity_loss(v, t, torch.eye(B), -text, scale, 1e4)):
        v, t, scale = (x.clone().requires_grad_() for x in (torch.eye(B), text, torch.tensor(1e4)))
        value = loss(v, t, scale)
        value.backward()
        assert all(x.isfinite().all() for x in (value, v.grad, t.grad, scale.grad))
