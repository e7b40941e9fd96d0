"""Processor: what a checkpoint folder stores and what released folders lack."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from data.example import DataError
from data.processor import Processor, transform_from_dict
from data.prompts import MINI, PAPER
from data.transforms import ImageTransform
from modeling.tokenizer import Tokenizer
from tests.data_helpers import SMALL, small_processor


@pytest.fixture(scope="module")
def tokenizer():
    backend = Backend(WordLevel({"left": 0, "right": 1, "?": 2}, unk_token="?"))
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?"))


def test_round_trip(tokenizer, tmp_path):
    Processor(tokenizer, SMALL, MINI).save_pretrained(tmp_path)
    loaded = Processor.from_pretrained(tmp_path)
    assert (loaded.transform, loaded.prompts) == (SMALL, MINI)
    assert loaded.tokenizer.encode("right") == [1]
    assert loaded.tokenizer.special == tokenizer.special


@pytest.mark.parametrize("foreign", [None, {"image_processor_type": "SiglipImageProcessor"}])
def test_released_folders_get_the_paper_settings(tokenizer, tmp_path, foreign):
    tokenizer.save(tmp_path)
    if foreign:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(foreign))
    loaded = Processor.from_pretrained(tmp_path)
    assert loaded.transform == ImageTransform(980, 378, 14, 2_007_040)
    assert loaded.prompts == PAPER


def test_wrong_files_are_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"prompt_set": "papr"}))
    with pytest.raises(ValueError, match="prompt_set 'papr' is not one of"):
        Processor.from_pretrained(tmp_path)
    file.write_text(json.dumps({"prompt_set": "mini", "stride": 14}))
    with pytest.raises(ValueError, match="expected exactly .*got .'stride'"):
        Processor.from_pretrained(tmp_path)


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
