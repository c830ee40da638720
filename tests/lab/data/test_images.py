from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab.data import Images, ImageShape, load
from steepest.lab.data.images import Labelled, cropped_and_flipped, held_out_of, labelled
from steepest.lab.data.permutations import generator_at
from steepest.lab.errors import InputError


def _photos(count: int, channels: int = 3, side: int = 8, classes: int = 4) -> Labelled:
    """Images that say in their first pixel which they are."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    return Labelled(images, np.arange(count) % classes)


def _numbers(images: Images, batch: torch.Tensor) -> list[int]:
    raw = batch[:, 0, 0, :2].double() * images._deviation[0] + images._mean[0]
    return (raw[:, 0] + 256 * raw[:, 1]).round().int().tolist()


def test_the_digits_are_8_x_8_in_10_classes() -> None:
    digits = load("digits")
    assert digits.shape(None) == ImageShape(1, 8, 10)
    assert (digits.unit, digits.bytes_per_token) == ("images", None)
    images, classes = digits.training(batch=32, context=None, seed=0).batch(0)
    assert images.shape == (32, 1, 8, 8)
    assert classes.shape == (32,)
    assert load("digits").sha256 == digits.sha256


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 9))
def test_an_epoch_has_each_training_image_once_and_parts_share_none(
    size: int, parts: int, seed: int
) -> None:
    images = Images("photos", "", _photos(100))
    batches = images.training(batch=size, context=None, seed=seed, parts=parts)
    row: list[int] = []
    for step in range(95 // (size * parts) + 2):
        for part in range(parts):
            row += _numbers(images, batches.batch(step, part)[0])
    held_out = next(images.validation(batch=100, context=None, count=100))[0]
    train = set(range(100)) - set(_numbers(images, held_out))
    assert set(row[: len(train)]) == train
    assert batches.state_dict() == {}


def test_a_batch_is_a_function_of_seed_step_and_part() -> None:
    images = Images("photos", "", _photos(200), augment=True)
    first, again = (images.training(batch=16, context=None, seed=5, parts=2) for _ in range(2))
    first.batch(0)
    for step, part in ((9, 1), (3, 0), (9, 0)):
        for ours, theirs in zip(first.batch(step, part), again.batch(step, part), strict=True):
            assert torch.equal(ours, theirs)
    other = images.training(batch=16, context=None, seed=6, parts=2).batch(9, 1)[0]
    assert not torch.equal(other, again.batch(9, 1)[0])


def test_channels_of_the_training_part_have_mean_0_and_deviation_1() -> None:
    images = Images("photos", "", _photos(400, classes=2))
    x, _ = images.training(batch=380, context=None, seed=0).batch(0)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_a_constant_channel_becomes_zero() -> None:
    part = _photos(40)
    part.images[:, 1] = 7
    x, _ = Images("photos", "", part).training(batch=4, context=None, seed=0).batch(0)
    assert (x[:, 1] == 0).all()


@given(st.lists(st.integers(1, 60), min_size=2, max_size=5))
def test_a_twentieth_of_each_class_is_held_out(sizes: list[int]) -> None:
    classes = np.repeat(np.arange(len(sizes)), sizes)
    part = Labelled(np.zeros((len(classes), 1, 2, 2), np.uint8), classes)
    part.images[:, 0, 0, 0], part.images[:, 0, 0, 1] = divmod(np.arange(len(classes)), 256)
    if max(sizes) == 1:
        with pytest.raises(InputError, match="one image of each class"):
            held_out_of(part)
        return
    train, held_out = held_out_of(part)
    for name, size in enumerate(sizes):
        count = int((held_out.classes == name).sum())
        assert count == (0 if size == 1 else max(1, round(size / 20)))
    both = np.concatenate([train.images, held_out.images])[:, 0, 0].tolist()
    assert sorted(both) == sorted(part.images[:, 0, 0].tolist())


def test_validation_batches_are_the_same_at_every_call_and_mix_classes() -> None:
    sorted_by_class = labelled(
        "photos", np.zeros((400, 4, 4), np.uint8), np.repeat(np.arange(4), 100)
    )
    images = Images("photos", "", sorted_by_class, judge=sorted_by_class)
    first, again = (
        [y for _, y in images.validation(batch=16, context=None, count=40)] for _ in range(2)
    )
    assert [len(y) for y in first] == [16, 16, 8]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(torch.cat(first).unique()) == 4


def test_the_test_part_is_scored_only_when_asked_for(tmp_path: Path) -> None:
    train, test = _photos(100, side=4), _photos(12, side=4)
    arrays = {"x_train": train.images, "y_train": train.classes}
    np.savez(tmp_path / "a.npz", **arrays, x_test=test.images, y_test=test.classes)
    data = load(str(tmp_path / "a.npz"))
    assert isinstance(data, Images)
    assert "12 test images kept apart" in data.description
    assert sum(len(y) for _, y in data.test(5)) == 12
    judged = load(str(tmp_path / "a.npz"), validation="test")
    assert "judged by its 12 test images" in judged.description
    assert "100 images to train on" in str(judged)
    assert sum(len(y) for _, y in judged.validation(batch=5, context=None, count=99)) == 12
    assert judged.sha256 != data.sha256
    np.savez(tmp_path / "b.npz", **arrays)
    other = load(str(tmp_path / "a.npz"), validation=str(tmp_path / "b.npz"))
    assert sum(len(y) for _, y in other.validation(batch=50, context=None, count=999)) == 100
    with pytest.raises(InputError, match="no test part"):
        load(str(tmp_path / "b.npz"), validation="test")
    with pytest.raises(InputError, match="no test part"):
        load(str(tmp_path / "b.npz")).test(5)


@given(st.integers(1, 6), st.sampled_from([1, 3]), st.sampled_from([8, 16, 32]), st.integers(0, 99))
def test_augmented_images_are_shifted_and_mirrored_pixel_for_pixel(
    count: int, channels: int, side: int, seed: int
) -> None:
    images = torch.randint(1, 256, (count, channels, side, side), dtype=torch.uint8)
    border = side // 8
    draw = generator_at(seed, 0)
    shifts = draw.integers(0, 2 * border + 1, size=(2, count)).tolist()
    mirrored = draw.random(count) < 0.5
    results = cropped_and_flipped(images, generator_at(seed, 0))
    padded = torch.nn.functional.pad(images, (border,) * 4)
    for i in range(count):
        y, x = shifts[0][i], shifts[1][i]
        expected = padded[i, :, y : y + side, x : x + side]
        assert torch.equal(results[i], expected.flip(2) if mirrored[i] else expected)


def test_all_shifts_and_both_directions_occur() -> None:
    image = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(500, 1, 8, 8)
    kinds = cropped_and_flipped(image, generator_at(0, 0)).flatten(1).unique(dim=0)
    assert len(kinds) == 3 * 3 * 2


def test_photos_are_augmented_and_small_or_grey_images_are_not() -> None:
    for channels, side, expected in ((3, 32, True), (3, 16, False), (1, 32, False)):
        images = Images("photos", "", _photos(20, channels, side))
        assert images.augment is expected
        assert ("at random" in images.description) is expected
    assert Images("photos", "", _photos(20, 3, 32), augment=False).augment is False


@pytest.mark.parametrize(
    "shape", [(9, 4, 4), (9, 4, 4, 1), (9, 1, 4, 4), (9, 4, 4, 3), (9, 3, 4, 4)]
)
def test_the_shape_says_where_the_channels_are(shape: tuple[int, ...]) -> None:
    channels = 3 if 3 in shape else 1
    part = labelled("images", np.zeros(shape, np.uint8), np.zeros((9, 1), np.int32))
    assert part.images.shape == (9, channels, 4, 4)
    assert part.classes.dtype == np.int64


ZEROS = np.zeros((9, 4, 4), np.uint8)
NUMBERS = np.arange(9) % 2


@pytest.mark.parametrize(
    ("images", "classes", "sentence"),
    [
        (ZEROS.astype(float), NUMBERS, "of float64, expected whole numbers of 8 bits"),
        (ZEROS.reshape(9, 16), NUMBERS, r"of shape \(9, 16\)"),
        (np.zeros((9, 4, 4, 2), np.uint8), NUMBERS, "with 1 or 3 channels"),
        (np.zeros((9, 4, 6), np.uint8), NUMBERS, "4 x 6 pixels, expected squares"),
        (ZEROS, NUMBERS[:8], "a whole number for each of its 9 images"),
        (ZEROS, NUMBERS / 2, "a whole number for each"),
        (ZEROS, NUMBERS - 1, "class -1"),
        (ZEROS, NUMBERS * 0 + 3, "one class only, number 3"),
        (ZEROS[:0], NUMBERS[:0], "no images"),
        (ZEROS[:2], NUMBERS[:2], "one image of each class"),
    ],
)
def test_wrong_arrays_get_a_sentence(
    tmp_path: Path, images: np.ndarray, classes: np.ndarray, sentence: str
) -> None:
    np.savez(tmp_path / "a.npz", images=images, labels=classes)
    with pytest.raises(InputError, match=sentence):
        load(str(tmp_path / "a.npz"))


def test_a_test_part_of_another_kind_gets_a_sentence(tmp_path: Path) -> None:
    def saved(x: np.ndarray, y: np.ndarray) -> str:
        np.savez(tmp_path / "a.npz", x_train=ZEROS, y_train=NUMBERS, x_test=x, y_test=y)
        return str(tmp_path / "a.npz")

    with pytest.raises(InputError, match="expected the same"):
        load(saved(np.zeros((9, 5, 5), np.uint8), NUMBERS))
    with pytest.raises(InputError, match="class 2 to judge by"):
        load(saved(ZEROS, NUMBERS + 1))


@pytest.mark.parametrize("cut", [0, 10, 300, -40])
def test_a_torn_npz_file_gets_a_sentence(tmp_path: Path, cut: int) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=ZEROS, labels=NUMBERS)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    if cut == 300:
        content[60:90] = b"\xff" * 30
    (tmp_path / "b.npz").write_bytes(content if cut == 300 else content[:cut])
    with pytest.raises(InputError, match="is torn"):
        load(str(tmp_path / "b.npz"))


def test_other_names_in_an_npz_file_get_a_sentence(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pictures=ZEROS)
    with pytest.raises(InputError, match="arrays named pictures, expected x_train"):
        load(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", images=np.array([{}]), labels=NUMBERS)
    with pytest.raises(InputError, match="is torn"):
        load(str(tmp_path / "b.npz"))


def _image_folder(folder: Path, mode: str = "RGB", size: int = 6, count: int = 5) -> Path:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            shape = (size, size) if mode == "L" else (size, size, 3)
            pixels = rng.integers(0, 256, shape, dtype=np.uint8)
            image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_a_folder_has_a_folder_for_each_class(tmp_path: Path, mode: str, channels: int) -> None:
    data = load(str(_image_folder(tmp_path / "a", mode)))
    assert data.shape(None) == ImageShape(channels, 6, 2)
    assert "2 of 10 images held out" in data.description
    for part in ("train", "test"):
        _image_folder(tmp_path / "b" / part, mode)
    assert "10 test images kept apart" in load(str(tmp_path / "b")).description


def test_a_folder_with_grey_images_among_colours_is_in_colours(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    _image_folder(tmp_path)
    image.fromarray(np.full((6, 6), 9, np.uint8)).save(tmp_path / "cats" / "grey.png")
    assert load(str(tmp_path)).shape(None).channels == 3


def test_bad_image_folders_get_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    (_image_folder(tmp_path / "a") / "birds").mkdir()
    with pytest.raises(InputError, match=r"birds of a class has no images"):
        load(str(tmp_path / "a"))
    (_image_folder(tmp_path / "b") / "cats" / "torn.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(InputError, match=r"could not read .*torn.png as an image"):
        load(str(tmp_path / "b"))
    image.new("RGB", (7, 6)).save(_image_folder(tmp_path / "c") / "dogs" / "wide.png")
    with pytest.raises(InputError, match=r"wide.png has 7 x 6 pixels, but"):
        load(str(tmp_path / "c"))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"Pillow, .* pip install 'steepest\[data\]'"):
        load(str(tmp_path / "c"))


def test_images_have_no_text() -> None:
    images = Images("photos", "", _photos(20))
    for call in (lambda: images.encode("a"), lambda: images.decode([1])):
        with pytest.raises(InputError, match="only text has tokens"):
            call()


def test_mnist_and_cifar(real_data: Path) -> None:
    mnist = load(str(real_data / "mnist" / "mnist.npz"))
    assert mnist.shape(None) == ImageShape(1, 28, 10)
    assert "3,000 of 60,000 images held out, 10,000 test images kept apart" in mnist.description
    cifar = load(str(real_data / "cifar10" / "cifar10_5k_1k.npz"))
    assert cifar.shape(None) == ImageShape(3, 32, 10)
    assert cifar.augment
    counts = torch.cat([y for _, y in cifar.validation(batch=99, context=None, count=9999)])
    assert counts.bincount().tolist() == [25] * 10
