"""Processor: what a checkpoint folder stores and what released folders lack."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from data.example import DataError
from data.processor import Processor, check_image_limits, transform_from_dict
from data.prompts import MINI, PAPER
from data.transforms import ImageTransform
from modeling.config import BagelConfig, LLMConfig, ViTConfig
from modeling.tokenizer import Tokenizer
from tests.data_helpers import SMALL, small_processor


@pytest.fixture(scope="module")
def tokenizer():
    backend = Backend(WordLevel({"left": 0, "right": 1, "?": 2}, unk_token="?"))
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?"))


@pytest.fixture
def folder(tokenizer, tmp_path):
    """What a released checkpoint says about its inputs."""
    tokenizer.save(tmp_path)
    BagelConfig(LLMConfig(8, 8, 8, 1, 1, 1), ViTConfig(8, 8, 2, 1)).save_pretrained(tmp_path)
    return tmp_path


def test_round_trip(tokenizer, folder):
    drawn = ImageTransform(64, 32, 16, 4096)
    Processor(tokenizer, SMALL, MINI, drawn).save_pretrained(folder)
    loaded = Processor.from_pretrained(folder)
    assert (loaded.transform, loaded.prompts) == (SMALL, MINI)
    assert loaded.vae_transform == drawn
    assert loaded.tokenizer.encode("right") == [1]
    assert loaded.tokenizer.special == tokenizer.special


@pytest.mark.parametrize("foreign", [None, {"image_processor_type": "SiglipImageProcessor"}])
def test_released_folders_get_the_paper_settings(folder, foreign):
    if foreign:
        (folder / "preprocessor_config.json").write_text(json.dumps(foreign))
    loaded = Processor.from_pretrained(folder)
    assert loaded.transform == ImageTransform(980, 378, 14, 2_007_040)
    assert loaded.vae_transform == ImageTransform(1024, 512, 16, 2_007_040)
    assert loaded.prompts == PAPER


def test_folders_from_before_pictures_were_drawn_get_the_released_limits(folder):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(SIZES | {"prompt_set": "mini"}))
    loaded = Processor.from_pretrained(folder)
    assert (loaded.transform, loaded.prompts) == (ImageTransform(56, 28, 14, 3136), MINI)
    assert loaded.vae_transform == ImageTransform(1024, 512, 16, 2_007_040)


def test_wrong_files_are_refused(folder):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({"prompt_set": "papr"}))
    with pytest.raises(ValueError, match="prompt_set 'papr' is not one of"):
        Processor.from_pretrained(folder)
    file.write_text(json.dumps({"prompt_set": "mini", "stride": 14}))
    with pytest.raises(ValueError, match="expected exactly .*got .'stride'"):
        Processor.from_pretrained(folder)
    wrong = SIZES | {"prompt_set": "mini", "vae_transform": {"image_stride": 16}}
    file.write_text(json.dumps(wrong))
    with pytest.raises(DataError, match="config.json: vae_transform: expected exactly .*got .'im"):
        Processor.from_pretrained(folder)
    file.write_text(json.dumps(wrong | {"vae_transform": SIZES | {"image_stride": 1.5}}))
    with pytest.raises(DataError, match="vae_transform: image_stride is 1.5; expected a whole num"):
        Processor.from_pretrained(folder)


def test_limits_have_to_fit_the_image_encoder(folder):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(SIZES | {"image_stride": 16, "prompt_set": "mini"}))
    with pytest.raises(DataError, match="image_stride 16 is not the patch_size 14 of .*vit_config"):
        Processor.from_pretrained(folder)
    file.write_text(json.dumps(SIZES | {"max_image_size": 1000, "prompt_set": "mini"}))
    named = "max_image_size 1000 makes sides of 71 patches, image_size 980 of .* for 70; .* to 980"
    with pytest.raises(DataError, match=named) as caught:
        Processor.from_pretrained(folder)
    assert str(caught.value).startswith(str(file))
    file.unlink()
    vit = json.loads((folder / "vit_config.json").read_text())
    (folder / "vit_config.json").write_text(json.dumps(vit | {"image_size": 384}))
    with pytest.raises(DataError, match=r"the paper's image limits\): max_image_size 980 .* 384"):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize("largest", range(48, 64))
def test_limits_fit_exactly_if_every_image_fits(folder, largest):
    """A limit between strides may be rounded up; the check knows what the resize does."""
    transform = ImageTransform(largest, 28, 14, 3136)
    sizes = [(w, h) for w in range(1, 80, 3) for h in range(1, 80, 3)]
    patches = max(max(transform.size(*size)) for size in sizes) // 14
    vit = json.loads((folder / "vit_config.json").read_text())
    for side in (patches - 1, patches):
        (folder / "vit_config.json").write_text(json.dumps(vit | {"image_size": 14 * side}))
        if side == patches:
            check_image_limits(transform, folder, "here")
        else:
            with pytest.raises(DataError, match=f"here: max_image_size {largest} makes sides of"):
                check_image_limits(transform, folder, "here")


SIZES = {"max_image_size": 56, "min_image_size": 28, "image_stride": 14, "max_pixels": 3136}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "here: expected exactly .* got None"),
        (SIZES | {"image_stride": "14"}, "here: image_stride is '14'; expected a whole number"),
        (SIZES | {"max_pixels": True}, "here: max_pixels is True"),
        (SIZES | {"image_stride": 0}, "here: image sizes need 0 < image_stride"),
        (SIZES | {3: 4}, "here: expected exactly"),
    ],
)
def test_wrong_limits_say_where(config, message):
    assert transform_from_dict(SIZES, "here") == ImageTransform(56, 28, 14, 3136)
    with pytest.raises(DataError, match=message):
        transform_from_dict(config, "here")


def test_unnamed_prompts_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="add them there"):
        small_processor().save_pretrained(tmp_path)


def test_mixture_limits_replace_those_of_the_checkpoint():
    processor = small_processor()
    assert processor.with_transform(None) is processor
    assert processor.with_transform(ImageTransform()).transform.max_image_size == 980
