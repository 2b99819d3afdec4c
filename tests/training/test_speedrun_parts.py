"""The pieces of `speedrun`, each beside a plain and slow one."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from shared.datasets import Spec
from shared.errors import Refused
from training import networks
from training.recipes import SPEEDRUN
from training.speedrun import crops, muon, network, program, twin, whitening
from training.speedrun.network import Layout

SPEC = Spec(32, ("a", "b", "c"), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def photographs(count, size, seed=0):
    """uint8 [N, S, S, 3] in which near pixels are alike, as in photographs."""
    rough = np.random.default_rng(seed).normal(0, 70, (count, size // 4 + 1, size // 4 + 1, 3))
    smooth = tf.image.resize(rough, [size, size], "bicubic").numpy()
    return np.clip(smooth + [140, 120, 100], 0, 255).astype(np.uint8)


def newton_schulz(matrix):
    """What airbench94_muon does to one matrix [O, I * h * w], in float64."""
    x = matrix / (np.linalg.norm(matrix) + 1e-7)
    for _ in range(3):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_orthogonal_is_newton_schulz_of_each_matrix_and_zeros_around_it_stay():
    rng = np.random.default_rng(0)
    shapes = [(27, 8), (72, 16), (40, 40)]
    matrices = np.zeros((3, 72, 40), np.float32)
    for padded, shape in zip(matrices, shapes, strict=True):
        padded[:shape[0], :shape[1]] = rng.normal(0, 3, shape)
    got = muon.orthogonal(tf.constant(matrices), tf.float32).numpy()
    half = muon.orthogonal(tf.constant(matrices)).numpy().astype(np.float32)
    for n, (rows, columns) in enumerate(shapes):
        expected = newton_schulz(matrices[n, :rows, :columns].T.astype(np.float64)).T
        np.testing.assert_allclose(got[n, :rows, :columns], expected, atol=1e-5)
        np.testing.assert_allclose(half[n, :rows, :columns], expected, atol=0.03)
        assert np.count_nonzero(got[n]) == rows * columns
    for n in (0, 1):  # of the square one the least singular values need more than three iterations
        values = np.linalg.svd(got[n, :shapes[n][0], :shapes[n][1]], compute_uv=False)
        assert 0.3 < values.min() <= values.max() < 1.3


def test_a_step_of_muon_is_the_one_written_down():
    rng = np.random.default_rng(1)
    filters, gradients, momenta = (rng.normal(0, 1, (1, 18, 4)) for _ in range(3))
    got = muon.step(*(tf.constant(a, tf.float32) for a in (filters, gradients, momenta, [[[4.0]]])),
                    tf.constant(0.1), 0.6, tf.float32)
    kept = 0.6 * momenta + gradients
    update = newton_schulz((gradients + 0.6 * kept)[0].T).T
    np.testing.assert_allclose(got[0][0], filters[0] * 2 / np.linalg.norm(filters) - 0.1 * update, atol=1e-5)
    np.testing.assert_allclose(got[1], kept, atol=1e-5)


@pytest.mark.parametrize(("size", "kernel", "stride", "directions"), [(32, 2, 1, 12), (64, 4, 2, 24)])
def test_whitened_patches_are_uncorrelated_with_variance_1(size, kernel, stride, directions):
    images, scale = photographs(40, size), program.channel_scale(SPEC)
    filters = whitening.whitening(tf.constant(images), *scale, kernel, stride, directions)
    images = (images - scale[0]) / scale[1]
    assert filters.shape == (kernel, kernel, 3, 2 * directions)
    np.testing.assert_array_equal(filters[..., directions:], -filters[..., :directions])
    found = tf.nn.conv2d(images.astype(np.float32), filters[..., :directions], stride, "VALID").numpy()
    found = found.reshape(-1, directions).astype(np.float64)
    seen = found.T @ found / len(found)
    assert np.abs(seen - np.diag(np.diag(seen))).max() < 1e-3
    assert (np.diff(np.diag(seen)) < 1e-3).all()  # those of most variance first
    strong = np.diag(seen)[:6]  # the added 5e-4 is little beside their variance
    assert 0.9 < strong.min() <= strong.max() <= 1.001


def test_new_convolutions_hand_their_inputs_on():
    layout = Layout(32, 10)
    weights, running = network.initial(layout, np.random.default_rng(0))
    for (inputs, outputs), kernel in zip(layout.convolutions, network.kernels(layout, weights.filters), strict=True):
        x = np.random.default_rng(1).normal(0, 1, (2, 7, 7, inputs)).astype(np.float32)
        found = tf.nn.conv2d(x, kernel, 1, "SAME").numpy()
        np.testing.assert_allclose(found[..., :inputs], x, atol=1e-5)
        spread = np.asarray(kernel)[..., inputs:]
        if outputs > inputs:  # uniform within 1 / sqrt(fan in), as PyTorch's
            assert 0.98 < np.abs(spread).max() * np.sqrt(9 * inputs) <= 1
    assert weights.head.std() == pytest.approx(1, rel=1e-5)
    assert (running.means == 0).all()
    assert (running.variances == 1).all()


@pytest.mark.parametrize("xla", [False, True])
def test_a_batch_is_slices_of_padded_images_reversed_where_mirrored(xla):
    images = np.random.default_rng(0).integers(0, 256, (40, 9, 9, 3), np.uint8)
    reach = (2, 3)

    @tf.function(jit_compile=xla)
    def batch(seed, epoch):
        order, shifts, mirrored = crops.draw(len(images), reach, True, seed, epoch)
        rows = order[5:25]
        return order, shifts, mirrored, crops.take(tf.constant(images), rows, tf.gather(shifts, rows),
                                                   tf.gather(mirrored, rows))

    padded = np.pad(images, [(0, 0), (2, 2), (3, 3), (0, 0)], "reflect")
    order, shifts, mirrored, got = (a.numpy() for a in batch(tf.constant(3), tf.constant(4)))
    assert sorted(order) == list(range(40))
    assert set(shifts[:, 0]) == {-2, -1, 0, 1, 2}
    assert set(shifts[:, 1]) == {-3, -2, -1, 0, 1, 2, 3}
    assert 0.2 < mirrored.mean() < 0.8
    for image, row in zip(got, order[5:25], strict=True):
        down, right = shifts[row] + reach
        expected = padded[row, down:down + 9, right:right + 9]
        np.testing.assert_array_equal(image, expected[:, ::-1] if mirrored[row] else expected)
    assert [(crops.draw(40, reach, True, 3, epoch)[2].numpy() == mirrored).all() for epoch in (5, 6)] == [False, True]
    assert not (crops.draw(40, reach, True, 3, 5)[2].numpy() == mirrored).any()
    assert not crops.draw(40, reach, False, 3, 5)[2].numpy().any()
    assert not (crops.draw(40, reach, True, 3, 5)[0].numpy() == order).all()


def test_all_images_moved_alike_are_slices_of_padded_ones():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], "reflect")
    np.testing.assert_array_equal(crops.shifted(images, -1, -1), padded[:, :8, :8])
    np.testing.assert_array_equal(crops.shifted(images, 1, 1), padded[:, 2:, 2:])


@pytest.mark.parametrize("side", [6, 7])
def test_convolution_and_pool_of_even_and_odd_maps_are_tensorflow_s_with_their_gradients(side):
    rng = np.random.default_rng(0)
    x, kernel = (tf.constant(rng.normal(0, 1, shape), tf.float32) for shape in ((2, side, side, 4), (3, 3, 4, 5)))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, kernel])
        got = network.pooled(network.convolved_evenly(x, kernel))
        expected = tf.nn.max_pool2d(tf.nn.conv2d(x, kernel, 1, "SAME"), 2, 2, "VALID")
        weight = tf.constant(rng.normal(0, 1, got.shape), tf.float32)
        sums = [tf.reduce_sum(weight * y) for y in (got, expected)]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    for one, other in zip(tape.gradient(sums[0], [x, kernel]), tape.gradient(sums[1], [x, kernel]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_normalisation_is_keras_s_and_tells_its_statistics():
    x = np.random.default_rng(0).normal(3, 2, (8, 5, 5, 6)).astype(np.float32)
    bias = np.linspace(-1, 1, 6).astype(np.float32)
    got, (mean, variance) = network.normed(tf.constant(x), tf.constant(bias), None)
    layer = keras.layers.BatchNormalization(scale=False, epsilon=network.EPSILON, momentum=0.0)
    layer.build(x.shape)
    layer.beta.assign(bias)
    np.testing.assert_allclose(got, layer(x, training=True), atol=1e-5)
    np.testing.assert_allclose(mean, layer.moving_mean, atol=1e-5)
    np.testing.assert_allclose(variance, layer.moving_variance, rtol=1e-5)
    np.testing.assert_allclose(network.normed(x, bias, (mean, variance))[0], layer(x, training=False), atol=1e-5)


@pytest.mark.parametrize("size", [32, 47, 64])
def test_the_twin_answers_as_the_trained_network(size):
    spec = dataclasses.replace(SPEC, size=size)
    layout, rng = Layout.of(spec), np.random.default_rng(0)
    weights, _ = network.initial(layout, rng)
    channels = len(weights.biases)
    weights = weights._replace(biases=rng.normal(0, 0.3, channels).astype(np.float32),
                               whitening_bias=rng.normal(0, 0.3, 2 * layout.directions).astype(np.float32))
    running = network.Statistics(rng.normal(0, 0.2, channels).astype(np.float32),
                                 rng.uniform(0.5, 2, channels).astype(np.float32))
    plan = program.Plan(layout, SPEEDRUN, *program.channel_scale(spec), (2, 2), True, 1)
    images = photographs(7, size)
    pixels = program.normalised(plan, images, tf.float32)
    first_layer = program.first_layer(plan, images).numpy()
    model = networks.build(SPEEDRUN, spec)
    twin.fill(model, layout, weights, first_layer, running)
    logits = network.forward(layout, weights, first_layer, pixels, running)[0]
    assert logits.numpy().std() > 1e-3
    np.testing.assert_allclose(networks.logits_of(model)(images.astype(np.float32)), logits, atol=1e-5)
    half = program.normalised(plan, images, tf.float16)
    np.testing.assert_allclose(network.forward(layout, weights, first_layer, half, running)[0], logits, atol=0.02)

    state = program.begin(weights, running)
    np.testing.assert_allclose(program.new_answer(plan, tf.constant(images))(state, first_layer), logits, atol=1e-5)


@pytest.mark.parametrize("size", [32, 96, 160, 192, 224, 256])
def test_parts_have_every_image_once(size):
    for count in [*range(1, 3000), 5000, 10_000, 50_000, 199_999]:
        parts, batch = program.parts_of(count, size)
        assert (parts - 1) * batch < count <= parts * batch
        assert (batch - 1) * size**2 < program.ANSWERED


@pytest.mark.parametrize("answered", [3, 1.5])  # images of a part; in the second case four parts are enough for seven
def test_answers_in_parts_and_with_views_are_those_one_by_one(monkeypatch, answered):
    layout = Layout.of(SPEC)
    plan = program.Plan(layout, SPEEDRUN, *program.channel_scale(SPEC), (2, 2), True, 1)
    images = photographs(7, 32)
    state = program.begin(*network.initial(layout, np.random.default_rng(0)))
    first_layer = np.random.default_rng(0).normal(0, 1, (2, 2, 3, 24)).astype(np.float32)

    def seen(views):
        pixels = program.normalised(plan, np.ascontiguousarray(views), tf.float32)
        return network.forward(layout, state.weights, first_layer, pixels, state.running)[0].numpy()

    monkeypatch.setattr(program, "ANSWERED", int(answered * 32**2))
    got = program.new_answer(plan, tf.constant(images))(state, first_layer)
    np.testing.assert_allclose(got, seen(images), atol=1e-5)
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], "reflect")
    mirrored = [0.5 * seen(v) + 0.5 * seen(v[:, :, ::-1]) for v in (images, padded[:, :32, :32], padded[:, 2:, 2:])]
    expected = 0.5 * mirrored[0] + 0.25 * mirrored[1] + 0.25 * mirrored[2]
    got = program.new_answer(plan, tf.constant(images), program.VIEWS)(state, first_layer)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_images_too_small_are_refused_with_the_size_to_ask_for():
    with pytest.raises(Refused, match=r"at least 32 pixels a side and this dataset's have 16"):
        Layout.of(dataclasses.replace(SPEC, size=16))


@pytest.mark.parametrize("size", [32, 63, 64, 100, 224, 256])
def test_the_first_layer_s_map_has_31_to_62_places_a_side(size):
    layout = Layout(size, 2)
    assert 31 <= layout.places <= 62
    assert layout.directions <= 24
