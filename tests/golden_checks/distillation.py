"""j, k, o, p: losses, distillation packs and gradients, schedule and EMA, on-policy sampling."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modeling.bagel import Bagel, text_logits
from modeling.generation import SamplingParams, generate
from modeling.sequence import PackedBatch, Segment, Text, pack
from modeling.tokenizer import SpecialTokens
from tests.golden_checks.core import (
    HIDDEN,
    JSD,
    JSD_GRADIENT,
    LOSS,
    Golden,
    Result,
    check,
    close,
    exact,
    gradient_results,
    relative,
    to_image,
)
from tests.golden_checks.decoder import MODEL, pack_results
from tests.tiny_model import FakeTokenizer
from train.losses import (
    IGNORE_INDEX,
    JSDConfig,
    chunked_jsd,
    generalized_jsd,
    policy_rows,
    teacher_topk,
    token_logprobs,
    token_mean_weights,
    trajectory_mean_weights,
)
from train.optim import OptimConfig, lr_at
from train.teacher import EMATeacher

# ---- j: losses ---------------------------------------------------------------------------------


@check("j_opsd_loss", "j_opsd_loss.safetensors", "j_opsd_loss.json")
def losses(golden: Golden) -> Iterator[Result]:
    stored, facts = golden.tensors("j_opsd_loss"), golden.json("j_opsd_loss")
    values: dict[str, list] = {}
    gradients: dict[str, list] = {"jsd": [], "tinker": []}
    for name, case in facts["cases"].items():
        kind = "tinker" if name.startswith("tinker") else "jsd"
        student = stored["student"].clone().requires_grad_()
        loss, found = (_tinker if kind == "tinker" else _jsd)(name, case, student, stored)
        for key, value in found.items():
            values.setdefault(f"{kind}.{key}", []).append((value, case[key]))
        (gradient,) = torch.autograd.grad(loss, student)
        gradients[kind].append((gradient.norm(), case["grad_norm"]))
        if f"grad.{name}" in stored:
            gradients[kind].append((gradient, stored[f"grad.{name}"]))
    rows = generalized_jsd(stored["student"], stored["teacher"], JSDConfig())
    masked = (rows * token_mean_weights(torch.full_like(stored["labels"], IGNORE_INDEX))).sum()
    values["jsd.all_masked"] = [(masked, facts["all_masked_jsd"])]
    for key, pairs in values.items():
        yield relative(f"j_opsd_loss.{key}", JSD, pairs)
    for kind, pairs in gradients.items():
        yield relative(f"j_opsd_loss.{kind}.gradients", JSD_GRADIENT, pairs)


def _jsd(
    name: str, case: dict[str, Any], student: Tensor, stored: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    config = JSDConfig(
        beta=case["beta"],
        top_k=case["top_k"] or 0,
        token_clip=case["token_clip"] or 0.0,
        temperature=case["temperature"],
        allow_signed_clip=True,  # the stored numbers have it
    )
    rows = generalized_jsd(student, stored["teacher"], config)
    labelled = token_mean_weights(stored["labels"])
    values = {
        "loss": rows.mean(),
        "loss_sum": rows.sum(),
        "per_token_none": rows,
        "loss_with_labels": (rows * labelled).sum(),
    }
    return rows.mean(), values


def _tinker(
    name: str, case: dict[str, Any], student: Tensor, stored: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    temperature, masked = re.fullmatch(r"tinker_T(.+)_lab(True|False)", name).groups()
    ids, tau = stored["sampled_ids"], float(temperature)
    rows = policy_rows(
        token_logprobs(student, ids, tau), token_logprobs(stored["teacher"], ids, tau)
    )
    labels = stored["labels"] if masked == "True" else ids
    loss = (rows * token_mean_weights(labels)).sum()
    return loss, {"loss": loss}


# ---- k: student and teacher packs, logits, loss and gradient -----------------------------------


@check("k_opsd_packs", "k_opsd_packs.safetensors", "k_opsd_packs.json", *MODEL)
def distillation_step(golden: Golden) -> Iterator[Result]:
    name = "k_opsd_packs"
    stored, facts = golden.tensors(name), golden.json(name)
    for variant in ("", "_flex", "_min"):
        batches = _batches(golden, stored, facts, minimal=variant == "_min")
        for side, batch in batches.items():
            label = f"{name}.{side}{variant}"
            yield from pack_results(label, golden, batch, stored, f"{side}{variant}.")
            if (lengths := facts[side + variant].get("split_lens")) is not None:
                splits = batch.samples[0]
                modes = facts[side + variant]["attn_modes"]
                count = len(splits)  # the flex packs end in a padding split that we do not need
                stored_splits = list(zip(lengths[:count], modes[:count], strict=True))
                ours = [(split.length, split.mode) for split in splits]
                yield exact(f"{label}.splits", [(ours == stored_splits, True)])
    model = golden.model()
    batches = _batches(golden, stored, facts, minimal=False)
    for side, batch in batches.items():
        with torch.no_grad():
            logits = model(batch, head=text_logits)
        yield close(f"{name}.{side}.logits", HIDDEN, [(logits, stored[f"{side}.logits"])])
        if f"{side}.ce" in stored:
            ce = -token_logprobs(logits, batch.labels)
            yield close(f"{name}.{side}.ce", LOSS, [(ce, stored[f"{side}.ce"])])
    loss = _jsd_step(model, batches)
    yield relative(f"{name}.jsd", JSD, [(loss, facts["jsd_beta0.5_top256_clip0.05"])])
    yield from gradient_results(name, model, facts["grad_norms"], {})


def _jsd_step(model: Bagel, batches: dict[str, PackedBatch]) -> Tensor:
    """The training path: hidden rows of both sides, chunked loss inside the forward, backward."""
    config = JSDConfig(beta=0.5, top_k=256, token_clip=0.05)
    with torch.no_grad():
        kept = model(batches["teacher"], head=lambda h, lm_head: teacher_topk(h, lm_head, config))
    student = batches["student"]
    weights = trajectory_mean_weights(student.loss_sample, 1)
    out = model(
        student,
        head=lambda h, lm_head: chunked_jsd(h, lm_head, kept, config, weights, chunk_rows=16),
    )
    out.loss.backward()
    return out.loss.detach()


def _batches(
    golden: Golden, stored: dict[str, Tensor], facts: dict[str, Any], minimal: bool
) -> dict[str, PackedBatch]:
    """Student and teacher packs from raw ids and pixels; `minimal` has no fixed texts at all."""
    raw, fixed = facts["raw"], facts["args"]
    patch = golden.config["vit"]["patch_size"]

    def text(ids: list[int]) -> list[Segment]:
        return [] if minimal else [Text(tuple(ids))]

    question = raw["question_ids"] + ([] if minimal else fixed["instruction_ids"])
    student = [
        *text(raw["_system_ids"]),
        to_image(stored["problem_image_tensor"], patch),
        Text(tuple(question)),
    ]
    thoughts = sorted(key for key in stored if re.fullmatch(r"vt\d+", key))
    teacher = [
        *student,
        *text(fixed["ref_intro_ids"]),
        *(to_image(stored[key], patch) for key in thoughts),
        *text(fixed["transition_ids"]),
    ]
    completion = Text(tuple(fixed["completion_ids"]), loss=True)
    return {
        "student": pack([[*student, completion]], golden.tokens),
        "teacher": pack([[*teacher, completion]], golden.tokens),
    }


# ---- o: schedule, loss weights, EMA ------------------------------------------------------------


@check("o_optim", "o_optim.json")
def schedule_and_ema(golden: Golden) -> Iterator[Result]:
    facts = golden.json("o_optim")
    base = facts["cosine_min_lr"]
    config = OptimConfig(
        lr=base["lr"],
        min_lr=base["min_lr"],
        warmup_steps=base["warmup"],
        total_steps=base["total"],
        warmup_from_zero=True,
    )
    constant = dataclasses.replace(config, schedule="constant")
    longer = dataclasses.replace(config, total_steps=2000)
    pairs = [
        *_schedule(config, base["lr_used_at_step"]),
        *_schedule(longer, facts["cosine_total2000"]),
        *_schedule(constant, facts["constant_warmup"]),
    ]
    yield relative("o_optim.schedule", 1e-6, [p for p in pairs if p[1]])
    yield exact("o_optim.schedule_zeros", [p for p in pairs if not p[1]])
    yield close("o_optim.ema", 1e-6, _ema(facts["ema"]))
    square = [(_block_weight(int(n)), w) for n, w in facts["len2weight"]["square"].items() if w]
    yield close("o_optim.loss_weights", 1e-7, square)
    adamw, ours = facts["adamw"], OptimConfig()
    defaults = [ours.beta1, ours.beta2, ours.eps, ours.weight_decay]
    stored = [*adamw["betas"], adamw["eps"], adamw["weight_decay"]]
    yield exact("o_optim.adamw", [(torch.tensor(defaults).double(), torch.tensor(stored).double())])


def _schedule(config: OptimConfig, rates: dict[str, float]) -> list[tuple[float, float]]:
    """Up to `total_steps`: beyond, the stored cosine climbs again and ours stays at its floor."""
    steps = {int(step): rate for step, rate in rates.items()}
    inside = config.schedule == "constant"
    return [
        (lr_at(step, config), rate)
        for step, rate in steps.items()
        if inside or step <= config.total_steps
    ]


def _block_weight(rows: int) -> float:
    block = Text((7,) * (rows - 1), loss=True)
    return float(pack([[block]], SpecialTokens(0, 1, 2, 3)).loss_weights[0])


def _ema(facts: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for decay, after_each in facts["after_each"].items():
        student, average = nn.Linear(1, 1), nn.Linear(1, 1)
        average.weight = nn.Parameter(torch.tensor([facts["start"]]))
        teacher = EMATeacher(average, decay=float(decay))
        for values, expected in zip(facts["params"], after_each, strict=True):
            student.weight = nn.Parameter(torch.tensor([values]))
            teacher.update(student)
            pairs.append((teacher.module.weight.detach().clone()[0], torch.tensor(expected)))
    return pairs


# ---- p: on-policy sampler ----------------------------------------------------------------------


@check("p_onpolicy_sampler", "p_onpolicy_sampler.safetensors", "p_onpolicy_sampler.json", *MODEL)
def sampler(golden: Golden) -> Iterator[Result]:
    """Greedy rounds. The stored budget counts the opening token, ours the visible tokens."""
    name = "p_onpolicy_sampler"
    facts, model = golden.json(name), golden.model()
    pixels = golden.tensors(name)["problem_image_tensor"]
    image = to_image(pixels, golden.config["vit"]["patch_size"])
    prefixes, surplus, starts = [], [], []
    for case in facts["cases"].values():
        special = dataclasses.replace(golden.tokens, eos=case["eos"])
        tokenizer = _appends_request(special, case["decode_always_appends_image_start"])
        question = facts["raw_question"] + (case["instruction_suffix"] or "")
        context = [
            Text(tuple(tokenizer.encode(facts["system_prompt"]))),
            image,
            Text(tuple(tokenizer.encode(question))),
        ]
        rounds = [row["tokens"][1:] for row in case["rounds"]]  # without the opening token
        again = len(rounds) > 1
        params = SamplingParams(case["budget"], temperature=0.0, max_image_skips=int(again))
        (rollout,) = generate(model, [context], tokenizer, params)
        first = rollout.rounds[0]
        prefixes.append((first.token_ids[: len(rounds[0])], rounds[0]))
        extra = 0 if first.ended_by == "eos" else 1  # the stored sampler drops its last sample
        surplus.append((len(first.token_ids) - len(rounds[0]), extra))
        for number, row in enumerate(case["rounds"]):
            written = [Text(r.token_ids) for r in rollout.rounds[:number]]
            layout = pack([[*context, *written]], special)
            starts += [(len(layout), row["start_kv"][0])]
            starts += [(layout.next_positions[0], row["start_pos"][0])]
    yield exact(f"{name}.tokens", prefixes)
    yield exact(f"{name}.length", surplus)
    yield exact(f"{name}.round_starts", starts)


def _appends_request(special: SpecialTokens, always: bool) -> FakeTokenizer:
    tokenizer = FakeTokenizer(special)
    if always:
        tokenizer.decode = lambda ids: "<image_start>"
    return tokenizer
