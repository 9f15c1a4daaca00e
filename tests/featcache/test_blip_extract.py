"""BLIP through the extraction: what lands in a cache, and what heads make of it."""

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from featcache.backbones.base import FeatureRequest
from featcache.backbones.blip import BlipConfig
from featcache.backbones.open_clip import OpenClipConfig
from featcache.errors import BackboneError, CacheMismatchError, ConfigError
from featcache.extract import ExtractConfig, run
from featcache.extraction import Extraction
from featcache.images import load_pixels
from featcache.info import InfoConfig
from featcache.info import run as info
from featcache.precision import Sample, open_checked
from featcache.reader import open_cache
from featcache.text_input import picture_of
from featcache.verify import VerifyConfig
from featcache.verify import run as verify
from heads.data import FeatureTables, open_arrays
from heads.encoding import encode_files
from heads.models.linear import LinearConfig
from heads.predict import PredictConfig
from heads.predict import run as predict
from heads.run_folder import Member
from heads.train import TrainConfig
from heads.train import run as train
from heads.zero_shot import ZeroShotJobConfig
from heads.zero_shot import run as zero_shot

JOINT = {"multimodal": "states", "itm": True, "storage_dtype": "float32"}
NAMES = ("image/multimodal", "image/multimodal_mask", "image/multimodal_pooled", "image/itm")
CAPTIONS = ["A cat on the mat.", "THE DOG", "A photo of a cat, a dog and the mat, a picture of it"]


@pytest.fixture
def captioned(image_folder):
    """CSV over the image folder: none, one or two captions an image."""
    lines = ["path,label,split,captions"]
    for number, file in enumerate(sorted(image_folder.rglob("*.jpg"))):
        path = file.relative_to(image_folder).as_posix()
        split, label, _ = path.split("/")
        captions = [CAPTIONS[(number + i) % 3] for i in range(number % 3)]
        cell = json.dumps(captions).replace('"', '""')
        lines.append(f'{path},{label},{split},"{cell}"')
    file = image_folder / "rows.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def make(captioned, tiny_blip, tmp_path):
    """Configuration of an extraction; keywords override."""

    def build(cache="cache", **changes):
        values = {
            "dataset": {"kind": "table", "file": str(captioned), "root": str(captioned.parent)},
            "backbone": {"kind": "blip", "model": str(tiny_blip), "max_text_tokens": 12},
            "cache": str(tmp_path / cache),
            "device": "cpu",
            "precision": "fp32",
            "batch_size": 4,
            "num_readers": 2,
            "features": JOINT,
            **changes,
        }
        return ExtractConfig.model_validate(values)

    return build


def first_captions(cache):
    offsets, captions = cache.captions
    return [captions[start] if stop > start else None for start, stop in pairwise(offsets.tolist())]


@torch.no_grad()
def test_a_cache_holds_what_the_model_gives_for_each_image_and_its_first_caption(make, tiny_blip):
    from transformers import BertTokenizer, BlipForImageTextRetrieval, BlipImageProcessor

    config = make(mode="reference")
    assert run(config).num_captions == 14 // 3 * 3 + 1
    cache = open_cache(config.cache)
    model = BlipForImageTextRetrieval.from_pretrained(tiny_blip, local_files_only=True).eval()
    tokenizer = BertTokenizer.from_pretrained(tiny_blip, local_files_only=True)
    processor = BlipImageProcessor.from_pretrained(tiny_blip, local_files_only=True)
    states, mask, pooled, itm = (cache.array(name).read() for name in NAMES)
    assert (states.shape, mask.shape, mask.dtype) == ((14, 12, 32), (14, 12), bool)
    captions = first_captions(cache)
    assert 0 < sum(caption is None for caption in captions) < 14
    for row, caption in enumerate(captions):
        image = Image.open(config.dataset.root / cache.paths[row])
        values = processor(images=image, return_tensors="pt")["pixel_values"]
        if caption is None:
            assert np.isnan(states[row]).all()
            assert np.isnan(pooled[row]).all()
            assert np.isnan(itm[row]).all()
            assert not mask[row].any()
            caption = ""
        inputs = tokenizer(
            [picture_of(caption)],
            padding="max_length",
            truncation=True,
            max_length=12,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        feature = torch.from_numpy(cache.array("image/projected").read(np.asarray([row])))
        contrast = model(pixel_values=values, use_itm_head=False, **inputs)
        if captions[row] is not None:
            expected = model(pixel_values=values, use_itm_head=True, **inputs)
            close(states[row], expected.question_embeds[0])
            close(pooled[row], expected.question_embeds[0, 0])
            close(itm[row], expected.itm_score[0])
            assert mask[row].tolist() == inputs["attention_mask"][0].bool().tolist()
            first = int(cache.captions[0][row])
            text = torch.from_numpy(cache.array("text/projected").read(np.asarray([first])))
            cosine = normalize(feature, dim=-1) @ normalize(text, dim=-1).T
            close(cosine.numpy(), contrast.itm_score)
    assert cache.valid.all()
    assert cache.identity.features.text_policy == "picture_of"
    assert cache.attributes["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-3)


def close(found, expected):
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_plan_names_the_arrays_and_their_sizes(make, capsys):
    run(make(features={"multimodal": "states", "itm": True}))
    shown = capsys.readouterr().out
    assert "image/multimodal 14 x 12 x 32 float16" in " ".join(shown.split())
    assert "image/multimodal_mask 14 x 12 bool" in " ".join(shown.split())
    assert "image/itm 14 x 2 float16" in " ".join(shown.split())
    config = make(features={"multimodal": "states", "itm": True})
    info(InfoConfig(cache=config.cache))
    shown = capsys.readouterr().out
    assert "text         picture_of, max_text_tokens 12, enc_token False" in shown


def test_interrupted_and_resumed_equals_uninterrupted(make, monkeypatch):
    whole, part = make("whole"), make("part", shard_rows=4, num_readers=1)
    run(whole)
    encode, calls = Extraction._encode_batch, []

    def cut(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, *arguments, **options)

    monkeypatch.setattr(Extraction, "_encode_batch", cut)
    with pytest.raises(KeyboardInterrupt):
        run(part)
    monkeypatch.undo()
    assert run(part).num_extracted == 6
    one, other = open_cache(whole.cache), open_cache(part.cache)
    for name in (*NAMES, "image/projected", "text/projected"):
        assert np.array_equal(one.array(name).read(), other.array(name).read(), equal_nan=True)


def test_pooled_alone_and_views(make):
    both = make("both")
    run(both)
    pooled = make("pooled", features={"multimodal": "pooled", "projected": False, "text": False})
    run(pooled)
    cache = open_cache(pooled.cache)
    assert cache.feature_names() == ["image/multimodal_pooled"]
    expected = open_cache(both.cache).array("image/multimodal_pooled").read()
    found = cache.array("image/multimodal_pooled").read()
    assert np.allclose(found, expected, atol=5e-3, equal_nan=True)
    views = make("views", views={"num_views": 2})
    run(views)
    cache = open_cache(views.cache)
    assert cache.array("image/multimodal").shape == (14, 2, 12, 32)
    plain = cache.array("image/multimodal_pooled").read(view=0)
    np.testing.assert_allclose(plain, expected, atol=1e-5)
    other = cache.array("image/multimodal_pooled").read(view=1)
    assert np.nanmax(np.abs(other - plain)) > 1e-3


def test_an_unreadable_image_is_missing_everywhere(make, captioned):
    (captioned.parent / "train/cat/02.jpg").write_bytes(b"no image")
    config = make(max_invalid=0.5)
    assert run(config).num_invalid == 1
    cache = open_cache(config.cache)
    row = cache.paths.index("train/cat/02.jpg")
    assert not cache.valid[row]
    assert not cache.array("image/multimodal_mask").read()[row].any()
    assert np.isnan(cache.array("image/itm").read()[row]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": {**JOINT, "text_policy": "raw"}}, "features.text_policy differs: .*'pict"),
        ({"features": {**JOINT, "itm": False}}, "features.itm differs"),
    ],
)
def test_another_text_is_another_cache(make, changes, message):
    run(make())
    with pytest.raises(CacheMismatchError, match=message):
        run(make(**changes))


def test_options_of_the_backbone_are_named_when_they_differ(make, tiny_blip):
    run(make())
    backbone = {"kind": "blip", "model": str(tiny_blip), "max_text_tokens": 10}
    with pytest.raises(CacheMismatchError, match=r"backbone.options.max_text_tokens .* 12, .* 10"):
        run(make(backbone=backbone))


def test_joint_features_need_captions_and_a_joint_encoder(make, image_folder, tiny_clip):
    folder = {"kind": "folder", "root": str(image_folder)}
    with pytest.raises(ConfigError, match=r"multimodal states needs captions, and the folder"):
        run(make(dataset=folder))
    plain = make("plain", dataset=folder, features={})
    run(plain)
    assert open_cache(plain.cache).identity.features.text_policy == "raw"
    with pytest.raises(BackboneError, match="no joint encoder"):
        run(make("clip", backbone={"model": f"local-dir:{tiny_clip}"}))
    with pytest.raises(ValueError, match="keep nothing; set one of them"):
        make(features={"projected": False})


def test_policies_work_for_every_backbone(make, tiny_clip, tmp_path, monkeypatch):
    (tmp_path / "my_phrases.py").write_text(
        "def words(captions):\n    return [caption.split()[:2] for caption in captions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    clip = OpenClipConfig(model=f"local-dir:{tiny_clip}").open()
    policies = {
        "raw": CAPTIONS[1],
        "auto": CAPTIONS[1],
        "picture_of": "a picture of the dog",
        "contains:my_phrases:words": "The photo contains THE, DOG.",
    }
    for number, (policy, text) in enumerate(policies.items()):
        config = make(
            f"clip{number}",
            backbone={"model": f"local-dir:{tiny_clip}"},
            features={"text_policy": policy, "storage_dtype": "float32"},
        )
        run(config)
        cache = open_cache(config.cache)
        row = cache.captions[1].index(CAPTIONS[1])
        found = cache.array("text/projected").read()[row]
        np.testing.assert_allclose(found, clip.encode_text([text])[0], atol=1e-5)
        recorded = cache.identity.features.text_policy
        assert recorded.partition("#")[0] == ("raw" if policy == "auto" else policy)
    (tmp_path / "my_phrases.py").write_text("def words(captions):\n    return captions\n")
    with pytest.raises(CacheMismatchError, match=r"features.text_policy differs"):
        run(config)


def test_a_fast_precision_is_checked_on_the_joint_encoder_too(tiny_blip, make_photo):
    config = BlipConfig(model=str(tiny_blip), max_text_tokens=12)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    sample = Sample(pixels, [0, 1, 2], ["a cat", "", "the dog", ""], [0, 2])
    asked = make_request()
    opened, cosine, _ = open_checked(
        config, torch.device("cpu"), "bf16", asked, 0.5, lambda _: iter([sample])
    )
    assert opened.precision == "bf16"
    exact = config.open().encode_image(pixels, asked, sample.texts)
    fast = opened.encode_image(pixels, asked, sample.texts)
    cosines = [
        torch.cosine_similarity(exact[name][rows], fast[name][rows], dim=-1).min()
        for name, rows in (("projected", [0, 1, 2]), ("multimodal_pooled", [0, 2]))
    ]
    assert cosine == pytest.approx(float(min(cosines)), abs=1e-6)
    with pytest.raises(BackboneError, match="differs from fp32"):
        open_checked(config, torch.device("cpu"), "bf16", asked, 1.0, lambda _: iter([sample]))


def make_request():
    from featcache.backbones.base import FeatureRequest

    return FeatureRequest(multimodal="states", itm=True)


def test_heads_run_on_a_blip_cache(make, captioned, tmp_path, capsys):
    config = make(features={"multimodal": "pooled"})
    run(config)
    options = {"cache": str(config.cache), "device": "cpu", "val_split": "val", "quiet": True}

    def trained(name, **head):
        values = {**options, "head": head, "run": str(tmp_path / name)}
        return train(TrainConfig.model_validate(values))

    linear = trained("linear", kind="linear")
    trained("zero", kind="zero_shot", templates=["a photo of the {name}."])
    images = {"images": str(captioned.parent / "val"), "device": "cpu", "quiet": True}
    table = predict(
        PredictConfig.model_validate(
            {**images, "run": str(linear.run), "out": str(tmp_path / "out.csv")}
        )
    ).table
    assert len(table) == 4
    captioned_rows = open_cache(config.cache).caption_counts > 0
    joint = trained("joint", kind="linear", feature="multimodal")
    assert joint.metrics["num_train_rows"] == captioned_rows[:10].sum() < 10


def test_a_head_on_joint_features_predicts_cached_rows_and_new_images(make, captioned, tmp_path):
    config = make(features={"multimodal": "pooled"})
    run(config)
    values = {"cache": str(config.cache), "device": "cpu", "val_split": "val", "quiet": True}
    head = {"kind": "linear", "feature": "multimodal"}
    report = train(
        TrainConfig.model_validate({**values, "head": head, "run": str(tmp_path / "joint")})
    )
    asked = {"run": str(report.run), "device": "cpu", "quiet": True}
    cached = PredictConfig.model_validate(
        {**asked, "cache": str(config.cache), "out": str(tmp_path / "cached.csv")}
    )
    rows = predict(cached)
    assert (len(rows.table), len(rows.unreadable)) == (9, 5)
    other = make("raw", features={"multimodal": "pooled", "text_policy": "raw"})
    run(other)
    with pytest.raises(CacheMismatchError, match=r"features.text_policy differs: .* 'raw', the h"):
        predict(cached.model_copy(update={"cache": str(other.cache)}))
    files = PredictConfig.model_validate(
        {**asked, "images": str(captioned.parent), "out": str(tmp_path / "files.csv")}
    )
    with pytest.raises(ConfigError, match=r"reads captions .* give --captions"):
        predict(files)
    found = predict(files.model_copy(update={"captions": captioned}))
    assert [one.path for one in found.unreadable] == [one.path for one in rows.unreadable]
    one, other = (
        {row.path: (row.class_1, row.probability_1) for row in frame.itertuples()}
        for frame in (rows.table, found.table)
    )
    assert one.keys() == other.keys()
    for path, (name, probability) in one.items():
        assert other[path][0] == name
        assert other[path][1] == pytest.approx(probability, rel=2e-3)


@pytest.mark.parametrize("policy", ["auto", "my_capitals:loud"])
def test_new_images_and_captions_are_encoded_as_every_array_of_a_cache(
    make, captioned, tmp_path, monkeypatch, policy
):
    source = tmp_path / "my_capitals.py"
    source.write_text("def loud(captions):\n    return [text.upper() for text in captions]\n")
    monkeypatch.syspath_prepend(tmp_path)
    features = {"projected": True, "pooled": True, "tokens": "grid:2", "token_dtype": "int8"}
    config = make(features={**features, "multimodal": "states", "text_policy": policy})
    run(config)
    cache = open_cache(config.cache)
    names = ("image/projected", "image/tokens", "text/projected", *NAMES[:3], "image/pooled")

    class Everything(LinearConfig):
        def arrays(self):
            return names

    arrays = open_arrays(cache, Everything())
    expected = FeatureTables(arrays, np.arange(14), torch.device("cpu")).slice(0, 14)
    member = Member("", "x", "", cache.identity, cache.attributes["backbone"])
    loaded = SimpleNamespace(
        path=tmp_path, features=dict.fromkeys(names, 0), members=[member], record={}
    )
    offsets, texts = cache.captions
    captions = {
        path: texts[offsets[row] : offsets[row + 1]] for row, path in enumerate(cache.paths)
    }
    monkeypatch.setattr("heads.encoding.IMAGE_BATCH", 4)
    batches = [
        *encode_files(loaded, captioned.parent, cache.paths, torch.device("cpu"), 2, captions)
    ]
    assert [row for one in batches for row in one.rows] == list(range(14))
    found = [torch.cat(parts) for parts in zip(*(one.features for one in batches), strict=True)]
    for name, have, want in zip(names, found, expected, strict=True):
        assert have.dtype == want.dtype, name
        assert have.shape == want.shape, name
        if name == "image/multimodal_mask":
            assert torch.equal(have, want)
            continue
        if name == "image/multimodal":  # what stands behind a text's end means nothing
            mask = expected[names.index("image/multimodal_mask")]
            have, want = have[mask], want[mask]
        torch.testing.assert_close(have, want, rtol=5e-3, atol=5e-3, msg=name)
    without = (np.diff(offsets) == 0).nonzero()[0]
    assert len(without)
    assert not found[names.index("image/multimodal")][without].any()
    assert not found[names.index("text/projected")][without].any()
    if policy != "auto":
        source.write_text("def loud(captions):\n    return captions\n")
        with pytest.raises(CacheMismatchError, match=r"text_policy differs: .*put it back, or"):
            next(encode_files(loaded, captioned.parent, cache.paths, torch.device("cpu"), 2))


def test_readers_of_a_cache_know_the_joint_arrays(make, tmp_path):
    config = make()
    run(config)
    cache = open_cache(config.cache)
    assert set(verify(VerifyConfig(cache=config.cache)).arrays) >= set(NAMES)
    folder = cache.to_numpy(tmp_path / "numpy")
    table = pq.read_table(cache.to_parquet(tmp_path / "rows.parquet"))
    for name in NAMES:
        expected = cache.array(name).read()
        equal_nan = expected.dtype != bool
        exported = np.load(folder / f"{name.replace('/', '.')}.npy")
        assert np.array_equal(exported, expected, equal_nan=equal_nan)
        assert np.array_equal(cache.dask(name).compute(), expected, equal_nan=equal_nan)
        column = table.column(name.removeprefix("image/")).combine_chunks()
        flat = column.values.to_numpy(zero_copy_only=False)
        assert np.array_equal(flat.reshape(expected.shape), expected, equal_nan=equal_nan)


def test_a_changed_first_caption_renews_that_image_only(make, captioned):
    config = make()
    run(config)
    before = open_cache(config.cache).array("image/multimodal").read()
    rows = captioned.read_text().splitlines()
    changed = next(row for row in rows if '["' in row.replace('""', '"'))
    rows[rows.index(changed)] = changed.replace('[""', '[""g ')
    captioned.write_text("\n".join(rows) + "\n")
    assert run(config).num_extracted == 1
    grown = open_cache(config.cache)
    fresh = make("fresh")
    run(fresh)
    anew = open_cache(fresh.cache)
    for name in (*NAMES, "image/projected", "text/projected"):
        found, expected = grown.array(name).read(), anew.array(name).read()
        np.testing.assert_allclose(found, expected, atol=1e-5, equal_nan=True)
    row = grown.paths.index(changed.split(",")[0])
    different = (grown.array("image/multimodal").read() != before) & ~np.isnan(before)
    assert np.flatnonzero(different.any((1, 2))).tolist() == [row]


@torch.no_grad()
def test_cached_tokens_before_the_last_block_give_the_projected_feature(make):
    options = {"tokens": "before_last:1", "token_dtype": "int8", "storage_dtype": "float32"}
    config = make(features=options)
    run(config)
    cache = open_cache(config.cache)
    tokens = torch.from_numpy(cache.array("image/tokens").read())
    assert tokens.shape == (14, 17, 48)
    finished = config.backbone.open().finish_from(tokens, 1)
    expected = torch.from_numpy(cache.array("image/projected").read())
    assert torch.cosine_similarity(finished, expected).min() > 0.999


def test_zero_shot_reads_blip(image_folder, tiny_blip, tmp_path):
    file = image_folder / "train" / "cat" / "00.jpg"
    words = ["cat", "dog", "mat", "picture"]  # all in the toy's vocabulary, so none are alike
    names = tmp_path / "names.txt"
    names.write_text("\n".join(words))
    config = ZeroShotJobConfig.model_validate(
        {
            "images": file,
            "backbone": {"kind": "blip", "model": str(tiny_blip)},
            "templates": "plain",
            "classes": str(names),
            "precision": "fp32",
            "device": "cpu",
            "out": tmp_path / "out",
            "figure": False,
            "quiet": True,
        }
    )
    backbone = BlipConfig(model=str(tiny_blip)).open()
    pixels = load_pixels(file.read_bytes(), backbone.spec.pixels)
    image = normalize(backbone.encode_image(pixels, FeatureRequest())["projected"], dim=1)
    texts = normalize(backbone.encode_text([f"a photo of a {name}." for name in words]), dim=1)
    shares, index = (35 * image @ texts.T)[0].softmax(0).sort(descending=True)
    found = zero_shot(config).table
    assert list(found["class"]) == [words[number] for number in index]
    np.testing.assert_allclose(found["probability"], shares, rtol=1e-4)
