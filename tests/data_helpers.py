"""What the data tests share: a byte tokenizer, small images, and a writer of parquet sources."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from data.processor import Processor
from data.prompts import PromptSet
from data.transforms import ImageTransform
from modeling.tokenizer import SpecialTokens

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PROMPTS = PromptSet("test", system="SYS", reference_intro="REF", transition="NOW")
SMALL = ImageTransform(max_image_size=56, min_image_size=28, image_stride=14)


class ByteTokenizer:
    """id = 16 + utf8 byte."""

    special = SpecialTokens(bos=1, eos=2, image_start=3, image_end=4)
    vocab_size = 272

    def encode(self, text: str) -> list[int]:
        return [16 + byte for byte in text.encode()]

    def decode(self, token_ids) -> str:
        return bytes(i - 16 for i in token_ids if i >= 16).decode()


def small_processor(prompts: PromptSet = PROMPTS) -> Processor:
    return Processor(ByteTokenizer(), SMALL, prompts)


def image(value: int, size: tuple[int, int] = (28, 28)) -> PIL.Image.Image:
    return PIL.Image.new("RGB", size, (value % 256, value // 256, 7))


def png(value: int, size: tuple[int, int] = (28, 28)) -> bytes:
    buffer = io.BytesIO()
    image(value, size).save(buffer, "PNG")
    return buffer.getvalue()


def noisy_png() -> bytes:
    """A picture that does not compress, so that half of its bytes are half of the picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def cell(data: bytes | None) -> dict:
    return {"bytes": data, "path": None}


def record(index: int, **changes) -> dict:
    """One row of the released schema with one visual thought."""
    row = {
        "pid": f"p{index}",
        "question": f"question {index}?",
        "answer": "AB"[index % 2],
        "problem_image_0": cell(png(index)),
        "resoning_thought_0": f"first {index}",
        "reasoning_image_0": cell(png(1000 + index)),
        "resoning_thought_1": f"second {index}",
        "task": "toy",
        "full_text_only_thought": f"because {index}",
    }
    return {key: value for key, value in (row | changes).items() if value is not ...}


def write_source(
    root: Path,
    name: str,
    rows: list[dict],
    files: int = 1,
    row_group_size: int = 4,
    split: str = "train",
) -> None:
    """Write rows as `files` shards of equal size (the last one may be shorter)."""
    folder = root / name / "data"
    folder.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(key for row in rows for key in row)
    schema = pa.schema([(key, IMAGE if "_image_" in key else pa.string()) for key in columns])
    per_file = -(-len(rows) // files)
    for index in range(files):
        part = rows[index * per_file : (index + 1) * per_file]
        path = folder / f"{split}-{index:05d}-of-{files:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema), path, row_group_size=row_group_size)
