"""Eqs. (1)-(3) of tinyclip_swap.py, (3)-(5) of spatial_kd.py: against numpy, in closed form, at
their edges.

Here everything is written out once more in numpy float64, with matrices P (rows: texts for a video)
and Q (rows: videos for a text), so that a wrong reduction or a transposed matrix cannot pass.
"""
import numpy as np
import pytest
import torch

from spatial_kd import spatial_loss, spatial_targets, total_loss
from tinyclip_swap import affinity_loss, class_scores, kl_pair

B, D = 6, 5
LABELS = np.array([0, 1, 0, 2, 1, 0])  # repeats: classes of three, two and one


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def tensors(*arrays, grad=False):
    return [torch.tensor(a, dtype=torch.float64, requires_grad=grad) for a in arrays]


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
    return sum(-(softmax(b) * np.log(softmax(a))).sum()
               for a, b in ((z_s, z_t), (z_s.T, z_t.T))) / (2 * len(v_s))


def through_unit(x, gradient):
    """Gradient with respect to x of what has `gradient` with respect to x / |x|."""
    n, length = unit(x), np.sqrt((x * x).sum(-1, keepdims=True))
    return (gradient - n * (n * gradient).sum(-1, keepdims=True)) / length


def assert_gradients(loss, v, t, scale, targets):
    """autograd against dL/dz = (P - target)/2B + (Q - target)'/2B, carried on to v, t and scale."""
    x, y, s = unit(v.detach().numpy()), unit(t.detach().numpy()), scale.item()
    z = s * x @ y.T
    dz = ((softmax(z) - targets[0]) + (softmax(z.T) - targets[1]).T) / (2 * len(z))
    loss.backward()
    for tensor, expected in ((v, through_unit(v.detach().numpy(), s * dz @ y)),
                             (t, through_unit(t.detach().numpy(), s * dz.T @ x)),
                             (scale, (dz * (x @ y.T)).sum())):
        np.testing.assert_allclose(tensor.grad, expected, atol=1e-10, rtol=0)


# ---- eq. (1) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [LABELS, np.arange(B), np.zeros(B, int)],
                         ids=["repeats", "all differ", "all equal"])
@pytest.mark.parametrize("scale", [1., 14.3, 100.])
def test_kl_pair_equals_numpy(labels, scale):
    v, t = draw(B, D), draw(B, D, seed=1)
    loss = kl_pair(*tensors(v, t), torch.tensor(labels), scale)
    assert loss.item() == pytest.approx(np_kl_pair(v, t, labels, scale), rel=1e-10)


def test_kl_pair_gradient_in_closed_form():
    v, t, scale = tensors(draw(B, D), draw(B, D, seed=1), 14.3, grad=True)
    G = soft_labels(LABELS)
    assert_gradients(kl_pair(v, t, torch.tensor(LABELS), scale), v, t, scale, (G, G))


def test_kl_pair_is_the_same_for_a_repeated_batch():
    (v, t), y = tensors(draw(B, D), draw(B, D, seed=1)), torch.tensor(LABELS)
    twice = kl_pair(v.repeat(2, 1), t.repeat(2, 1), y.repeat(2), 14.3)
    assert twice.item() == pytest.approx(kl_pair(v, t, y, 14.3).item(), rel=1e-12)


def test_kl_pair_is_symmetric_in_videos_and_texts():
    (v, t), y = tensors(draw(B, D), draw(B, D, seed=1)), torch.tensor(LABELS)
    assert kl_pair(v, t, y, 14.3).item() == pytest.approx(kl_pair(t, v, y, 14.3).item(), rel=1e-12)


def test_kl_pair_does_not_depend_on_the_order_of_the_batch():
    (v, t), y = tensors(draw(B, D), draw(B, D, seed=1)), torch.tensor(LABELS)
    p = torch.tensor([3, 0, 5, 1, 4, 2])
    assert kl_pair(v[p], t[p], y[p], 14.3).item() == pytest.approx(kl_pair(v, t, y, 14.3).item())


def test_kl_pair_does_not_depend_on_the_length_of_embeddings():
    (v, t), y = tensors(draw(B, D), draw(B, D, seed=1)), torch.tensor(LABELS)
    assert kl_pair(9 * v, .1 * t, y, 9.).item() == pytest.approx(kl_pair(v, t, y, 9.).item())


def test_kl_pair_is_zero_where_every_label_is_equal_and_embeddings_too():
    one = torch.ones(B, D)  # G and both softmaxes are uniform
    assert kl_pair(one, one, torch.zeros(B), 100.).item() == pytest.approx(0, abs=1e-6)


def test_kl_pair_falls_where_the_right_text_comes_nearer():
    t, y = torch.eye(B, dtype=torch.float64), torch.arange(B)
    off = torch.tensor(draw(B, B))
    far, near, there = (kl_pair(t + share * off, t, y, 10.) for share in (1, .3, 0))
    assert far > near > there


def test_kl_pair_of_a_single_clip_is_zero():
    v, t = tensors(draw(1, D), draw(1, D, seed=1))
    assert kl_pair(v, t, torch.tensor([3]), 100.).item() == 0


EXTREMES = {"right": torch.eye(B), "opposite": -torch.eye(B), "shifted": torch.eye(B).roll(1, 0),
            "all one": torch.ones(B, B), "zero": torch.zeros(B, B)}


@pytest.mark.parametrize("text", EXTREMES.values(), ids=EXTREMES.keys())
def test_kl_pair_stays_finite_at_a_scale_of_ten_thousand(text):
    v, t, scale = (x.clone().requires_grad_() for x in (torch.eye(B), text, torch.tensor(1e4)))
    loss = kl_pair(v, t, torch.tensor(LABELS), scale)
    loss.backward()
    assert all(x.isfinite().all() for x in (loss, v.grad, t.grad, scale.grad))


# ---- eq. (2) -------------------------------------------------------------------------------------


def test_class_scores_equal_numpy():
    v, t = draw(3, D), draw(16, 4, D, seed=1)
    z = 100 * np.stack([unit(v) @ unit(template).T for template in t])  # (16, 3, 4)
    np.testing.assert_allclose(class_scores(*tensors(v, t)), softmax(z).mean(0), atol=1e-12)


def test_class_scores_are_a_mean_of_softmaxes_not_a_softmax_of_means():
    v = torch.tensor([[1., 0.]])  # template 1 is sure of class 0, template 2 cannot tell
    t = torch.tensor([[[1., 0.], [0., 1.]], [[1., 0.], [1., 0.]]])
    torch.testing.assert_close(class_scores(v, t), torch.tensor([[.75, .25]]))


def test_class_scores_sum_to_one():
    scores = class_scores(*tensors(draw(3, D), draw(16, 4, D, seed=1)))
    torch.testing.assert_close(scores.sum(1), torch.ones_like(scores[:, 0]))


def test_class_scores_do_not_depend_on_the_length_of_embeddings():
    v, t = tensors(draw(3, D), draw(16, 4, D, seed=1))
    torch.testing.assert_close(class_scores(7 * v, .1 * t), class_scores(v, t))


def test_class_scores_multiply_cosines_by_one_hundred():
    v, t = tensors([[1., 0.]], [[[1., 0.], [.8, .6]]])  # cosines 1 and .8
    odds = class_scores(v, t)[0]
    assert (odds[0] / odds[1]).log().item() == pytest.approx(100 * .2, rel=1e-6)


# ---- eq. (3) -------------------------------------------------------------------------------------


def test_affinity_loss_equals_numpy_with_widths_that_differ():
    four = draw(B, D), draw(B, D, seed=1), draw(B, D + 3, seed=2), draw(B, D + 3, seed=3)
    loss = affinity_loss(*tensors(*four), 14.3, 50.)
    assert loss.item() == pytest.approx(np_affinity(*four, 14.3, 50.), rel=1e-10)


def test_affinity_loss_gradient_in_closed_form():
    v, t, scale = tensors(draw(B, D), draw(B, D, seed=1), 14.3, grad=True)
    v_t, t_t = draw(B, D + 3, seed=2), draw(B, D + 3, seed=3)
    z = 50 * unit(v_t) @ unit(t_t).T
    loss = affinity_loss(v, t, *tensors(v_t, t_t), scale, 50.)
    assert_gradients(loss, v, t, scale, (softmax(z), softmax(z.T)))


def test_affinity_loss_is_least_where_small_equals_large():
    v, t, scale = tensors(draw(B, D), draw(B, D, seed=1), 50., grad=True)
    large = v.detach(), t.detach()
    loss = affinity_loss(v, t, *large, scale, 50.)
    loss.backward()
    assert max(x.grad.abs().max().item() for x in (v, t, scale)) < 1e-12
    assert affinity_loss(v + .01 * torch.tensor(draw(B, D, seed=4)), t, *large, 50., 50.) > loss


def test_affinity_loss_of_a_repeated_batch_is_larger_by_ln_2():
    # A row's probability is shared by twice as many columns: its entropy grows, its KL does not.
    four = tensors(draw(B, D), draw(B, D, seed=1), draw(B, D + 3, seed=2), draw(B, D + 3, seed=3))
    twice = [x.repeat(2, 1) for x in four]
    loss, loss_2 = affinity_loss(*four, 14.3, 50.), affinity_loss(*twice, 14.3, 50.)
    assert (loss_2 - loss).item() == pytest.approx(np.log(2), rel=1e-12)
    least, least_2 = (affinity_loss(*x[2:], *x[2:], 50., 50.) for x in (four, twice))
    assert (loss_2 - least_2).item() == pytest.approx((loss - least).item(), rel=1e-12)


def test_affinity_loss_does_not_depend_on_the_order_of_the_batch():
    four = tensors(draw(B, D), draw(B, D, seed=1), draw(B, D + 3, seed=2), draw(B, D + 3, seed=3))
    p = torch.tensor([3, 0, 5, 1, 4, 2])
    assert affinity_loss(*(x[p] for x in four), 14.3, 50.).item() == pytest.approx(
        affinity_loss(*four, 14.3, 50.).item())


def test_affinity_loss_tells_small_from_large():
    # CE(A_t, A_s) is not CE(A_s, A_t): a swap of the two must not go unnoticed.
    a, b, c, d = tensors(draw(B, D), draw(B, D, seed=1), draw(B, D, seed=2), draw(B, D, seed=3))
    assert abs(affinity_loss(a, b, c, d, 14.3, 50.) - affinity_loss(c, d, a, b, 50., 14.3)) > .1


@pytest.mark.parametrize("large", EXTREMES.values(), ids=EXTREMES.keys())
@pytest.mark.parametrize("small", EXTREMES.values(), ids=EXTREMES.keys())
def test_affinity_loss_stays_finite_at_a_scale_of_ten_thousand(small, large):
    v, t, scale = (x.clone().requires_grad_() for x in (torch.eye(B), small, torch.tensor(1e4)))
    loss = affinity_loss(v, t, torch.eye(B), large, scale, 1e4)
    loss.backward()
    assert all(x.isfinite().all() for x in (loss, v.grad, t.grad, scale.grad))


# ---- spatial_kd.py: what a frozen CLIP sees ------------------------------------------------------

T, L = 4, 3


def test_spatial_targets_equal_numpy():
    f, b = draw(B, T, D), draw(L, D, seed=1)
    q = spatial_targets(*tensors(f, b))
    np.testing.assert_allclose(q, softmax(100 * unit(f) @ unit(b).T).mean(1), atol=1e-12)
    np.testing.assert_allclose(q.sum(1), 1, atol=1e-12)


def test_spatial_targets_do_not_depend_on_the_order_of_frames():
    f, b = (x.float() for x in tensors(draw(B, T, D), draw(L, D, seed=1)))
    torch.testing.assert_close(spatial_targets(f[:, [2, 0, 3, 1]], b), spatial_targets(f, b),
                               atol=1e-6, rtol=0)


def test_spatial_targets_are_a_mean_of_softmaxes_not_a_softmax_of_means():
    frames = torch.tensor([[[1., 0.], [0., 3.], [0., 1.], [0., 1.]]])  # one frame of four says so
    torch.testing.assert_close(spatial_targets(frames, torch.eye(2)), torch.tensor([[.25, .75]]))


def test_spatial_targets_do_not_depend_on_the_length_of_embeddings():
    f, b = tensors(draw(B, T, D), draw(L, D, seed=1))
    torch.testing.assert_close(spatial_targets(7 * f, .1 * b), spatial_targets(f, b))


# ---- spatial_kd.py: one objective ----------------------------------------------------------------

CONFIDENCE, FLOOR = np.array([.9, .2, .5, .3, .1, .29]), .3
SURE = np.array([0, 2, 3])  # a confidence equal to the floor is enough
KINDS = pytest.mark.parametrize("several", [False, True], ids=["one label", "several labels"])


def objective(several, grad=False):
    """Logits z and targets q, (B, L), and the confidence."""
    z, q = 3 * draw(B, L), softmax(draw(B, L, seed=1))
    (z,) = tensors(z, grad=grad)
    return z, *tensors((q > .3).astype(float) if several else q, CONFIDENCE)


@KINDS
def test_spatial_loss_equals_numpy(several):
    z, q, confidence = objective(several)
    p, y = z.numpy()[SURE], q.numpy()[SURE]
    each = -(y * np.log(1 / (1 + np.exp(-p))) + (1 - y) * np.log(1 / (1 + np.exp(p)))).mean(1) \
        if several else (y * np.log(y / softmax(p))).sum(1)
    loss = spatial_loss(z, q, confidence, FLOOR, several)
    assert loss.item() == pytest.approx(each.mean(), rel=1e-10)


@KINDS
def test_spatial_loss_gradient_in_closed_form(several):
    z, q, confidence = objective(several, grad=True)
    spatial_loss(z, q, confidence, FLOOR, several).backward()
    x, expected = z.detach().numpy(), np.zeros((B, L))
    p = 1 / (L * (1 + np.exp(-x))) - q.numpy() / L if several else softmax(x) - q.numpy()
    expected[SURE] = p[SURE] / len(SURE)
    np.testing.assert_allclose(z.grad, expected, atol=1e-10, rtol=0)


@KINDS
def test_spatial_loss_leaves_out_clips_below_the_floor_exactly(several):
    z, q, confidence = objective(several)
    alone = spatial_loss(z[SURE], q[SURE], confidence[SURE], FLOOR, several)
    unsure = torch.from_numpy(CONFIDENCE < FLOOR)[:, None]
    for other in (z, torch.where(unsure, 1e4, z)):  # whatever the logits of the others are
        assert torch.equal(spatial_loss(other, q, confidence, FLOOR, several), alone)


@KINDS
def test_spatial_loss_is_the_same_for_a_repeated_batch(several):
    given = objective(several)
    twice = spatial_loss(*(x.repeat(2, *[1] * (x.ndim - 1)) for x in given), FLOOR, several)
    assert twice.item() == pytest.approx(spatial_loss(*given, FLOOR, several).item(), rel=1e-12)


@KINDS
def test_spatial_loss_without_a_sure_clip_is_zero(several):
    z, q, confidence = objective(several, grad=True)
    loss = spatial_loss(z, q, confidence, .95, several)
    loss.backward()
    assert loss.item() == 0
    assert z.grad.abs().max().item() == 0


@KINDS
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_spatial_loss_stays_finite(several, size):
    z = (size * torch.eye(B, L)).requires_grad_()
    one = torch.eye(B, L).roll(1, 1)  # a target that is sure of another label, or of none
    loss = spatial_loss(z, one, torch.ones(B), FLOOR, several)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


def test_spatial_loss_is_zero_where_the_student_says_the_same():
    _, q, confidence = objective(False)
    assert spatial_loss(q.log() + 5, q, confidence, FLOOR).item() == pytest.approx(0, abs=1e-12)


# ---- spatial_kd.py: the sum ----------------------------------------------------------------------


def test_total_loss_adds_lambda_times_the_mean_of_the_tasks():
    action, *spatial = tensors(2., 1., 4., 7., grad=True)
    loss = total_loss(action, spatial, .5)
    loss.backward()
    assert loss.item() == pytest.approx(2 + .5 * 4)
    assert action.grad == 1
    assert [x.grad.item() for x in spatial] == pytest.approx([.5 / 3] * 3)


def test_total_loss_without_a_task_is_that_of_the_action():
    assert total_loss(torch.tensor(2.), [], .5) == 2
