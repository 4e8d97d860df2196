"""Every reader on a tiny file in its true format, and every sentence for a broken one."""

import gzip
import os
import pickle

import numpy as np
import pytest
import torch
from tasks import images, text, values

from torchnewton.train.data import WINDOW, absolute, load
from torchnewton.train.errors import UsageError
from torchnewton.train.prepare import prepared


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_mnist(folder, train=7, test=3):
    folder.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", train), ("t10k", test)):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", np.arange(n * 28 * 28).reshape(n, 28, 28) % 256)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(n))


def test_digits_are_split_by_class_and_scaled(tmp_path):
    data = load("digits", tmp_path)
    assert data.x_train.shape == (1437, 1, 8, 8)
    assert data.x_test.shape == (360, 1, 8, 8)
    assert data.x_train.dtype == torch.float32
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    assert set(data.y_test.bincount().tolist()) <= {34, 35, 36, 37}
    assert torch.equal(data.x_train, load("digits", tmp_path).x_train)
    assert (data.kind, data.num_classes, data.metric) == ("classification", 10, "accuracy")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("sub", [True, False])
def test_idx_files_in_their_folder_or_beside(tmp_path, name, sub):
    write_mnist(tmp_path / name if sub else tmp_path)
    data = load(name, tmp_path)
    assert data.x_train.shape == (7, 1, 28, 28)
    assert data.y_test.tolist() == [0, 1, 2]
    assert data.x_train[0, 0, 0, 3] == torch.tensor(3 / 255)


def test_cifar10_without_a_test_set_keeps_the_last_eighth(tmp_path):
    (tmp_path / "cifar10").mkdir()
    x = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "cifar10" / "a.npz", x_train=x, y_train=np.arange(16) % 10)
    data = load("cifar10", tmp_path)
    assert data.x_train.shape == (14, 3, 32, 32)
    assert data.y_test.tolist() == [4, 5]
    assert data.x_train[1, 2, 3, 4] == torch.tensor(x[1, 3, 4, 2] / np.float32(255))


def test_cifar10_with_a_test_set(tmp_path):
    x = np.zeros((4, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=np.zeros(4), x_test=x[:3], y_test=np.ones(3))
    data = load("cifar10", tmp_path)
    assert (len(data.x_train), len(data.x_test)) == (4, 3)


def cifar_batches(folder, protocol=2, count=3):
    """Small files in the layout of the published ones, first channel k/255 in batch k."""
    folder.mkdir()
    for k, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"], start=1):
        x = np.zeros((count, 3072), np.uint8)
        x[:, :1024] = k
        x[:, -1] = 255
        content = {
            b"data": x,
            b"labels": [k % 10] * count,
            b"batch_label": b"made up",
            b"filenames": [b"a.png"] * count,
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol))


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar10"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar10_from_the_python_batches(tmp_path, folder, protocol):
    cifar_batches(tmp_path / folder, protocol)
    for data_dir in (tmp_path, tmp_path / folder):
        data = load("cifar10", data_dir)
        assert (data.x_train.shape, data.x_test.shape) == ((15, 3, 32, 32), (3, 3, 32, 32))
        assert data.y_train.tolist() == [k for k in range(1, 6) for _ in range(3)]
        assert data.y_test.tolist() == [6] * 3
        assert torch.allclose(data.x_train[3, 0], torch.tensor(2 / 255))
        assert data.x_train[0, 2, 31, 31] == 1
        assert not data.x_train[:, 1].any()


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cifar_batches(tmp_path / "cifar10")
    (tmp_path / "cifar10" / "data_batch_3").write_bytes(pickle.dumps({b"data": _Runs()}))
    with pytest.raises(UsageError, match=r"data_batch_3 could not be read as a CIFAR-10 batch: .*mkdir"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "made-by-a-pickle").exists()
    broken = {b"data": np.zeros((2, 9), np.uint8), b"labels": [0, 1]}
    (tmp_path / "cifar10" / "data_batch_3").write_bytes(pickle.dumps(broken))
    with pytest.raises(UsageError, match="shape"):
        load("cifar10", tmp_path)


def test_preparation():
    data = images(n=40)
    small = prepared(data, samples=30, test_samples=5, validation=0.2, center=True)
    assert (len(small.x_train), len(small.x_test), len(small.x_validation)) == (24, 5, 6)
    assert small.x_train.mean(0).abs().max() < 1e-6
    assert small.x_validation.mean(0).abs().max() > 1e-3
    mean = (data.x_test[:5] - small.x_test)[0]
    together = torch.cat([small.x_train, small.x_validation]) + mean
    for image in data.x_train[:30]:
        assert (together - image).abs().amax((1, 2, 3)).min() < 1e-6
    again = prepared(data, samples=30, validation=0.2)
    assert torch.equal(again.y_validation, small.y_validation)
    for options, match in (
        ({"validation": 0.001}, "leaves 0 of 40"),
        ({"loss": "hinge"}, "Unknown loss"),
    ):
        with pytest.raises(UsageError, match=match):
            prepared(data, **options)
    with pytest.raises(UsageError, match="values to predict"):
        prepared(values(), loss="squared-error")
    with pytest.raises(UsageError, match="is text"):
        prepared(text(), center=True)


def test_sine_has_the_published_sizes_and_noise(tmp_path):
    data = load("sine", tmp_path)
    assert (data.x_train.shape, data.y_test.shape) == ((7000, 1), (3000, 1))
    assert data.x_train.abs().max() <= 1
    noise = (data.y_train - torch.sin(10 * data.x_train)).std()
    assert 0.0095 < noise < 0.0105
    assert load("sine:100", tmp_path).name == "sine-100"
    assert not torch.equal(load("sine:100", tmp_path).y_train, data.y_train)


def test_libsvm_with_a_test_file(tmp_path):
    (tmp_path / "tiny").write_text("3 1:1 2:4\n5 1:3\n3 2:4\n5 1:1 2:0\n")
    (tmp_path / "tiny.t").write_text("5 3:2\n")
    data = load(f"libsvm:{tmp_path / 'tiny'}", tmp_path)
    assert data.x_train.shape == (4, 3)
    assert data.y_train.tolist() == [0, 1, 0, 1]
    assert (data.y_test.tolist(), data.num_classes) == ([1], 2)
    assert data.x_train.mean(0).abs().max() < 1e-6
    assert torch.allclose(data.x_train[:, 1].std(correction=0), torch.tensor(1.0))
    assert data.x_test[0, 2] == 2  # constant in training: not scaled


def test_libsvm_without_a_test_file_splits(tmp_path):
    (tmp_path / "tiny").write_text("".join(f"{i % 2} 1:{i}\n" for i in range(10)))
    data = load(f"libsvm:{tmp_path / 'tiny'}", tmp_path)
    assert (len(data.x_train), len(data.x_test)) == (8, 2)


@pytest.mark.parametrize("scale", [1e300, 1e-300])
@pytest.mark.parametrize("kind", ["table", "libsvm"])
def test_columns_of_any_size_are_standardized_and_constant_ones_vanish(tmp_path, kind, scale):
    x = np.random.default_rng(0).normal(0, scale, 40)
    rows = [f"0.1 {v} {k}" if kind == "table" else f"{k % 2} 1:0.1 2:{v}" for k, v in enumerate(x)]
    (tmp_path / "t").write_text("\n".join(rows))
    data = load(f"{kind}:{tmp_path / 't'}", tmp_path)
    assert not data.x_train[:, 0].any()
    assert torch.allclose(data.x_train[:, 1].std(correction=0), torch.tensor(1.0))


@pytest.mark.parametrize(("start", "delimiter"), [("\ufeff", ","), ("# a, b\n\n", " "), ("", ";"), ("# a\n", " ; ")])
def test_tables_of_spreadsheets(tmp_path, start, delimiter):
    (tmp_path / "t").write_text(start + "".join(f"{k}{delimiter}{k * k}\n" for k in range(20)), encoding="utf-8")
    assert load(f"table:{tmp_path / 't'}", tmp_path).x_train.shape == (18, 1)


@pytest.mark.parametrize(("delimiter", "name"), [(" ", "t.txt"), (",", "t.csv"), ("\t", "t.txt.gz"), (",", "t.gz")])
def test_table_is_standardized_with_training_statistics(tmp_path, delimiter, name):
    rows = np.random.default_rng(0).normal(5, 3, (40, 4))
    text = "\n".join(delimiter.join(map(str, row)) for row in rows)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    data = load(f"table:{tmp_path / name}", tmp_path)
    assert (data.x_train.shape, data.y_train.shape, data.x_test.shape) == ((36, 3), (36, 1), (4, 3))
    assert data.y_train.mean().abs() < 1e-6
    assert torch.allclose(data.x_train.std(0, correction=0), torch.ones(3))
    assert (data.name, data.kind, data.metric) == ("t", "regression", "mse")


def test_a_file_is_stored_with_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("table:a.csv") == f"table:{tmp_path / 'a.csv'}"
    assert absolute("sine:100") == "sine:100"


def test_text_predicts_the_next_character(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefgä" * 400, encoding="utf-8")
    data = load(f"text:{tmp_path / 'text.txt'}", tmp_path)
    assert data.x_train.shape == data.y_train.shape == (2879 // WINDOW, WINDOW)
    assert torch.equal(data.x_train.flatten()[1:], data.y_train.flatten()[:-1])
    assert data.num_classes == 8


BROKEN = {
    "letters": ("table", b"a b c\n" * 20),
    "header": ("table", b"a,b\n" + b"1,2\n" * 20),
    "nan value": ("libsvm", b"0 1:nan\n1 1:2\n" * 9),
    "inf value": ("libsvm", b"0 1:inf\n1 1:2\n" * 9),
    "inf label": ("libsvm", b"0 1:1\ninf 1:2\n" * 9),
    "no row": ("libsvm", b""),
    "one row": ("libsvm", b"1 1:1\n"),
    "wide": ("libsvm", b"0 1:1\n1 900000000:1\n"),
    "short": ("table", b"1 2\n" * 3),
    "ragged": ("table", b"1 2\n" * 20 + b"1\n"),
    "nan": ("table", b"1 nan\n" * 20),
    "half.gz": ("table", gzip.compress(b"1 2\n" * 200)[:20]),
    "svm": ("libsvm", b"hello world\n"),
    "values": ("libsvm", b"0.5 1:1\n" * 10),
    "latin": ("text", b"\xff\xfe\xfa" * 1000),
    "brief": ("text", b"abc"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence_with_its_name(tmp_path, name):
    kind, content = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name) as error:
        load(f"{kind}:{tmp_path / name}", tmp_path)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_a_broken_file_is_told_what_is_wrong(tmp_path):
    (tmp_path / "svm").write_text("0 1:1\n1 1:2\n")
    (tmp_path / "svm.t").write_text("")
    (tmp_path / "table").write_text("a,b\n" + "1,2\n" * 20)
    for spec, message in (("libsvm:svm", "svm.t has no rows"), ("table:table", "remove the header")):
        kind, name = spec.split(":")
        with pytest.raises(UsageError, match=message):
            load(f"{kind}:{tmp_path / name}", tmp_path)
    write_mnist(tmp_path, test=0)
    with pytest.raises(UsageError, match="7 training and 0 test samples"):
        load("mnist", tmp_path)
    with pytest.raises(UsageError, match="too fast for float32"):
        load("sine:1e40", tmp_path)


def test_missing_standard_files_say_what_to_put_where(tmp_path):
    with pytest.raises(UsageError, match=r"put train-images-idx3-ubyte\.gz.* into .*mnist"):
        load("mnist", tmp_path)
    with pytest.raises(UsageError, match=r"put the python batches .* into .*cifar10"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"\0\0\x08\x03abc"), gzip.compress(b"\0\0\x0d\x01")],
    ids=["empty", "no gzip", "too short", "another type"],
)
def test_a_broken_idx_file(tmp_path, content):
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UsageError, match="train-images-idx3"):
        load("mnist", tmp_path)


def test_images_and_labels_have_to_agree(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(3))
    with pytest.raises(UsageError, match="different numbers"):
        load("mnist", tmp_path)


def test_a_broken_npz_file(tmp_path):
    (tmp_path / "cifar10.npz").write_bytes(b"PK nothing")
    with pytest.raises(UsageError, match=r"cifar10\.npz"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("spec", ["", "imagenet", "digits:7", "sine:-1", "sine:x", "sine:nan", "libsvm", "libsvm:"])
def test_unknown_data_names_the_valid_ones(tmp_path, spec):
    with pytest.raises(UsageError, match="choose from digits, mnist, fashion-mnist, cifar10, sine"):
        load(spec, tmp_path)
