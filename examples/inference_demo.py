r"""Ask a checkpoint about an image, or about a picture of the miniature world that is drawn for it.

    python -m examples.inference_demo --model_path models/ThinkMorph-7B --image problem.png \
        --question "Which way is the exit?"
    python -m examples.inference_demo --model_path models/mini-base --example Jigsaw_Assembly

Prints the question, what the model wrote, the answer in it, the right answer of a drawn picture,
and the time it took.
"""

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import torch

from data.answers import answers_match
from data.example import DECODE_ERRORS, decode_image
from data.miniworld.record import MiniRecord
from data.miniworld.world import TASKS
from data.miniworld.write import split_records
from eval.session import announce, pick_device, positive
from inferencer import Completion, InterleaveInferencer
from train.config import UsageError
from train.session import exit_on_user_error


def read_image(path: str) -> PIL.Image.Image:
    """An image file as RGB.

    Raises:
        UsageError: no such file, or not an image.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"--image {path}: no such file; --example draws a picture instead")
    try:
        return decode_image(file.read_bytes())
    except DECODE_ERRORS as error:
        raise UsageError(
            f"--image {path} is damaged or not an image; give a PNG or JPEG file"
        ) from error


def draw_example(task: str, seed: int) -> MiniRecord:
    """A test item of the miniature world; `task` "any" leaves the family to the seed."""
    rng = random.Random(seed)
    name = rng.choice(TASKS) if task == "any" else task
    return next(split_records(name, "test", 1, rng))


def demo(args: argparse.Namespace) -> None:
    """Open the checkpoint, ask, print."""
    positive(max_new_tokens=args.max_new_tokens)
    if args.temperature <= 0:
        raise UsageError(f"--temperature {args.temperature}: leave out --do_sample for greedy")
    if not Path(args.model_path).is_dir():
        raise UsageError(
            f"--model_path {args.model_path}: no such folder; INSTALL.md says how to download a "
            "checkpoint, models/mini-base comes with the code"
        )
    device = pick_device(args.device)
    item = None if args.example is None else draw_example(args.example, args.seed)
    if item is None:
        image, question = read_image(args.image), args.question
    else:
        image, question = item.problem_image, item.question
        if args.save_image:
            image.save(args.save_image)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inferencer = InterleaveInferencer.from_pretrained(args.model_path, device, dtype, args.weights)
    announce(args.model_path, args.weights, inferencer.model)
    start = time.perf_counter()
    completion = inferencer.answer(
        [image],
        question,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature if args.do_sample else 0.0,
        seed=args.seed,
    )
    seconds = time.perf_counter() - start
    print(f"question:   {question}")
    show(completion, item)
    tokens = len(completion.rollout.token_ids)
    print(f"time:       {seconds:.2f} s for {tokens} tokens, {tokens / seconds:.1f} tokens/s")
    if args.save_image:
        print(f"picture:    {args.save_image}")


def show(completion: Completion, item: MiniRecord | None) -> None:
    """Completion, extracted answer, and the right answer where it is known."""
    print(f"completion: {completion.text}")
    print(f"answer:     {completion.answer or 'none found between <answer> and </answer>'}")
    if item is not None:
        right = completion.answer is not None and answers_match(completion.answer, item.answer)
        print(f"gold:       {item.answer} ({'right' if right else 'wrong'}, {item.task})")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.inference_demo",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model_path",
        default="models/ThinkMorph-7B",
        help="checkpoint folder (default: %(default)s)",
    )
    add(
        "--weights",
        choices=("auto", "student", "ema"),
        default="auto",
        help="which ones of that folder; auto is the student of a run, and the EMA weights of a "
        "released checkpoint if it has them",
    )
    add("--image", metavar="FILE", help="picture to ask about")
    add("--question", metavar="TEXT", help="what to ask about it")
    add(
        "--example",
        nargs="?",
        const="any",
        choices=("any", *TASKS),
        metavar="TASK",
        help="draw an item of the miniature world instead of --image and --question: any (also "
        f"without a value), {', '.join(TASKS)}",
    )
    add("--save_image", metavar="FILE.png", help="where to save the picture of --example")
    add("--max_new_tokens", type=int, default=1024, help="budget (default: %(default)s)")
    add("--do_sample", action="store_true", help="sample; without it decoding is greedy")
    add("--temperature", type=float, default=0.3, help="with --do_sample (default: %(default)s)")
    add("--seed", type=int, default=0, help="of --do_sample and --example (default: %(default)s)")
    add("--device", default="auto", help="auto (cuda where there is a GPU), cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    given = args.image is not None or args.question is not None
    if args.example is not None and given:
        parser.error("--example brings its own image and question: leave out --image, --question")
    if args.example is None and (args.image is None or args.question is None):
        parser.error("give --image FILE and --question TEXT, or --example for a drawn picture")
    if args.save_image and args.example is None:
        parser.error("--save_image belongs to --example")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with exit_on_user_error():
        demo(args)


if __name__ == "__main__":
    main()
