"""Eqs. (1)-(4) of tinyclip_swap.py against numpy: values, gradients in closed form, edge cases.

Everything is written out once more in numpy float64, so that a wrong reduction, a transposed matrix
or swapped roles cannot pass.
"""
import numpy as np
import pytest
import torch

from tinyclip_swap import (
    actionclip_loss,
    affinity_loss,
    class_cross_entropy,
    class_probabilities,
)

B, D = 6, 5
LABELS = np.array([0, 1, 0, 2, 1, 0])  # classes of three, two and one


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def tensors(*arrays, grad=False):
    return [torch.tensor(a, dtype=torch.float64, requires_grad=grad) for a in arrays]


VIDEO, TEXT = normal(B, D), normal(B, D, seed=1)
TEACHER = normal(B, D + 3, seed=2), normal(B, D + 3, seed=3)  # another width


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def soft_labels(labels):
    return softmax(10. * np.equal.outer(labels, labels))


def np_actionclip_loss(v, t, labels, scale):
    G, logits = soft_labels(labels), scale * unit(v) @ unit(t).T
    return sum((G * np.log(G / softmax(z))).sum() for z in (logits, logits.T)) / (2 * len(v))


def np_affinity_loss(v, t, teacher_v, teacher_t, scale, teacher_scale):
    z, target = scale * unit(v) @ unit(t).T, teacher_scale * unit(teacher_v) @ unit(teacher_t).T
    pairs = (z, target), (z.T, target.T)
    return sum(-(softmax(b) * np.log(softmax(a))).sum() for a, b in pairs) / (2 * len(v))


def gradient_through_unit(x, gradient):
    """Gradient with respect to x, given that with respect to x / |x|"""
    n, length = unit(x), np.sqrt((x * x).sum(-1, keepdims=True))
    return (gradient - n * (n * gradient).sum(-1, keepdims=True)) / length


def assert_gradients(loss, v, t, scale, dz):
    """autograd against the closed form: dz, the gradient with respect to the logits z = s v^ t^',
    carried on to v, t and scale"""
    x, y, s = unit(v.detach().numpy()), unit(t.detach().numpy()), scale.item()
    loss.backward()
    for tensor, expected in ((v, gradient_through_unit(v.detach().numpy(), s * dz @ y)),
                             (t, gradient_through_unit(t.detach().numpy(), s * dz.T @ x)),
                             (scale, (dz * (x @ y.T)).sum())):
        np.testing.assert_allclose(tensor.grad, expected, atol=1e-10, rtol=0)


def symmetric_dz(scale, target, target_of_columns):
    """dL/dz of eqs. (1) and (3): (P - target)/2B + (Q - target)'/2B, where P is the softmax of the
    rows of z and Q that of its columns"""
    z = scale * unit(VIDEO) @ unit(TEXT).T
    return ((softmax(z) - target) + (softmax(z.T) - target_of_columns).T) / (2 * B)


# ---- eq. (1)


@pytest.mark.parametrize("labels", [LABELS, np.arange(B), np.zeros(B, int)],
                         ids=["repeats", "all differ", "all equal"])
def test_actionclip_loss_equals_numpy(labels):
    for scale in (1., 100.):
        loss = actionclip_loss(*tensors(VIDEO, TEXT), torch.tensor(labels), scale)
        expected = np_actionclip_loss(VIDEO, TEXT, labels, scale)
        assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_actionclip_loss_gradient():
    v, t, scale = tensors(VIDEO, TEXT, 14.3, grad=True)
    G = soft_labels(LABELS)
    loss = actionclip_loss(v, t, torch.tensor(LABELS), scale)
    assert_gradients(loss, v, t, scale, symmetric_dz(14.3, G, G))


# ---- eq. (2)


def test_class_probabilities_equal_numpy():
    v, t = normal(3, D), normal(16, 4, D, seed=1)
    z = 100 * np.stack([unit(v) @ unit(template).T for template in t])          # (16, 3, 4)
    expected = softmax(z).mean(0)
    np.testing.assert_allclose(class_probabilities(*tensors(v, t)), expected, atol=1e-12)
    np.testing.assert_allclose(class_probabilities(*tensors(7 * v, .1 * t)), expected)


def test_class_probabilities_are_a_mean_of_softmaxes():
    """Not a softmax of means: template 1 is certain of class 0, template 2 cannot tell."""
    v = torch.tensor([[1., 0.]])
    t = torch.tensor([[[1., 0.], [0., 1.]], [[1., 0.], [1., 0.]]])
    torch.testing.assert_close(class_probabilities(v, t), torch.tensor([[.75, .25]]))


# ---- eq. (3)


def test_affinity_loss_equals_numpy_and_its_gradient():
    v, t, scale = tensors(VIDEO, TEXT, 14.3, grad=True)
    loss = affinity_loss(v, t, *tensors(*TEACHER), scale, 50.)
    expected = np_affinity_loss(VIDEO, TEXT, *TEACHER, 14.3, 50.)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    target = 50 * unit(TEACHER[0]) @ unit(TEACHER[1]).T
    dz = symmetric_dz(14.3, softmax(target), softmax(target.T))
    assert_gradients(loss, v, t, scale, dz)


# ---- eq. (4)


def test_class_cross_entropy_equals_numpy_and_its_gradient():
    text = normal(3, D, seed=4)
    v, t, scale = tensors(VIDEO, text, 7.4, grad=True)
    loss = class_cross_entropy(v, t, torch.tensor(LABELS), scale)
    p = softmax(7.4 * unit(VIDEO) @ unit(text).T)                               # (B, 3)
    expected = -np.log(p[range(B), LABELS]).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert_gradients(loss, v, t, scale, (p - np.eye(3)[LABELS]) / B)


# ---- edge cases


@pytest.mark.parametrize("text", [torch.eye(B), -torch.eye(B), torch.zeros(B, B)],
                         ids=["right", "opposite", "zero"])
def test_losses_stay_finite_at_a_scale_of_ten_thousand(text):
    for loss in (lambda v, t, scale: actionclip_loss(v, t, torch.tensor(LABELS), scale),
                 lambda v, t, scale: affinity_loss(v, t, torch.eye(B), -text, scale, 1e4)):
        v, t, scale = (x.clone().requires_grad_() for x in (torch.eye(B), text, torch.tensor(1e4)))
        value = loss(v, t, scale)
        value.backward()
        assert all(x.isfinite().all() for x in (value, v.grad, t.grad, scale.grad))
