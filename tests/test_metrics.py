"""Networks that describe pictures and the scores made of it: each against another implementation,
or by hand.
"""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image

import eyes
import tiny
from distill.core import distances, tensors
from distill.evaluation import networks, scores
from distill.evaluation.features import features, open_rgb
from distill.evaluation.references import coco, pictures_in
from distill.storage.atomic import write_atomic

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return eyes.write_all(tmp_path_factory.mktemp("eyes"))


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (50, 70, 3), np.uint8))


def loaded(network: networks.Describer) -> networks.Describer:
    network.load()
    return network


# -- scores from fixed features --------------------------------------------------------------------


def test_frechet_agrees_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = normal(300, 24), normal(200, 24, seed=1) * 1.5 + 0.2
    feature = torch.nn.Identity()
    feature.num_features = 24
    theirs = FrechetInceptionDistance(feature)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = scores.Frechet(network="x")(fake, real, 1.0)
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-5)


def test_kid_of_all_samples_is_the_unbiased_estimate_by_hand():
    real, fake = normal(9, 4).double(), (normal(9, 4, seed=1) + 0.5).double()

    def k(x, y):
        return (sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)) / 4 + 1) ** 3

    n = len(real)
    same = [
        sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        for x in (real, fake)
    ]
    cross = sum(k(x, y) for x in real for y in fake) / n**2
    found = scores.Kid(network="x", subsets=3)(fake, real, 1.0)
    assert found["kid"] == pytest.approx(sum(same) - 2 * cross, rel=1e-9)
    assert found["kid_std"] == pytest.approx(0, abs=1e-9)


def test_kid_draws_its_subsets_from_its_own_seed_and_leaves_the_global_one():
    seen = normal(40, 4, seed=1), normal(40, 4), 1.0
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = scores.Kid(network="x", subsets=5, size=10)(*seen)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert scores.Kid(network="x", subsets=5, size=10)(*seen) == first
    assert scores.Kid(network="x", subsets=5, size=10, seed=1)(*seen) != first


def test_kid_is_computed_by_one_process_of_several(monkeypatch):
    """A run of several judges itself in the first alone: nobody would answer."""
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    monkeypatch.setattr(
        "torchmetrics.metric.gather_all_tensors", lambda *_, **__: pytest.fail("asked the others")
    )
    found = scores.Kid(network="x", subsets=3)(normal(9, 4), normal(9, 4, seed=1), 1.0)
    assert math.isfinite(found["kid"])


def test_mmd_is_that_of_its_definition():
    a, b = normal(7, 3).double(), normal(5, 3, seed=1).double() + 1

    def mean(x, y):
        return sum(math.exp(-(p - q).square().sum().item() / (2 * 4.0)) for p in x for q in y) / (
            len(x) * len(y)
        )

    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    assert distances.mmd(a, b, bandwidth=2.0) == pytest.approx(expected, rel=1e-9)
    assert scores.Mmd(network="x", bandwidth=2.0)(a, b, 1.0) == pytest.approx(
        1000 * expected, rel=1e-9
    )
    assert distances.mmd(a, a) == pytest.approx(0, abs=1e-12)


def test_manifolds_by_brute_force():
    real, fake, k = normal(30, 3), normal(20, 3, seed=1) + 0.7, 4

    def radii(points):
        return [sorted((p - q).norm().item() for q in points)[k] for p in points]

    def inside(points, members):
        return [
            [(p - m).norm().item() <= r for m, r in zip(members, radii(members), strict=True)]
            for p in points
        ]

    fakes, reals = inside(fake, real), inside(real, fake)
    expected = {
        "precision": np.mean([any(row) for row in fakes]),
        "recall": np.mean([any(row) for row in reals]),
        "density": sum(map(sum, fakes)) / (k * len(fake)),
        "coverage": np.mean([any(row[i] for row in fakes) for i in range(len(real))]),
    }
    assert 0 < expected["precision"] < 1  # or it would tell nothing
    assert 0 < expected["coverage"] < 1
    assert scores.Manifolds(network="x", k=k)(fake, real, 1.0) == pytest.approx(expected)


def test_density_and_coverage_of_the_data_itself_and_too_few():
    real = normal(400, 2)
    density, coverage = distances.density_coverage(real, normal(400, 2, seed=1), 5)
    assert density == pytest.approx(1, abs=0.15)
    assert coverage > 0.9
    assert distances.density_coverage(real, real + 100, 5) == (0.0, 0.0)
    with pytest.raises(ValueError, match="more than 5 samples, got 4"):
        distances.density_coverage(real[:4], real)


def test_alignment_and_variety_by_hand():
    pictures, captions = (
        torch.tensor([[0.6, 0.8], [1.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [0.8, 0.6]]),
    )
    assert scores.Alignment(network="x")(pictures, captions, 50.0) == pytest.approx((0.6 + 0.8) / 2)
    assert scores.Alignment(network="x", scaled=True)(pictures, captions, 50.0) == pytest.approx(
        50 * 0.7
    )
    groups = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    assert scores.Variety(network="x")(pictures, groups, 1.0) == pytest.approx(2.5)


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [13, 299], ids=["smaller", "larger"])
def test_clean_resizing_is_pillows_on_floats(picture, size):
    expected = [
        np.asarray(
            Image.fromarray(np.asarray(picture)[:, :, c].astype(np.float32)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
        )
        for c in range(3)
    ]
    found = networks.clean_resize(picture, size)
    assert found.shape == (3, size, size)
    assert np.abs(found.numpy() - np.stack(expected).clip(0, 255)).max() < 1e-2  # of 255


def test_inception_is_that_of_torch_fidelity(tmp_path, monkeypatch):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        reference = theirs.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    network = loaded(networks.Inception(str(tmp_path / "weights.pth")))
    pictures = torch.randint(
        0, 256, (2, 3, 299, 299), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    (expected,) = reference(pictures)
    shown = torch.stack(
        [network.prepare(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pictures]
    )
    found = network.images(shown)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dinov2_gives_its_normalised_class_token(places, picture):
    network = loaded(networks.Dinov2(str(places["dinov2"]), size=64))
    model = transformers.Dinov2Model.from_pretrained(places["dinov2"])
    pixels = networks.clean_resize(picture, 64) / 255
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        pixels[c] = (pixels[c] - mean) / std
    expected = model(pixels[None]).pooler_output
    torch.testing.assert_close(network.images(network.prepare(picture)[None]), expected)


def test_clip_agrees_with_the_model_on_its_own_processor(places, picture):
    """PickScore's formula: exp(logit scale) times the cosine, which is what the model calls
    logits.
    """
    network = loaded(networks.Clip(str(places["clip"])))
    model = transformers.CLIPModel.from_pretrained(places["clip"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(places["clip"])
    pixels = transformers.AutoImageProcessor.from_pretrained(places["clip"])(
        picture, return_tensors="pt"
    ).pixel_values
    said = ["a red star", "two blue circles on white"]
    words = tokenizer(said, padding="max_length", max_length=24, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=pixels, **words).logits_per_image[0]
    image, texts = network.images(network.prepare(picture)[None]), network.texts(said, CPU)
    torch.testing.assert_close(network.scale * (texts @ image[0]), logits)
    for i in range(2):
        found = scores.Alignment(network="x", scaled=True)(image, texts[i : i + 1], network.scale)
        # A cosine near 0 keeps float32's absolute error, about 1e-7 of the scale.
        assert found == pytest.approx(logits[i].item(), rel=1e-5, abs=1e-7 * network.scale)
    assert network.texts(["a red star " * 40], CPU).shape == (1, 16)  # cut to what it reads


def test_cmmds_eyes_see_the_whole_picture(places, picture):
    network = loaded(networks.Clip(str(places["clip"]), whole=True))
    pixels = networks.clean_resize(picture, 32) / 255
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    expected = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(network.prepare(picture), expected)
    assert network.images(network.prepare(picture)[None]).norm() == pytest.approx(1, abs=1e-5)


def test_clip_score_is_open_clips(places, picture):
    name = f"local-dir:{places['open_clip']}"
    network = loaded(networks.OpenClip(name))
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    with torch.no_grad():
        image = model.eval().encode_image(preprocess(picture)[None])
        text = model.encode_text(open_clip.get_tokenizer(name)(["a red star"]))
    found = network.images(network.prepare(picture)[None]), network.texts(["a red star"], CPU)
    expected = torch.nn.functional.cosine_similarity(image, text).item()
    assert scores.Alignment(network="x")(*found, 1.0) == pytest.approx(expected, rel=1e-5)
    assert network.name == f"open_clip {name}"  # a tag would mean nothing here


def test_a_network_out_of_reach_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    for network in (
        networks.Dinov2("nobody/nothing"),
        networks.Clip(str(tmp_path)),
        networks.OpenClip("ViT-g-14"),
        networks.OpenClip("ViT-H-14", pretrained="HPS_v2.1_compressed.pt"),
    ):
        with pytest.raises(
            ValueError, match=r"^metrics\.networks: the weights of .* cannot be read \("
        ) as error:
            network.load()
        assert "\n" not in str(error.value)


def test_inceptions_file_may_hold_no_code(tmp_path):
    pytest.importorskip("torch_fidelity")
    torch.save({"x": print}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"cannot be read \(Weights only load failed"):
        networks.Inception(str(tmp_path / "weights.pth")).load()


def test_fingerprints_tell_weights_apart():
    torch.manual_seed(0)
    a, b = torch.nn.Linear(30, 40), torch.nn.Linear(30, 40)
    assert tensors.fingerprint(a) == tensors.fingerprint(a) != tensors.fingerprint(b)
    b.load_state_dict(a.state_dict())
    assert tensors.fingerprint(a) == tensors.fingerprint(b)
    assert tensors.fingerprint(tiny.shake(b, 1, std=1e-6)) != tensors.fingerprint(a)


def test_a_file_that_cannot_be_put_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomic(tmp_path / "taken", b"x")  # no file takes the place of a folder
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# -- files -----------------------------------------------------------------------------------------


def test_features_of_a_folder_in_any_batches_and_halves(places, tmp_path):
    """What is exact over processes: each picture's features are its own, whoever computes them."""
    network, paths = (
        loaded(networks.Dinov2(str(places["dinov2"]), size=64)),
        pictures_in(places["coco"] / "val2017"),
    )
    how = {"workers": 0, "device": CPU}
    whole = features(paths, network, tmp_path / "a", batch_size=8, **how)
    halves = [
        features(p, network, tmp_path / "b", batch_size=3, **how) for p in (paths[:5], paths[5:])
    ]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-5, atol=1e-5)
    loader = features(paths, network, tmp_path / "c", batch_size=8, workers=1, device=CPU)
    assert torch.equal(loader, whole)


def test_features_are_kept_until_anything_changes(places, tmp_path, monkeypatch):
    paths = eyes.write_pictures(tmp_path / "pictures", 3)
    network = loaded(networks.Dinov2(str(places["dinov2"]), size=64))
    how, calls = {"batch_size": 2, "workers": 0, "device": CPU}, []
    prepare = network.prepare
    monkeypatch.setattr(network, "prepare", lambda picture: calls.append(1) or prepare(picture))
    first = features(paths, network, tmp_path / "cache", **how)
    assert torch.equal(features(paths, network, tmp_path / "cache", **how), first)
    assert len(calls) == 3
    features(paths, network, tmp_path / "cache", **how, square=False)
    network.shown = "otherwise"
    features(paths, network, tmp_path / "cache", **how)
    eyes.write_pictures(tmp_path / "pictures", 1, seed=9)
    features(paths, network, tmp_path / "cache", **how)
    tiny.shake(network.model, 3)
    features(paths, network, tmp_path / "cache", **how)
    assert len(calls) == 15
    assert len(list((tmp_path / "cache").iterdir())) == 5  # and no part of a file


def test_pictures_are_read_as_in_training(monkeypatch, tmp_path):
    exif, clear = Image.Exif(), np.zeros((4, 4, 4), np.uint8)
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "sideways.jpg", exif=exif)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(np.full((4, 4), 30000, np.uint16)).save(tmp_path / "grey.png")
    Image.new("RGB", (8, 4)).save(
        tmp_path / "grid.png"
    )  # of distill.sample: no picture, but all of them
    clear, grey, *others = map(open_rgb, pictures_in(tmp_path))
    sideways = others[-1]
    with monkeypatch.context() as patch:  # Pillow, of an EXIF block that is damaged
        patch.setattr(
            "distill.storage.formats.ImageOps.exif_transpose", lambda _: struct.unpack("I", b"")
        )
        with pytest.raises(ValueError, match=r"sideways\.jpg: cannot be read as a picture"):
            open_rgb(tmp_path / "sideways.jpg")
    assert sideways.size == (4, 8)
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert grey.getpixel((0, 0)) == (117, 117, 117)


def test_the_centred_square_of_a_picture(places, tmp_path):
    wide = Image.new("RGB", (90, 30), (255, 0, 0))
    wide.paste((0, 0, 255), (30, 0, 60, 30))
    wide.save(tmp_path / "wide.png")
    Image.new("RGB", (30, 30), (0, 0, 255)).save(tmp_path / "blue.png")
    network = loaded(networks.Dinov2(str(places["dinov2"]), size=64))
    how = {"batch_size": 2, "workers": 0, "device": CPU}
    paths = pictures_in(tmp_path)
    blue, wide = features(paths, network, tmp_path / "cache", **how)
    torch.testing.assert_close(blue, wide)
    blue, wide = features(paths, network, tmp_path / "cache", **how, square=False)
    assert not torch.allclose(blue, wide, atol=1e-2)


def test_the_centred_square_is_made_of_the_pictures_own_pixels(places, tmp_path):
    """Also where its corner would lie between two pixels, as of COCO's 640 x 427."""
    columns = (
        np.arange(61, dtype=np.uint8) % 2 * 255
    )  # any resampling at half a pixel makes them grey
    Image.fromarray(np.tile(columns[None, :, None], (30, 1, 3))).save(tmp_path / "odd.png")
    network = loaded(networks.Dinov2(str(places["dinov2"]), size=64))
    seen = []
    network.prepare = lambda picture: (
        seen.append(np.unique(picture).tolist()) or networks.clean_resize(picture, 28)
    )
    features(pictures_in(tmp_path), network, tmp_path / "cache", device=CPU)
    assert seen == [[0, 255]]


def test_coco_gives_the_first_caption_of_each_picture_by_id(places):
    captions, paths = coco(str(places["coco"]), 5)
    assert [int(path.stem) for path in paths] == [100, 101, 102, 103, 104]
    assert captions == tiny.CAPTIONS[8:13]  # the second of each in the file has the lower id
    assert len(coco(str(places["coco"]), None)[0]) == 8


def test_coco_that_is_not_whole(places, tmp_path):
    with pytest.raises(ValueError, match=r"has captions of 8 pictures, metrics\.prompts=9"):
        coco(str(places["coco"]), 9)
    with pytest.raises(ValueError, match=r"cannot read annotations/captions_val2017\.json"):
        coco(str(tmp_path), 5)
    folder = eyes.write_coco(tmp_path / "coco")
    (folder / "val2017" / "000000000102.jpg").unlink()
    with pytest.raises(
        ValueError,
        match=r"1 of 8 pictures are not there, the first val2017/000000000102\.jpg; unpack",
    ):
        coco(str(folder), None)
    (folder / "annotations" / "captions_val2017.json").write_text(
        json.dumps({"images": [{"id": 1}], "annotations": []}), encoding="utf-8"
    )
    with pytest.raises(ValueError, match="cannot read annotations"):
        coco(str(folder), None)
